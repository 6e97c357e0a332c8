"""Krum and multi-Krum: the updates that lie nearest to the others, by the distances of all pairs."""

import jax
import jax.numpy as jnp

from jaxfed.channels.robust import (
    check_float_messages,
    concatenate_columns,
    count_contributions,
    reduce_over_holders,
    split_tables,
    sum_groups,
)
from jaxfed.core.aggregate import gather_then
from jaxfed.core.link import Channel, link
from jaxfed.core.recipe import named
from jaxfed.core.types import Messages

CHUNK = 1 << 23  # numbers of a dense piece of the cohort's messages: 32 MB


@named("channel")
def krum(slots: int, byzantine: int = 1, selected: int = 1) -> Channel:
    """Krum (Blanchard et al. 2017): of n updates the one with the least summed distance to its n - byzantine - 2
    nearest ones. Multi-Krum: the mean of the `selected` best; of a row, the mean of those of them that hold it, or 0.

    The distance of two clients is the mean squared difference of the coordinates that both have: of the rows that both
    hold, and of all other leaves. Two that share none are as far apart as the farthest pair. Of equal scores
    the smaller id wins. Takes M^2 x (rows of the cohort) x D operations for M clients, in matrix products, and memory
    for M^2 numbers.

    No choice is safe with fewer than 2 * byzantine + 3 clients. Of those that report, nobody checks this.

    Args:
        slots: The largest number of clients in a round.
        byzantine: The largest number of malicious clients in a round.
        selected: How many of the best are averaged. 1: Krum; more: multi-Krum.

    Returns:
        The link.

    Raises:
        ValueError: a number is too small, or 2 * byzantine + 3 is more than `slots`.

    Example:
        >>> import jaxfed as jf
        >>> jf.channels.krum(slots=9, byzantine=4)
        Traceback (most recent call last):
            ...
        ValueError: krum: a cohort of 9 clients bears at most 3 malicious: lower byzantine
    """
    if byzantine < 0 or selected < 1:
        raise ValueError("krum: byzantine must be at least 0 and selected at least 1")
    if slots < 2 * byzantine + 3:
        most = max(slots - 3, 0) // 2
        raise ValueError(f"krum: a cohort of {slots} clients bears at most {most} malicious: lower byzantine")

    def reduce(part, size):
        ids, chosen = select_best(part, size, byzantine, selected)

        def rule(x, group, size, owner):
            one = chosen.at[jnp.searchsorted(ids, owner)].get(mode="fill", fill_value=False).astype(x.dtype)[:, None]
            return sum_groups(one * x, group, size) / jnp.maximum(sum_groups(one, group, size), 1)

        return reduce_over_holders(rule)(part, size)

    return link(aggregator=gather_then(reduce), init=check_float_messages, name="krum")


def select_best(part: Messages, size: int, byzantine: int, selected: int) -> tuple[jax.Array, jax.Array]:
    """(int [M]: ids of the cohort, ascending, bool [M]: who of them has one of the least scores)."""
    ids, present, square, shared = pairwise_distances(part, size)
    other = present[:, None] & present & ~jnp.eye(len(ids), dtype=bool)
    distance = jnp.where(shared > 0, jnp.maximum(square, 0) / jnp.maximum(shared, 1), 0)
    distance = jnp.where(shared > 0, distance, jnp.max(distance, where=other, initial=0))
    nearest = jnp.sort(jnp.where(other, distance, jnp.inf), axis=1)
    place, n = jnp.arange(len(ids)), present.sum()
    is_near = (place < jnp.maximum(n - byzantine - 2, 1)) & jnp.isfinite(nearest)
    score = jnp.sum(jnp.where(is_near, nearest, 0), 1)
    order = jnp.lexsort((score, ~present))  # stable
    return ids, jnp.zeros(len(ids), bool).at[order].set(place < selected) & present


def pairwise_distances(part: Messages, size: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(ids [M] ascending, present [M], squared distances [M, M] of the coordinates two share, their number [M, M]).

    Clients in the order of their ids, so that no sum depends on the blocks they came in. Rows are taken in pieces of
    the catalogue, dense: products of matrices instead of a pass over all rows for each client.
    """
    order = jnp.argsort(part.ids)
    ids, present = part.ids[order], part.present[order]
    tables, leaves = (concatenate_columns(arrays) for arrays in split_tables(part.messages))
    square, shared = jnp.zeros((2, len(ids), len(ids)))
    if leaves.size:
        square, shared = pairwise_products(leaves[order][:, None], present[:, None])
    if tables.size:
        clients, width = len(ids), tables.shape[1]
        each = max(1, min(CHUNK // (clients * width), size))
        by_row, end = jnp.argsort(part.rows), jnp.cumsum(count_contributions(part.rows, size))
        client = jnp.searchsorted(ids, part.owner)

        def piece(total, first):
            begin = jnp.where(first > 0, end.at[first - 1].get(mode="clip"), 0)
            entry = by_row.at[begin + jnp.arange(each * clients)].get(mode="fill", fill_value=len(by_row))
            row = part.rows.at[entry].get(mode="fill", fill_value=size)
            row = jnp.where((row < size) & (row - first < each), row - first, each)  # the next pieces' lie past the end
            place = client.at[entry].get(mode="clip"), row
            dense = jnp.zeros((clients, each, width)).at[place].set(tables.at[entry].get(mode="clip"), mode="drop")
            held = jnp.zeros((clients, each)).at[place].set(1, mode="drop")
            return jax.tree.map(jnp.add, total, pairwise_products(dense, held)), None

        (square, shared), _ = jax.lax.scan(piece, (square, shared), jnp.arange(0, size, each))
    return ids, present, (square + square.T) / 2, shared  # the same both ways to the last bit, or ties are none


def pairwise_products(x: jax.Array, held: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(squared distances [M, M], their coordinates [M, M]) of x [M, k, D] over the rows that two clients hold;
    held [M, k], x is zero elsewhere."""
    held, flat, norm = held.astype(x.dtype), x.reshape(len(x), -1), jnp.sum(x * x, -1)

    def by(a, b):
        return jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)

    return by(norm, held) + by(held, norm) - 2 * by(flat, flat), x.shape[2] * by(held, held)
