"""What clients train on, as arrays of a device."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfed.core.tree import count_bytes
from jaxfed.data.batching import Batching
from jaxfed.data.population import ALONE, Population, ProcessShare
from jaxfed.data.ragged import Ragged
from jaxfed.data.room import device_memory
from jaxfed.data.sequences import list_warm_items


class DevicePopularity(NamedTuple):
    """A `PopularityIndex` whose counts begin anew with each user, so that 32 bits are enough."""

    mass: Any  # int32 [N + 1]: interactions with the items before each place
    gaps: Any  # int32 [X]: interactions outside the user's list before each item on it
    passed: Any  # int32 [X]: interactions with the items of the user's list up to each entry, itself among them
    begin: Any  # int32 [U + 1]: interactions before the user's domain
    open: Any  # int32 [U + 1]: interactions of the user's domain with items that are not on its list, at least 1


class DeviceTrainData(NamedTuple):
    """The E train items of all U users of C clients, each user's end to end, on the host or the device. User U and
    client C are nobody: they have no items. Where each client has one user, both have the same number."""

    start: Any  # int32 [U + 2]: where each user's begin
    items: Any  # int32 [E]: in the order of time
    labels: Any = None  # float32 [E]; None: every row is a click
    # of examples:
    excluded_start: Any = None  # int32 [U + 2]: of the items that are no negatives of each user
    gaps: Any = None  # int32 [X]: where these stand among the items of the user's domain, ascending, less their rank
    negatives: Any = None  # int32: all other items of each user, end to end; None: too many
    excluded_items: Any = None  # int32 [X]: those that are no negatives, ascending; None: not in_batch
    label_flipped: Any = None  # bool [C + 1]; None: nobody's
    item_features: Any = None  # int32 [N + 1, F], at the end those of no item; None: no model asks
    user_features: Any = None  # int32 [U + 1, F]
    # of domains; None: there is one catalogue
    domain_items: Any = None  # int32 [N]: domain by domain
    domain_start: Any = None  # int32 [U + 1]: where the items of each user's domain begin
    domain_size: Any = None  # int32 [U + 1]
    # of negatives by popularity; None: all items are equally likely
    popularity: DevicePopularity | None = None
    # of clients with several users, and of negatives by popularity; None: neither
    client_offsets: Any = None  # int32 [C + 2]: the first user of each client
    user_of_row: Any = None  # int32 [E]
    # of histories:
    times: Any = None  # int32 [E]: when each item was met; None: no model asks
    warm: Any = None  # int32 [W]: the items that may be negatives, ascending; None: all
    warm_place: Any = None  # int32 [N]: the place of each item among these, W where it is none of them

    @property
    def nobody(self) -> int:
        """The number of the user without items: U."""
        return self.start.shape[0] - 2


def put_train_data(arrays: DeviceTrainData) -> DeviceTrainData:
    """Puts arrays of the host on the device. Raises ValueError where it has no room for them."""
    if problem := find_room_problem(arrays):
        raise ValueError(f'work.draw_on = "device": {problem}: take a device with room, or "host" in a new run')
    return jax.tree.map(jnp.asarray, arrays)


def keep_own_rows(population: Population, share: ProcessShare) -> Population:
    """A population without the train rows, excluded items and features of the users of other processes."""
    if share.size == 1:
        return population
    owner = share.owner(population.client_of, population.num_clients)
    first, last = np.searchsorted(owner, [share.rank, share.rank + 1])

    def cut(start: np.ndarray) -> tuple[slice, np.ndarray]:
        kept = np.clip(start, start[first], start[last])
        return slice(kept[0], kept[-1]), kept - kept[0]

    (rows, start), (excluded, excluded_start) = cut(population.train.start), cut(population.excluded.start)
    labels, times, features = population.labels, population.times, population.user_features
    is_own = (np.arange(len(owner)) >= first) & (np.arange(len(owner)) < last)
    if features:  # of others none: see `Features.numbers`
        none = np.int32(len(features.names))
        features = features._replace(numbers=np.where(is_own[:, None], features.numbers, none))
    return population._replace(
        user_features=features,
        train=Ragged(population.train.values[rows], start),
        excluded=Ragged(population.excluded.values[excluded], excluded_start),
        negative_index=population.negative_index._replace(negatives=None),
        labels=labels and labels._replace(train=labels.train[rows]),
        times=times and times._replace(train=times.train[rows]),
    )


def list_train_data(population: Population, batching: Batching, share: ProcessShare = ALONE) -> DeviceTrainData:
    """What clients of this process train on, as arrays of the host."""
    population = keep_own_rows(population, share)
    arrays = list_histories(population, batching) if batching.sequence else list_examples(population, batching)
    # programs cannot read from an array without entries, as of a process without clients
    return jax.tree.map(lambda x: x if len(x) else np.zeros(1, x.dtype), arrays)


def find_room_problem(arrays: DeviceTrainData) -> str:
    """Why the device has no room for what clients train on; "": it has."""
    need, free = count_bytes(arrays), device_memory()
    if need <= free // 2:
        return ""
    return (
        f"what clients train on takes {need / 1e9:.2g} GB there, and may take half of its {free / 1e9:.2g} GB, as "
        "rounds need memory, too"
    )


def list_examples(population: Population, batching: Batching) -> DeviceTrainData:
    """What clients of a model of examples train on."""
    excluded, labels, listed = population.excluded, population.labels, population.negative_index.negatives
    flipped = population.label_flipped
    gaps = np.zeros(0, np.int32)
    if listed is None:
        values = excluded.values if population.domains is None else population.domains.place[excluded.values]
        rank = np.arange(len(values)) - np.repeat(excluded.start[:-1], excluded.counts)
        gaps = (values - rank).astype(np.int32)
    return DeviceTrainData(
        start=append_empty_user(population.train.start),
        items=population.train.values,
        labels=None if labels is None else labels.train,
        excluded_start=append_empty_user(excluded.start),
        gaps=gaps,
        negatives=listed,
        excluded_items=excluded.values if batching.negative_sampling == "in_batch" else None,
        label_flipped=None if flipped is None else np.append(flipped, False),
        **list_features(population, batching),
        **list_domain_items(population),
        **list_users(population),
        popularity=list_popularity(population),
    )


def list_domain_items(population: Population) -> dict[str, np.ndarray]:
    """Which items users are offered, where there are domains; see `DeviceTrainData`."""
    if population.domains is None:
        return {}
    start, size = population.span(np.arange(len(population.user_names)))
    return {
        "domain_items": population.domains.items,
        "domain_start": np.append(start, 0).astype(np.int32),
        "domain_size": np.append(size, 1).astype(np.int32),
    }


def list_popularity(population: Population) -> DevicePopularity | None:
    """What negatives by popularity are found by; None: they are uniform."""
    if (index := population.popularity) is None:
        return None
    start, counts = population.excluded.start, population.excluded.counts
    user = np.repeat(np.arange(len(counts)), counts)
    gaps, passed = index.gaps - user * (index.mass[-1] + 1), index.skipped[1:] - index.skipped[start[user]]
    begin, free = np.append(index.begin, 0), np.append(np.maximum(index.open, 1), 1)
    return DevicePopularity(*(each.astype(np.int32) for each in (index.mass, gaps, passed, begin, free)))


def list_users(population: Population) -> dict[str, np.ndarray]:
    """Whose rows are whose, where clients have several users or negatives repeat; see `DeviceTrainData`."""
    if population.users_per_client == 1 and not population.popularity:
        return {}
    users = np.arange(len(population.user_names), dtype=np.int32)
    return {
        "client_offsets": np.append(population.client_offsets, len(users) + 1).astype(np.int32),
        "user_of_row": np.repeat(users, population.train.counts),
    }


def list_features(population: Population, batching: Batching) -> dict[str, np.ndarray]:
    """The features that batches carry; see `DeviceTrainData`."""
    every, found = np.arange(population.num_items + 1), {}
    if "item" in batching.features and population.item_features:
        found["item_features"] = population.item_features.rows(every)
    if "user" in batching.features and population.user_features:
        found["user_features"] = population.user_features.rows(np.arange(len(population.user_names) + 1))
    return found


def append_empty_user(start: np.ndarray) -> np.ndarray:
    """int32 [C + 2]: where lists of clients begin, from int64 [C + 1], with one without entries after them."""
    return np.append(start, start[-1]).astype(np.int32)


def list_histories(population: Population, batching: Batching) -> DeviceTrainData:
    """What clients of a model of sequences train on."""
    assert batching.sequence
    start, items = append_empty_user(population.train.start), population.train.values
    data = DeviceTrainData(start, items, **list_users(population), popularity=list_popularity(population))
    if batching.sequence.times != "none":
        assert population.times
        data = data._replace(times=population.times.train)
    if population.cold_items is not None:
        warm = list_warm_items(population)
        place = np.full(population.num_items, len(warm), np.int32)
        place[warm] = np.arange(len(warm))
        data = data._replace(warm=warm, warm_place=place)
    return data


def count_free_items(population: Population, users: np.ndarray) -> np.ndarray:
    """int64: how many items may be negatives of each of some users."""
    start = population.excluded.start
    return population.span(users)[1] - (start[users + 1] - start[users])


class BlockFormat(NamedTuple):
    """What is static of the blocks of one kind."""

    batching: Batching  # with batches no larger than what any client fills
    items: int
    end: int  # past the end of the tables
    steps: int
    width: int  # examples of a step; of histories, the most items that are read of one
    rows: int  # of a client
    positives: int  # train items of a client, at most
    excluded_items: int  # of a user, at most
    users: int  # of a client, at most


def count_items(data: DeviceTrainData, user: jax.Array, items: int) -> tuple[jax.Array, jax.Array]:
    """(int32: train items of users, int32: items that may be their negatives, at least 1)."""
    assert data.excluded_start is not None
    excluded = data.excluded_start[user + 1] - data.excluded_start[user]
    offered = items if data.domain_size is None else data.domain_size[user]
    return data.start[user + 1] - data.start[user], jnp.maximum(offered - excluded, 1)


def find_negatives(
    data: DeviceTrainData, user: jax.Array, rank: jax.Array, items: int, excluded_items: int
) -> jax.Array:
    """int32: the item of each rank among those that are not excluded for a user: rank + #{gaps <= rank}, in its domain.

    By a list, or by a binary search. excluded_items: of one of the users, at most.
    """
    assert data.excluded_start is not None
    assert data.gaps is not None
    begin = data.excluded_start[user]
    if data.negatives is not None:
        return data.negatives.at[user * items - begin + rank].get(mode="clip")
    place = rank + find_first_above(data.gaps, begin, data.excluded_start[user + 1], rank, excluded_items) - begin
    return place if data.domain_items is None else data.domain_items[data.domain_start[user] + place]


def find_first_above(values: jax.Array, low: jax.Array, high: jax.Array, bound: jax.Array, most: int) -> jax.Array:
    """int32, of the shape of the bounds: the first entry of [low, high) whose value is above a bound, or high, by a
    binary search. The values there are ascending; there are at most so many."""
    low, high = jnp.broadcast_to(low, bound.shape), jnp.broadcast_to(high, bound.shape)
    for _ in range(int(most).bit_length()):
        middle = low + (high - low) // 2
        is_below = (low < high) & (values.at[middle].get(mode="clip") <= bound)
        low, high = jnp.where(is_below, middle + 1, low), jnp.where(is_below, high, middle)
    return low


def is_excluded(data: DeviceTrainData, user: jax.Array, item: jax.Array, most: int) -> jax.Array:
    """bool: whether each item is excluded for a user. most: such items of one of the users, at most."""
    assert data.excluded_start is not None
    assert data.excluded_items is not None
    begin = data.excluded_start[user]
    entry = find_first_above(data.excluded_items, begin, data.excluded_start[user + 1], item, most)
    return (entry > begin) & (data.excluded_items.at[entry - 1].get(mode="clip") == item)


def find_popular_negatives(data: DeviceTrainData, user: jax.Array, rank: jax.Array, excluded_items: int) -> jax.Array:
    """int32: the items of some interactions outside each user's list; see `popular_negatives.find_popular_items`.

    rank: numbers of interactions, from 0 to below `DevicePopularity.open` of the user. excluded_items: of one of the
    users, at most.
    """
    assert data.popularity is not None
    assert data.excluded_start is not None
    mass, gaps, passed, before, _ = data.popularity
    begin = data.excluded_start[user]
    entry = find_first_above(gaps, begin, data.excluded_start[user + 1], rank, excluded_items)
    jumped = jnp.where(entry > begin, passed.at[entry - 1].get(mode="clip"), 0)
    place = find_popular_places(mass, before[user] + rank + jumped)
    return place if data.domain_items is None else data.domain_items[place]


def find_popular_places(mass: jax.Array, interaction: jax.Array) -> jax.Array:
    """int32: the place of the item of each interaction; mass: see `DevicePopularity`."""
    return find_first_above(mass, jnp.int32(0), jnp.int32(len(mass)), interaction, len(mass)) - 1
