"""Data sets that say themselves which rows train, validate and test, and what these are ranked among."""

import hashlib

import numpy as np

from jaxfed.core.excerpt import shorten
from jaxfed.data.given_negatives import PARTS, match_negatives
from jaxfed.data.interactions import Dataset, number_ids, select_rows
from jaxfed.data.population import Population
from jaxfed.data.ragged import sort_pairs
from jaxfed.data.splits import (
    GLOBAL,
    PART,
    TEST,
    TRAIN,
    Protocol,
    assign_parts,
    drop_short_histories,
    needs_validation,
)


def join_parts(parts: dict[int, Dataset]) -> Dataset:
    """One data set of those of the parts, with the column `PART`; ids that are equal are one user or item.

    Args:
        parts: {TRAIN, VALID or TEST: its rows}, without titles, features and negatives.

    Returns:
        The data set; its rows are those of the parts one after the other.
    """
    sets, train = list(parts.values()), parts[TRAIN]
    user, users = join_ids([(each.users, each.interactions.user) for each in sets])
    item, items = join_ids([(each.items, each.interactions.item) for each in sets])
    rest = (np.concatenate([each.interactions[column] for each in sets]) for column in (2, 3))
    columns = {name: np.concatenate([each.columns[name] for each in sets]) for name in train.columns}
    columns[PART] = np.repeat(np.array(list(parts), np.int8), [len(each.interactions.user) for each in sets])
    notes = [f"{PARTS[part]}: {note}" for part, each in parts.items() for note in each.notes]
    return train._replace(
        interactions=type(train.interactions)(user, item, *rest),
        users=users,
        items=items,
        columns=columns,
        notes=tuple(notes),
        one_clock=all(each.has_times and each.one_clock for each in sets),
    )


