"""Which rows train, validate and test: each user's latest, rows drawn by chance, or what a data set itself says."""

from typing import Literal, NamedTuple, get_args

import numpy as np

from jaxfed.core.streams import SetupStream, setup_rng
from jaxfed.data.interactions import Dataset, select_rows
from jaxfed.data.ragged import concatenate_ranges, sort_pairs
from jaxfed.data.sorting import sort_histories

Protocol = Literal[
    "loo-clean",
    "ratio-clean",
    "compat-pfedrec",
    "loo-random",
    "ratio-random",
    "global-random",
    "global-time",
]
LATEST = ("loo-clean", "ratio-clean", "compat-pfedrec")  # hold out the latest rows of each user
GLOBAL = ("global-random", "global-time")  # hold out shares of all rows, whose they may be
PART = " part"  # the column with the part of each row, where a data set, or chance, says which

TRAIN, VALID, TEST = 0, 1, 2
LEAST = 3  # one row each to train, to choose by and to test on


class Split(NamedTuple):
    """Which part each row belongs to, and where a row stands in its user's history."""

    part: np.ndarray  # int8 [n]: TRAIN, VALID or TEST
    order: np.ndarray  # int [n]: row numbers sorted by user, then from the earliest to the latest
    leaky: bool  # train negatives leave held-out items out, so every result is marked
    by_ties: int = 0  # held-out rows with the time of a row of the same user in another part, which the order decided
    by_order: int = 0  # rows that are held out as the latest of their user


def check_protocol(protocol: str, ratio: tuple[float, float]) -> None:
    """Raises ValueError for a protocol that there is not, or shares that cannot be."""
    if protocol not in get_args(Protocol):
        *most, last = get_args(Protocol)
        raise ValueError(f"no protocol {protocol!r}: choose {', '.join(most)} or {last}")
    shares = protocol.startswith(("ratio", "global"))
    if shares and (len(ratio) != 2 or not (min(ratio) > 0 and sum(ratio) < 1)):
        raise ValueError(
            f"ratio {ratio}: two shares, of validation and test, which must be positive and add up to less than 1"
        )


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
    """The part of each row, and the order of the rows within each user.

    loo-clean: test = the latest row, validation = the one before; of equal times a later row of the source counts as
    later (`data.ties_in_order`), or the earliest as the latest (pandas `rank(method="first", ascending=False)`, as
    published figures of MovieLens have it). ratio-clean: the last ratio[1] of the rows are test, the ratio[0] before
    them validation, at least one each. compat-pfedrec: as loo-clean, marked leaky: train negatives are drawn from what
    the user never touched, held-out rows included, as in the public code of PFedRec and others. Where the data have the
    column `PART` it says which part each row is of; if it names no validation, the latest train rows of each user are.
    """
    check_protocol(protocol, ratio)
    user, time = data.interactions.user, data.interactions.time
    order = sort_histories(user, time, len(data.users), data.ties_in_order)
    leaky = protocol == "compat-pfedrec"
    if PART not in data.columns:
        valid, test = count_held_out(np.bincount(user, minlength=len(data.users)), protocol, ratio)
        part = hold_out_last(user, order, valid, test)
    elif needs_validation(data):
        order_of_train = order[data.columns[PART][order] == TRAIN]
        valid = count_validation(np.bincount(user[order_of_train], minlength=len(data.users)), protocol, ratio)
        held_out = hold_out_last(user, order_of_train, valid, np.zeros_like(valid))
        ties = count_decided_by_ties(data, held_out[order_of_train], order_of_train)
        return Split(np.maximum(data.columns[PART], held_out), order, leaky, ties, int(valid.sum()))
    else:
        return Split(data.columns[PART], order, leaky)
    return Split(part, order, leaky, count_decided_by_ties(data, part[order], order), int((part != TRAIN).sum()))


def needs_validation(data: Dataset) -> bool:
    """Whether a data set says which rows test, and none that validate."""
    return PART in data.columns and not (data.columns[PART] == VALID).any()


