"""What the host says of a round that is drawn on the device, and the blocks that a program of many rounds draws."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfed.core.round_loop import BlockSource, PlannedRound
from jaxfed.core.types import Block
from jaxfed.data.batching import Batching
from jaxfed.data.bijections import BijectionKey
from jaxfed.data.blocks import BlockShapes
from jaxfed.data.device_cohorts import (
    bound_cohort_rows,
    bound_held_rows,
    choose_draws,
    list_block_formats,
    make_round_key,
    mark_held_items,
    number_marked_items,
    plan_cohort_blocks,
)
from jaxfed.data.device_data import DeviceTrainData
from jaxfed.data.population import Population


class DrawInputs(NamedTuple):
    """What the blocks of a round are drawn from; of R rounds, all arrays [R, ...]."""

    slots: Any  # int32 [places]: the slot of the client at each place of the blocks, one after the other
    blocks_per_kind: Any  # int32 [kinds]: that this cohort fills; further ones are empty
    key: BijectionKey  # of the round


def plan_device_round(
    population: Population,
    batching: Batching,
    shapes: BlockShapes,
    ids: np.ndarray,
    present: np.ndarray,
    ages: np.ndarray | None,
    seed: int,
    round: int,
) -> PlannedRound:
    """What a program is told of a round: its clients, in the order in which they lie in blocks, and a key.

    Args:
        population, batching, shapes: what is drawn, see `make_block_source`.
        ids, present, ages: the cohort, see `Cohort`.
        seed: of the draws.
        round: its number.

    Returns:
        The round, on the host.
    """
    where = plan_cohort_blocks(population, batching, shapes, ids)
    places = shapes.slots + max(shapes.clients(steps) for steps, _ in shapes.kinds)  # the last block may not be full
    slots = np.full(places, len(ids), np.int32)
    slots[where.lane] = where.order
    steps = [(steps, width) for _, steps, _, width in where.shapes]
    counts = np.array([steps.count(kind) for kind in reversed(shapes.kinds)], np.int32)
    return PlannedRound(
        ids.astype(np.int32), present, ages, counts, DrawInputs(slots, counts, make_round_key(seed, round))
    )


def drop_finer_kinds(shapes: BlockShapes) -> BlockShapes:
    """The shapes of blocks in a program of many rounds, which holds all kinds: only those whose steps are a power of
    two, those of short batches, and the longest. It compiles in half the time, and takes as long to run: a round has
    fewer blocks that are not full."""
    longest, width = shapes.kinds[-1]
    kept = [(steps, w) for steps, w in shapes.kinds if steps & (steps - 1) == 0 or w < width or steps == longest]
    return shapes._replace(kinds=tuple(kept))


def expect_room(population: Population, batching: Batching, shapes: BlockShapes) -> int:
    """Rows that hardly any cohort exceeds, whatever is drawn: six standard deviations above the mean of what clients
    hold, if no two of them held the same row. 0: rounds run on all rows."""
    held = bound_held_rows(population, batching, np.arange(population.num_clients))
    most = shapes.slots * held.mean() + 6 * np.sqrt(shapes.slots) * held.std()
    return max(shapes.room, min(int(most), population.num_items)) if shapes.room else 0


def choose_room(population: Population, batching: Batching, room: int, cohorts: list[np.ndarray]) -> int:
    """Rows that none of some cohorts exceeds, whatever is drawn.

    Args:
        population, batching: what is drawn.
        room: the rows that are expected, doubled where they are too few: a program is compiled for each number. 0:
            rounds run on all rows.
        cohorts: the ids of each, int [M].
    """
    clients = (ids[ids < population.num_clients] for ids in cohorts)
    most = max(bound_cohort_rows(population, batching, each) for each in clients)
    while 0 < room < min(most, population.num_items):
        room *= 2
    return room


def make_block_source(population: Population, batching: Batching, shapes: BlockShapes) -> BlockSource:
    """The blocks of rounds as `plan_device_round` plans them, drawn inside of a program whose data are
    `put_train_data`."""
    nobody, end, draws = population.num_clients, shapes.end, choose_draws(population, batching)
    formats = [*reversed(list_block_formats(population, batching, shapes).values())]
    widths = [shapes.clients(steps) for steps, _ in reversed(shapes.kinds)]

    def find_clients(kind: int, planned: PlannedRound, block_index: Any) -> tuple[jax.Array, jax.Array, BijectionKey]:
        slots, filled, key = planned.draw_inputs
        first = sum((filled[k] * widths[k] for k in range(kind)), jnp.int32(0))
        slot = jax.lax.dynamic_slice_in_dim(slots, first + block_index * widths[kind], widths[kind])
        slot = jnp.where(block_index < filled[kind], slot, len(planned.ids))
        return planned.ids.at[slot].get(mode="fill", fill_value=nobody), slot, key

    def draw(kind: int, data: DeviceTrainData, planned: PlannedRound, block_index: Any) -> Block:
        client, slot, key = find_clients(kind, planned, block_index)
        return Block(slot, *draws.block(formats[kind], data, client, key))

    def mark_block(
        kind: int, data: DeviceTrainData, planned: PlannedRound, block_index: Any, marked: jax.Array
    ) -> jax.Array:
        client, _, key = find_clients(kind, planned, block_index)
        return mark_held_items(marked, draws.held_rows(formats[kind], data, client, key))

    def list_rows(data: DeviceTrainData, planned: PlannedRound, room: int) -> tuple[jax.Array, jax.Array]:
        marked = jnp.zeros(end + 1, bool)
        for kind in range(len(widths)):
            marked = jax.lax.fori_loop(
                0, planned.blocks_per_kind[kind], partial(mark_block, kind, data, planned), marked
            )
        rows, place, _ = number_marked_items(room, marked)
        return rows, place

    return BlockSource(len(widths), draw, list_rows if shapes.room else None, end)