def join_ids(lists: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """(int32 [n]: the number of each row's id, the ids), from (ids, number of each row's) of several tables."""
    place, ids = number_ids(np.concatenate([names for names, _ in lists]))
    starts = np.cumsum([0, *(len(names) for names, _ in lists)])
    return np.concatenate([place[start + number] for start, (_, number) in zip(starts, lists, strict=False)]), ids


def given_parts_digest(digest: str, data: Dataset) -> str:
    """SHA-256 of a data set's digest and of what it says of parts and negatives; the digest itself where it says
    nothing."""
    given = data.negatives
    if PART not in data.columns and given is None:
        return digest
    sha = hashlib.sha256(digest.encode())
    if PART in data.columns:
        sha.update(b";parts;" + np.ascontiguousarray(data.columns[PART], "i1").tobytes())
    if given is not None:
        for ids in (given.users, given.items, given.targets):
            sha.update(b";negatives;" + "\n".join(ids.tolist()).encode())
        for numbers in (given.user, given.item):
            sha.update(np.ascontiguousarray(numbers, "<i4").tobytes())
    return sha.hexdigest()


def check_given_parts(data: Dataset, user_core: int, item_core: int) -> None:
    """Raises ValueError where a part is empty, a (user, item) is in two parts, or rows would be left out of one."""
    part = data.columns[PART]
    for each in (TRAIN, TEST):
        if not (part == each).any():
            raise ValueError(f"no row of the data is of the part {PARTS[each]}: a split needs train and test rows")
    if user_core or item_core:
        raise ValueError(
            "data.user_core, data.item_core: the parts of the data are given, a k-core would change them: set both to 0"
        )
    user, item = data.interactions.user.astype(np.int64), data.interactions.item
    pair, order = sort_pairs(user, item, len(data.users), len(data.items))
    clash = (np.diff(pair) == 0) & (np.diff(part[order]) != 0)
    if clash.any():
        first = np.flatnonzero(clash)[0]
        row, other = order[first], order[first + 1]
        count = len(np.unique(pair[:-1][clash]))
        raise ValueError(
            f"{count:,} (user, item) pairs are in two parts (the first: user "
            f'"{shorten(data.users[user[row]])}", item "{shorten(data.items[item[row]])}", in {PARTS[part[row]]} and '
            f"{PARTS[part[other]]}): parts must not overlap, leave each pair in one"
        )


def prepare_parts(data: Dataset, protocol: Protocol, ratio: tuple[float, float], seed: int) -> Dataset:
    """The data set without users who cannot be split, and with the column `PART` where it is not each user's latest
    rows that are held out. Raises ValueError where a part would be empty."""
    given = PART in data.columns
    if not given and protocol not in GLOBAL:
        return assign_parts(drop_short_histories(data), protocol, ratio, seed)
    if not given:
        return drop_untrained_users(assign_parts(data, protocol, ratio, seed), 1.0)
    data = note_untrained_items(drop_untrained_users(data, 0.5))
    return assign_parts(note_missing_validation(data, protocol), protocol, ratio, seed)


def count_train_rows(data: Dataset, ids: np.ndarray, count: int) -> np.ndarray:
    """int64 [count]: the train rows of each user or item; ids [n]: that of each row."""
    return np.bincount(ids[data.columns[PART] == TRAIN], minlength=count)


def drop_untrained_users(data: Dataset, most: float) -> Dataset:
    """Leaves out users without a train row, and says who.

    most: the share of the users with held-out rows that may be left out. Raises ValueError where they are more, or a
    part would be empty.
    """
    user, part = data.interactions.user, data.columns[PART]
    unknown = count_train_rows(data, user, len(data.users)) == 0
    if not unknown.any():
        return data
    rows, held_out = unknown[user], len(np.unique(user[part != TRAIN]))
    what = (
        f"{int(unknown.sum()):,} of {held_out:,} users with validation or test rows have no train row (the first: "
        f'"{shorten(data.users[unknown.argmax()])}")'
    )
    if unknown.sum() > most * held_out or len(np.unique(part[~rows])) < len(np.unique(part)):
        mend = "check that all parts write ids the same way, or leave these users out"
        raise ValueError(f"{what}: {mend if most < 1 else 'choose another data.protocol'}")
    return select_rows(data, ~rows, f"{what}: left out, with {int(rows.sum()):,} rows")


def note_untrained_items(data: Dataset) -> Dataset:
    """The same data with a note on items without a train row. Raises ValueError where the items of all other rows
    are."""
    item = data.interactions.item
    unknown = count_train_rows(data, item, len(data.items)) == 0
    if not unknown.any():
        return data
    rows = unknown[item]
    what = (
        f"{int(unknown.sum()):,} of {len(data.items):,} items have no train row (the first: "
        f'"{shorten(data.items[unknown.argmax()])}")'
    )
    if rows[data.columns[PART] != TRAIN].all():
        raise ValueError(
            f"{what}, among them all of the validation and test rows: check that all parts write ids the same way"
        )
    note = f"{what}: their {int(rows.sum()):,} validation and test rows stay, though no model has seen these items"
    return data._replace(notes=(*data.notes, note))


def note_missing_validation(data: Dataset, protocol: Protocol) -> Dataset:
    """The same data with a note on how validation rows are chosen, where none are given."""
    if not needs_validation(data):
        return data
    user = data.interactions.user
    single = int((count_train_rows(data, user, len(data.users)) == 1).sum())
    which = "random" if protocol.endswith("random") else "latest"
    rows = f"{'a' if which == 'random' else 'the'} {which} {'share' if protocol.startswith('ratio') else 'one'}"
    note = f'no validation rows are given: {rows} of each user\'s train rows validates (data.protocol = "{protocol}")'
    note += f"; {single:,} users with a single train row have none" if single else ""
    return data._replace(notes=(*data.notes, note))


def add_given_negatives(
    data: Dataset, population: Population, part: np.ndarray, refused: list[str]
) -> tuple[Dataset, Population]:
    """The population with the negatives that came with the data, and the data with notes on them in their place.

    Args:
        data: the data set, numbered like the users of the population.
        population: who has them, each user once.
        part: int8 [n], of each row.
        refused: options that were chosen and do not go with given negatives.

    Raises:
        ValueError: there can be none, or they do not fit, see `match_negatives`.
    """
    assert data.negatives
    if population.labels:
        raise ValueError(
            f'data.negatives: with data.label = "{population.labels.kind}" nothing is ranked: leave it out'
        )
    if refused:
        raise ValueError(f"data.negatives: given negatives do not go with {refused[0]}: leave one of both out")
    rows = data.interactions.user, data.interactions.item, part
    negatives, notes = match_negatives(data.negatives, data.users, data.items, rows)
    return data._replace(negatives=None, notes=(*data.notes, *notes)), population._replace(negatives=negatives)
