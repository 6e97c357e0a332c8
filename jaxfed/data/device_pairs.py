"""Pairs of a positive and a negative that are drawn where their clients train; see `device_draws` of the negatives.

As on the host, an epoch has the train items of a client in a random order, and each of them with its negatives, one
pair after the other. So the pair at a place of an epoch follows from that place: its train item from a bijection, its
negative from how many came before. A step has an item in one row, however many of its pairs name it.
"""

import jax
import jax.numpy as jnp

from jaxfed.core.client_work import Batches
from jaxfed.data.bijections import BijectionKey, divide_integers, fold_in_number
from jaxfed.data.device_data import BlockFormat, DeviceTrainData, count_items
from jaxfed.data.device_draws import draw_held_rows, number_steps, order_each_epoch


def lay_out_pairs(
    block_format: BlockFormat, n: jax.Array, free: jax.Array, order: jax.Array
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """(int32 [m, S, 2 B]: the rows of each step, `items` where unused, bool [m, S]: which steps there are, what
    batches carry).

    n, free int [m, 1]: see `count_items`; order: see `order_each_epoch`. A row lies where the step has its item first,
    as `packing.lay_out_examples` lays it.
    """
    batching, width = block_format.batching, block_format.width
    lane, size = jnp.arange(width), batching.batch_size
    pairs = n * batching.negatives  # of an epoch
    of_epoch = jnp.maximum(-(-pairs // size), 1)
    epoch, rest = number_steps(block_format, of_epoch)
    first = rest * size  # pair of an epoch, of each step [m, S]
    count = jnp.where(epoch < batching.epochs, jnp.clip(pairs - first, 0, size), 0)
    is_live, place = lane < count[..., None], first[..., None] + lane

    group = place // batching.negatives  # pairs of the same train item
    number = jnp.clip(epoch, 0, batching.epochs - 1)[..., None] * block_format.positives + group
    positive = jnp.take_along_axis(order, number.reshape(len(n), -1), 1, mode="clip").reshape(place.shape)
    start = jnp.maximum(group * batching.negatives - first[..., None], 0)  # of the group, in its step

    before = divide_integers(epoch * pairs + first, free)[1][..., None]  # negatives of the steps before, in laps
    free = free[..., None]
    negative = n[..., None] + divide_integers(before + lane, free)[1]
    again = jnp.broadcast_to(divide_integers(lane, free)[1], place.shape)  # where the step has the same one first

    columns = [(start == lane, positive), (again == lane, negative)]
    rows = jnp.stack([jnp.where(is_live & is_first, row, block_format.items) for is_first, row in columns], -1)
    batch = {
        "weight": is_live.astype(jnp.float32),
        "item": jnp.where(is_live, 2 * start, 0),
        "other": jnp.where(is_live, 2 * again + 1, 0),
    }
    return rows.reshape(*place.shape[:2], 2 * width), count > 0, batch


def draw_pair_block(
    block_format: BlockFormat, data: DeviceTrainData, client: jax.Array, key: BijectionKey
) -> tuple[jax.Array, jax.Array, Batches]:
    """(int32 [m, K]: the items that each client holds, float [m]: train items, `Batches` [m, ...]); see
    `device_draws.draw_block`."""
    batching = block_format.batching
    held, client = draw_held_rows(block_format, data, client, key), client[:, None]
    n, free = count_items(data, client, block_format.items)
    order = order_each_epoch(n, block_format.positives, batching.epochs, fold_in_number(key, client))
    rows, is_live, batch = lay_out_pairs(block_format, n, free, order)
    examples = (batching.epochs * batching.negatives * n[:, 0]).astype(jnp.float32)
    steps = Batches(rows, is_live, batch, examples)
    return held, n[:, 0].astype(jnp.float32), steps
