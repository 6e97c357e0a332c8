"""Matrix factorisation: a logit is the inner product of a private user vector and a shared item vector."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxfed.models.model import LossName, Model, TableDtype, dot, from_module, loss_named, positive, vectors


class Factorisation(nn.Module):
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

        def table(collection, name, rows, dtype="float32"):
            normal = nn.initializers.normal(self.init_scale)
            make = lambda: normal(self.make_rng("params"), (rows, self.dim)).astype(dtype)  # noqa: E731
            return self.variable(collection, name, make).value

        users = table("private", "user", self.num_users)
        items = table("tables", "item", self.num_items, self.table_dtype)
        logit = dot(vectors(items, item), users[user])
        if self.bias:
            bias = self.variable("tables", "bias", jnp.zeros, self.num_items, self.table_dtype).value
            logit += vectors(bias, item)
        return logit


def mf(
    num_items: int,
    num_users: int,
    dim: int = 64,
    init_scale: float = 0.1,
    bias: bool = True,
    table_dtype: TableDtype = "float32",
    loss: LossName = "bce",
) -> Model:
    """Matrix factorisation with `dim` factors; `bias` adds one number an item."""
    positive("model.dim", dim)
    return from_module(Factorisation(num_items, num_users, dim, init_scale, bias, table_dtype), loss_named(loss))
