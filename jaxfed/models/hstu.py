"""HSTU: blocks of pointwise attention without a softmax."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxfed.core.model import Model, TimesRead
from jaxfed.core.recipe import named
from jaxfed.models.dropout import drop_out
from jaxfed.models.model import TableDtype
from jaxfed.models.sasrec import ComputeDtype
from jaxfed.models.sequence import from_encoder
from jaxfed.models.sequence_losses import SequenceLossName
from jaxfed.models.transformer import check_heads, split_key

CLASSES = 128  # of the time between two items, as in the authors' code


def classify_times(later: jax.Array, earlier: jax.Array) -> jax.Array:
    """int [T, S]: the classes of the seconds s from each of `earlier` [S] to each of `later` [T]: ln(max(1, s)) / .301,
    rounded down."""
    gap = jnp.maximum(later[:, None] - earlier, 1).astype(jnp.float32)
    return jnp.minimum((jnp.log(gap) / 0.301).astype(jnp.int32), CLASSES - 1)


class PointwiseBlock(nn.Module):
    """[u, v, q, k] = SiLU(W LN x); a = (SiLU(q k' + bias) / length, causal) v; x += W drop(u * LN a).

    The bias is a number for each distance, and, where times are read, one for each class of the time between two items.
    Both normalisations are without scale and shift. The divisor is the length that the model reads, whatever a history
    is padded to.
    """

    heads: int
    length: int
    rate: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, live: jax.Array, key: jax.Array | None, gap_class: jax.Array | None = None
    ) -> jax.Array:
        """x [T, d], live bool [T], gap_class int [T, T]: see `classify_times`. Returns [T, d]."""
        (places, dim), shape = x.shape, (4, self.heads, x.shape[-1] // self.heads)
        normalize = nn.LayerNorm(use_bias=False, use_scale=False, dtype=self.dtype)
        inner = nn.silu(nn.DenseGeneral(shape, use_bias=False, dtype=self.dtype, name="inner")(normalize(x)))
        gate, value, query, keys = jnp.moveaxis(inner, 1, 0)
        distance = jnp.arange(places)[:, None] - jnp.arange(places)
        bias = self.param("distance", nn.initializers.normal(0.02), (self.length,))
        bias = bias[jnp.maximum(distance, 0)]
        if gap_class is not None:
            bias += self.param("time", nn.initializers.normal(0.02), (CLASSES,))[gap_class]
        weights = nn.silu(jnp.einsum("thd,shd->tsh", query, keys) + bias[..., None])
        seen = (distance >= 0) & live
        weights = jnp.where(seen[..., None], weights, 0) / self.length
        mixed = normalize(jnp.einsum("tsh,shd->thd", weights, value).reshape(places, dim))
        mixed = drop_out(gate.reshape(places, dim) * mixed, self.rate, key)
        return x + nn.Dense(dim, dtype=self.dtype, name="output")(mixed)


class PointwiseEncoder(nn.Module):
    """sqrt(d) times the item vectors through some blocks; order comes from the bias of distances.

    request: whether times are measured to the item to be predicted, in place of the latest one read.
    """

    length: int
    blocks: int
    heads: int
    rate: float
    compute_dtype: ComputeDtype = "float32"
    remat: bool = False
    request: bool = False

    @nn.compact
    def __call__(self, vectors, live, key=None, masked=None, times=None) -> jax.Array:
        """See `SequenceEncoder`."""
        gap_class = None if times is None else classify_times(times[1:] if self.request else times[:-1], times[:-1])
        keys, dtype = split_key(key, self.blocks + 1), jnp.dtype(self.compute_dtype)
        x = drop_out(vectors.shape[-1] ** 0.5 * vectors, self.rate, keys[0]).astype(dtype)
        make_block: Any = nn.remat(PointwiseBlock) if self.remat else PointwiseBlock
        for number in range(self.blocks):
            block = make_block(self.heads, self.length, self.rate, dtype, name=f"block_{number}")
            x = block(x, live, keys[number + 1], gap_class)
        return nn.LayerNorm(name="norm")(x).astype(jnp.float32)


@named("model")
def hstu(
    num_items: int,
    num_users: int = 1,
    dim: int = 64,
    length: int = 50,
    blocks: int = 2,
    heads: int = 1,
    dropout: float = 0.2,
    loss: SequenceLossName = "sampled_softmax",
    temperature: float = 0.05,
    time_bias: TimesRead = "none",
    init_scale: float = 0.02,
    compute_dtype: ComputeDtype = "float32",
    remat: bool = False,
    table_dtype: TableDtype = "float32",
) -> Model:
    """HSTU (Zhai et al. 2024, "Actions speak louder than words").

    The authors' code also has a bias of times that ends at the time of the item to be predicted. In a test on recorded
    data that is the time of the held-out item, which tells something of it: `time_bias = "request"`, marked LEAKY.

    Args:
        num_items: Number of items.
        num_users: Not used: nothing is kept for a user but the history.
        dim: Numbers in the vector of an item, and the width of the blocks.
        length: Items of a history that are read, the latest.
        blocks: Number of blocks.
        heads: Heads of attention; they divide `dim`.
        dropout: Share of numbers that are dropped in training.
        loss: softmax: cross-entropy among all items, for which a client has all their vectors. sampled_softmax: an
            estimate of it from `work.negatives` items. bce, gbce (calibration 0.75), bpr: see
            docs/methods/sequences.md.
        temperature: Above 0: logits are cosines, divided by this number. 0: inner products.
        time_bias: A bias of attention by the time since each item of the history. none: there is none. known: until the
            latest item read. request: until the item to be predicted, which leaks: results are marked LEAKY.
        init_scale: Standard deviation of the normal numbers that item vectors start with.
        compute_dtype: What blocks compute in. Parameters, messages and loss are float32.
        remat: Compute activations again in the backward pass, in place of keeping them.
        table_dtype: In what the server stores item vectors and clients download them.

    Returns:
        The model.

    Raises:
        ValueError: a size is below 1, heads do not divide `dim`, or there is no such time_bias.

    Example:
        >>> import jaxfed as jf
        >>> model = jf.models.hstu(num_items=100, dim=8, length=20)
        >>> jax.tree.map(jnp.shape, model.init(jax.random.key(0))["params"]["encoder"]["block_0"]["distance"])
        (20,)
    """
    check_heads(dim, heads, dropout, length=length, blocks=blocks)
    encoder = PointwiseEncoder(length, blocks, heads, dropout, compute_dtype, remat, time_bias == "request")
    options: dict[str, Any] = {"temperature": temperature, "init_scale": init_scale, "table_dtype": table_dtype}
    options["times"] = time_bias
    return from_encoder(encoder, num_items, dim, length, loss, **options)
