"""Steps of the histories of clients with several users, drawn where they train; what `sequences` draws on the host.

A bijection of (seed, round, client, epoch) orders the users of a client, whose histories go into steps in that order.
Negatives are drawn one by one for each step, as on the host, so that they may come again; or they are what the step
reads (`in_batch`). Clients with one user have these batches where negatives are drawn by popularity.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfed.core.client_work import Batches
from jaxfed.data.bijections import BijectionKey, draw_below, fold_in_number
from jaxfed.data.device_data import BlockFormat, DeviceTrainData, find_popular_places
from jaxfed.data.device_draws import number_steps, order_each_epoch
from jaxfed.data.device_histories import SHARED, count_warm_items, mark_warm_items
from jaxfed.data.device_organisations import list_client_rows, sort_entries

DROPOUT = np.uint32(0xFFFFFFFE)  # below a round's key; no client has this number


class StepHistories(NamedTuple):
    """The histories that the S steps of m clients read, H each, T places each; and the negatives of each step."""

    user: jax.Array  # int32 [m, S, H]: nobody where unused
    number: jax.Array  # int32 [m, S, H, T]: of each item read among all train items, earliest first
    item: jax.Array  # int32 [m, S, H, T]: past the end of the catalogue where unused
    negative: jax.Array  # int32 [m, S, n]: past the end of the catalogue in an unused step
    epoch: jax.Array  # int32 [m, S]
    is_live: jax.Array  # bool [m, S]


def draw_step_histories(
    block_format: BlockFormat, data: DeviceTrainData, client: jax.Array, key: BijectionKey
) -> StepHistories:
    """What clients int [m] read in a round, in the order of training; the arguments are those of
    `draw_organisation_histories`."""
    assert data.client_offsets is not None
    batching, items, width = block_format.batching, block_format.items, block_format.width
    assert batching.sequence
    histories, most, client = batching.batch_size, block_format.users, client[:, None]
    first, own_key = data.client_offsets[client], fold_in_number(key, client)
    users = jnp.where(first < data.nobody, data.client_offsets[client + 1] - first, 0)
    order = order_each_epoch(users, most, batching.epochs, own_key)

    epoch, step = number_steps(block_format, jnp.maximum(-(-users // histories), 1))
    is_live = (epoch < batching.epochs) & (users > 0)
    place = (step * histories)[..., None] + jnp.arange(histories)  # of each user, in its epoch
    at = jnp.clip(epoch, 0, batching.epochs - 1)[..., None] * most + jnp.minimum(place, most - 1)
    user = first[..., None] + jnp.take_along_axis(order, at.reshape(len(client), -1), 1).reshape(at.shape)
    user = jnp.where(is_live[..., None] & (place < users[..., None]), user, data.nobody)

    length = jnp.minimum(data.start[user + 1] - data.start[user], batching.sequence.length)
    number = (data.start[user + 1] - length)[..., None] + jnp.arange(width)
    item = jnp.where(jnp.arange(width) < length[..., None], data.items.at[number].get(mode="clip"), items)
    drawn = 0 if batching.sequence.whole_catalogue else batching.negatives
    of_step = epoch if batching.shared_negatives else jnp.arange(block_format.steps)
    of_round = fold_in_number(key, jnp.uint32(SHARED)) if batching.shared_negatives else own_key
    below = jax.tree.map(lambda word: jnp.asarray(word)[..., None], fold_in_number(of_round, 0))
    words = fold_in_number(below, of_step[..., None] * max(drawn, 1) + jnp.arange(drawn))
    if data.popularity is None:
        negative = draw_below(jnp.int32(count_warm_items(data, items)), words)
        negative = negative if data.warm is None else data.warm[negative]
    else:
        mass = data.popularity.mass
        negative = find_popular_places(mass, draw_below(mass[-1], words))
    negative = jnp.broadcast_to(negative, (*is_live.shape, drawn))
    return StepHistories(user, number, item, jnp.where(is_live[..., None], negative, items), epoch, is_live)


def list_step_entries(found: StepHistories) -> jax.Array:
    """int32 [m, S, H * T + n]: the items that each step reads, then its negatives."""
    return jnp.concatenate([found.item.reshape(*found.is_live.shape, -1), found.negative], -1)


def list_all_rows(found: StepHistories, block_format: BlockFormat) -> tuple[jax.Array, jax.Array]:
    """See `list_client_rows`, of `list_step_entries`; of a whole catalogue, all items of those who have steps."""
    batching, items, end, rows = block_format.batching, block_format.items, block_format.end, block_format.rows
    assert batching.sequence
    if batching.sequence.whole_catalogue:
        every = jnp.broadcast_to(jnp.arange(items, dtype=jnp.int32), (len(found.item), items))
        return jnp.where(found.is_live[:, :1], every, end), every
    return list_client_rows(list_step_entries(found), items, end, rows)


def lay_out_step_histories(
    found: StepHistories, place: jax.Array, block_format: BlockFormat
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(int32 [m, S, k]: the rows of each step, in the order of their items, int32 [m, S, H, T]: which of these each
    item read is, float [m, S, k]: how often each is a negative). place: of each of `list_step_entries` among the
    rows of its client."""
    items, shape, read = block_format.items, found.is_live.shape, found.item.shape[2:]
    rows = min(block_format.width * read[0] + block_format.batching.negatives, items)
    entry = list_step_entries(found)
    order, _, is_new = sort_entries(entry)
    number = jnp.cumsum(is_new, -1, dtype=jnp.int32) - 1  # of each entry's item among those of the step
    lead = jnp.indices((*shape, 1), sparse=True)[:2]
    slot = jnp.zeros(entry.shape, jnp.int32).at[(*lead, order)].set(number)
    slot = jnp.where(entry < items, slot, items)
    step_rows = jnp.full((*shape, rows), items, jnp.int32).at[(*lead, slot)].set(place, mode="drop")
    split = read[0] * read[1]
    of_batch = block_format.batching.negative_sampling == "in_batch"
    negative = slot[..., :split] if of_batch else slot[..., split:]
    drawn = jnp.zeros((*shape, rows), jnp.float32).at[(*lead, negative)].add(1, mode="drop")
    return step_rows, slot[..., :split].reshape(*shape, *read), drawn


