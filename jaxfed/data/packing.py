"""Blocks: a cohort's examples in few static shapes, longest clients first; and the rows of the tables it holds."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

from jaxfed.core.client_work import Batches
from jaxfed.core.pairs import count_pairs, list_pairs
from jaxfed.core.types import Block, Cohort
from jaxfed.data.batching import Batching, DrawnExamples, draw_examples, measure_clients
from jaxfed.data.blocks import BlockPlan, BlockShapes, block_shape, plan_blocks
from jaxfed.data.population import Population
from jaxfed.data.ragged import concatenate_ranges, sort_pairs
from jaxfed.data.sequences import draw_sequences, lay_out_sequences, list_sequence_widths


class CohortLayout(NamedTuple):
    """Arrays of all blocks, end to end: R rows that clients may hold, T steps."""

    held: np.ndarray  # int32 [R]: items, distinct in a client and by first use; `end` where unused
    rows: np.ndarray  # int32 [T, width]: positions in the client's rows; N where unused
    live: np.ndarray  # bool [T]
    batch: dict[str, np.ndarray]  # [T, ...]


def order_by_first_use(new: np.ndarray, client: np.ndarray, clients: int) -> np.ndarray:
    """int64 [n]: the place of each among its client's rows, by first use: a step finds most of its rows side by side.

    new [n]: the entries that are the first of their client and item; client [E]: of each entry, ascending.
    """
    rank = np.zeros(len(client) + 1, np.int64)
    rank[new + 1] = 1
    rank = np.cumsum(rank)
    return rank[new] - rank[np.searchsorted(client, np.arange(clients))][client[new]]


def batch_features(
    population: Population, batching: Batching, drawn: DrawnExamples, where: BlockPlan, items: np.ndarray
) -> dict[str, np.ndarray]:
    """What batches carry of features: `item_features` [T, width, F] of a step's rows, whose items are [T, width];
    `user_features` [T, F] of the user whose step it is, or [T, size, F] of its examples' users."""
    found, size = {}, batching.batch_size
    if "item" in batching.features and population.item_features:
        found["item_features"] = population.item_features.rows(items)
    if "user" in batching.features and population.user_features:
        begin, count = where.step[drawn.client] + drawn.step, -(-drawn.examples // size)
        user = np.full(len(items), len(population.user_names))
        user[concatenate_ranges(begin, count)] = np.repeat(drawn.first, count)
        if population.users_per_client > 1:
            of_example = np.repeat(user, size)
            of_example[concatenate_ranges(begin * size, drawn.examples)] += drawn.user
            found["user_features"] = population.user_features.rows(of_example.reshape(-1, size))
        else:
            found["user_features"] = population.user_features.rows(user)
    return found


def fill_table(
    shape: tuple[int, int], at: np.ndarray, values: np.ndarray, fill: int = 0, dtype: type = np.int32
) -> np.ndarray:
    """An array [T, n] with `values` at the flat positions `at`, and `fill` elsewhere."""
    out: np.ndarray = np.full(shape[0] * shape[1], fill, dtype)
    out[at] = values
    return out.reshape(shape)


def lay_out_examples(
    population: Population, batching: Batching, drawn: DrawnExamples, where: BlockPlan, end: int
) -> CohortLayout:
    """Puts examples, their clients in the order they lie, at their places.

    A step's rows are distinct: an item lies where the step has it first. Where one user is a client, an example is its
    item alone, and repeats in a step become one row whose weight is their number and whose label is their mean; see
    `models.model.Loss`.
    """
    items, width, (_, steps, rows) = population.num_items, batching.width, where.sizes
    begin, count = (where.step[drawn.client] + drawn.step) * width, drawn.examples * drawn.item.shape[1]
    client, item = np.repeat(drawn.client, count), drawn.item.ravel()
    pair, order = sort_pairs(client, item, len(where.order), items)
    entry = concatenate_ranges(begin, count)[order]
    fresh = np.diff(pair, prepend=-1) != 0  # the client has the item here for the first time
    step_firsts = np.flatnonzero(fresh | (np.diff(entry // width, prepend=-1) != 0))  # and a step has it
    first_entries = np.flatnonzero(fresh)
    new, place = order[first_entries], order_by_first_use(order[first_entries], client, len(where.order))
    held_items = np.full(rows, end, np.int32)
    held_items[where.row[client[new]] + place] = item[new]
    place = np.repeat(place, np.diff(first_entries, append=len(pair)))
    positions = fill_table((steps, width), entry[step_firsts], place[step_firsts], items)
    live = np.zeros(steps, bool)
    live[concatenate_ranges(begin // width, -(-count // width))] = True

    at, ids, repeats = entry[step_firsts], item[order][step_firsts], np.diff(step_firsts, append=len(pair))
    batch = {}
    if batching.features:
        batch = batch_features(population, batching, drawn, where, fill_table((steps, width), at, ids, items))
    if population.users_per_client == 1 and not batching.pairwise:
        labels = np.add.reduceat(drawn.label[order], step_firsts, dtype=np.float64)
        batch["label"] = fill_table((steps, width), at, labels / repeats, 0, np.float32)
        batch["weight"] = fill_table((steps, width), at, repeats, 0, np.float32)
        if batching.ordered:
            batch["id"] = fill_table((steps, width), at, ids, end)
    else:
        slot = np.empty(len(pair), np.int64)
        slot[order] = np.repeat(at % width, repeats)
        batch |= batch_of_examples(population, batching, drawn, begin, slot, steps)
    return CohortLayout(held_items, positions, live, batch)


def batch_of_examples(
    population: Population, batching: Batching, drawn: DrawnExamples, begin: np.ndarray, slot: np.ndarray, steps: int
) -> dict[str, np.ndarray]:
    """What batches carry where an example is more than its item: [T, batch size] each.

    begin: the first entry of each client's pass; slot [E]: the row of its step that each entry lies in.
    """
    shape, columns = (steps, batching.batch_size), drawn.item.shape[1]
    at, slots = concatenate_ranges(begin // columns, drawn.examples), slot.reshape(-1, columns)
    weight = np.ones(len(at)) if drawn.is_learned is None else drawn.is_learned
    batch = {
        "weight": fill_table(shape, at, weight, 0, np.float32),
        "item": fill_table(shape, at, slots[:, 0]),
    }
    if population.users_per_client > 1:
        batch["user"] = fill_table(shape, at, drawn.user)
    if batching.pairwise:
        return batch | {"other": fill_table(shape, at, slots[:, 1])}
    return batch | {"label": fill_table(shape, at, drawn.label, 0, np.float32)}


def list_cohort_rows(
    held: np.ndarray, end: int, room: int, union: Callable[[np.ndarray], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """(int32 [room]: the distinct items, sorted; past the end where unused, int32 [R]: `held` as positions in them).

    union: what the other processes hold too, as bool [end + 1].
    """
    is_held = np.zeros(end + 1, bool)
    is_held[held] = True
    distinct = np.flatnonzero(union(is_held)[:end])
    while room < len(distinct):
        room *= 2
    rows = pad_rows(distinct, room, end)
    position = np.empty(end + 1, np.int32)
    position[distinct], position[end] = np.arange(len(distinct)), room
    return rows, position[held]


def pad_rows(distinct: np.ndarray, room: int, end: int) -> np.ndarray:
    """int32 [room]: ascending row numbers, past the end where unused."""
    rows = np.arange(end, end + room, dtype=np.int32)
    rows[: len(distinct)] = distinct
    return rows


def list_example_widths(batching: Batching, one_user: bool, size: int) -> dict[str, int]:
    """{name: places} of what a step of so many examples holds. Features of one user have no places."""
    columns = batching.width // batching.batch_size
    names = ("label", "weight", "item", "id", "other", "user", *(() if one_user else ("user_features",)))
    return {"rows": size * columns, "item_features": size * columns, **dict.fromkeys(names, size)}


def split_blocks(
    where: BlockPlan,
    laid: CohortLayout,
    widths: Callable[[int], dict[str, int]],
    slots: np.ndarray,
    examples: np.ndarray,
    num_train: np.ndarray,
) -> tuple[Block, ...]:
    """The blocks of what is laid end to end; slots, examples and num_train are [places for clients].

    widths: from the size of a block's steps to the first places of each array of a batch, and of `rows`.
    """
    blocks, at = [], (0, 0, 0)
    for m, length, k, size in where.shapes:
        to = at[0] + m, at[1] + m * length, at[2] + m * k
        lanes, steps, rows = map(slice, at, to)
        live = laid.live[steps].reshape(m, length)
        # a step lies in its first places: the others are unused in all steps of a narrower block
        width = widths(size)
        positions = laid.rows[steps, : width["rows"]].reshape(m, length, -1)
        cuts = {name: x[steps, : width[name]] if name in width else x[steps] for name, x in laid.batch.items()}
        batch = {name: x.reshape(m, length, *x.shape[1:]) for name, x in cuts.items()}
        data = Batches(positions, live, batch, examples[lanes])
        blocks.append(Block(slots[lanes], laid.held[rows].reshape(m, k), num_train[lanes], data))
        at = to
    return tuple(blocks)


def pack_cohort(
    population: Population,
    batching: Batching,
    shapes: BlockShapes,
    ids: np.ndarray,
    present: np.ndarray,
    seed: int,
    round: int,
    union: Callable[[np.ndarray], np.ndarray] = lambda is_held: is_held,
) -> Cohort:
    """A cohort with its data for one round. ids int [M]: past the end is an empty slot; present bool [M].

    Blocks depend on the cohort and the shapes alone. Of several processes each has its own part of every block, and
    reads the data of its own clients alone; `union` adds the rows the others hold to bool [end + 1].
    """
    clients = ids[ids < population.num_clients]
    owner = shapes.share.owner(clients, population.num_clients)
    where = plan_blocks(shapes, measure_clients(population, batching, clients), owner)
    return pack_planned(population, batching, shapes, ids, present, where, seed, round, union)


def empty_cohort(population: Population, batching: Batching, shapes: BlockShapes) -> Cohort:
    """An empty cohort with one block of every shape: what compiles all the programs of a run."""
    ids, none = np.full(shapes.slots, population.num_clients), np.zeros(0, np.int64)
    blocks = [block_shape(shapes, *kind) for kind in shapes.kinds]
    every = BlockPlan(none, blocks, none, none, none)
    return pack_planned(
        population, batching, shapes, ids, np.zeros(shapes.slots, bool), every, 0, 0, lambda is_held: is_held
    )


def pack_planned(population, batching, shapes, ids, present, where, seed, round, union) -> Cohort:
    """The cohort whose clients lie as planned."""
    slots = np.flatnonzero(ids < population.num_clients)[where.order]
    clients = ids[slots].astype(np.int64)
    widths: Callable[[int], dict[str, int]]
    if batching.sequence:
        sequences = draw_sequences(population, batching, clients, seed, round)
        laid = CohortLayout(*lay_out_sequences(population, batching, sequences, where, shapes))
        widths = partial(list_sequence_widths, shapes)
    else:
        batching = batching._replace(batch_size=shapes.kinds[-1][1])  # no wider than what any client fills
        drawn = draw_examples(population, batching, clients, seed, round)
        laid = lay_out_examples(population, batching, drawn, where, shapes.end)
        widths = partial(list_example_widths, batching, population.users_per_client == 1)
    rows = None
    if shapes.room and not shapes.pairs:
        rows, held = list_cohort_rows(laid.held, shapes.end, shapes.room, union)
        laid = laid._replace(held=held)

    def lanes(values, fill, dtype):
        out = np.full(where.sizes[0], fill, dtype)
        out[where.lane] = values
        return out

    num_train = population.num_train[clients]
    examples = lanes(measure_clients(population, batching, clients).examples, 0, np.float32)
    places = lanes(slots, len(ids), np.int32)
    blocks = split_blocks(where, laid, widths, places, examples, lanes(num_train, 0, np.float32))
    if shapes.room and shapes.pairs:
        rows = pad_rows(
            list_pairs([np.asarray(block.rows) for block in blocks], shapes.end), shapes.room, count_pairs(shapes.end)
        )
    return Cohort(ids.astype(np.int32), present, blocks, rows)
