"""Neural matrix factorisation (He et al. 2017, "Neural collaborative filtering"), and heads of clients' own."""

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


class NeuralFactorization(nn.Module):
    """A generalised inner product beside a small network; user vectors are private, the network is shared."""

    num_items: int
    num_users: int
    dim: int
    hidden: tuple[int, ...]
    init_scale: float
    table_dtype: TableDtype

    @nn.compact
    def __call__(self, user: jax.Array, item: jax.Array | None = None) -> jax.Array:
        """Logits, see `from_module`."""

        def both(part):
            users = normal_variable(self, "private", f"user_{part}", (self.num_users, self.dim), self.init_scale)
            shape = self.num_items, self.dim
            items = take_vectors(
                normal_variable(self, "tables", f"item_{part}", shape, self.init_scale, self.table_dtype), item
            )
            return jnp.broadcast_to(users[user], items.shape), items

        (user_product, item_product), (user_network, item_network) = both("product"), both("network")
        # the first layer on [user, item] in two halves: a user's half is computed once, not once an item
        width, *deeper = self.hidden
        x = nn.Dense(width, name="item_half")(item_network) + nn.Dense(width, False, name="user_half")(user_network)
        for i, size in enumerate(deeper):
            x = nn.Dense(size, name=f"hidden_{i}")(nn.relu(x))
        joined = jnp.concatenate([user_product * item_product, nn.relu(x)], -1)
        return nn.Dense(1, name="output")(joined)[..., 0]


class PersonalHead(nn.Module):
    """A shared item table under a score function that each client has for itself; the user is that function."""

    num_items: int
    num_users: int
    dim: int
    init_scale: float
    table_dtype: TableDtype

    @nn.compact
    def __call__(self, user: jax.Array, item: jax.Array | None = None) -> jax.Array:
        """Logits, see `from_module`."""
        shape = self.num_items, self.dim
        items = take_vectors(normal_variable(self, "tables", "item", shape, self.init_scale, self.table_dtype), item)
        head = normal_variable(self, "private", "head", (self.num_users, self.dim), self.dim**-0.5)
        bias = self.variable("private", "bias", jnp.zeros, self.num_users).value
        return score_rows(items, head[user]) + bias[user]


@named("model")
def pfedrec(
    num_items: int,
    num_users: int = 1,
    dim: int = 32,
    init_scale: float = 0.1,
    table_dtype: TableDtype = "float32",
    loss: LossName = "bce",
) -> Model:
    """PFedRec (Zhang et al. 2023): item vectors are shared, the linear score function is a client's own. With
    `work.keep_copy` the paper's mode, in which clients are scored by the table as they last trained it, is beside the
    server's as `personal`.

    Args:
        dim: Numbers in the vector of a user and of an item.
        init_scale: Standard deviation of the normal numbers that vectors start with.
        table_dtype: In what the server stores tables and clients download them; clients compute and send in float32.
        loss: bce: cross-entropy, of clicks and negatives. bpr: the click of a pair ranks before the negative. squared:
            squared error, of clicks or of ratings.
    """
    check_positive("model.dim", dim)
    return from_module(PersonalHead(num_items, num_users, dim, init_scale, table_dtype), find_loss(loss))


class AdditiveItems(nn.Module):
    """Items are the sum of a shared and a private vector, under a score function of each client's own."""

    num_items: int
    num_users: int
    dim: int
    init_scale: float

    @nn.compact
    def __call__(self, user: jax.Array, item: jax.Array | None = None) -> jax.Array:
        """Logits, see `from_module`."""
        shape = self.num_items, self.dim
        both = normal_variable(self, "tables", "item", shape, self.init_scale)
        both += normal_variable(self, "private_tables", "item", shape, self.init_scale)
        head = normal_variable(self, "private", "head", (self.num_users, self.dim), self.dim**-0.5)
        bias = self.variable("private", "bias", jnp.zeros, self.num_users).value
        return score_rows(take_vectors(both, item), head[user]) + bias[user]


@named("model")
def fedrap(
    num_items: int,
    num_users: int = 1,
    dim: int = 32,
    init_scale: float = 0.1,
    apart: float = 0.0,
    sparse: float = 0.0,
    loss: LossName = "bce",
) -> Model:
    """FedRAP (Li et al. 2024): a shared and a private item table, added. The loss of an example has
    - apart * mean (private - shared)^2 + sparse * mean |shared| of its item beside it. Stores one full item
    table per client (clients x items x dim numbers).

    Args:
        dim: Numbers in the vector of a user and of an item.
        init_scale: Standard deviation of the normal numbers that vectors start with.
        apart: How strongly the two tables are driven apart.
        sparse: The penalty on the size of the shared table's numbers.
        loss: bce: cross-entropy, of clicks and negatives. bpr: the click of a pair ranks before the negative. squared:
            squared error, of clicks or of ratings.
    """
    check_positive("model.dim", dim)

    def penalty(shared, private):
        common, own = shared["tables"]["item"], private["private_tables"]["item"]
        return sparse * jnp.abs(common).mean(-1) - apart * jnp.square(own - common).mean(-1)

    module = AdditiveItems(num_items, num_users, dim, init_scale)
    return from_module(module, find_loss(loss), penalty if apart or sparse else None)


@named("model")
def neumf(
    num_items: int,
    num_users: int = 1,
    dim: int = 16,
    hidden: tuple[int, ...] = (32, 16),
    init_scale: float = 0.1,
    table_dtype: TableDtype = "float32",
    loss: LossName = "bce",
) -> Model:
    """NeuMF: an inner product and a network side by side.

    Args:
        dim: Numbers in the vectors of a user and of an item, of the product and of the network each.
        hidden: Widths of the network's layers.
        init_scale: Standard deviation of the normal numbers that vectors start with.
        table_dtype: In what the server stores tables and clients download them; clients compute and send in float32.
        loss: bce: cross-entropy, of clicks and negatives. bpr: the click of a pair ranks before the negative. squared:
            squared error, of clicks or of ratings.
    """
    check_positive("model.dim", dim)
    check_positive("model.hidden", *(hidden or (0,)))
    module = NeuralFactorization(num_items, num_users, dim, tuple(hidden), init_scale, table_dtype)
    return from_module(module, find_loss(loss))
