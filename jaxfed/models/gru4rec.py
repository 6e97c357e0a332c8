"""GRU4Rec: a recurrent network over the latest items of a history, a baseline without attention."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxfed.core.model import Model
from jaxfed.core.recipe import named
from jaxfed.models.dropout import drop_out
from jaxfed.models.model import TableDtype, check_positive
from jaxfed.models.sequence import from_encoder
from jaxfed.models.sequence_losses import SequenceLossName, find_sequence_loss
from jaxfed.models.transformer import check_dropout_rate, split_key


class RecurrentEncoder(nn.Module):
    """Layers of gated recurrent units, and a last layer to the width of item vectors."""

    hidden: int
    layers: int
    rate: float

    @nn.compact
    def __call__(self, vectors, live, key=None, masked=None) -> jax.Array:
        """See `SequenceEncoder`."""
        keys = split_key(key, self.layers + 1)
        x = drop_out(vectors, self.rate, keys[0])
        for number in range(self.layers):
            # orthogonal numbers, Flax's default, take a QR factorisation, which not every platform has
            cell = nn.GRUCell(self.hidden, recurrent_kernel_init=nn.initializers.lecun_normal())
            x = jnp.asarray(nn.RNN(cell, name=f"layer_{number}")(x))
            x = drop_out(x, self.rate, keys[number + 1])
        return nn.Dense(vectors.shape[-1], name="output")(x)


@named("model")
def gru4rec(
    num_items: int,
    num_users: int = 1,
    dim: int = 64,
    length: int = 50,
    hidden: int = 128,
    layers: int = 1,
    dropout: float = 0.2,
    loss: SequenceLossName = "sampled_softmax",
    calibration: float = 0.75,
    temperature: float = 0.0,
    init_scale: float = 0.1,
    table_dtype: TableDtype = "float32",
) -> Model:
    """GRU4Rec (Hidasi et al. 2016, "Session-based recommendations with recurrent neural networks"), with item vectors
    that are tied: the same are read and predicted.

    Args:
        num_items: Number of items.
        num_users: Not used: nothing is kept for a user but the history.
        dim: Numbers in the vector of an item.
        length: Items of a history that are read, the latest.
        hidden: Width of the recurrent layers.
        layers: Number of recurrent layers.
        dropout: Share of numbers that are dropped in training.
        loss: softmax: cross-entropy among all items, for which a client has all their vectors. sampled_softmax: an
            estimate of it from `work.negatives` items. bce, gbce, bpr: see docs/methods/sequences.md.
        calibration: t of gbce: 0 is bce, 1 gives calibrated probabilities.
        temperature: Above 0: logits are cosines, divided by this number. 0: inner products.
        init_scale: Standard deviation of the normal numbers that item vectors start with.
        table_dtype: In what the server stores item vectors and clients download them.

    Returns:
        The model.

    Raises:
        ValueError: a size is below 1.

    Example:
        >>> import jaxfed as jf
        >>> model = jf.models.gru4rec(num_items=100, dim=8, hidden=16)
        >>> jax.tree.map(jnp.shape, model.init(jax.random.key(0))["params"]["encoder"]["output"]["kernel"])
        (16, 8)
    """
    check_positive("model.hidden", hidden)
    check_positive("model.layers", layers)
    check_dropout_rate(dropout)
    options: dict[str, Any] = {"temperature": temperature, "init_scale": init_scale, "table_dtype": table_dtype}
    encoder, chosen = RecurrentEncoder(hidden, layers, dropout), find_sequence_loss(loss, calibration)
    return from_encoder(encoder, num_items, dim, length, chosen, **options)
