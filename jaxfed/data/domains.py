"""Domains: a part of a catalogue, chosen by features of items; or files of interactions that share users."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxfed.core.excerpt import shorten, shorten_list
from jaxfed.data.given_parts import join_ids
from jaxfed.data.interactions import Dataset, Interactions, select_rows

DOMAIN = "domain"  # the column that says of which file a row is


def find_items(data: Dataset, names: Sequence[str], where: str) -> np.ndarray:
    """bool [items]: which items have one of some features. Raises ValueError for a feature that is not there."""
    known = data.item_features
    if known is None:
        raise ValueError(f"{where}: the data have no features of items: name a file of them (data.item_features)")
    places = {name: place for place, name in enumerate(known.names.tolist())}
    for name in names:
        if name not in places:
            raise ValueError(f'{where}: no item has "{shorten(name)}"; there are {shorten_list(known.names.tolist())}')
    found: np.ndarray = np.isin(known.numbers, [places[name] for name in names])
    return np.any(found, axis=1)


def select_domain(data: Dataset, wanted: Sequence[str], unwanted: Sequence[str]) -> Dataset:
    """The rows of items that have one of the wanted features, if any are named, and none of the unwanted ones.

    Raises ValueError where a feature is not there, or no row is left.
    """
    if not wanted and not unwanted:
        return data
    kept = find_items(data, wanted, "data.items_with") if wanted else np.ones(len(data.items), bool)
    if unwanted:
        kept &= ~find_items(data, unwanted, "data.items_without")
    rows = kept[data.interactions.item]
    if not rows.any():
        raise ValueError("data.items_with, data.items_without: no row is left: name other features")
    note = f"{int(kept.sum()):,} of {len(kept):,} items are in the domain, with {int(rows.sum()):,} rows"
    return select_rows(data, rows, note)


def list_domains(paths: Sequence[str]) -> dict[str, str]:
    """{the name of a file without its ending: its path}. Raises ValueError where two have one name."""
    found: dict[str, str] = {}
    for path in paths:
        name = Path(path).expanduser().name.removesuffix(".gz")
        name = name.rpartition(".")[0] or name
        if name in found:
            raise ValueError(
                f"data.domains: {shorten(found[name])} and {shorten(path)} have the same name, {shorten(name)}, and it "
                "is that of the domain: rename one"
            )
        found[name] = path
    return found


def find_shared_users(sets: dict[str, Dataset], user: np.ndarray, users: int) -> np.ndarray:
    """bool [users]: who has rows in more than one domain. user int [n]: of all rows, domain after domain.

    Raises ValueError where a domain shares no user with the others, or some have times and others have none.
    """
    names, timed = list(sets), [each.has_times for each in sets.values()]
    if len({*timed}) > 1:
        raise ValueError(
            f"data.domains: {shorten(names[timed.index(True)])} has times and {shorten(names[timed.index(False)])} has "
            'none: name its column (data.time), or set data.time = "none" for all'
        )
    present = np.zeros((len(names), users), bool)
    present[np.repeat(np.arange(len(names)), [len(each.interactions.user) for each in sets.values()]), user] = True
    shared = present.sum(0) > 1
    for name, there in zip(names, present, strict=True):
        if not (there & shared).any():
            raise ValueError(
                f"data.domains: no user of {shorten(name)} is in another file: users need the same ids in all of them"
            )
    return shared


def join_domains(sets: dict[str, Dataset]) -> Dataset:
    """One data set of those of several domains, with the column `DOMAIN`. Ids of users that are equal are one user; an
    item is called domain/id.

    Args:
        sets: {domain: its rows}. What is known of items and users beside their ids is left out.

    Raises:
        ValueError: a domain shares no user with the others, or some have times and others have none.
    """
    each, lengths = list(sets.values()), [len(some.interactions.user) for some in sets.values()]
    user, users = join_ids([(some.users, some.interactions.user) for some in each])
    shared = find_shared_users(sets, user, len(users))
    starts = np.cumsum([0, *(len(some.items) for some in each)])
    item = np.concatenate([some.interactions.item + start for some, start in zip(each, starts, strict=False)])
    rating, time = (np.concatenate([some.interactions[column] for some in each]) for column in (2, 3))
    time = time if each[0].has_times else np.arange(len(user))
    columns = {name: np.concatenate([some.columns[name] for some in each]) for name in each[0].columns}
    notes = [f"{name}: {note}" for name, some in sets.items() for note in some.notes]
    notes.append(f"{len(sets)} domains; {int(shared.sum()):,} of {len(users):,} users are in more than one of them")
    if any(some.titles is not None or some.user_features or some.item_features for some in each):
        notes.append("titles and features that were found beside the files are not read")
    return each[0]._replace(
        interactions=Interactions(user, item.astype(np.int32), rating, time),
        users=users,
        items=np.concatenate([np.char.add(f"{name}/", some.items) for name, some in sets.items()]),
        titles=None,
        columns=columns | {DOMAIN: np.repeat(list(sets), lengths)},
        notes=tuple(notes),
        user_features=None,
        item_features=None,
    )
