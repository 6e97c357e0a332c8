"""Pairs of rows as rows of a table of their own, by which X'X is summed: a client sends the pairs of what it holds.

The pair of the rows i >= j of a catalogue is row i (i + 1) / 2 + j. {i, j} is one pair, and {i, i} is one.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfed.core.tables import Table
from jaxfed.core.types import Array

MOST_ROWS = 65_535  # whose pairs have numbers below 2^31
AT_ONCE = 1 << 22  # pairs that are listed at a time


class PairSums(NamedTuple):
    """Sums over clients of what they sent for pairs of rows, on the host.

    Args:
        ids: int64 [P]: the pairs, ascending.
        values: float32 [P, C].
        size: Rows of the catalogue.
    """

    ids: np.ndarray
    values: np.ndarray
    size: int


def count_pairs(rows: Any) -> Any:
    """How many pairs there are of so many rows, a row with itself among them."""
    return rows * (rows + 1) // 2


def count_paired_rows(pairs: Array) -> np.ndarray:
    """int64: of how many rows there are so many pairs; undoes `count_pairs`."""
    root = np.floor((np.sqrt(8.0 * np.asarray(pairs, np.int64) + 1) - 1) / 2).astype(np.int64)
    root -= count_pairs(root) > pairs  # where the root was rounded up
    return root + (count_pairs(root + 1) <= pairs)


def check_pairs(rows: int) -> None:
    """Raises ValueError for a catalogue whose pairs cannot be numbered."""
    if rows > MOST_ROWS:
        raise ValueError(
            f"a sum over pairs of items is for at most {MOST_ROWS:,} items, there are {rows:,}: leave rare items out "
            "(data.item_core), or take mf"
        )


def number_row_pairs(rows: jax.Array, size: int) -> jax.Array:
    """int32 [K (K + 1) / 2]: the pairs (a, b), a <= b, of a client's rows [K], in the order of `np.triu_indices`; past
    the end where one of the two is unused. size: rows of the catalogue."""
    first, second = np.triu_indices(rows.shape[0])
    high, low = jnp.maximum(rows[first], rows[second]), jnp.minimum(rows[first], rows[second])
    return jnp.where(high < size, ((high + 1) >> 1) * (high | 1) + low, count_pairs(size))  # no overflow before halving


def find_pairs(ids: jax.Array, pairs: jax.Array, end: int) -> jax.Array:
    """Positions of pairs in a sorted list [U] that holds them all; U for those past the end."""
    return jnp.where(ids < end, jnp.searchsorted(pairs, ids).astype(jnp.int32), pairs.shape[0])


def list_pairs(rows: list[np.ndarray], size: int) -> np.ndarray:
    """int32, ascending: the distinct pairs of clients' rows, blocks of them [m, K], past the end where unused."""
    found = [np.zeros(0, np.int32)]
    for block in rows:
        first, second = np.triu_indices(block.shape[1])
        step = max(1, AT_ONCE // len(first))
        for low in range(0, len(block), step):
            some = np.ascontiguousarray(block[low : low + step].T, dtype=np.int32)
            high, lower = np.maximum(some[first], some[second]), np.minimum(some[first], some[second])
            pairs = ((high + 1) >> 1) * (high | 1) + lower  # no overflow before halving
            found.append(sort_distinct(pairs[high < size]))
    return sort_distinct(np.concatenate(found))


def sort_distinct(values: np.ndarray) -> np.ndarray:
    """The distinct values, ascending; by a sort, which is several times as fast as `np.unique` here."""
    values = np.sort(values)
    return values[np.append(True, values[1:] != values[:-1])[: len(values)]]


def split_pairs(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int64 [P] each: the rows (i, j), i >= j, of pairs."""
    high = count_paired_rows(ids)
    return high, ids - count_pairs(high)


def pair_table(rows: int) -> Table:
    """What clients are sent where they read nothing of the model: a table with a row for each pair of so many rows, and
    no numbers in it."""
    return Table(jnp.zeros((count_pairs(rows), 0)))


def to_dense(sums: PairSums, column: int = 0) -> np.ndarray:
    """float32 [N, N]: the lower triangle of a matrix whose entries are a column of the sums; zeros above."""
    return add_to_dense(np.zeros((sums.size, sums.size), np.float32), sums, column)


def add_to_dense(matrix: np.ndarray, sums: PairSums, column: int = 0, upper: bool = False) -> np.ndarray:
    """Adds a column of the sums to the lower triangle of a matrix [N, N] in place; upper: to the upper one."""
    for low in range(0, len(sums.ids), AT_ONCE):
        some = slice(low, low + AT_ONCE)
        high, lower = split_pairs(sums.ids[some])
        matrix[(lower, high) if upper else (high, lower)] += sums.values[some, column]
    return matrix
