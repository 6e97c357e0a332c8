"""Models of features: what is known of users and items beside their ids."""

from typing import Literal

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

Sides = Literal["all", "user", "item", "none"]


def sum_feature_rows(table: jax.Array, numbers: jax.Array) -> jax.Array:
    """Sums of rows of a small table [V, d] by sets of numbers [..., F]; past the end adds nothing."""
    return table.at[numbers].get(mode="fill", fill_value=0).sum(-2)


def known_sides(features: Sides, vocabulary: tuple[int, int]) -> tuple[str, ...]:
    """The sides that a model reads, of those of which something is known: its vocabulary is not empty.

    Raises ValueError when nothing is known of a side that is asked for.
    """
    sizes = dict(zip(("user", "item"), vocabulary, strict=True))
    if not sizes.get(features, 1):
        raise ValueError(
            f'model.features is "{features}", but the data have no {features} features: name a file '
            f'(--data.{features}-features), or take "all" (those there are) or "none"'
        )
    return tuple(side for side, size in sizes.items() if size and features in ("all", side))


class FactorizationMachine(nn.Module):
    """A factorisation machine of order two on indicators: of user, item, and each of their features."""

    num_items: int
    num_users: int
    dim: int
    init_scale: float
    table_dtype: TableDtype
    vocabulary: dict[str, int]

    @nn.compact
    def __call__(self, user, item=None, of_user=None, of_item=None) -> jax.Array:
        """Logits, see `from_module`."""
        users = normal_variable(self, "private", "user", (self.num_users, self.dim), self.init_scale)
        own = self.variable("private", "bias", jnp.zeros, self.num_users).value
        items = normal_variable(self, "tables", "item", (self.num_items, self.dim), self.init_scale, self.table_dtype)
        bias = self.variable("tables", "bias", jnp.zeros, self.num_items, self.table_dtype).value

        def side(name, vector, weight, numbers):
            """(sum of the side's vectors, the rest of its logit: weights, and the inner products of its pairs)."""
            if name not in self.vocabulary:
                return vector, weight
            shape = self.vocabulary[name], self.dim
            table = self.param(f"{name}_features", nn.initializers.normal(self.init_scale), shape)
            weights = self.param(f"{name}_weights", nn.initializers.zeros, shape[:1])
            if numbers is None:
                return vector, weight
            every = sum_feature_rows(jnp.concatenate([table, jnp.square(table), weights[:, None]], 1), numbers)
            total, squares = vector + every[..., : self.dim], jnp.square(vector) + every[..., self.dim : -1]
            return total, weight + every[..., -1] + 0.5 * (jnp.square(total) - squares).sum(-1)

        # (|a + b|^2 - squares) / 2 of both sides' vectors together is <a, b> and what is left of each alone
        user_vector, user_rest = side("user", users[user], own[user], of_user)
        item_vectors, item_rest = side("item", items, bias, of_item)
        user_logit = self.param("offset", nn.initializers.zeros, ()) + user_rest
        return user_logit + take_vectors(item_rest, item) + score_rows(take_vectors(item_vectors, item), user_vector)


@named("model")
def fm(
    num_items: int,
    num_users: int = 1,
    dim: int = 16,
    init_scale: float = 0.1,
    features: Sides = "all",
    table_dtype: TableDtype = "float32",
    loss: LossName = "bce",
    vocabulary: tuple[int, int] | None = None,
) -> Model:
    """Factorisation machine (Rendle 2010, "Factorization machines", equations 1 and 5) of the user, the item, and the
    features of both.

    logit = offset + sum of weights + sum over pairs of <v_i, v_j>. The user's vector is private; those of features are
    small, shared and sent whole.

    Args:
        num_items: Number of items.
        num_users: Number of users of a client.
        dim: Numbers in the vector of a user and of an item.
        init_scale: Standard deviation of the normal numbers that vectors start with.
        features: Whose features are read: of users, of items, none, or all that the data have.
        table_dtype: In what the server stores tables and clients download them; clients compute and send in float32.
        loss: bce: cross-entropy, of clicks and negatives. bpr: the click of a pair ranks before the negative. squared:
            squared error, of clicks or of ratings.
        vocabulary: Numbers of features (of users, of items), as `Clients.vocabulary` says. None: nothing is known of
            them.

    Returns:
        The model.

    Raises:
        ValueError: `dim` is below 1, there is no such loss, or nothing is known of the side in `features`.

    Example:
        >>> import jaxfed as jf
        >>> jf.models.fm(num_items=100, vocabulary=(0, 18)).features  # whose features it reads
        ('item',)
    """
    check_positive("model.dim", dim)
    sizes = vocabulary or (0, 0)
    sides = known_sides(features, sizes)
    known_vocabulary = {side: size for side, size in zip(("user", "item"), sizes, strict=True) if side in sides}
    module = FactorizationMachine(num_items, num_users, dim, init_scale, table_dtype, known_vocabulary)
    return from_module(module, find_loss(loss), features=sides)


