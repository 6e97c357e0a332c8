"""Negatives that a file gives: the items that the held-out items of each user are ranked among."""

from typing import NamedTuple

import numpy as np

from jaxfed.core.excerpt import shorten
from jaxfed.data.ragged import Ragged, make_ragged

PARTS = ("train", "validation", "test")  # what the parts of a split are called, by their numbers


class GivenNegatives(NamedTuple):
    """Pairs of a user and an item, by ids of their own: the users and items need not be those of the interactions."""

    name: str  # of the file, for messages
    user: np.ndarray  # int32 [m]: 0 <= user < len(users)
    item: np.ndarray  # int32 [m]: 0 <= item < len(items)
    users: np.ndarray  # str: ids
    items: np.ndarray  # str: ids
    targets: np.ndarray  # str [users]: the test item that the file names for each user; [0]: it names none


def find_ids(ids: np.ndarray, among: np.ndarray) -> np.ndarray:
    """int64 [len(ids)]: the place of each id in `among`, -1 where it is not there."""
    places = {name: place for place, name in enumerate(among.tolist())}
    return np.array([places.get(name, -1) for name in ids.tolist()], np.int64)


def match_negatives(
    given: GivenNegatives, users: np.ndarray, items: np.ndarray, rows: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> tuple[Ragged, tuple[str, ...]]:
    """The given negatives of each user of a population.

    Args:
        given: what the file has.
        users: str [U]: the ids of the users, one user at several clients several times.
        items: str [N]: the ids of the items.
        rows: the user, the item and the part of every interaction [n], as numbers.

    Returns:
        (the items of each user, sorted and distinct; notes on what was left out).

    Raises:
        ValueError: a user has none, or a negative is an item that the user interacted with.
    """
    item_number, of = find_ids(given.items, items), find_ids(users, given.users)
    notes = note_unknown(given, item_number, of)
    known = item_number[given.item] >= 0
    user, item = given.user[known].astype(np.int64), item_number[given.item[known]]
    pairs = np.unique(user * len(items) + item)
    if len(pairs) < len(user):
        notes.append(f"{given.name}: {len(user) - len(pairs):,} negatives come twice and count once")
    lists = make_ragged((pairs % len(items)).astype(np.int32), pairs // len(items), len(given.users))
    without = np.where(of < 0, True, lists.counts[of] == 0)
    if without.all():
        whose, own, known = ("users", given.users, users) if (of < 0).all() else ("items", given.items, items)
        raise ValueError(
            f'{given.name}: none of its {whose} is one of the data\'s ("{shorten(own[0])}" here, "{shorten(known[0])}" '
            "there): check that it writes ids as the data do"
        )
    if without.any():
        raise ValueError(
            f"{given.name}: {int(without.sum()):,} of {len(users):,} users have no negatives (the first: "
            f'"{shorten(users[without.argmax()])}"): add them, or leave these users out of the interactions'
        )
    found = lists.some(of)
    check_untouched(given, found, users, items, rows)
    notes += note_lengths(given, found) + note_other_targets(given, users, items, of, rows)
    return found, tuple(notes)


def note_unknown(given: GivenNegatives, item_number: np.ndarray, of: np.ndarray) -> list[str]:
    """Notes on users and items of the file that are none of the population, which are left out."""
    notes, strangers = [], np.ones(len(given.users), bool)
    strangers[of[of >= 0]] = False
    for kind, ids, missing, rows in (
        ("users", given.users, strangers, given.user),
        ("items", given.items, item_number < 0, given.item),
    ):
        if missing.any():
            notes.append(
                f"{given.name}: {int(missing.sum()):,} of its {len(ids):,} {kind} are none of the data's (the first: "
                f'"{shorten(ids[missing.argmax()])}"): {int(missing[rows].sum()):,} negatives left out'
            )
    return notes


def check_untouched(
    given: GivenNegatives,
    found: Ragged,
    users: np.ndarray,
    items: np.ndarray,
    rows: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:
    """Raises ValueError where a negative is an item that the user interacted with."""
    owner = np.repeat(np.arange(len(users)), found.counts)
    touched = rows[0].astype(np.int64) * len(items) + rows[1]
    wrong = np.isin(touched, owner * len(items) + found.values)
    if wrong.any():
        user, item, part = (column[wrong.argmax()] for column in rows)
        raise ValueError(
            f"{given.name}: {int(wrong.sum()):,} negatives are items that the user interacted with (the first: user "
            f'"{shorten(users[user])}", item "{shorten(items[item])}", a {PARTS[part]} item): take them out'
        )


def note_lengths(given: GivenNegatives, found: Ragged) -> list[str]:
    """A note on users who have fewer negatives than others, if there are any."""
    low, high = int(found.counts.min()), int(found.counts.max())
    few = int((found.counts < high).sum())
    note = (
        f"{given.name}: users have {low:,} to {high:,} negatives, {few:,} of {len(found.counts):,} fewer than {high:,}"
    )
    return [note] if few else []


def note_other_targets(
    given: GivenNegatives,
    users: np.ndarray,
    items: np.ndarray,
    of: np.ndarray,
    rows: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> list[str]:
    """A note on users for whom the file names a test item that is another by the split, if there are any."""
    if not len(given.targets):
        return []
    target = find_ids(given.targets, items)[of]
    tested = rows[2] == PARTS.index("test")
    pairs = rows[0][tested].astype(np.int64) * len(items) + rows[1][tested]
    same = np.isin(np.arange(len(users)) * len(items) + target, pairs) & (target >= 0)
    other = int((~same).sum())
    note = (
        f"{given.name} names another test item than the split for {other:,} of {len(users):,} users (the first: "
        f'"{shorten(users[(~same).argmax()])}"): its figures are of another test'
    )
    return [note] if other else []
