"""What batches that are drawn on the device have beside rows and labels: features, and labels that attackers flip."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxfed.core.client_work import Batches
from jaxfed.data.bijections import BijectionKey
from jaxfed.data.device_data import BlockFormat, DeviceTrainData


def flip_labels(data: DeviceTrainData, client: jax.Array, steps: Batches) -> Batches:
    """Batches of clients int [m], positives and negatives exchanged where `data.label_flipped` says so."""
    assert data.label_flipped is not None
    flipped, batch = data.label_flipped[client][:, None, None], steps.batch
    if "other" in batch:
        pairs = batch["item"], batch["other"]
        item, other = (jnp.where(flipped, *each) for each in (pairs[::-1], pairs))
        return steps._replace(batch=batch | {"item": item, "other": other})
    label = jnp.where(flipped & (batch["weight"] > 0), 1 - batch["label"], batch["label"])
    return steps._replace(batch=batch | {"label": label})


def add_features(data: DeviceTrainData, items: int, client: jax.Array, held: jax.Array, steps: Batches) -> Batches:
    """Batches with `item_features` [m, S, k, F] of the items in their rows and `user_features` [m, S, F], or
    [m, S, B, F] where clients have several users, as far as the data have them. held int [m, K]: the items of each
    client's rows."""
    found = {}
    if data.item_features is not None:
        row = steps.rows.reshape(len(held), -1)
        item = jnp.where(row < items, jnp.take_along_axis(held, row, 1, mode="clip"), items).reshape(steps.rows.shape)
        found["item_features"] = data.item_features[item]
    if data.user_features is not None:
        user, is_live = client[:, None], steps.live
        if "user" in steps.batch:
            assert data.client_offsets is not None
            user, is_live = data.client_offsets[client][:, None, None] + steps.batch["user"], is_live[..., None]
        found["user_features"] = data.user_features[jnp.where(is_live, user, data.nobody)]
    return steps._replace(batch=steps.batch | found)


def draw_block_with_features(
    draw: Callable[..., tuple[jax.Array, jax.Array, Batches]],
    block_format: BlockFormat,
    data: DeviceTrainData,
    client: jax.Array,
    key: BijectionKey,
) -> tuple[jax.Array, jax.Array, Batches]:
    """What `draw` draws of the other arguments, with features and flipped labels."""
    held, num_train, steps = draw(block_format, data, client, key)
    if data.label_flipped is not None:
        steps = flip_labels(data, client, steps)
    return held, num_train, add_features(data, block_format.items, client, held, steps)
