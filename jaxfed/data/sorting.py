"""Rows in order. Tens of millions of them are sorted by counting where a column has few values, and by one sort of
numbers where it has many."""

import numpy as np


def sort_by_group(group: np.ndarray, groups: int) -> np.ndarray:
    """int [n]: the rows by group (int [n], below `groups`), those of one group in their order.

    A counting sort, linear in n, which SciPy has as the transposition of a sparse matrix.
    """
    from scipy.sparse import csr_array  # takes long to import

    number = np.int32 if max(len(group), groups) < 1 << 31 else np.int64
    group, starts = group.astype(number, copy=False), np.arange(len(group) + 1, dtype=number)
    one_a_row = csr_array((np.zeros(len(group), np.int8), group, starts), (len(group), groups))
    return one_a_row.tocsc().indices


def sort_by_time(time: np.ndarray) -> np.ndarray:
    """int64 [n]: the rows from the earliest to the latest, equal times in their order.

    Where time and row number fit into 63 bits, one sort of numbers that hold both: twice as fast as `argsort`.
    """
    bits = max(len(time) - 1, 1).bit_length()
    low, high = (int(time.min()), int(time.max())) if len(time) else (0, 0)
    if (high - low).bit_length() + bits > 63:
        return np.argsort(time, kind="stable")
    packed = time - low
    packed <<= bits
    packed |= np.arange(len(time))
    packed.sort()
    packed &= (1 << bits) - 1
    return packed


def sort_histories(user: np.ndarray, time: np.ndarray, users: int, ties_in_order: bool = True) -> np.ndarray:
    """int [n]: the rows by user, then from the earliest to the latest.

    ties_in_order: of a user's rows with equal times a later one is later; else it is earlier.
    """
    if not ties_in_order:
        return len(user) - 1 - sort_histories(user[::-1], time[::-1], users)
    if (time[1:] >= time[:-1]).all():
        return sort_by_group(user, users)
    by_time = sort_by_time(time)
    return by_time[sort_by_group(user[by_time], users)]


def sort_pairs_of_rows(user: np.ndarray, item: np.ndarray, users: int, items: int) -> np.ndarray:
    """int [n]: the rows by user, then by item, equal pairs in their order."""
    by_item = sort_by_group(item, items)
    return by_item[sort_by_group(user[by_item], users)]


def number_present(number: np.ndarray, numbers: int) -> tuple[np.ndarray, np.ndarray]:
    """(the numbers below `numbers` that occur, ascending; [n]: the place of each row's among them)."""
    occurs = np.bincount(number, minlength=numbers) > 0
    place = (np.cumsum(occurs) - 1).astype(number.dtype)
    return np.flatnonzero(occurs), number if occurs.all() else place[number]


def list_starts(counts: np.ndarray) -> np.ndarray:
    """int64 [k + 1]: where each of k lists of these lengths begins, end to end, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(counts)])


def find_repeats(values: np.ndarray, start: np.ndarray) -> np.ndarray:
    """bool [n]: which values are the same as the one before in their list; start: see `list_starts`."""
    again = np.append(False, values[1:] == values[:-1])
    again[start[:-1][start[:-1] < len(values)]] = False
    return again[: len(values)]