class TwoTower(nn.Module):
    """The inner product of what a network makes of the user and what another one makes of the item."""

    num_items: int
    num_users: int
    dim: int
    hidden: tuple[int, ...]
    init_scale: float
    bias: bool
    table_dtype: TableDtype
    vocabulary: dict[str, int]

    @nn.compact
    def __call__(self, user, item=None, of_user=None, of_item=None) -> jax.Array:
        """Logits, see `from_module`."""

        def tower(name, x, numbers):
            if name in self.vocabulary:
                shape = self.vocabulary[name], self.dim
                table = self.param(f"{name}_features", nn.initializers.normal(self.init_scale), shape)
                x = x if numbers is None else x + sum_feature_rows(table, numbers)
            for i, size in enumerate(self.hidden):
                x = nn.relu(nn.Dense(size, name=f"{name}_{i}")(x))
            return nn.Dense(self.dim, name=f"{name}_output")(x) if self.hidden else x

        users = normal_variable(self, "private", "user", (self.num_users, self.dim), self.init_scale)
        items = normal_variable(self, "tables", "item", (self.num_items, self.dim), self.init_scale, self.table_dtype)
        logit = score_rows(take_vectors(tower("item", items, of_item), item), tower("user", users[user], of_user))
        if self.bias:
            own = self.variable("private", "bias", jnp.zeros, self.num_users).value
            bias = self.variable("tables", "bias", jnp.zeros, self.num_items, self.table_dtype).value
            logit += self.param("offset", nn.initializers.zeros, ()) + own[user] + take_vectors(bias, item)
        return logit


@named("model")
def two_tower(
    num_items: int,
    num_users: int = 1,
    dim: int = 16,
    hidden: tuple[int, ...] = (32,),
    init_scale: float = 0.1,
    bias: bool = True,
    features: Sides = "all",
    table_dtype: TableDtype = "float32",
    loss: LossName = "bce",
    vocabulary: tuple[int, int] | None = None,
) -> Model:
    """Two towers (Covington et al. 2016; Yi et al. 2019): a network for users and one for items, and the inner product.

    A tower reads the sum of an id's vector and those of its features. Its layers have the widths `hidden`, and it gives
    `dim` numbers; without layers, these are the sums themselves. The user's vector is private, the towers and the
    features' vectors are shared and sent whole.

    Args:
        num_items: Number of items.
        num_users: Number of users of a client.
        dim: Number of numbers that a tower gives.
        hidden: Widths of the layers of each tower.
        init_scale: Standard deviation of the normal numbers that vectors start with.
        bias: Whether an offset, and a number for each user and item, are added to the inner product.
        features: Whose features are read: of users, of items, none, or all that the data have.
        table_dtype: In what the server stores tables and clients download them; clients compute and send in float32.
        loss: bce: cross-entropy, of clicks and negatives. bpr: the click of a pair ranks before the negative. squared:
            squared error, of clicks or of ratings.
        vocabulary: Numbers of features (of users, of items), as `Clients.vocabulary` says. None: nothing is known of
            them.

    Returns:
        The model.

    Raises:
        ValueError: a size is below 1, there is no such loss, or nothing is known of the side in `features`.

    Example:
        >>> import jaxfed as jf
        >>> jf.models.two_tower(num_items=100, vocabulary=(20, 18)).features  # whose features it reads
        ('user', 'item')
    """
    check_positive("model.dim", dim)
    check_positive("model.hidden", *hidden, 1)
    sizes = vocabulary or (0, 0)
    sides = known_sides(features, sizes)
    known_vocabulary = {side: size for side, size in zip(("user", "item"), sizes, strict=True) if side in sides}
    module = TwoTower(num_items, num_users, dim, tuple(hidden), init_scale, bias, table_dtype, known_vocabulary)
    return from_module(module, find_loss(loss), features=sides)
