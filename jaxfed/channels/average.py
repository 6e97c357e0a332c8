"""Links that turn the sum over a cohort into a mean."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from jaxfed.core.link import Channel, link
from jaxfed.core.recipe import named
from jaxfed.core.tables import Table, clear_padding, map_tables
from jaxfed.core.tree import scale_tree
from jaxfed.core.types import Broadcast, ClientView, Summed, Tree, Weights, is_summed

By = Literal["examples", "activity", "uniform"]


def client_weight(by: By, power: float) -> Callable[[ClientView], jax.Array]:
    """What a client's update weighs: (training examples | train interactions | 1) ** power."""
    measures = {
        "examples": lambda client: client.weight,
        "activity": lambda client: client.num_train,
        "uniform": lambda client: jnp.ones_like(client.weight),
    }
    if by not in measures:
        raise ValueError(f"weights by {by!r}: choose one of {', '.join(measures)}")
    return lambda client: measures[by](client) ** power


def divide_or_zero(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x divided by its weight along the first axis; zero where nothing was weighed."""
    weight = weight.reshape(weight.shape + (1,) * (x.ndim - weight.ndim))
    return jnp.where(weight > 0, x / jnp.where(weight > 0, weight, 1), 0)


def divide_rows(update: Tree, held: jax.Array, weight: jax.Array) -> Tree:
    """An update divided by its weight, of tables by that of each row [N]; zero where nothing was weighed."""
    return map_tables(lambda x: divide_or_zero(x, held), lambda x: divide_or_zero(x, weight), update)


def weigh_rows(weights: jax.Array, client: ClientView) -> Weights:
    """The weights for each row that a client holds; zero for rows that only fill the block."""
    return Weights(clear_padding(Table(jnp.broadcast_to(weights, client.held.shape + weights.shape)), client.held))


def weigh_groups(update: Tree, weight: jax.Array, in_groups: bool) -> tuple[Tree, jax.Array]:
    """(an update without the groups of its client, the weight in each group); without groups, both unchanged."""
    return (Broadcast(update.params), weight * update.extra) if in_groups else (update, weight)


def divide_coordinates(
    update: Tree, holds: Tree, held: jax.Array, weights: jax.Array, floor: float, shown: tuple[int, ...] | None = None
) -> Tree:
    """An update divided by the weight of those who hold each coordinate, at least `floor`; zero where nobody does.

    holds: of each leaf, bool [groups, ...]. held: [N, groups], what those who hold a row weigh. weights: [groups].
    shown: the groups that `held` has columns of; None: all.
    """
    if shown is not None:
        held = jnp.zeros((len(held), len(weights))).at[:, jnp.array(shown)].set(held)

    def divide(x, mask, by_group):
        weight = jnp.tensordot(by_group, mask.astype(x.dtype), 1, precision=jax.lax.Precision.HIGHEST)
        return divide_or_zero(x, jnp.maximum(weight, floor))

    return map_tables(lambda x, mask: divide(x, mask, held), lambda x, mask: divide(x, mask, weights), update, holds)


def drop_sums(update: Tree) -> Tree:
    """An update without its `Summed` parts, whose places stay."""
    return jax.tree.map(lambda node: Summed(()) if is_summed(node) else node, update, is_leaf=is_summed)


def map_averaged(function: Callable[[Tree], Tree], update: Tree) -> Tree:
    """`function` of an update, whose `Summed` parts it does not see and which stay as they are."""
    averaged = function(drop_sums(update))
    return jax.tree.map(lambda new, old: old if is_summed(new) else new, averaged, update, is_leaf=is_summed)


@named("channel")
def mean(count: int = 0) -> Channel:
    """The plain mean: the sum of all updates, divided by how many clients reported (McMahan et al. 2017, with equal
    weights) or by `count`.

    Args:
        count: Number the sum is divided by; under differential privacy the expected cohort size. 0: number of clients
            that reported.

    Returns:
        The link.

    Raises:
        ValueError: count is negative.

    Example:
        >>> import jaxfed as jf, jax.numpy as jnp
        >>> jf.channels.mean(count=4).decode({"bias": jnp.array([8.0])}, (), None)[0]["bias"].tolist()
        [2.0]
    """

    if count < 0:
        raise ValueError(f"mean.count is {count}: it must be at least 0")

    def decode(total, state, round):
        share = 1 / (count or jnp.maximum(round.present.sum(), 1))
        return map_averaged(lambda update: scale_tree(share, update), total), state, {}

    return link(decode=decode, l2_gain=lambda bound: bound, reads_cohort_size=not count, is_average=True, name="mean")


@named("channel")
def weighted_mean(by: By = "examples", power: float = 1.0) -> Channel:
    """Mean with weights n_k / n (McMahan et al. 2017, algorithm 1), where n_k = measure ** power and n is their sum.

    Args:
        by: What a client's update weighs: its training examples, its train interactions (activity), or the same for
            all.
        power: Weight = (value chosen by `by`) ** power.

    Returns:
        The link. A client sends its update times its weight, and the weight.

    Raises:
        ValueError: `by` is not one of the three words.

    Example:
        >>> import jaxfed as jf, jax.numpy as jnp
        >>> total = {"bias": jnp.array([8.0])}, jnp.array(4.0)
        >>> jf.channels.weighted_mean().decode(total, (), None)[0]["bias"].tolist()
        [2.0]
    """
    weigh = client_weight(by, power)

    def encode(update, sent, client):
        weight = weigh(client)
        return (map_averaged(lambda update: scale_tree(weight, update), update), weight), client.link_state

    def decode(total, state, round):
        update, weight = total
        return map_averaged(lambda update: jax.tree.map(lambda x: divide_or_zero(x, weight), update), update), state, {}

    return link(encode, decode, is_average=True, name="weighted_mean")


@named("channel")
def per_row_mean(by: By = "uniform", power: float = 1.0, floor: float = 0.0, counted: float = 1.0) -> Channel:
    """Divides each row of a table by the summed weight of the clients that hold it, other leaves by that of all.

    This is FedSubAvg (Ding et al. 2022, "Federated submodel optimization for hot and cold data features"). With a plain
    mean, a row that few clients hold moves by only (its clients / cohort) of their mean step.

    The weights are part of the message: links to the right clip them and add noise to them with the rest. Then set
    `counted` and `floor`; otherwise rows with small total weight are mostly noise.

    Args:
        by: What a client's update weighs: its training examples, its train interactions (activity), or the same for
            all.
        power: Weight = (value chosen by `by`) ** power.
        floor: The smallest weight to divide by. Set it under noise: otherwise rows with small total weight are mostly
            noise.
        counted: Factor on the weight column in the message, so that clipping does not let it vanish beside the update.

    Returns:
        The link.

    Raises:
        ValueError: `by` is not one of the three words, `floor` is negative, or `counted` is not positive.

    Example:
        Of three clients, two hold the first row and none the second:

        >>> import jaxfed as jf, jax.numpy as jnp
        >>> from jaxfed.core.types import Weights
        >>> total, holders = jf.Table(jnp.array([[4.0], [0.0]])), Weights(jf.Table(jnp.array([2.0, 0.0])))
        >>> jf.channels.per_row_mean().decode((total, holders, jnp.array(3.0)), (), None)[0].rows.tolist()
        [[2.0], [0.0]]
    """
    return coordinate_mean(None, by, power, floor, counted, "per_row_mean")


def coordinate_mean(
    holds: Callable[[Tree, jax.Array], Tree] | None,
    by: By = "uniform",
    power: float = 1.0,
    floor: float = 0.0,
    counted: float = 1.0,
    name: str = "coordinate_mean",
    shown: tuple[int, ...] | None = None,
) -> Channel:
    """Divides each coordinate of an update by the summed weight of the clients that hold it (Diao et al. 2021).

    A client holds some rows of the tables and, of all else, the coordinates of its group, which are public. So a
    message says what it weighs by a number for each group, and for each row and group, and a sum of them is enough.

    Args:
        holds: holds(params, round) -> of each leaf, bool [groups, ...]: which of its coordinates each group holds in a
            round, of a table those of one row. Updates then have zeros and, for the client's groups, ones in
            `Broadcast.extra` [groups]. None: no groups, a client holds all of its rows and leaves (`per_row_mean`).
        by: What a client's update weighs: its training examples, train interactions (activity), or the same for all.
        power: Weight = (value chosen by `by`) ** power.
        floor: The smallest weight to divide by.
        counted: Factor on the weights in the message, see `per_row_mean`.
        name: What the link is called.
        shown: The groups whose weights are sent for each row: those that hold coordinates of tables. None: all.

    Returns:
        The link.

    Raises:
        ValueError: `by` is not one of the three words, `floor` is negative, or `counted` is not positive.

    Example:
        Two groups; the second one holds the first of two numbers. Of three clients two are in it:

        >>> import jaxfed as jf, jax.numpy as jnp
        >>> from jaxfed.core.types import Weights
        >>> link = jf.channels.coordinate_mean(lambda params, round: jnp.array([[True, True], [True, False]]))
        >>> total = jf.Broadcast(jnp.array([6.0, 5.0])), Weights(jf.Table(jnp.zeros((0, 2)))), jnp.array([1.0, 2.0])
        >>> link.decode(total, jnp.int32(0), None)[0].params.tolist()
        [2.0, 5.0]
    """
    weigh = client_weight(by, power)
    if floor < 0 or counted <= 0:
        raise ValueError(f"{name}: floor must not be negative, counted must be positive")

    def encode(update, sent, client):
        weight = weigh(client)
        update, weights = weigh_groups(update, counted * weight, holds is not None)
        held = weigh_rows(weights if shown is None else weights[jnp.array(shown)], client)
        return (map_averaged(lambda update: scale_tree(weight, update), update), held, weights), client.link_state

    def decode(total, state, round):
        update, held, weights = total[0], total[1].values.rows / counted, total[2] / counted
        if holds:
            mean = divide_coordinates(update.params, holds(update.params, state), held, weights, floor, shown)
            return Broadcast(mean), state + 1, {}
        held, weights = jnp.maximum(held, floor), jnp.maximum(weights, floor)
        return map_averaged(lambda update: divide_rows(update, held, weights), update), state, {}

    return link(encode, decode, (lambda example: (jnp.int32(0), ())) if holds else None, is_average=True, name=name)


@named("channel")
def cluster_mean() -> Channel:
    """Averages each of several models side by side over the clients that chose it (IFCA: Ghosh et al. 2020).

    A row of a table is averaged over those of them that hold the row. What nobody chose stays as it is. It takes the
    place of a mean; `jaxfed.algorithms.ifca` brings it along.

    Returns:
        The link.

    Raises:
        ValueError: in a chain, where clients do not say which model they chose.

    Example:
        >>> import jaxfed as jf
        >>> jf.channels.cluster_mean().claims.is_average
        True
    """

    def init(example):
        if not isinstance(example, Broadcast) or not example.extra:
            raise ValueError('cluster_mean: nothing says who chose which model: set work.name = "clustered"')
        return (), ()

    def encode(update, sent, client):
        membership, held = update.extra
        return (update.params, Weights(clear_padding(held, client.held)), membership), client.link_state

    def decode(total, state, round):
        params, held, members = total
        mean = map_tables(lambda x: divide_or_zero(x, held.values.rows), lambda x: divide_or_zero(x, members), params)
        metrics = {"clusters/empty": (members == 0).sum()}
        return Broadcast(mean, ()), state, metrics

    return link(encode, decode, init, is_average=True, name="cluster_mean")
