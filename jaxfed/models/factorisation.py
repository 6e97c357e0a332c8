"""Matrix factorisation: a logit is the inner product of a private user vector and a shared item vector."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxfed.models.model import LossName, Model, dot, from_module, loss_named, positive, vectors


class Factorisation(nn.Module):
    """Koren et al. 2009, with user vectors that stay on the client (Ammad-ud-din et al. 2019, FCF)."""

    num_items: int
    num_users: int
    dim: int
    init_scale: float
    bias: bool

    @nn.compact
    def __call__(self, user: jax.Array, item: jax.Array | None = None) -> jax.Array:
        """Logits, see `from_module`."""

        def table(collection, name, rows):
            normal = nn.initializers.normal(self.init_scale)
            return self.variable(collection, name, lambda: normal(self.make_rng("params"), (rows, self.dim))).value

        users, items = table("private", "user", self.num_users), table("tables", "item", self.num_items)
        logit = dot(vectors(items, item), users[user])
        if self.bias:
            bias = self.variable("tables", "bias", jnp.zeros, self.num_items).value
            logit += vectors(bias, item)
        return logit


def mf(
    num_items: int, num_users: int, dim: int = 64, init_scale: float = 0.1, bias: bool = True, loss: LossName = "bce"
) -> Model:
    """Matrix factorisation with `dim` factors; `bias` adds one number an item."""
    positive("model.dim", dim)
    return from_module(Factorisation(num_items, num_users, dim, init_scale, bias), loss_named(loss))