def draw_organisation_histories(
    block_format: BlockFormat, data: DeviceTrainData, client: jax.Array, key: BijectionKey
) -> tuple[jax.Array, jax.Array, Batches]:
    """(int32 [m, K]: the items that each client holds, float [m]: train items, `Batches` [m, ...]); see
    `device_draws.draw_block`.

    client int [m]: C, the number of clients, for an empty place. key: of the round.
    """
    batching, items = block_format.batching, block_format.items
    assert batching.sequence
    found = draw_step_histories(block_format, data, client, key)
    held, place = list_all_rows(found, block_format)
    if batching.sequence.whole_catalogue:
        rows = jnp.broadcast_to(jnp.arange(items, dtype=jnp.int32), (*found.is_live.shape, items))
        sequence, negative = found.item, jnp.broadcast_to(mark_warm_items(data, items), rows.shape)
    else:
        rows, sequence, negative = lay_out_step_histories(found, place, block_format)
    is_live, used = found.is_live[..., None], found.user[..., None] < data.nobody
    dropout_key = fold_in_number(key, jnp.uint32(DROPOUT))
    dropout = jnp.stack(fold_in_number(fold_in_number(dropout_key, found.user), found.epoch[..., None]), -1)
    batch = {"sequence": sequence, "dropout": jnp.where(used, dropout, 0)}
    if data.times is not None:
        batch["time"] = jnp.where(found.item < items, data.times.at[found.number].get(mode="clip"), 0)
    if batching.batch_size == 1:
        batch = {name: x[:, :, 0] for name, x in batch.items()}
    batch["negative"] = jnp.where(is_live, negative, 0)
    batch["catalogue"] = jnp.full(found.is_live.shape, count_warm_items(data, items), jnp.float32)
    read = (found.item < items).sum(-1)
    targets = jnp.where(found.user < data.nobody, read - 1 if batching.sequence.compares else read, 0)
    examples = jnp.maximum(targets, 0).sum((1, 2)).astype(jnp.float32)
    offsets = data.start[data.client_offsets]
    n = (offsets[client + 1] - offsets[client]).astype(jnp.float32)
    return held, n, Batches(jnp.where(is_live, rows, items), found.is_live, batch, examples)


def draw_organisation_history_rows(
    block_format: BlockFormat, data: DeviceTrainData, client: jax.Array, key: BijectionKey
) -> jax.Array:
    """int32 [m, K]: the items that each client holds; see `draw_organisation_histories`."""
    return list_all_rows(draw_step_histories(block_format, data, client, key), block_format)[0]
