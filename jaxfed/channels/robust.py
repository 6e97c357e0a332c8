"""Links that bear malicious clients: reductions in place of the sum. A bound on the norm is `clip`.

A row of a table is reduced over the clients that hold it. Everyone else says nothing of it, which is not zero: with
zeros the median of a row that fewer than half of the clients hold would be zero. `rule(x [n, D], group [n], size,
owner [n]) -> [size, D]` gives what stands for the contributions x of each group, which come in ascending order: of the
holders of each row, of all clients for the other leaves. A reduction is the rule times the number of contributions, an
estimate of the sum: a mean to the left divides it as it divides a sum, and the counts of holders that `per_row_mean`
sends come out as counts.

Weights (`weighted_mean`, `per_row_mean` by anything but `uniform`) multiply updates before the rule sees them, and a
client says its own: where clients may be malicious, let them weigh the same. No rule helps where most of a row's
holders are malicious, which are few clients for a row that few hold.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxfed.core.aggregate import gather_then
from jaxfed.core.link import Channel, link
from jaxfed.core.recipe import named
from jaxfed.core.tables import is_table, map_tables
from jaxfed.core.types import Messages, Tree

Rule = Callable[[jax.Array, jax.Array, int, jax.Array], jax.Array]
PIECE = 1 << 13  # contributions that are compared at a time: they stay in the cache


def reduce_over_holders(rule: Rule) -> Callable[[Messages, int], Tree]:
    """The reduction that times a rule by the number of contributions, row by row, and for other leaves once."""

    def reduce(part: Messages, size: int) -> Tree:
        tables, leaves = (concatenate_columns(arrays) for arrays in split_tables(part.messages))
        rows = estimate_groups(rule, tables, part.rows, size, part.owner)
        rest = estimate_groups(rule, leaves, jnp.where(part.present, 0, 1), 1, part.ids)
        done = [0, 0]  # columns of each that have been laid back

        def back(matrix, which):
            def leaf(x):
                width = int(np.prod(x.shape[1:]))
                done[which] += width
                piece = matrix[:, done[which] - width : done[which]].reshape(len(matrix), *x.shape[1:])
                return (piece[0] if which else piece).astype(x.dtype)

            return leaf

        return map_tables(back(rows, 0), back(rest, 1), part.messages)

    return reduce


def estimate_groups(rule: Rule, x: jax.Array, group: jax.Array, size: int, owner: jax.Array) -> jax.Array:
    """[size, D]: the rule over the contributions to each group, times their number; 0 where there are none."""
    n, order = count_contributions(group, size)[:, None], jnp.argsort(group)
    x, group, owner = x[order], group[order], owner[order]
    return jnp.where(n > 0, n * rule(x, group, size, owner), 0) if x.size else jnp.zeros((size, x.shape[1]))


def split_tables(messages: Tree) -> tuple[list[jax.Array], list[jax.Array]]:
    """(arrays of tables, other leaves)."""
    nodes = jax.tree.leaves(messages, is_leaf=is_table)
    return jax.tree.leaves([x for x in nodes if is_table(x)]), [x for x in nodes if not is_table(x)]


def concatenate_columns(arrays: list[jax.Array]) -> jax.Array:
    """float32 [n, D]: arrays [n, ...] side by side; [0, 0] of none."""
    flat = [x.reshape(x.shape[0], -1).astype(jnp.float32) for x in arrays]
    return jnp.concatenate(flat, 1) if flat else jnp.zeros((0, 0))


def count_contributions(group: jax.Array, size: int) -> jax.Array:
    """int [size]: contributions to each group; those past the end are nobody's."""
    return jnp.zeros(size, jnp.int32).at[group].add(1, mode="drop")


def take_group_rows(x: jax.Array, group: jax.Array) -> jax.Array:
    """Rows of x [size, D] for each contribution; some row where it is nobody's, which a sum then drops."""
    return x.at[group].get(mode="clip")


def sum_groups(x: jax.Array, group: jax.Array, size: int) -> jax.Array:
    """[size, D]: sums over each group."""
    return jnp.zeros((size, *x.shape[1:]), x.dtype).at[group].add(x, mode="drop")


# --- coordinate by coordinate ----------------------------------------


def float_order_bits(x: jax.Array) -> jax.Array:
    """int32 in the order of the floats: their bits, those of negative numbers turned round; of bits, the inverse."""
    bits = x if x.dtype == jnp.int32 else jax.lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)


def select_nth(keys: jax.Array, group: jax.Array, size: int, rank: jax.Array) -> jax.Array:
    """int32 [size, D]: of the keys [n, D] of each group the one of that rank [size, D], 0 the least, exactly.

    Bisection of the 32 bits of a key, each a pass over the contributions but for those that are nobody's: they come
    last, as groups ascend. Cheaper than to sort by (group, key).
    """
    width, each = keys.shape[1], min(PIECE, len(keys))
    past = -len(keys) % each
    keys = jnp.pad(keys, ((0, past), (0, 0))).reshape(-1, each, width)
    group = jnp.pad(group, (0, past), constant_values=size).reshape(-1, each)
    pieces = (group[:, 0] < size).sum()

    def upto(limit):
        def add(i, total):
            return total.at[group[i]].add((keys[i] <= take_group_rows(limit, group[i])).astype(jnp.int32), mode="drop")

        return jax.lax.fori_loop(0, pieces, add, jnp.zeros((size, width), jnp.int32))

    def halve(_, between):
        low, high = between
        middle = (low >> 1) + (high >> 1) + (low & high & 1)  # rounded down, without overflow
        enough = upto(middle) > rank
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    low = jnp.full((size, width), jnp.iinfo(jnp.int32).min)
    return jax.lax.fori_loop(0, 32, halve, (low, ~low))[0]


