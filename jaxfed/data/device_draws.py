"""Rounds that are drawn where their clients train, without a sort and without the host.

A client has n train items, and `free` items that may be its negatives. A key of (seed, round, client) chooses a random
order of these: a bijection of [0, free), see `bijections`. The negatives of a round, epoch after epoch, are its values
at 0, 1, 2, ...: none comes twice before all have come. Other bijections say at which places of an epoch its train items
lie. So what lies at a place of a step follows from that place and from sizes that are known before anything is drawn.
"""

import jax
import jax.numpy as jnp

from jaxfed.core.client_work import Batches
from jaxfed.data.bijections import BijectionKey, divide_integers, fold_in_number, permute_indices
from jaxfed.data.device_data import BlockFormat, DeviceTrainData, count_items, find_negatives


def draw_held_rows(block_format: BlockFormat, data: DeviceTrainData, client: jax.Array, key: BijectionKey) -> jax.Array:
    """int32 [m, K]: the items that each client holds: its train items, then its negatives; `end` where unused.

    client int [m]: C for nobody. key: of the round.
    """
    batching, items, client = block_format.batching, block_format.items, client[:, None]
    begin, (n, free) = data.start[client], count_items(data, client, items)
    place, order = jnp.arange(block_format.rows), fold_in_number(fold_in_number(key, client), 0)
    rank = permute_indices(jnp.clip(place - n, 0, free - 1), free, order, items)
    negative = find_negatives(data, client, rank, items, block_format.excluded_items)
    positive = data.items.at[begin + place].get(mode="clip")
    used = n + jnp.minimum(batching.epochs * n * batching.negatives, free)
    return jnp.where(place < n, positive, jnp.where(place < used, negative, block_format.end))


def order_each_epoch(count: jax.Array, most: int, epochs: int, key: BijectionKey) -> jax.Array:
    """int32 [m, epochs * most]: in each epoch the numbers below a count int [m, 1] in a random order. No count is above
    `most`; places past a count hold one of its numbers again, and must not be used."""
    number, size = jnp.minimum(jnp.arange(most), jnp.maximum(count - 1, 0)), jnp.maximum(count, 1)
    keys = [fold_in_number(key, epoch + 1) for epoch in range(epochs)]
    return jnp.concatenate([permute_indices(number, size, each, most) for each in keys], 1)


def number_steps(block_format: BlockFormat, of_epoch: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(int32 [m, S]: the epoch of each step of a block, int32 [m, S]: its number in that epoch). of_epoch int [m, 1]:
    steps of an epoch of each client."""
    step = jnp.arange(block_format.steps)
    return divide_integers(jnp.broadcast_to(step, (len(of_epoch), block_format.steps)), of_epoch)


def place_positives(block_format: BlockFormat, n: jax.Array, of_epoch: jax.Array, key: BijectionKey) -> jax.Array:
    """int32 [m, S * B]: which train item of its client lies at each place of its steps; -1: none. of_epoch: steps of an
    epoch."""
    batching, width, positives = block_format.batching, block_format.width, block_format.positives
    clients, places = len(n), block_format.steps * width
    found = jnp.full((clients, places), -1, jnp.int32)
    number, examples = jnp.arange(positives), jnp.maximum(n * (1 + batching.negatives), 1)
    largest = max(positives * (1 + batching.negatives), 1)
    for epoch in range(batching.epochs):
        at = permute_indices(jnp.minimum(number, examples - 1), examples, fold_in_number(key, epoch + 1), largest)
        step = epoch * of_epoch + at // batching.batch_size
        at = jnp.where(number < n, step * width + at % batching.batch_size, places)
        found = found.at[jnp.arange(clients)[:, None], at].set(number, mode="drop", unique_indices=True)
    return found


def draw_block(
    block_format: BlockFormat, data: DeviceTrainData, client: jax.Array, key: BijectionKey
) -> tuple[jax.Array, jax.Array, Batches]:
    """(int32 [m, K]: the items that each client holds, float [m]: train items, `Batches` [m, ...]).

    client int [m]: C for nobody. key: of the round. The arrays are those of `packing.pack_cohort`, whose rows come in
    another order.
    """
    batching, items, width = block_format.batching, block_format.items, block_format.width
    held, client = draw_held_rows(block_format, data, client, key), client[:, None]
    own_key, shape = fold_in_number(key, client), (len(client), block_format.steps, width)
    n, free = count_items(data, client, items)
    examples = n * (1 + batching.negatives)
    of_epoch = jnp.maximum(-(-examples // batching.batch_size), 1)

    positive = place_positives(block_format, n, of_epoch, own_key).reshape(shape)
    step = jnp.arange(block_format.steps)
    first = step % of_epoch * batching.batch_size  # example of an epoch, of each step [m, S]
    count = jnp.where(step < batching.epochs * of_epoch, jnp.clip(examples - first, 0, batching.batch_size), 0)
    is_live = jnp.arange(width) < count[..., None]
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
        held,
        n[:, 0].astype(jnp.float32),
        Batches(jnp.where(is_row, row, items), count > 0, batch, total),
    )
