"""Rounds that are drawn where their clients train, without a sort and without the host.

A client has n train items, and `free` items that may be its negatives. A key of (seed, round, client) chooses a random
order of these: a bijection of [0, free), see `bijections`. The negatives of a round, epoch after epoch, are its values
at 0, 1, 2, ...: none comes twice before all have come. Other bijections say at which places of an epoch its train items
lie. So what lies at a place of a step follows from that place and from sizes that are known before anything is drawn.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfed.core.client_work import Batches
from jaxfed.data.batching import Batching
from jaxfed.data.bijections import BijectionKey, divide_integers, fold_in_number, permute_indices
from jaxfed.data.blocks import BlockShapes
from jaxfed.data.population import Population

LARGEST = 1 << 30  # no bijection is of as many numbers
MOST_LAPS = 1 << 20  # as often does no client come to the same negative


class DeviceTrainData(NamedTuple):
    """The train items of all clients on a device, each client's end to end; the last client is nobody, with none."""

    start: jax.Array  # int32 [C + 2]: where each client's begin
    items: jax.Array  # int32 [E]: in the order of time
    labels: jax.Array | None  # float32 [E]; None: every row is a click
    excluded_start: jax.Array  # int32 [C + 2]: of the items that are no negatives of each client
    gaps: jax.Array  # int32 [X]: these items, sorted for each client, each less its place there; [0]: not needed
    negatives: jax.Array | None  # int32: all other items of each client, end to end; None: too many


def put_train_data(population: Population) -> DeviceTrainData:
    """What clients train on, as arrays of a device."""
    excluded, labels, listed = population.excluded, population.labels, population.negative_index.negatives
    gaps = np.zeros(0, np.int32)
    if listed is None:
        gaps = excluded.values + np.repeat(excluded.start[:-1], excluded.counts).astype(np.int32)
        gaps -= np.arange(len(gaps), dtype=np.int32)
    starts = [np.append(start, start[-1]).astype(np.int32) for start in (population.train.start, excluded.start)]
    return DeviceTrainData(
        start=jnp.asarray(starts[0]),
        items=jnp.asarray(population.train.values),
        labels=None if labels is None else jnp.asarray(labels.train),
        excluded_start=jnp.asarray(starts[1]),
        gaps=jnp.asarray(gaps),
        negatives=None if listed is None else jnp.asarray(listed),
    )


def check_device_draws(population: Population, batching: Batching, shapes: BlockShapes) -> None:
    """Raises ValueError where rounds cannot be drawn on the device."""
    if problem := find_draw_problem(population, batching, shapes):
        raise ValueError(f'work.draw_on = "device": {problem}: set it to "host"')


