"""Cohorts that are drawn on the device: the blocks of `device_draws`, and the rows that they hold together."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfed.core.streams import Stream, host_rng
from jaxfed.core.types import Block, Cohort
from jaxfed.data.batching import Batching, measure_clients
from jaxfed.data.bijections import BijectionKey
from jaxfed.data.blocks import BlockPlan, BlockShapes, block_shape, find_kinds, plan_blocks
from jaxfed.data.device_data import (
    BlockFormat,
    DeviceTrainData,
    count_free_items,
    list_train_data,
    put_train_data,
)
from jaxfed.data.device_draws import draw_block, draw_held_rows
from jaxfed.data.device_features import draw_block_with_features
from jaxfed.data.device_histories import draw_history_block, draw_history_rows
from jaxfed.data.device_organisation_histories import (
    draw_organisation_histories,
    draw_organisation_history_rows,
)
from jaxfed.data.device_organisations import (
    draw_organisation_block,
    draw_organisation_rows,
)
from jaxfed.data.device_pairs import draw_pair_block
from jaxfed.data.draw_place import check_device_draws
from jaxfed.data.population import Population


class BlockDraws(NamedTuple):
    """What draws the blocks of a format of batches; all read (format of the block, data, clients, key of the round).

    Args:
        block: draw(...) -> (int32 [m, K]: the items that each client holds, float [m]: train items, `Batches`).
        held_rows: draw(...) -> the first of these alone.
    """

    block: Callable[..., Any]
    held_rows: Callable[..., jax.Array]


def choose_draws(population: Population, batching: Batching) -> BlockDraws:
    """What draws batches of these on the device."""
    # a permutation of items does not follow their popularity: negatives are drawn one by one, and repeat
    with_repeats = population.users_per_client > 1 or batching.negative_sampling == "popularity"
    if batching.sequence and with_repeats:
        return BlockDraws(draw_organisation_histories, draw_organisation_history_rows)
    if batching.sequence:
        return BlockDraws(draw_history_block, draw_history_rows)
    if with_repeats:
        draw = partial(draw_block_with_features, draw_organisation_block)
        return BlockDraws(draw, draw_organisation_rows)
    draw = partial(draw_block_with_features, draw_pair_block if batching.pairwise else draw_block)
    return BlockDraws(draw, draw_held_rows)


def list_block_formats(
    population: Population, batching: Batching, shapes: BlockShapes
) -> dict[tuple[int, int], BlockFormat]:
    """What is static of each kind of blocks (steps, examples of a step)."""
    size = shapes.columns if batching.sequence else shapes.kinds[-1][1]
    batching = batching._replace(batch_size=size)  # no wider than what any client fills
    sizes = measure_clients(population, batching, np.arange(population.num_clients))
    kind, ends = find_kinds(shapes, sizes), (population.num_items, shapes.end)
    excluded = np.zeros(population.num_clients, np.int64)  # of a user of each client
    np.maximum.at(excluded, population.client_of, population.excluded.counts)
    found = {}
    for number, (steps, width) in enumerate(shapes.kinds):
        of_kind = kind <= number  # the last blocks are filled up with shorter clients
        positives, excluded_items = (int(x[of_kind].max(initial=0)) for x in (population.num_train, excluded))
        rows, users = shapes.rows(steps, width), population.users_per_client
        found[steps, width] = BlockFormat(batching, *ends, steps, width, rows, positives, excluded_items, users)
    return found


def mark_held_items(marked: jax.Array, held: jax.Array) -> jax.Array:
    """bool [end + 1] with the items that are held."""
    return marked.at[held].set(True)


def number_marked_items(room: int, marked: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(int32 [room]: the items marked, ascending, past the end where unused, int32 [end + 1]: the place of each among
    them, int []: how many there are)."""
    end = len(marked) - 1
    marked = marked.at[end].set(False)
    place, count = jnp.cumsum(marked, dtype=jnp.int32) - 1, marked.sum(dtype=jnp.int32)
    rows = (
        jnp.arange(end, end + room, dtype=jnp.int32)
        .at[jnp.where(marked, place, room)]
        .set(jnp.arange(end + 1, dtype=jnp.int32), mode="drop")
    )
    return rows, jnp.where(marked, place, room), count


def has_random_rows(population: Population, batching: Batching) -> bool:
    """Whether the number of rows that a client holds depends on what is drawn."""
    is_popular = batching.negative_sampling == "popularity"
    return bool(batching.sequence) or is_popular or population.users_per_client > 1


def bound_held_rows(population: Population, batching: Batching, clients: np.ndarray) -> np.ndarray:
    """int64: how many rows each of some clients holds in a round that is drawn on the device: exactly so many, or at
    most, where that depends on what is drawn."""
    n, items = population.num_train[clients], population.num_items
    if not has_random_rows(population, batching):
        return n + np.minimum(batching.epochs * n * batching.negatives, count_free_items(population, clients))
    if not batching.sequence:
        return np.minimum(n + batching.epochs * n * batching.negatives, items)
    sizes = measure_clients(population, batching, clients)
    drawn = items if batching.sequence.whole_catalogue else sizes.steps * batching.negatives
    return np.minimum(sizes.read + drawn, items)


