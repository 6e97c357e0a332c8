"""SASRec and BERT4Rec: transformers over the latest items of a history."""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxfed.core.model import Model
from jaxfed.core.recipe import named
from jaxfed.models.dropout import drop_out
from jaxfed.models.model import TableDtype, check_positive
from jaxfed.models.sequence import from_encoder
from jaxfed.models.sequence_losses import SequenceLossName, find_sequence_loss
from jaxfed.models.transformer import BlockName, TransformerBlock, check_heads, places_from_end, split_key

ComputeDtype = Literal["float32", "bfloat16"]


class TransformerEncoder(nn.Module):
    """sqrt(d) times the item vectors, plus positions from the end, through some blocks and a last LayerNorm."""

    length: int
    blocks: int
    heads: int
    hidden: int
    rate: float
    kind: BlockName
    causal: bool = True
    activation: Literal["relu", "gelu"] = "relu"
    compute_dtype: ComputeDtype = "float32"
    remat: bool = False
    head_width: int = 0

    @nn.compact
    def __call__(self, vectors, live, key=None, masked=None) -> jax.Array:
        """See `SequenceEncoder`."""
        dim, dtype = vectors.shape[-1], jnp.dtype(self.compute_dtype)
        if not self.causal:
            mask = self.param("mask", nn.initializers.normal(0.02), (dim,))
            hidden = jnp.zeros_like(live) if masked is None else masked
            vectors, live = jnp.where(hidden[:, None], mask, vectors), live | hidden
        table = self.param("position", nn.initializers.normal(0.02), (self.length, dim))
        keys = split_key(key, self.blocks + 1)
        x = dim**0.5 * vectors + table[places_from_end(live)]
        x = drop_out(x, self.rate, keys[0]).astype(dtype)
        make_block: Any = nn.remat(TransformerBlock) if self.remat else TransformerBlock
        for number in range(self.blocks):
            sizes = self.heads, self.hidden, self.rate, self.causal, self.activation, dtype, self.head_width
            x = make_block(self.kind, *sizes, name=f"block_{number}")(x, live, keys[number + 1])
        return nn.LayerNorm(name="norm")(x).astype(jnp.float32)


@named("model")
def sasrec(
    num_items: int,
    num_users: int = 1,
    dim: int = 64,
    length: int = 50,
    blocks: int = 2,
    heads: int = 1,
    expansion: int = 1,
    dropout: float = 0.2,
    block: BlockName = "pre_norm",
    loss: SequenceLossName = "sampled_softmax",
    calibration: float = 0.75,
    temperature: float = 0.0,
    init_scale: float = 0.02,
    compute_dtype: ComputeDtype = "float32",
    remat: bool = False,
    table_dtype: TableDtype = "float32",
    head_width: int = 0,
    hidden_width: int = 0,
) -> Model:
    """SASRec (Kang and McAuley 2018): a causal transformer predicts the next item after each place of a history.

    Args:
        num_items: Number of items.
        num_users: Not used: nothing is kept for a user but the history.
        dim: Numbers in the vector of an item, and the width of the blocks.
        length: Items of a history that are read, the latest.
        blocks: Number of blocks.
        heads: Heads of attention; they divide `dim`.
        expansion: Width of the feed-forward layers, divided by `dim`.
        dropout: Share of numbers that are dropped in training.
        block: pre_norm: as in the paper. authors_code: only queries are normalised. ligr: gated, SwiGLU (eSASRec).
        loss: softmax: cross-entropy among all items. sampled_softmax: an estimate of it from `work.negatives` items.
            bce, gbce, bpr: see docs/methods/sequences.md.
        calibration: t of gbce: 0 is bce, 1 gives calibrated probabilities.
        temperature: Above 0: logits are cosines, divided by this number. 0: inner products.
        init_scale: Standard deviation of the normal numbers that item vectors start with.
        compute_dtype: What blocks compute in. Parameters, messages, softmax and loss are float32.
        remat: Compute activations again in the backward pass, in place of keeping them.
        table_dtype: In what the server stores item vectors and clients download them.
        head_width: Numbers of a head. 0: dim / heads.
        hidden_width: Width of the feed-forward layers. 0: expansion * dim.

    Returns:
        The model.

    Raises:
        ValueError: a size is below 1, or heads do not divide `dim`.

    Example:
        >>> model = sasrec(num_items=100, dim=8, length=20)
        >>> jax.eval_shape(model.init, jax.random.key(0))["tables"]["item"].rows.shape
        (100, 8)
    """
    check_positive("model.hidden_width", width := hidden_width or expansion * dim)
    check_heads(dim, heads, dropout, head_width, length=length, blocks=blocks, expansion=expansion)
    sizes = length, blocks, heads, width, dropout, block
    encoder = TransformerEncoder(*sizes, compute_dtype=compute_dtype, remat=remat, head_width=head_width)
    options: dict[str, Any] = {"temperature": temperature, "init_scale": init_scale, "table_dtype": table_dtype}
    return from_encoder(encoder, num_items, dim, length, find_sequence_loss(loss, calibration), **options)


@named("model")
def bert4rec(
    num_items: int,
    num_users: int = 1,
    dim: int = 64,
    length: int = 50,
    blocks: int = 2,
    heads: int = 2,
    expansion: int = 4,
    dropout: float = 0.1,
    mask_share: float = 0.2,
    loss: SequenceLossName = "softmax",
    init_scale: float = 0.02,
    compute_dtype: ComputeDtype = "float32",
    remat: bool = False,
    table_dtype: TableDtype = "float32",
) -> Model:
    """BERT4Rec (Sun et al. 2019): a bidirectional transformer predicts items that are masked at random.

    In validation and test a masked place is appended to the history. It needs more steps than SASRec, since a step has
    only the masked items as targets (Petrov and Macdonald 2022, "A systematic review and replicability study of
    BERT4Rec").

    Args:
        num_items: Number of items.
        num_users: Not used: nothing is kept for a user but the history.
        dim: Numbers in the vector of an item, and the width of the blocks.
        length: Items of a history that are read, the latest.
        blocks: Number of blocks.
        heads: Heads of attention; they divide `dim`.
        expansion: Width of the feed-forward layers, divided by `dim`.
        dropout: Share of numbers that are dropped in training.
        mask_share: Share of the items of a history that are masked in a step.
        loss: softmax: cross-entropy among all items, for which a client has all their vectors. sampled_softmax: an
            estimate of it from `work.negatives` items. bce, gbce (calibration 0.75), bpr: see
            docs/methods/sequences.md.
        init_scale: Standard deviation of the normal numbers that item vectors start with.
        compute_dtype: What blocks compute in. Parameters, messages, softmax and loss are float32.
        remat: Compute activations again in the backward pass, in place of keeping them.
        table_dtype: In what the server stores item vectors and clients download them.

    Returns:
        The model.

    Raises:
        ValueError: a size is below 1, heads do not divide `dim`, or nothing would be masked.

    Example:
        >>> import jaxfed as jf
        >>> jf.models.bert4rec(num_items=100, dim=8, length=20).sequence.whole_catalogue
        True
    """
    check_heads(dim, heads, dropout, length=length, blocks=blocks, expansion=expansion)
    sizes = length + 1, blocks, heads, expansion * dim, dropout
    encoder = TransformerEncoder(
        *sizes, "pre_norm", causal=False, activation="gelu", compute_dtype=compute_dtype, remat=remat
    )
    options: dict[str, Any] = {"mask_share": mask_share, "init_scale": init_scale}
    options |= {"table_dtype": table_dtype}
    return from_encoder(encoder, num_items, dim, length, loss, "masked", **options)