def find_draw_problem(population: Population, batching: Batching, shapes: BlockShapes) -> str:
    """Why rounds cannot be drawn on the device; "": they can."""
    reasons = {
        "batches of pairs": batching.pairwise,
        "batches of histories": batching.sequence is not None,
        "sums for a closed form": batching.ordered,
        "batches of clients with several users": population.users_per_client > 1,
        "batches of domains": population.domains is not None,
        "batches with features": bool(batching.features),
        "batches with flipped labels": population.label_flipped is not None,
        "batches of several processes": shapes.share.size > 1,
    }
    if found := [reason for reason, holds in reasons.items() if holds]:
        return f"{found[0]} are drawn on the host alone"
    n, free = population.num_train, np.maximum(population.num_items - population.excluded.counts, 1)
    drawn = batching.epochs * batching.negatives * n
    most = max(population.num_items, int((drawn + batching.epochs * n).max()))
    rows = max(len(population.train.values), len(population.excluded.values))
    if most >= LARGEST or rows >= 2 * LARGEST or (drawn // free).max() >= MOST_LAPS:
        return "the device counts in 32 bits, too few for these data"
    return ""


def find_negatives(data: DeviceTrainData, client: jax.Array, rank: jax.Array, items: int, longest: int) -> jax.Array:
    """int32: the item of each rank among those that are not excluded for a client: rank + #{gaps <= rank}.

    By a list, or by a binary search. longest: the most items that are excluded for one of the clients.
    """
    begin = data.excluded_start[client]
    if data.negatives is not None:
        return data.negatives.at[client * items - begin + rank].get(mode="clip")
    low, high = jnp.broadcast_to(begin, rank.shape), jnp.broadcast_to(data.excluded_start[client + 1], rank.shape)
    for _ in range(int(longest).bit_length()):
        middle = low + (high - low) // 2
        is_below = (low < high) & (data.gaps.at[middle].get(mode="clip") <= rank)
        low, high = jnp.where(is_below, middle + 1, low), jnp.where(is_below, high, middle)
    return rank + low - begin


class DrawSizes(NamedTuple):
    """Static sizes of the blocks of one kind."""

    steps: int
    width: int  # examples of a step
    rows: int  # of a client
    positives: int  # train items of a client, at most
    longest: int  # items that are excluded for a client, at most


def count_items(data: DeviceTrainData, client: jax.Array, items: int) -> tuple[jax.Array, jax.Array]:
    """(int32: train items of clients, int32: items that may be their negatives, at least 1)."""
    excluded = data.excluded_start[client + 1] - data.excluded_start[client]
    return data.start[client + 1] - data.start[client], jnp.maximum(items - excluded, 1)


def draw_held_rows(
    sizes: DrawSizes,
    batching: Batching,
    items: int,
    end: int,
    data: DeviceTrainData,
    client: jax.Array,
    key: BijectionKey,
) -> jax.Array:
    """int32 [m, K]: the items that each client holds: its train items, then its negatives; `end` where unused."""
    begin, (n, free) = data.start[client], count_items(data, client, items)
    place = jnp.arange(sizes.rows)
    rank = permute_indices(jnp.clip(place - n, 0, free - 1), free, fold_in_number(key, 0), items)
    negative = find_negatives(data, client, rank, items, sizes.longest)
    positive = data.items.at[begin + place].get(mode="clip")
    used = n + jnp.minimum(batching.epochs * n * batching.negatives, free)
    return jnp.where(place < n, positive, jnp.where(place < used, negative, end))


def place_positives(
    sizes: DrawSizes, batching: Batching, n: jax.Array, of_epoch: jax.Array, key: BijectionKey
) -> jax.Array:
    """int32 [m, S * B]: which train item of its client lies at each place of its steps; -1: none. of_epoch: steps of an
    epoch."""
    clients, places = len(n), sizes.steps * sizes.width
    found = jnp.full((clients, places), -1, jnp.int32)
    number, examples = jnp.arange(sizes.positives), jnp.maximum(n * (1 + batching.negatives), 1)
    largest = max(sizes.positives * (1 + batching.negatives), 1)
    for epoch in range(batching.epochs):
        at = permute_indices(jnp.minimum(number, examples - 1), examples, fold_in_number(key, epoch + 1), largest)
        step = epoch * of_epoch + at // batching.batch_size
        at = jnp.where(number < n, step * sizes.width + at % batching.batch_size, places)
        found = found.at[jnp.arange(clients)[:, None], at].set(number, mode="drop", unique_indices=True)
    return found


def draw_block(
    sizes: DrawSizes,
    batching: Batching,
    items: int,
    end: int,
    data: DeviceTrainData,
    client: jax.Array,
    key: BijectionKey,
) -> tuple[jax.Array, jax.Array, Batches]:
    """(int32 [m, K]: the items that each client holds, float [m]: train items, `Batches` [m, ...]).

    client int [m]: C for nobody. key: of the round. The arrays are those of `packing.pack_cohort`, whose rows come in
    another order.
    """
    client = client[:, None]
    own_key, shape = fold_in_number(key, client), (len(client), sizes.steps, sizes.width)
    n, free = count_items(data, client, items)
    examples = n * (1 + batching.negatives)
    of_epoch = jnp.maximum(-(-examples // batching.batch_size), 1)

    positive = place_positives(sizes, batching, n, of_epoch, own_key).reshape(shape)
    step = jnp.arange(sizes.steps)
    first = step % of_epoch * batching.batch_size  # example of an epoch, of each step [m, S]
    count = jnp.where(step < batching.epochs * of_epoch, jnp.clip(examples - first, 0, batching.batch_size), 0)
    is_live = jnp.arange(sizes.width) < count[..., None]
    is_negative = is_live & (positive < 0)
    drawn = is_negative.sum(-1, dtype=jnp.int32)
    before = divide_integers(jnp.cumsum(drawn, 1) - drawn, free)[1][..., None]  # negatives of the steps before, in laps
    number = jnp.cumsum(is_negative, -1, dtype=jnp.int32) - is_negative  # of each negative, in its step
    free = free[..., None]
    # one that a step has again, as there are so few, is no row of its own: the first one counts so often
    laps = divide_integers(drawn[..., None] - number + free - 1, free)[0]
    weight = jnp.where(is_negative, laps, 1)
    is_row = is_live & (~is_negative | (number < free))
    lap = before + number
    row = jnp.where(is_negative, n[..., None] + jnp.where(lap >= free, lap - free, lap), positive)
    label = (~is_negative).astype(jnp.float32)  # with a type of its own: a weak one would compile every round anew
    if data.labels is not None:
        label = data.labels.at[data.start[client][..., None] + positive].get(mode="clip")
    batch = {"label": jnp.where(is_row, label, 0), "weight": jnp.where(is_row, weight, 0).astype(jnp.float32)}
    total = (batching.epochs * examples[:, 0]).astype(jnp.float32)
    return (
        draw_held_rows(sizes, batching, items, end, data, client, own_key),
        n[:, 0].astype(jnp.float32),
        Batches(jnp.where(is_row, row, items), count > 0, batch, total),
    )
