"""Negatives in proportion to how often items were met: `work.negative_sampling = "popularity"`."""

from typing import NamedTuple

import numpy as np

from jaxfed.data.ragged import Domains, Ragged


class PopularityIndex(NamedTuple):
    """What negatives in proportion to popularity are found by. W is the number of train interactions of all users.

    The interactions with items outside a user's list are numbered from 0, item by item in the order of places: domain
    by domain where there are domains, else by number. A negative is the item of one of these interactions.
    """

    mass: np.ndarray  # int64 [N + 1]: interactions with the items before each place
    gaps: np.ndarray  # int64 [X]: user * (W + 1) + interactions outside the user's list before each item on it, sorted
    skipped: np.ndarray  # int64 [X + 1]: interactions with the items before each entry of all lists, end to end
    begin: np.ndarray  # int64 [U]: interactions before the user's domain
    open: np.ndarray  # int64 [U]: interactions with the items of the user's domain that are not on the user's list


def make_popularity_index(
    train: Ragged, excluded: Ragged, items: int, span: tuple[np.ndarray, np.ndarray], domains: Domains | None = None
) -> PopularityIndex:
    """The index of the train interactions of all users.

    Args:
        train: The train items of each user.
        excluded: The items that are no negatives of each user, sorted and distinct.
        items: N.
        span: (the first place of each user's domain, how many items it has), int [U] each.
        domains: None: there is one catalogue.
    """
    if len(train.values) >= 1 << 32:
        raise ValueError("work.negative_sampling: interactions are numbered with 32 bits, too few for these data")
    order = np.arange(items) if domains is None else domains.items
    mass = np.append(0, np.cumsum(np.bincount(train.values, minlength=items)[order]))
    user = np.repeat(np.arange(len(excluded.counts)), excluded.counts)
    place = excluded.values if domains is None else span[0][user] + domains.place[excluded.values]
    skipped = np.append(0, np.cumsum(mass[place + 1] - mass[place]))
    begin, end = mass[span[0]], mass[span[0] + span[1]]
    before = mass[place] - begin[user] - (skipped[:-1] - skipped[excluded.start[user]])
    gaps = user * (mass[-1] + 1) + before
    return PopularityIndex(mass, gaps, skipped, begin, end - begin - np.diff(skipped[excluded.start]))


def find_popular_items(index: PopularityIndex, excluded: Ragged, user: np.ndarray, rank: np.ndarray) -> np.ndarray:
    """int64 [n, k]: the places of the items of some interactions outside each user's list.

    user int [n]; rank int64 [n, k]: numbers of interactions, from 0 to `index.open` of the user.
    """
    passed = np.searchsorted(index.gaps, (user * (index.mass[-1] + 1))[:, None] + rank, "right")
    jumped = index.skipped[passed] - index.skipped[excluded.start[user]][:, None]
    return np.searchsorted(index.mass, index.begin[user][:, None] + rank + jumped, "right") - 1


def scale_random(random32: np.ndarray, most: np.ndarray | int) -> np.ndarray:
    """int64: numbers below `most`, uniform up to 2^-32, from 32 random bits each."""
    return (random32 * np.asarray(most, np.uint64) >> np.uint64(32)).astype(np.int64)
