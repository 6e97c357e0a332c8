"""Steps of histories that are drawn where their clients train; what `sequences` draws and lays out on the host.

W items may be negatives: all but the cold ones. A key of (seed, round, client), or of (seed, round) where clients share
their negatives, chooses a random order of these, a bijection of [0, W). Steps take n each in that order, epoch after
epoch, and begin again when all have come. The inverse bijection says where an item of a history stands in the order,
and so which steps draw it. So the rows of a client are known without a sort: the negatives in their order, then the
items read that are none of them. So are the rows of a step.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfed.core.client_work import Batches
from jaxfed.data.batching import Batching
from jaxfed.data.bijections import BijectionKey, fold_in_number, permute_indices
from jaxfed.data.device_data import BlockFormat, DeviceTrainData

SHARED = np.uint32(0xFFFFFFFF)  # below a round's key; no client has this number


def count_warm_items(data: DeviceTrainData, items: int) -> int:
    """How many items may be negatives."""
    return items if data.warm is None else data.warm.shape[0]


def mark_warm_items(data: DeviceTrainData, items: int) -> jax.Array:
    """float [N]: 1 for each item that may be a negative, else 0."""
    is_warm = jnp.ones(items, bool) if data.warm_place is None else data.warm_place < count_warm_items(data, items)
    return is_warm.astype(jnp.float32)


def make_order_key(batching: Batching, client: jax.Array, key: BijectionKey) -> BijectionKey:
    """The key of the order of negatives, words [m, 1], or [1, 1] where clients share it. client int [m, 1]."""
    return fold_in_number(fold_in_number(key, jnp.full((1, 1), SHARED) if batching.shared_negatives else client), 0)


class ReadItems(NamedTuple):
    """The latest items of m clients, T places each, earliest first; the unused ones at the end."""

    number: jax.Array  # int32 [m, T]: of each among all train items
    item: jax.Array  # int32 [m, T]: past the end of the catalogue where unused
    place: jax.Array  # int32 [m, T]: in the order of negatives; W or more: it is never one
    is_used: jax.Array  # bool [m, T]


def read_histories(block_format: BlockFormat, data: DeviceTrainData, client: jax.Array, key: BijectionKey) -> ReadItems:
    """What clients read of their histories. client int [m, 1]: C for nobody; key: of the round."""
    batching, items, width = block_format.batching, block_format.items, block_format.width
    assert batching.sequence
    end, count = data.start[client + 1], jnp.minimum(data.start[client + 1] - data.start[client], width)
    is_used = jnp.arange(width) < jnp.minimum(count, batching.sequence.length)
    number = end - jnp.minimum(count, batching.sequence.length) + jnp.arange(width)
    item = jnp.where(is_used, data.items.at[number].get(mode="clip"), items)
    warm = count_warm_items(data, items)
    place = item if data.warm_place is None else data.warm_place.at[item].get(mode="fill", fill_value=warm)
    if batching.negatives and not batching.sequence.whole_catalogue:
        order = make_order_key(batching, client, key)
        known = jnp.minimum(place, warm - 1).reshape(len(order.even), -1)  # of one order: all clients side by side
        found = permute_indices(known, jnp.full((1, 1), warm), order, warm, inverse=True).reshape(place.shape)
        place = jnp.where(place < warm, found, warm)
    return ReadItems(number, item, place, is_used)


def number_chosen(first: int, is_chosen: jax.Array) -> jax.Array:
    """int32 [..., T]: the chosen ones numbered from `first` on."""
    return first + jnp.cumsum(is_chosen, -1, dtype=jnp.int32) - 1


def scatter_chosen(array: jax.Array, is_chosen: jax.Array, place: jax.Array, value: jax.Array) -> jax.Array:
    """An array [..., K] with the chosen ones of values [..., T] at their places, which are distinct."""
    lead = jnp.indices((*array.shape[:-1], 1), sparse=True)[:-1]
    at = jnp.where(is_chosen, place, array.shape[-1])
    return array.at[(*lead, at)].set(value, mode="drop", unique_indices=True)


def draw_history_rows(
    block_format: BlockFormat, data: DeviceTrainData, client: jax.Array, key: BijectionKey
) -> jax.Array:
    """int32 [m, K]: the items that each client holds, `end` where unused: the negatives in the order in which they are
    drawn, then the other items that it reads; or the whole catalogue.

    client int [m]: C for nobody. key: of the round.
    """
    batching, items, end = block_format.batching, block_format.items, block_format.end
    assert batching.sequence
    client, warm = client[:, None], count_warm_items(data, items)
    is_somebody, held = client < data.nobody, jnp.full((len(client), block_format.rows), end, jnp.int32)
    if batching.sequence.whole_catalogue:
        return jnp.where(is_somebody, jnp.arange(block_format.rows, dtype=jnp.int32), end)
    if drawn := min(batching.epochs * batching.negatives, warm):
        order, place = make_order_key(batching, client, key), jnp.arange(drawn)[None]
        negative = permute_indices(place, jnp.full((1, 1), warm), order, warm)
        negative = negative if data.warm is None else data.warm[negative]
        held = held.at[:, :drawn].set(jnp.where(is_somebody, negative, end))
    read = read_histories(block_format, data, client, key)
    is_other = read.is_used & (read.place >= drawn)
    return scatter_chosen(held, is_other, number_chosen(drawn, is_other), read.item)


def lay_out_steps(block_format: BlockFormat, warm: int, read: ReadItems) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(int32 [m, S, k]: the rows of each step, int32 [m, S, T]: which of these each item read is, float [k]: how often
    each was drawn)."""
    items, steps, n = block_format.items, block_format.steps, block_format.batching.negatives
    width, drawn, held = min(block_format.width + n, items), min(n, warm), min(steps * n, warm)
    first = np.arange(steps, dtype=np.int32)[:, None] * n % max(warm, 1)  # place of a step's first negative, in order
    drawn_rows = np.full((steps, width), items, np.int32)
    drawn_rows[:, :drawn] = (first + np.arange(drawn)) % max(warm, 1)
    # as there are so few items, a step comes to the first ones again: they count more than once
    laps = np.zeros(width, np.float32)
    laps[:drawn] = (n - np.arange(drawn) + warm - 1) // max(warm, 1)

    used = read.is_used[:, None]
    row = jnp.where(read.place < held, read.place, number_chosen(held, read.is_used & (read.place >= held)))[:, None]
    ahead = read.place[:, None] - first  # of the step's first negative
    ahead = jnp.where(ahead < 0, ahead + warm, ahead)
    is_drawn = used & (read.place[:, None] < warm) & (ahead < drawn)
    is_other = used & ~is_drawn
    place = jnp.where(is_drawn, ahead, number_chosen(drawn, is_other))
    rows = scatter_chosen(jnp.broadcast_to(drawn_rows, (len(used), steps, width)), is_other, place, row)
    return rows, jnp.where(used, place, items), jnp.asarray(laps)


