"""Batches of clients with several users, drawn where they train; what `batching.draw_examples` draws on the host. Those
of clients with one user, where negatives are drawn by popularity.

A bijection of (seed, round, client, epoch) orders the train items of all users of a client. Each is followed by its
negatives, which are drawn one by one as on the host, so that they may come again: items that are not excluded for its
user, or other positives of the step. Users of a client have items in common, so the rows that it holds are found by
sorting or marking them.
"""

import jax
import jax.numpy as jnp

from jaxfed.core.client_work import Batches
from jaxfed.data.bijections import BijectionKey, draw_below, fold_in_number
from jaxfed.data.device_data import (
    BlockFormat,
    DeviceTrainData,
    count_items,
    find_negatives,
    find_popular_negatives,
    is_excluded,
)
from jaxfed.data.device_draws import number_steps, order_each_epoch


def sort_entries(item: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(int32 [..., W]: the lanes of items [..., W] in ascending order, [..., W]: these items, bool [..., W]: whether
    each is the first of its kind). Lanes of the same item keep their order."""
    order = jnp.argsort(item, -1, stable=True)
    ascending = jnp.take_along_axis(item, order, -1)
    return order, ascending, jnp.diff(ascending, axis=-1, prepend=-1) != 0


def find_first_lanes(item: jax.Array) -> jax.Array:
    """int32 [..., W]: the first lane with the same item as each lane has."""
    order, _, is_new = sort_entries(item)
    first = jax.lax.cummax(jnp.where(is_new, jnp.arange(item.shape[-1]), 0), item.ndim - 1)
    return jnp.put_along_axis(order, order, jnp.take_along_axis(order, first, -1), -1, inplace=False).astype(jnp.int32)


def list_client_rows(item: jax.Array, items: int, end: int, rows: int) -> tuple[jax.Array, jax.Array]:
    """(int32 [m, rows]: the distinct items of each client, ascending, `end` where unused, int32 [m, ...]: the place of
    each entry's item among them). item int [m, ...]: `items` where unused.

    A client with more entries than there are items marks them in a list of all items; others are sorted.
    """
    lead, entry = jnp.arange(len(item))[:, None], item.reshape(len(item), -1)
    if entry.shape[1] > items:
        marked = jnp.zeros((len(item), items + 1), bool).at[lead, entry].set(True)
        value, is_new = jnp.broadcast_to(jnp.arange(items + 1, dtype=jnp.int32), marked.shape), marked
        number = jnp.cumsum(marked, 1, dtype=jnp.int32) - 1
        place = jnp.take_along_axis(number, entry, 1)
    else:
        order, value, is_new = sort_entries(entry)
        number = jnp.cumsum(is_new, 1, dtype=jnp.int32) - 1
        place = jnp.zeros(entry.shape, jnp.int32).at[lead, order].set(number, unique_indices=True)
    at = jnp.where(is_new & (value < items), number, rows)
    held = jnp.full((len(item), rows), end, jnp.int32).at[lead, at].set(value, mode="drop")
    return held, place.reshape(item.shape)


def draw_negatives_of_users(
    block_format: BlockFormat, data: DeviceTrainData, user: jax.Array, words: BijectionKey
) -> jax.Array:
    """int32: an item that is not excluded for each user, uniform or by popularity. words: random, one for each."""
    if data.popularity is None:
        rank = draw_below(count_items(data, user, block_format.items)[1], words)
        return find_negatives(data, user, rank, block_format.items, block_format.excluded_items)
    rank = draw_below(data.popularity.open[user], words)
    return find_popular_negatives(data, user, rank, block_format.excluded_items)


def choose_other_positive(
    start: jax.Array, count: jax.Array, number: jax.Array, each: int, words: BijectionKey
) -> jax.Array:
    """int32 [m, S, B]: one of the positives of which each step has an example, uniform, but not that of the example
    itself; that one where there is no other. Positives are numbered in their epoch; each has `each` examples.

    start, count int [m, S, 1]: the first example of each step in its epoch, and how many it has; number: of each
    example's positive. words: random.
    """
    first, last = start // each, (start + jnp.maximum(count, 1) - 1) // each
    other = first + draw_below(jnp.maximum(last - first, 1), words)
    return jnp.where(last > first, other + (other >= number), number)


def draw_examples_of_users(
    block_format: BlockFormat, data: DeviceTrainData, client: jax.Array, key: BijectionKey
) -> tuple[jax.Array, jax.Array, jax.Array, dict[str, jax.Array]]:
    """(int32 [m, S, B, 1 or 2]: the items of each example, `items` where unused, bool [m, S]: which steps there are,
    int32 [m]: examples of an epoch, {`weight`, `user` and, not of pairs, `label`: [m, S, B]}); the arguments are those
    of `draw_organisation_block`."""
    assert data.client_offsets is not None
    assert data.user_of_row is not None
    batching, items, most = block_format.batching, block_format.items, max(block_format.positives, 1)
    client, size, each = client[:, None], batching.batch_size, batching.examples(1)
    lane = jnp.arange(block_format.width)  # an epoch of one step may be narrower than other batches
    first_user = data.client_offsets[client]
    first_row = data.start[first_user]
    n = data.start[data.client_offsets[client + 1]] - first_row
    own_key = fold_in_number(key, client)
    order = order_each_epoch(n, most, batching.epochs, own_key)

    of_epoch = jnp.maximum(-(-n * each // size), 1)
    epoch, step = number_steps(block_format, of_epoch)
    count = jnp.where(epoch < batching.epochs, jnp.clip(n * each - step * size, 0, size), 0)
    is_live = lane < count[..., None]
    place = jnp.where(is_live, (step * size)[..., None] + lane, 0)  # of each example, in its epoch

    def find_row(number):  # of positives by their number in the epoch
        at = jnp.clip(epoch, 0, batching.epochs - 1)[..., None] * most + number
        row = first_row[..., None] + jnp.take_along_axis(order, at.reshape(len(n), -1), 1).reshape(at.shape)
        return jnp.minimum(row, len(data.items) - 1)

    row = find_row(place // each)
    user, positive = data.user_of_row[row], data.items[row]
    # a random number of its own for each example of each epoch
    words = fold_in_number(
        jax.tree.map(lambda word: word[..., None], fold_in_number(own_key, 0)), (epoch * n * each)[..., None] + place
    )
    batch = {"weight": is_live.astype(jnp.float32), "user": jnp.where(is_live, user - first_user[..., None], 0)}
    is_negative = jnp.bool_(True) if batching.pairwise else place % each > 0
    if batching.negative_sampling == "in_batch":
        other = choose_other_positive((step * size)[..., None], count[..., None], place // each, each, words)
        negative = data.items[find_row(other)]
        is_positive_too = is_excluded(data, user, negative, block_format.excluded_items)
        batch["weight"] = jnp.where(is_negative & is_positive_too, 0, batch["weight"])
    else:
        negative = draw_negatives_of_users(block_format, data, user, words)
    if batching.pairwise:
        item = jnp.stack([positive, negative], -1)
    else:
        item = jnp.where(is_negative, negative, positive)[..., None]
        label = (~is_negative).astype(jnp.float32) if data.labels is None else data.labels[row]
        batch["label"] = jnp.where(is_live, label, 0)
    return jnp.where(is_live[..., None], item, items), count > 0, (n * each)[:, 0], batch


def draw_organisation_block(
    block_format: BlockFormat, data: DeviceTrainData, client: jax.Array, key: BijectionKey
) -> tuple[jax.Array, jax.Array, Batches]:
    """(int32 [m, K]: the items that each client holds, float [m]: train items, `Batches` [m, ...]); see
    `device_draws.draw_block`. A row lies where the step has its item first, as `packing.lay_out_examples` lays it.

    client int [m]: C, the number of clients, for an empty place. key: of the round.
    """
    batching, items = block_format.batching, block_format.items
    item, is_live, examples, batch = draw_examples_of_users(block_format, data, client, key)
    item = item.reshape(*item.shape[:2], -1)  # [m, S, W]
    held, place = list_client_rows(item, items, block_format.end, block_format.rows)
    first = find_first_lanes(item)
    is_row = (first == jnp.arange(item.shape[-1])) & (item < items)
    slot = jnp.where(item < items, first, 0).reshape(*batch["weight"].shape, -1)
    names = ("item", "other") if batching.pairwise else ("item",)
    batch |= {name: slot[..., column] for column, name in enumerate(names)}
    if block_format.users == 1:
        batch = (
            {name: x for name, x in batch.items() if name != "user"}
            if batching.pairwise
            else merge_repeated_rows(batch)
        )
    steps = Batches(jnp.where(is_row, place, items), is_live, batch, (batching.epochs * examples).astype(jnp.float32))
    return held, (examples // batching.examples(1)).astype(jnp.float32), steps


def merge_repeated_rows(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """`weight` and `label` [m, S, W] of the rows of steps, whose examples are of one user: what a row repeats is its
    weight, the mean of the labels is its label. batch: of `draw_examples_of_users`, with the `item` of each example."""
    lead = jnp.indices((*batch["item"].shape[:-1], 1), sparse=True)[:-1]
    at = *lead, batch["item"]
    weight = jnp.zeros_like(batch["weight"]).at[at].add(batch["weight"])
    label = jnp.zeros_like(batch["label"]).at[at].add(batch["label"])
    return {"weight": weight, "label": label / jnp.maximum(weight, 1)}


def draw_organisation_rows(
    block_format: BlockFormat, data: DeviceTrainData, client: jax.Array, key: BijectionKey
) -> jax.Array:
    """int32 [m, K]: the items that each client holds; see `draw_organisation_block`."""
    item = draw_examples_of_users(block_format, data, client, key)[0]
    return list_client_rows(item, block_format.items, block_format.end, block_format.rows)[0]