def count_held_out(count: np.ndarray, protocol: Protocol, ratio: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """int64 [users] each: how many rows of each user, who has `count`, validate and test."""
    if not protocol.startswith("ratio"):
        return np.ones(len(count), np.int64), np.ones(len(count), np.int64)
    valid, test = (np.maximum((share * count).astype(np.int64), 1) for share in ratio)
    test = np.minimum(test, count - 2)
    return np.minimum(valid, count - test - 1), test


def count_validation(count: np.ndarray, protocol: Protocol, ratio: tuple[float, float]) -> np.ndarray:
    """int64 [users]: how many of each user's `count` train rows validate where the test rows are given; one trains."""
    share = ratio[0] if protocol.startswith("ratio") else 0.0
    return np.clip((share * count).astype(np.int64), 1, np.maximum(count - 1, 0))


def hold_out_last(group: np.ndarray, rows: np.ndarray, valid: np.ndarray, test: np.ndarray) -> np.ndarray:
    """int8 [n]: the part of each row; the last `test` rows of each group test, the `valid` before them validate.

    group int [n]; rows: row numbers by group, in each those to be held out last; all others train.
    """
    count = np.bincount(group[rows], minlength=len(valid))
    held_out, end = np.clip(valid + test, 0, count), np.cumsum(count)
    test = np.clip(test, 0, held_out)
    part = np.full(len(group), TRAIN, np.int8)
    part[rows[concatenate_ranges(end - test, test)]] = TEST
    part[rows[concatenate_ranges(end - held_out, held_out - test)]] = VALID
    return part


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


def assign_parts(data: Dataset, protocol: Protocol, ratio: tuple[float, float], seed: int) -> Dataset:
    """The same data with the column `PART`, where neither the data nor the order of each user's rows say what is held
    out.

    loo-random: of each user a random row tests, another validates. ratio-random: random shares of each user's rows.
    global-random: random shares of all rows. global-time: of all rows the latest; equal times are in one part. What
    chance decides is a function of the seed and of the (user, item) pairs, whatever the order of their rows.

    Raises ValueError where shares of all rows cannot be.
    """
    check_protocol(protocol, ratio)
    user, given = data.interactions.user, data.columns.get(PART)
    if protocol in LATEST or (given is not None and not needs_validation(data)):
        return data
    if given is not None and protocol in GLOBAL:
        raise ValueError(
            f'data.protocol = "{protocol}": the test rows are given, and no validation rows: choose loo-clean, '
            "ratio-clean, loo-random or ratio-random, which take them from each user's train rows"
        )
    if protocol in GLOBAL:
        part = hold_out_globally(data, protocol, ratio, seed)
    else:
        rows = sort_pairs(user.astype(np.int64), rank_by_chance(data, seed), len(data.users), len(user))[1]
        if given is None:
            sizes = count_held_out(np.bincount(user, minlength=len(data.users)), protocol, ratio)
            part = hold_out_last(user, rows, *sizes)
        else:
            rows = rows[given[rows] == TRAIN]
            valid = count_validation(np.bincount(user[rows], minlength=len(data.users)), protocol, ratio)
            part = np.maximum(given, hold_out_last(user, rows, valid, np.zeros_like(valid)))
    return data._replace(columns={**data.columns, PART: part})


def rank_by_chance(data: Dataset, seed: int) -> np.ndarray:
    """int64 [n]: a random rank of each row, all different, drawn in the order of ids: it is the same at any client."""
    user, item = data.interactions.user, data.interactions.item
    rank, by_id = np.empty(len(user), np.int64), np.unique(data.users, return_inverse=True)[1]
    pairs = sort_pairs(by_id[user], item, len(data.users), len(data.items))[1]
    rank[pairs] = setup_rng(seed, SetupStream.SPLIT, len(user)).permutation(len(user))
    return rank


def hold_out_globally(data: Dataset, protocol: Protocol, ratio: tuple[float, float], seed: int) -> np.ndarray:
    """int8 [n]: the part of each row, of shares of all rows. Raises ValueError where a part would be empty."""
    time, n = data.interactions.time, len(data.interactions.time)
    valid, test = (np.array([max(int(share * n), 1)]) for share in ratio)
    if protocol == "global-random":
        return hold_out_last(np.zeros(n, np.int64), np.argsort(rank_by_chance(data, seed)), valid, test)
    if not data.has_times:
        raise ValueError('data.protocol = "global-time": the data have no times: choose loo-random or global-random')
    ordered = np.sort(time)
    starts = ordered[n - test[0]], ordered[max(n - test[0] - valid[0], 0)]  # the first times of test and validation
    part = np.where(time >= starts[0], TEST, np.where(time >= starts[1], VALID, TRAIN)).astype(np.int8)
    if len(np.unique(part)) < 3:
        raise ValueError(
            f'data.protocol = "global-time": too many of the {n:,} rows have equal times for shares of {ratio[0]:g} '
            f"and {ratio[1]:g}: change data.ratio, or choose another protocol"
        )
    return part