def lay_out_whole_catalogue(
    block_format: BlockFormat, data: DeviceTrainData, read: ReadItems
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `lay_out_steps`, for steps that hold all items: a row's position is its item number."""
    items, shape = block_format.items, (len(read.item), block_format.steps)
    rows = jnp.broadcast_to(jnp.arange(items, dtype=jnp.int32), (*shape, items))
    return rows, jnp.broadcast_to(read.item[:, None], (*shape, block_format.width)), mark_warm_items(data, items)


def draw_history_block(
    block_format: BlockFormat, data: DeviceTrainData, client: jax.Array, key: BijectionKey
) -> tuple[jax.Array, jax.Array, Batches]:
    """(int32 [m, K]: the items that each client holds, float [m]: train items, `Batches` [m, ...]); see
    `device_draws.draw_block`. Rows of a step come in another order than those of `packing.pack_cohort`."""
    batching, items, steps = block_format.batching, block_format.items, block_format.steps
    assert batching.sequence
    held = draw_history_rows(block_format, data, client, key)
    client, warm, shape = client[:, None], count_warm_items(data, items), (len(client), steps)
    read = read_histories(block_format, data, client, key)
    if batching.sequence.whole_catalogue:
        rows, sequence, negative = lay_out_whole_catalogue(block_format, data, read)
    else:
        rows, sequence, negative = lay_out_steps(block_format, warm, read)
    is_live = jnp.broadcast_to(client < data.nobody, shape)
    dropout = fold_in_number(fold_in_number(key, client), jnp.arange(1, steps + 1))
    batch = {
        "sequence": sequence,
        "dropout": jnp.stack(dropout, -1),
        "negative": jnp.where(is_live[..., None], negative, 0),
        "catalogue": jnp.full(shape, warm, jnp.float32),
    }
    if data.times is not None:
        times = jnp.where(read.is_used, data.times.at[read.number].get(mode="clip"), 0)
        batch["time"] = jnp.broadcast_to(times[:, None], sequence.shape)
    n = (data.start[client + 1] - data.start[client])[:, 0]
    targets = jnp.minimum(n, batching.sequence.length)
    if batching.sequence.compares:
        targets = jnp.maximum(targets - 1, 0)
    rows = jnp.where(is_live[..., None], rows, items)
    data_of_steps = Batches(rows, is_live, batch, (batching.epochs * targets).astype(jnp.float32))
    return held, n.astype(jnp.float32), data_of_steps
