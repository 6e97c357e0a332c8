"""Splits by time, within each user."""

from typing import Literal, NamedTuple

import numpy as np

from jaxfed.data.interactions import Dataset, select_rows
from jaxfed.data.sorting import sort_histories

Protocol = Literal["loo-clean", "ratio-clean", "compat-pfedrec"]

TRAIN, VALID, TEST = 0, 1, 2
LEAST = 3  # one row each to train, to choose by and to test on


class Split(NamedTuple):
    """Which part each row belongs to, and where a row stands in its user's history."""

    part: np.ndarray  # int8 [n]: TRAIN, VALID or TEST
    order: np.ndarray  # int [n]: row numbers sorted by user, then from the earliest to the latest
    leaky: bool  # train negatives leave held-out items out, so every result is marked
    by_ties: int = 0  # held-out rows with the time of a row of the same user in another part


def drop_short_histories(data: Dataset) -> Dataset:
    """Leaves out users with fewer than 3 rows, and says how many. Raises ValueError when nobody is left."""
    rows = np.bincount(data.interactions.user, minlength=len(data.users))
    short = rows < LEAST
    if short.all():
        raise ValueError(f"no user has {LEAST} interactions, the least that can be split into train, validation, test")
    if not short.any():
        return data
    note = f"{int(short.sum()):,} users with fewer than {LEAST} interactions left out ({int(rows[short].sum()):,} rows)"
    return select_rows(data, ~short[data.interactions.user], note)


def split_histories(data: Dataset, protocol: Protocol = "loo-clean", ratio: tuple[float, float] = (0.1, 0.1)) -> Split:
    """Cuts each user's history, the latest rows for test.

    loo-clean: test = the latest row, validation = the one before; of equal times a later row of the source counts as
    later (`data.ties_in_order`), or the earliest as the latest (pandas `rank(method="first", ascending=False)`, as
    published figures of MovieLens have it). ratio-clean: the last ratio[1] of the rows are test, the ratio[0] before
    them validation, at least one each. compat-pfedrec: as loo-clean, marked leaky: train negatives are drawn from what
    the user never touched, held-out rows included, as in the public code of PFedRec and others.
    """
    if protocol not in ("loo-clean", "ratio-clean", "compat-pfedrec"):
        raise ValueError(f"no protocol {protocol!r}: choose loo-clean, ratio-clean or compat-pfedrec")
    user, time = data.interactions.user, data.interactions.time
    number = np.arange(len(user))
    order = sort_histories(user, time, len(data.users), data.ties_in_order)
    count = np.bincount(user, minlength=len(data.users))
    start = np.cumsum(count) - count
    from_end = np.empty(len(user), np.int64)  # 0: the user's latest row
    from_end[order] = (start + count)[user[order]] - 1 - number
    test = valid = np.ones(len(count), np.int64)
    if protocol == "ratio-clean":
        if len(ratio) != 2 or not (min(ratio) > 0 and sum(ratio) < 1):
            raise ValueError(
                f"ratio {ratio}: two shares, of validation and test, which must be positive and add up to less than 1"
            )
        valid, test = (np.maximum((share * count).astype(np.int64), 1) for share in ratio)
        test = np.minimum(test, count - 2)
        valid = np.minimum(valid, count - test - 1)
    held_out_part = np.where(from_end < test[user], TEST, VALID)
    part = np.where(from_end < (test + valid)[user], held_out_part, TRAIN).astype(np.int8)
    return Split(part, order, protocol == "compat-pfedrec", count_decided_by_ties(data, part[order], order))


def count_decided_by_ties(data: Dataset, part: np.ndarray, order: np.ndarray) -> int:
    """How many held-out rows have the time of a row of the same user in another part; part [n], in `order`."""
    user, time = data.interactions.user[order], data.interactions.time[order]
    same = np.append(False, (user[1:] == user[:-1]) & (time[1:] == time[:-1]))  # as the row before
    if not same.any():
        return 0
    tied = same | np.append(same[1:], False)
    part, first = part[tied], np.flatnonzero(~same[tied])
    mixed = np.minimum.reduceat(part, first) != np.maximum.reduceat(part, first)
    return int(np.add.reduceat(part != TRAIN, first)[mixed].sum())
