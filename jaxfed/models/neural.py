"""Neural matrix factorisation (He et al. 2017, "Neural collaborative filtering"), and heads of clients' own."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxfed.core.model import Model
from jaxfed.core.recipe import named
from jaxfed.core.tables import unwrap
from jaxfed.core.types import Tree
from jaxfed.models.model import (
    LossName,
    TableDtype,
    check_positive,
    find_loss,
    from_module,
    normal_variable,
    score_one_by_one,
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


def score_catalogue(shared: Tree, private: Tree, user: jax.Array) -> jax.Array:
    """float [rows]: what `NeuralFactorization` gives one user for every row, with less work: the items' half of the
    first layer once for all users and the user's half once, and layers with the items along their last axis."""
    params, items, users = shared["params"], unwrap(shared)["tables"], private["private"]
    first, last = params["item_half"], params["output"]["kernel"][:, 0]
    hidden = [params[f"hidden_{i}"] for i in range(sum(name.startswith("hidden_") for name in params))]
    width = len(hidden[-1]["bias"] if hidden else first["bias"])
    of_product, of_network = jnp.split(last, [len(last) - width])

    def score_network(from_items, from_user, hidden, of_network):
        x = from_items + from_user[:, None]
        for layer in hidden:
            x = layer["kernel"].T @ nn.relu(x) + layer["bias"][:, None]
        return of_network @ nn.relu(x)

    from_items = (items["item_network"] @ first["kernel"] + first["bias"]).T
    from_user = users["user_network"][user] @ params["user_half"]["kernel"]
    product = items["item_product"] @ (users["user_product"][user] * of_product)
    return (
        product + score_one_by_one(score_network)(from_items, from_user, hidden, of_network) + params["output"]["bias"]
    )


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
    """PFedRec (Zhang et al. 2023): item vectors are shared, and each client has a linear score function of its own.

    In the paper, clients are scored by the table as they last trained it. With `work.keep_copy`, or
    `jaxfed.algorithms.keep_own_copy`, this is evaluated as `personal`, beside the server's table.

    Args:
        num_items: Number of items.
        num_users: Number of users of a client.
        dim: Numbers in the vector of a user and of an item.
        init_scale: Standard deviation of the normal numbers that vectors start with.
        table_dtype: In what the server stores tables and clients download them; clients compute and send in float32.
        loss: bce: cross-entropy, of clicks and negatives. bpr: the click of a pair ranks before the negative. squared:
            squared error, of clicks or of ratings.

    Returns:
        The model.

    Raises:
        ValueError: `dim` is below 1, or there is no such loss.

    Example:
        >>> import jax, jaxfed as jf
        >>> model = jf.models.pfedrec(num_items=100, dim=8)
        >>> sorted(jax.eval_shape(model.private, jax.random.key(0))["private"])  # of the score function
        ['bias', 'head']
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
    """FedRAP (Li et al. 2024): item vectors are the sum of a shared and a private table.

    For the item of an example, sparse * mean |shared| - apart * mean (private - shared)^2 is added to the loss. Stores
    one full item table per client (clients x items x dim numbers).

    Args:
        num_items: Number of items.
        num_users: Number of users of a client.
        dim: Numbers in the vector of a user and of an item.
        init_scale: Standard deviation of the normal numbers that vectors start with.
        apart: How strongly the two tables are driven apart.
        sparse: Penalty on the size of the shared table's numbers.
        loss: bce: cross-entropy, of clicks and negatives. bpr: the click of a pair ranks before the negative. squared:
            squared error, of clicks or of ratings.

    Returns:
        The model.

    Raises:
        ValueError: `dim` is below 1, or there is no such loss.

    Example:
        >>> import jax, jaxfed as jf
        >>> model = jf.models.fedrap(num_items=100, dim=8)
        >>> jax.eval_shape(model.private, jax.random.key(0))["private_tables"]["item"].rows.shape
        (100, 8)
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
    """NeuMF (He et al. 2017, "Neural collaborative filtering"): an inner product and a network side by side.

    The user's vectors are private, the network is shared.

    Args:
        num_items: Number of items.
        num_users: Number of users of a client.
        dim: Numbers in the vectors of a user and of an item, of the product and of the network each.
        hidden: Widths of the network's layers.
        init_scale: Standard deviation of the normal numbers that vectors start with.
        table_dtype: In what the server stores tables and clients download them; clients compute and send in float32.
        loss: bce: cross-entropy, of clicks and negatives. bpr: the click of a pair ranks before the negative. squared:
            squared error, of clicks or of ratings.

    Returns:
        The model.

    Raises:
        ValueError: a size is below 1, or there is no such loss.

    Example:
        >>> import jax, jaxfed as jf
        >>> model = jf.models.neumf(num_items=100)
        >>> sorted(jax.eval_shape(model.init, jax.random.key(0))["tables"])
        ['item_network', 'item_product']
    """
    check_positive("model.dim", dim)
    check_positive("model.hidden", *(hidden or (0,)))
    module = NeuralFactorization(num_items, num_users, dim, tuple(hidden), init_scale, table_dtype)
    return from_module(module, find_loss(loss))._replace(score=score_catalogue)
