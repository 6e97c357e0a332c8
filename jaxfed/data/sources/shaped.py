"""Interactions made to a description: as many users, items and rows, histories as long and items as popular as it says,
with as much order and as strong groups of taste."""

import numpy as np

from jaxfed.core.recipe import named
from jaxfed.core.streams import SetupStream, setup_rng
from jaxfed.data.interactions import Dataset, Interactions
from jaxfed.data.ragged import concatenate_ranges
from jaxfed.data.sources.roles import describe_columns
from jaxfed.data.sources.shapes import Shape, history_lengths, make_item_counts, read_shape

GOLDEN = (5**0.5 - 1) / 2  # steps of this share of a circle come back to where they were as late as any
EPOCH, YEAR, DAY = 1_577_836_800, 365 * 86_400, 86_400  # seconds: 1 January 2020
EXCHANGES = 60  # rounds in which repeats are exchanged
COLUMNS = {"user": "user", "item": "item", "rating": "", "time": ""}  # of data without times
NEARBY = 8  # of these rounds, those within the group


@named("data", "shape")
def shaped_data(description: str = "small", seed: int = 0) -> Dataset:
    """Interactions of people that do not exist, of the shape that a description gives.

    Every item has a part of a line that is as wide as the item is popular; the items of a group lie side by side. A
    history is a walk on the line. With the probability `order` the next place is the successor of the last one (a fixed
    step within the group); else it is drawn anew, with the probability `loyalty` in the user's own group, else
    anywhere. The places of all users and the rows of all items are matched in their order, so that lengths and
    popularity are kept. A repeated item is exchanged with a row of another user.

    Args:
        description: A JSON file that `jaxfed data --json` printed, or the name of a shape that comes with jaxfed:
            dense-films, very-sparse-shop, sparse-shop, check-ins or small.
        seed: Random seed of the data.

    Returns:
        The data set, a function of the description and the seed.

    Raises:
        ValueError: there is no such description, or it cannot be.
    """
    return make_interactions(read_shape(description), seed)


def make_interactions(shape: Shape, seed: int = 0) -> Dataset:
    """Interactions of a shape; see `shaped_data`."""
    random = setup_rng(seed, SetupStream.SHAPED_DATA)
    length = random.permutation(history_lengths(shape))
    count = make_item_counts(shape)
    item_group = spread_evenly(random, np.full(shape.groups, 1 / shape.groups), shape.items)
    line = np.lexsort((random.random(shape.items), item_group))  # the items from the left to the right
    edges = np.concatenate([[0], np.cumsum(np.bincount(item_group, count, shape.groups))]) / shape.rows
    user = np.repeat(np.arange(shape.users, dtype=np.int32), length)
    place = draw_places(random, shape, length, edges)
    item = np.empty(shape.rows, np.int32)
    item[np.argsort(place)] = np.repeat(line, count[line])
    del place
    item = replace_repeats(random, user, item, length, item_group)
    time = draw_times(random, shape, length)
    order = np.argsort(time, kind="stable") if shape.times else random.permutation(shape.rows)
    name = random.permutation(shape.items).astype(np.int32)  # popularity is not written on the id
    rows = Interactions(
        user[order],
        name[item[order]],
        np.ones(shape.rows, np.float32),
        time[order] if shape.times else np.arange(shape.rows),
    )
    return Dataset(
        rows,
        np.arange(shape.users).astype(str),
        np.arange(shape.items).astype(str),
        notes=() if shape.times else (describe_columns(COLUMNS),),
        ties_in_order=True,
        has_times=shape.times,
    )


def spread_evenly(random: np.random.Generator, share: np.ndarray, number: int) -> np.ndarray:
    """int64 [number]: a group for each of some things in a row, so that any stretch of them has the groups in their
    `share`."""
    at = (random.random() + GOLDEN * np.arange(number)) % 1
    return np.minimum(np.searchsorted(np.cumsum(share), at, "right"), len(share) - 1)