def bound_cohort_rows(population: Population, batching: Batching, clients: np.ndarray) -> int:
    """Rows that some clients hold together in a round, at most."""
    if not (batching.sequence and batching.shared_negatives):
        return int(bound_held_rows(population, batching, clients).sum())
    return int(measure_clients(population, batching, clients).read.sum()) + batching.epochs * batching.negatives


def make_round_key(seed: int, round: int) -> BijectionKey:
    """The key of the draws of a round: two words of 32 bits."""
    return BijectionKey(*host_rng(seed, Stream.DEVICE_DRAWS, round).integers(0, 1 << 32, 2, np.uint32))


def plan_cohort_blocks(population: Population, batching: Batching, shapes: BlockShapes, ids: np.ndarray) -> BlockPlan:
    """Where the clients of a cohort, or this process's among them, lie in blocks, in the order of their slots. ids int
    [M]: past the end is an empty slot."""
    slots = np.flatnonzero(ids < population.num_clients)
    sizes = measure_clients(population, batching, ids[slots])
    where = plan_blocks(shapes, sizes, shapes.share.owner(ids[slots], population.num_clients))
    return where._replace(order=slots[where.order])


class CohortDrawer(NamedTuple):
    """What draws cohorts on the device.

    Args:
        draw: draw(ids, present, seed, round, union) -> `Cohort`, as `packing.pack_cohort` makes it, of other random
            numbers. union: union(is_held) -> bool [end + 1]: what any process holds, from what this one does.
        compile: Compiles all programs of `draw`.
        train_data: What clients train on, on the device since it was first asked for.
    """

    draw: Callable[..., Cohort]
    compile: Callable[[], None]
    train_data: Callable[[], DeviceTrainData]


def make_drawer(population: Population, batching: Batching, shapes: BlockShapes) -> CohortDrawer:
    """What draws the cohorts of a run. Raises ValueError where it cannot, see `check_device_draws`."""
    check_device_draws(population, batching, shapes)
    nobody, end = population.num_clients, shapes.end
    put = cache(partial(put_train_data, list_train_data(population, batching, shapes.share)))  # once rounds begin
    formats, draws = list_block_formats(population, batching, shapes), choose_draws(population, batching)
    programs = {kind: jax.jit(partial(draws.block, each)) for kind, each in formats.items()}
    mark, number = jax.jit(mark_held_items, donate_argnums=0), jax.jit(number_marked_items, static_argnums=0)
    locate = jax.jit(lambda place, held: place[held])

    def draw_blocks(ids, where, key):
        lanes = np.full((2, where.sizes[0]), [[nobody], [len(ids)]], np.int32)
        lanes[:, where.lane] = ids[where.order], where.order
        low = 0
        for clients, steps, _, width in where.shapes:
            client, slot = lanes[:, low : low + clients]
            held, num_train, batches = programs[steps, width](put(), client, key)
            yield Block(slot, held, num_train, batches)
            low += clients

    def list_rows(blocks, union):
        marked, room = jnp.zeros(end + 1, bool), shapes.room
        for block in blocks:
            marked = mark(marked, block.rows)
        if shapes.share.size > 1:
            marked = jnp.asarray(union(np.asarray(marked)))
        rows, place, count = number(room, marked)
        while room < int(count):
            room *= 2
            rows, place, count = number(room, marked)
        return rows, [block._replace(rows=locate(place, block.rows)) for block in blocks]

    def draw(ids, present, seed, round, union=lambda is_held: is_held):
        where = plan_cohort_blocks(population, batching, shapes, ids)
        blocks, rows = list(draw_blocks(ids, where, make_round_key(seed, round))), None
        if shapes.room:
            rows, blocks = list_rows(blocks, union)
        # programs of several processes take arrays of the host, which are the same in all, and own parts of blocks
        rows = np.asarray(rows) if shapes.share.size > 1 and rows is not None else rows
        return Cohort(ids.astype(np.int32), present, tuple(blocks), rows)

    def compile_kind(kind):
        none, key = np.zeros(0, np.int64), BijectionKey(*np.zeros(2, np.uint32))
        where = BlockPlan(none, [block_shape(shapes, *kind)], none, none, none)
        blocks = list(draw_blocks(np.full(shapes.slots, nobody), where, key))
        jax.block_until_ready(list_rows(blocks, lambda is_held: is_held) if shapes.room else blocks)

    def compile_kinds():
        put()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile_kind, shapes.kinds))

    return CohortDrawer(draw, compile_kinds, put)
