"""Interactions of people that do not exist: low-rank taste, skewed popularity, and an order worth learning."""

import numpy as np

from jaxfed.core.recipe import named
from jaxfed.core.streams import SetupStream, setup_rng
from jaxfed.data.features import Features
from jaxfed.data.interactions import Dataset, Interactions
from jaxfed.data.room import check_room

PHASES = 4  # of a feature
# bytes of a row, of an item, and of each of its factors, while data are made (measured)
ROW_BYTES, ITEM_BYTES, FACTOR_BYTES = 130, 20, 12


def check_sizes(users: int, items: int, mean_length: float, rank: int, order: float) -> None:
    """Raises ValueError for arguments of `synthetic_data` that cannot be."""
    if users < 1 or items < 4 or not 3 <= mean_length <= items / 2 or not 0 < order <= 1:
        raise ValueError("synthetic data need users >= 1, items >= 4, 3 <= mean_length <= items / 2, 0 < order <= 1")
    if max(users, items, rank) >= 1 << 31:
        raise ValueError("synthetic data: users, items and rank must lie below 2^31")
    need = ROW_BYTES * users * mean_length + (ITEM_BYTES + FACTOR_BYTES * rank) * items
    check_room(need, "data.users, data.items, data.mean_length or data.rank")


def sort_as_log(random: np.random.Generator, user: np.ndarray, item: np.ndarray, time: np.ndarray) -> Interactions:
    """Interactions of many users by time, as they lie in a log; those of a user stay in order."""
    mixed = np.argsort(time + random.random(len(time)), kind="stable")
    return Interactions(
        user[mixed].astype(np.int32),
        item[mixed].astype(np.int32),
        np.ones(len(user), np.float32),
        time[mixed].astype(np.int64),
    )


@named("data", "synthetic")
def synthetic_data(
    users: int = 1000,
    items: int = 500,
    mean_length: float = 20.0,
    rank: int = 8,
    taste: float = 2.0,
    skew: float = 0.8,
    order: float = 0.3,
    seed: int = 0,
) -> Dataset:
    """Any number of users and items, a function of the seed.

    A user has 3 + log-normal many distinct items, `mean_length` on average. Candidates come by popularity, the n-th
    item's share falling as n ** -skew; of four candidates an item those with the largest taste * <user, item> + Gumbel
    noise stay. Each item has a phase in [0, 1); a history runs through phases, blurred by a noise of 1 / order - 1
    (order 1: sharp, near 0: none). Features: the strongest factor of a user and of an item, and a quarter of
    the item's phase. Raises ValueError for sizes that cannot be.

    Args:
        users: Number of users.
        items: Number of items.
        mean_length: Mean number of interactions of a user.
        rank: Dimensions of taste.
        taste: How much taste counts beside chance, in what users take.
        skew: How unequal popularity is: the n-th item's share falls as n to the power of -skew.
        order: How much the order of a history follows the phases of its items: 1 sharply, near 0 not at all.
        seed: Random seed of the data.
    """
    check_sizes(users, items, mean_length, rank, order)
    random = setup_rng(seed, SetupStream.SYNTHETIC_DATA)
    length = 3 + np.floor(random.lognormal(0, 1, users) * (mean_length - 2.5) / np.exp(0.5)).astype(np.int64)
    length = np.minimum(length, items // 2)
    share = np.cumsum(np.arange(1.0, items + 1) ** -skew)
    name = random.permutation(items)  # popularity is not written on the id
    item_vectors = random.normal(size=(items, rank)).astype(np.float32) / np.sqrt(rank)
    phase = random.random(items, np.float32)
    pieces = [_some(random, length[low : low + 4096], share, item_vectors, taste) for low in range(0, users, 4096)]
    counts, chosen, user_factors = zip(*pieces, strict=True)
    user, item = np.repeat(np.arange(users), np.concatenate(counts)), np.concatenate(chosen)
    when = phase[item] + random.normal(size=len(item)) * (1 / order - 1)
    sort = np.lexsort((when, user))
    user, item = user[sort], name[item[sort]]
    first = np.searchsorted(user, user)
    time = np.arange(len(user)) - first
    rows = sort_as_log(random, user, item, time)
    present, item_number = np.unique(rows.item, return_inverse=True)
    sign = name.argsort()[present]  # of the vectors
    item_features = np.stack([item_vectors[sign].argmax(1), rank + (PHASES * phase[sign]).astype(int)], 1)
    factors, phases = [f"factor={i}" for i in range(rank)], [f"phase={i / PHASES:g}" for i in range(PHASES)]
    return Dataset(
        rows._replace(item=item_number.astype(np.int32)),
        np.arange(users).astype(str),
        present.astype(str),
        user_features=Features(np.concatenate(user_factors)[:, None].astype(np.int32), np.array(factors)),
        item_features=Features(item_features.astype(np.int32), np.array(factors + phases)),
        features_follow=True,
    )


def _some(random, length, share, item_vectors, taste) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(how many items each of some users got, their items, each user's strongest factor): four candidates an item, the
    best of them, distinct."""
    owner = np.repeat(np.arange(len(length)), 4 * length)
    drawn = np.searchsorted(share, random.random(len(owner)) * share[-1], "right")
    pairs = np.sort(owner * len(share) + np.minimum(drawn, len(share) - 1))
    pairs = pairs[np.diff(pairs, prepend=-1) > 0]
    owner, candidate = pairs // len(share), pairs % len(share)
    user_vectors = random.normal(size=(len(length), item_vectors.shape[1])).astype(np.float32)
    score = taste * np.einsum("nd,nd->n", user_vectors[owner], item_vectors[candidate]) + random.gumbel(size=len(owner))
    order = np.lexsort((-score, owner))
    rank = np.arange(len(order)) - np.searchsorted(owner, owner)
    kept = order[rank < length[owner]]
    return np.bincount(owner[kept], minlength=len(length)), candidate[kept], user_vectors.argmax(1)