def draw_places(random: np.random.Generator, shape: Shape, length: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """float64 [rows]: where on the line each user is at each step. edges [groups + 1]: of the groups."""
    home = np.empty(shape.users, np.int64)
    home[np.argsort(-length, kind="stable")] = spread_evenly(random, np.diff(edges), shape.users)
    home = np.repeat(home, length)
    place = random.random(shape.rows)
    loyal = random.random(shape.rows) < shape.loyalty
    place[loyal] = edges[home[loyal]] + place[loyal] * np.diff(edges)[home[loyal]]
    del home, loyal
    number = np.arange(shape.rows)
    fresh = random.random(shape.rows) >= shape.order
    fresh[np.cumsum(length) - length] = True
    since = np.maximum.accumulate(np.where(fresh, number, 0))
    start, steps = place[since], number - since
    group = np.clip(np.searchsorted(edges, start, "right") - 1, 0, shape.groups - 1)
    low, width = edges[group], np.diff(edges)[group]
    return low + (start - low + steps * (GOLDEN * width)) % width


def draw_times(random: np.random.Generator, shape: Shape, length: np.ndarray) -> np.ndarray:
    """int64 [rows]: seconds since 1970, user by user: a first day within a year, then a day on average from row to row,
    or none for a share `ties` of them."""
    gap = np.ceil(random.exponential(DAY, shape.rows)).astype(np.int64)
    gap[random.random(shape.rows) < shape.ties] = 0
    first = np.cumsum(length) - length
    gap[first] = 0
    since = np.cumsum(gap)
    return since + np.repeat(EPOCH + random.integers(0, YEAR, shape.users) - since[first], length)


def replace_repeats(
    random: np.random.Generator, user: np.ndarray, item: np.ndarray, length: np.ndarray, group: np.ndarray
) -> np.ndarray:
    """The items [n] of rows, user by user, without repeats: a repeated item and one of another row change places, first
    with rows of the same group. What cannot be exchanged becomes an item that the user lacks, by popularity."""
    items = len(group)
    key = user.astype(np.int64) * items + item
    order = np.argsort(key, kind="stable")
    repeated = np.sort(order[1:][np.diff(key[order]) == 0])
    by_group = np.argsort(group[item], kind="stable")
    begin = np.concatenate([[0], np.cumsum(np.bincount(group[item], minlength=group.max() + 1))])
    first = np.concatenate([[0], np.cumsum(length)])
    del key, order
    for attempt in range(EXCHANGES):
        if not len(repeated):
            break
        if attempt < NEARBY:
            own = group[item[repeated]]
            other = by_group[(begin[own] + random.random(len(own)) * (begin[own + 1] - begin[own])).astype(np.int64)]
        else:
            whom = random.integers(0, len(length), len(repeated))  # rather a short history, which lacks more
            other = first[whom] + (random.random(len(whom)) * length[whom]).astype(np.int64)
        repeated = repeated[~exchange_rows(user, item, first, items, repeated, other)]
    weight = np.bincount(item, minlength=items).astype(np.float64)
    for row in repeated.tolist():
        lacks = np.ones(items, bool)
        lacks[item[first[user[row]] : first[user[row] + 1]]] = False
        free = np.flatnonzero(lacks)
        if len(free):  # else the user has all items
            share = weight[free] + 1e-9  # where nobody has any of them, all alike
            item[row] = random.choice(free, p=share / share.sum())
    return item


def exchange_rows(
    user: np.ndarray, item: np.ndarray, first: np.ndarray, items: int, repeated: np.ndarray, other: np.ndarray
) -> np.ndarray:
    """Exchanges, in place, the items of rows `repeated` [m] and `other` [m] where neither user has the other's item.

    first [users + 1]: of each user's rows. Returns bool [m]: where it did.
    """
    involved = np.unique(user[np.concatenate([repeated, other])])
    rows = concatenate_ranges(first[involved], first[involved + 1] - first[involved])
    held = np.sort(user[rows].astype(np.int64) * items + item[rows])
    taken, given = item[other], item[repeated]
    new = np.stack([user[repeated].astype(np.int64) * items + taken, user[other].astype(np.int64) * items + given])
    found = held[np.minimum(np.searchsorted(held, new), len(held) - 1)] == new
    done = ~found.any(0) & ~np.isin(other, repeated)
    for keys in (other, new.ravel()):  # the first of equal ones alone, so that no two exchanges meet
        one = np.zeros(keys.shape, bool)
        one[np.unique(keys, return_index=True)[1]] = True
        done &= one.reshape(-1, len(repeated)).all(0)
    item[repeated[done]], item[other[done]] = taken[done], given[done]
    return done
