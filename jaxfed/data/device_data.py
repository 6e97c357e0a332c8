"""What clients train on, as arrays of a device, and which rounds can be drawn from them there."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfed.core.tree import count_bytes
from jaxfed.data.batching import Batching
from jaxfed.data.blocks import BlockShapes
from jaxfed.data.population import Population
from jaxfed.data.room import device_memory
from jaxfed.data.sequences import list_warm_items

LARGEST = 1 << 30  # no bijection is of as many numbers
MOST_LAPS = 1 << 20  # as often does no client come to the same negative


class DeviceTrainData(NamedTuple):
    """The train items of all clients, each client's end to end, on the host or the device; the last client is nobody,
    with none."""

    start: Any  # int32 [C + 2]: where each client's begin
    items: Any  # int32 [E]: in the order of time
    labels: Any = None  # float32 [E]; None: every row is a click
    # of examples:
    excluded_start: Any = None  # int32 [C + 2]: of the items that are no negatives of each client
    gaps: Any = None  # int32 [X]: these, sorted for each client, each less its place there; [0]: no need
    negatives: Any = None  # int32: all other items of each client, end to end; None: too many
    label_flipped: Any = None  # bool [C + 1]; None: nobody's
    item_features: Any = None  # int32 [N + 1, F], at the end those of no item; None: no model asks
    user_features: Any = None  # int32 [C + 1, F]
    # of histories:
    times: Any = None  # int32 [E]: when each item was met; None: no model asks
    warm: Any = None  # int32 [W]: the items that may be negatives, ascending; None: all
    warm_place: Any = None  # int32 [N]: the place of each item among these, W where it is none of them

    @property
    def nobody(self) -> int:
        """The number of the client without items, which is that of all clients."""
        return self.start.shape[0] - 2


def put_train_data(arrays: DeviceTrainData) -> DeviceTrainData:
    """Puts arrays of the host on the device."""
    return jax.tree.map(jnp.asarray, arrays)


def list_train_data(population: Population, batching: Batching) -> DeviceTrainData:
    """What clients train on, as arrays of the host. Raises ValueError where the device has no memory for it."""
    arrays = list_histories(population, batching) if batching.sequence else list_examples(population, batching)
    need, free = count_bytes(arrays), device_memory()
    if need > free // 2:
        raise ValueError(
            f'work.draw_on = "device": what clients train on takes {need / 1e9:.2g} GB there, and may take half of its '
            f'{free / 1e9:.2g} GB, as rounds need memory, too: set it to "host"'
        )
    return arrays


def list_examples(population: Population, batching: Batching) -> DeviceTrainData:
    """What clients of a model of examples train on."""
    excluded, labels, listed = population.excluded, population.labels, population.negative_index.negatives
    flipped = population.label_flipped
    gaps = np.zeros(0, np.int32)
    if listed is None:
        gaps = excluded.values + np.repeat(excluded.start[:-1], excluded.counts).astype(np.int32)
        gaps -= np.arange(len(gaps), dtype=np.int32)
    return DeviceTrainData(
        start=append_empty_client(population.train.start),
        items=population.train.values,
        labels=None if labels is None else labels.train,
        excluded_start=append_empty_client(excluded.start),
        gaps=gaps,
        negatives=listed,
        label_flipped=None if flipped is None else np.append(flipped, False),
        **list_features(population, batching),
    )


def list_features(population: Population, batching: Batching) -> dict[str, np.ndarray]:
    """The features that batches carry, of clients with one user; see `DeviceTrainData`."""
    every, found = np.arange(population.num_items + 1), {}
    if "item" in batching.features and population.item_features:
        found["item_features"] = population.item_features.rows(every)
    if "user" in batching.features and population.user_features:
        users = np.append(population.client_offsets[:-1], len(population.user_names))
        found["user_features"] = population.user_features.rows(users)
    return found


def append_empty_client(start: np.ndarray) -> np.ndarray:
    """int32 [C + 2]: where lists of clients begin, from int64 [C + 1], with one without entries after them."""
    return np.append(start, start[-1]).astype(np.int32)


def list_histories(population: Population, batching: Batching) -> DeviceTrainData:
    """What clients of a model of sequences train on."""
    assert batching.sequence
    data = DeviceTrainData(append_empty_client(population.train.start), population.train.values)
    if batching.sequence.times != "none":
        assert population.times
        data = data._replace(times=population.times.train)
    if population.cold_items is not None:
        warm = list_warm_items(population)
        place = np.full(population.num_items, len(warm), np.int32)
        place[warm] = np.arange(len(warm))
        data = data._replace(warm=warm, warm_place=place)
    return data


def check_device_draws(population: Population, batching: Batching, shapes: BlockShapes) -> None:
    """Raises ValueError where rounds cannot be drawn on the device."""
    if problem := find_draw_problem(population, batching, shapes):
        raise ValueError(f'work.draw_on = "device": {problem}: set it to "host"')


def find_draw_problem(population: Population, batching: Batching, shapes: BlockShapes) -> str:
    """Why rounds cannot be drawn on the device; "": they can."""
    reasons = {
        "sums for a closed form": batching.ordered,
        "batches of clients with several users": population.users_per_client > 1,
        "batches of domains": population.domains is not None,
        "batches of several processes": shapes.share.size > 1,
    }
    if found := [reason for reason, holds in reasons.items() if holds]:
        return f"{found[0]} are drawn on the host alone"
    n, free = population.num_train, np.maximum(population.num_items - population.excluded.counts, 1)
    if batching.sequence:  # negatives of a step, whatever its client has
        n, free = np.ones(1, np.int64), np.array([len(list_warm_items(population))])
    drawn = batching.epochs * batching.negatives * n
    most = max(population.num_items, int((drawn + batching.epochs * n).max()))
    rows = max(len(population.train.values), len(population.excluded.values))
    if most >= LARGEST or rows >= 2 * LARGEST or (drawn // free).max() >= MOST_LAPS:
        return "the device counts in 32 bits, too few for these data"
    return ""


class BlockFormat(NamedTuple):
    """What is static of the blocks of one kind."""

    batching: Batching  # with batches no larger than what any client fills
    items: int
    end: int  # past the end of the tables
    steps: int
    width: int  # examples of a step; of histories, the most items that are read of one
    rows: int  # of a client
    positives: int  # train items of a client, at most
    longest: int  # items that are excluded for a client, at most


def count_items(data: DeviceTrainData, client: jax.Array, items: int) -> tuple[jax.Array, jax.Array]:
    """(int32: train items of clients, int32: items that may be their negatives, at least 1)."""
    assert data.excluded_start is not None
    excluded = data.excluded_start[client + 1] - data.excluded_start[client]
    return data.start[client + 1] - data.start[client], jnp.maximum(items - excluded, 1)


def find_negatives(data: DeviceTrainData, client: jax.Array, rank: jax.Array, items: int, longest: int) -> jax.Array:
    """int32: the item of each rank among those that are not excluded for a client: rank + #{gaps <= rank}.

    By a list, or by a binary search. longest: the most items that are excluded for one of the clients.
    """
    assert data.excluded_start is not None
    assert data.gaps is not None
    begin = data.excluded_start[client]
    if data.negatives is not None:
        return data.negatives.at[client * items - begin + rank].get(mode="clip")
    low, high = jnp.broadcast_to(begin, rank.shape), jnp.broadcast_to(data.excluded_start[client + 1], rank.shape)
    for _ in range(int(longest).bit_length()):
        middle = low + (high - low) // 2
        is_below = (low < high) & (data.gaps.at[middle].get(mode="clip") <= rank)
        low, high = jnp.where(is_below, middle + 1, low), jnp.where(is_below, high, middle)
    return rank + low - begin