def trimmed_group_mean(cut: Callable[[jax.Array], jax.Array]) -> Rule:
    """The mean of what is left when the cut(n) least and the cut(n) largest of n contributions are gone, for each
    coordinate; cut(n) < n / 2."""

    def rule(x, group, size, owner):
        n = count_contributions(group, size)
        tail, keys = cut(n), float_order_bits(x)
        ranks = jnp.stack([tail, jnp.maximum(n - 1 - tail, 0)], 1).repeat(keys.shape[1], 1)
        low, high = jnp.split(
            select_nth(jnp.tile(keys, 2), group, size, ranks), 2, 1
        )  # side by side: passes cost by the row
        between = (keys > take_group_rows(low, group)) & (keys < take_group_rows(high, group))
        inner = sum_groups(jnp.where(between, x, 0), group, size)
        # of those equal to a limit some may be gone, which ones is all the same
        upto_low = sum_groups((keys <= take_group_rows(low, group)).astype(jnp.int32), group, size)
        below_high = sum_groups((keys < take_group_rows(high, group)).astype(jnp.int32), group, size)
        first, last = (jax.lax.bitcast_convert_type(float_order_bits(key), jnp.float32) for key in (low, high))
        kept = jnp.maximum(n - 2 * tail, 1)[:, None]
        ends = (upto_low - tail[:, None]) * first + ((n - tail)[:, None] - below_high) * last
        return jnp.where(low == high, first, (inner + ends) / kept)

    return rule


def check_float_messages(example: Tree) -> tuple[Tree, Tree]:
    """What a link without state starts with. Raises ValueError for messages that are no numbers but codes."""
    if not all(jnp.issubdtype(x.dtype, jnp.floating) for x in jax.tree.leaves(example)):
        raise ValueError("a robust rule compares numbers, and was given integers: put it before their link")
    return (), ()


MEDIAN = gather_then(reduce_over_holders(trimmed_group_mean(lambda n: jnp.maximum(n - 1, 0) // 2)))


@named("channel")
def median() -> Channel:
    """The median of each coordinate (Yin et al. 2018); of an even number of clients, the mean of the middle two.

    Less than half of the clients that hold a row may be malicious. Takes 32 passes over the table rows that the cohort
    sent.

    Returns:
        The link.

    Example:
        >>> import jaxfed as jf
        >>> jf.channels.median().aggregator.streams  # messages cannot be added one by one
        False
    """
    return link(aggregator=MEDIAN, init=check_float_messages, name="median")


@named("channel")
def trimmed_mean(fraction: float = 0.2) -> Channel:
    """The mean of each coordinate without a share of the contributions at either end (Yin et al. 2018).

    Of n contributions ceil(fraction * n) are dropped at either end, but one or two are always left. Rounded down, rows
    that few clients hold would not be trimmed at all. Costs what `median` costs.

    Args:
        fraction: Share of the contributions that is dropped at either end, below 1/2.

    Returns:
        The link.

    Raises:
        ValueError: the fraction is negative, or 1/2 or more.

    Example:
        >>> import jaxfed as jf
        >>> jf.channels.trimmed_mean(0.5)
        Traceback (most recent call last):
            ...
        ValueError: trimmed_mean: fraction is 0.5: it must be at least 0 and below 0.5
    """
    if not 0 <= fraction < 0.5:
        raise ValueError(f"trimmed_mean: fraction is {fraction}: it must be at least 0 and below 0.5")

    def cut(n):
        share = fraction * (1 - 1e-6) * n  # 0.2 of 5 is 1, not the 1.00000003 of float32, which would round up to 2
        return jnp.minimum(jnp.ceil(share).astype(jnp.int32), jnp.maximum(n - 1, 0) // 2)

    return link(
        aggregator=gather_then(reduce_over_holders(trimmed_group_mean(cut))),
        init=check_float_messages,
        name="trimmed_mean",
    )


# --- by distance ----------------------------------------


@named("channel")
def geometric_median(iterations: int = 8, smoothing: float = 1e-6) -> Channel:
    """The point of least summed distance to the contributions (RFA: Pillutla et al. 2022).

    It is found by the smoothed Weiszfeld algorithm, which begins with the plain mean. In each iteration the next point
    is a mean with weights 1 / max(smoothing, distance to the last point).

    Each row, with all tables side by side, is a point of its own, and so are all other leaves together: a client that
    is malicious in one row alone is far off there and nowhere else. Each iteration takes three passes over the rows
    that the cohort sent.

    Args:
        iterations: Number of iterations.
        smoothing: The least distance that counts, in the units of an update.

    Returns:
        The link.

    Raises:
        ValueError: there is no iteration, or `smoothing` is not positive.

    Example:
        >>> import jaxfed as jf
        >>> jf.channels.geometric_median().aggregator.streams  # messages cannot be added one by one
        False
    """
    if iterations < 1 or smoothing <= 0:
        raise ValueError("geometric_median: iterations must be at least 1 and smoothing above 0")

    def rule(x, group, size, owner):
        def weighted(weight):
            return sum_groups(weight * x, group, size) / jnp.maximum(sum_groups(weight, group, size), 1e-30)

        def closer(_, point):
            distance = jnp.linalg.norm(x - take_group_rows(point, group), axis=1, keepdims=True)
            return weighted(1 / jnp.maximum(distance, smoothing))

        return jax.lax.fori_loop(0, iterations, closer, weighted(jnp.ones((len(x), 1))))

    return link(aggregator=gather_then(reduce_over_holders(rule)), init=check_float_messages, name="geometric_median")
