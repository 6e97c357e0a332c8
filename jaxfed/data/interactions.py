"""Who did what, when: columns of NumPy arrays, and what is done to them before they are split."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from jaxfed.core.excerpt import shorten
from jaxfed.core.recipe import Recipe
from jaxfed.data.features import Features
from jaxfed.data.given_negatives import GivenNegatives
from jaxfed.data.sorting import find_repeats, list_starts, number_present, sort_histories, sort_pairs_of_rows

CLIENT = " client"  # the column with the client of each row; a source's columns have no blanks around their names
AT_ONCE = 1 << 20  # rows whose ids are joined at a time
FEW = 64  # a few users are one of so many


class Interactions(NamedTuple):
    """n rows in the order of their source. The order is data: it decides between equal times."""

    user: np.ndarray  # int32 [n]: 0 <= user < number of users
    item: np.ndarray  # int32 [n]: 0 <= item < number of items
    rating: np.ndarray  # float32 [n]; 1 where the source has none
    time: np.ndarray  # int64 [n]: seconds, or the row's number where the source has none

    def at(self, index: np.ndarray) -> "Interactions":
        """The rows `index` (positions or a mask)."""
        return Interactions(*(column[index] for column in self))


class Dataset(NamedTuple):
    """Interactions, and what the numbers in them are called."""

    interactions: Interactions
    users: np.ndarray  # [users]: the source's own ids, as strings
    items: np.ndarray  # [items]
    titles: np.ndarray | None = None  # [items]: what a person calls them
    columns: dict[str, np.ndarray] = {}  # further columns, one value a row [n]
    notes: tuple[str, ...] = ()  # what was done to the source, for the reader
    user_features: Features | None = None  # of the users, in their order; None: nothing is known of them
    item_features: Features | None = None
    ties_in_order: bool = False  # of a user's rows with equal times a later one is later; else it is earlier
    features_follow: bool = False  # from the rows, as in a published data set: the digest is that of the rows alone
    recipe: Recipe | None = None  # the call that read it
    has_times: bool = True  # false: the number of each row stands for its time
    one_clock: bool = True  # false: only some of the rows have times
    negatives: GivenNegatives | None = None  # what held-out items are ranked among; None: what is drawn


def number_ids(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(number of each row's id, the ids): numbers follow the sorted ids; whole numbers sort as numbers.

    Words that look like numbers stay words unless all of them are written as numbers are: 007 is not 7.
    """
    whole = None if raw.dtype.kind in "iu" else whole_numbers(raw)
    ids, number = np.unique(raw if whole is None else whole, return_inverse=True)
    return number.astype(np.int32), ids.astype(str)


def whole_numbers(names: np.ndarray) -> np.ndarray | None:
    """int64 [n]: ids as numbers; None unless all of them are written as whole numbers are that 64 bits hold."""
    try:
        whole = names.astype(np.int64)
    except (ValueError, OverflowError):
        return None
    return whole if (whole.astype(str) == names).all() else None


def item_numbers(items: np.ndarray, names: Sequence[str], where: str) -> np.ndarray:
    """int64 [len(names)]: the numbers of items [N] by their names. Raises ValueError, which begins with `where`, for
    one that is not there."""
    numbers = {name: number for number, name in enumerate(items.tolist())} if len(names) else {}
    if missing := [name for name in names if name not in numbers]:
        raise ValueError(
            f'{where}: no item "{shorten(missing[0])}" in the data; ids are those of the source, in quotes'
        )
    return np.array([numbers[name] for name in names], np.int64)


def data_digest(data: Dataset, features: bool = False) -> str:
    """SHA-256 of the rows in their order, by the source's own ids; features: and of what is known beside the ids."""
    user, item, rating, time = data.interactions
    sha = hashlib.sha256()
    for ids, column in ((data.users, user), (data.items, item)):
        lines = pa.array([f"{name}\n" for name in ids.tolist()], pa.large_string())
        for low in range(0, len(column), AT_ONCE):
            _, ends, text = lines.take(pa.array(column[low : low + AT_ONCE])).buffers()
            end = int(np.frombuffer(ends, np.int64)[min(AT_ONCE, len(column) - low)])
            sha.update(memoryview(text)[: end if low + AT_ONCE < len(column) else end - 1])  # no line end at the end
        sha.update(b";")
    for values, dtype in ((rating, "<f4"), (time, "<i8")):
        sha.update(np.ascontiguousarray(values, dtype).data)
        sha.update(b";")
    if data.ties_in_order and has_equal_times(data.interactions):
        sha.update(b"ties in order;")
    for table in (data.user_features, data.item_features) if features else ():
        if table is not None:
            sha.update("\n".join(table.names.tolist()).encode() + b";")
            sha.update(np.ascontiguousarray(table.numbers, "<i4").tobytes() + b";")
    return sha.hexdigest()


def has_equal_times(rows: Interactions) -> bool:
    """Whether a user has two rows with the same time."""
    users = int(rows.user.max(initial=0)) + 1
    for some in (rows.at(rows.user < users // FEW), rows):  # where there are any, a few users have some
        time = some.time[sort_histories(some.user, some.time, users)]
        if find_repeats(time, list_starts(np.bincount(some.user, minlength=users))).any():
            return True
    return False


def select_rows(data: Dataset, keep: np.ndarray, note: str = "") -> Dataset:
    """The rows where `keep` (bool [n]), users and items renumbered to those that are left."""
    rows = data.interactions.at(keep)
    users, user = number_present(rows.user, len(data.users))
    items, item = number_present(rows.item, len(data.items))
    return data._replace(
        interactions=rows._replace(user=user, item=item),
        users=data.users[users],
        items=data.items[items],
        titles=None if data.titles is None else data.titles[items],
        columns={name: column[keep] for name, column in data.columns.items()},
        notes=(*data.notes, note) if note else data.notes,
        user_features=None if data.user_features is None else data.user_features.some(users),
        item_features=None if data.item_features is None else data.item_features.some(items),
    )


def drop_repeats(data: Dataset) -> Dataset:
    """Keeps the earliest row of each (user, item): a later one would be a test item seen in training."""
    user, item, _, time = data.interactions
    order = sort_pairs_of_rows(user, item, len(data.users), len(data.items))
    again = find_repeats(item[order], list_starts(np.bincount(user, minlength=len(data.users))))
    if not again.any():
        return data
    repeated = again | np.append(again[1:], False)
    rows, later = order[repeated], again[repeated]
    by_time = np.lexsort((time[rows], np.cumsum(~later)))  # pair by pair; equal times stay in the order of rows
    keep = np.ones(len(order), bool)
    keep[rows[by_time[later]]] = False
    return select_rows(data, keep, f"{int(again.sum()):,} repeated (user, item) rows left out, the earliest kept")


def k_core(data: Dataset, users: int, items: int) -> Dataset:
    """Drops users with fewer than `users` and items with fewer than `items` rows until none is left to drop."""
    user, item = data.interactions.user, data.interactions.item
    keep = np.ones(len(user), bool)
    while True:
        by_user = np.bincount(user[keep], minlength=len(data.users))
        by_item = np.bincount(item[keep], minlength=len(data.items))
        fewer = keep & (by_user[user] >= users) & (by_item[item] >= items)
        if fewer.sum() == keep.sum():
            break
        keep = fewer
    if not keep.any():
        raise ValueError(f"no rows are left with {users} rows a user and {items} an item: lower user_core or item_core")
    dropped = int((~keep).sum())
    note = f"{dropped:,} rows left out by the k-core ({users} rows a user, {items} an item)"
    return select_rows(data, keep, note) if dropped else data
