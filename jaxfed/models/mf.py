"""Matrix factorisation: a logit is the inner product of a private user vector and a shared item vector."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxfed.core.model import Model
from jaxfed.core.recipe import named
from jaxfed.models.model import (
    LossName,
    TableDtype,
    check_positive,
    find_loss,
    from_module,
    normal_variable,
    score_rows,
    take_vectors,
)


class MatrixFactorization(nn.Module):
    """Koren et al. 2009, with user vectors that stay on the client (Ammad-ud-din et al. 2019, FCF)."""

    num_items: int
    num_users: int
    dim: int
    init_scale: float
    bias: bool
    table_dtype: TableDtype

    @nn.compact
    def __call__(self, user: jax.Array, item: jax.Array | None = None) -> jax.Array:
        """Logits, see `from_module`."""

        users = normal_variable(self, "private", "user", (self.num_users, self.dim), self.init_scale)
        items = normal_variable(self, "tables", "item", (self.num_items, self.dim), self.init_scale, self.table_dtype)
        logit = score_rows(take_vectors(items, item), users[user])
        if self.bias:
            bias = self.variable("tables", "bias", jnp.zeros, self.num_items, self.table_dtype).value
            logit += take_vectors(bias, item)
        return logit


@named("model")
def mf(
    num_items: int,
    num_users: int = 1,
    dim: int = 64,
    init_scale: float = 0.1,
    bias: bool = True,
    table_dtype: TableDtype = "float32",
    loss: LossName = "bce",
) -> Model:
    """Matrix factorisation (Koren et al. 2009): a logit is the inner product of a user's and an item's vector.

    The user's vector is private and stays on the client (FCF, Ammad-ud-din et al. 2019).

    Args:
        num_items: Number of items.
        num_users: Number of users of a client.
        dim: Numbers in the vector of a user and of an item.
        init_scale: Standard deviation of the normal numbers that vectors start with.
        bias: Whether each item has a number of its own, which is added to its scores.
        table_dtype: In what the server stores tables and clients download them; clients compute and send in float32.
        loss: bce: cross-entropy, of clicks and negatives. bpr: the click of a pair ranks before the negative. squared:
            squared error, of clicks or of ratings.

    Returns:
        The model.

    Raises:
        ValueError: `dim` is below 1, or there is no such loss.

    Example:
        >>> import jax, jaxfed as jf
        >>> model = jf.models.mf(num_items=100, dim=8)
        >>> jax.eval_shape(model.init, jax.random.key(0))["tables"]["item"].rows.shape
        (100, 8)
    """
    check_positive("model.dim", dim)
    return from_module(MatrixFactorization(num_items, num_users, dim, init_scale, bias, table_dtype), find_loss(loss))
