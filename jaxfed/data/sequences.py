"""Histories in their order as batches, in NumPy: each step of a client reads that of its user, or those of several of
its users, with negatives for all of it.

All of it is a function of (seed, round, client), as examples are; see `batching`. The arrays are those of
`packing.CohortLayout`.
"""

from typing import NamedTuple

import numpy as np

from jaxfed.core.streams import Stream, host_rng
from jaxfed.data.batching import Batching, client_random_numbers, count_step_histories
from jaxfed.data.blocks import BlockPlan, BlockShapes
from jaxfed.data.popular_negatives import scale_random
from jaxfed.data.population import Population
from jaxfed.data.ragged import concatenate_ranges, sort_pairs


class DrawnSequences(NamedTuple):
    """The steps of some clients, S in all, client by client, and the histories that they read, H in all."""

    client: np.ndarray  # int64 [S]: which of the clients asked for
    place: np.ndarray  # int64 [S]: which of its client's steps
    step: np.ndarray  # int64 [H]: of each history, ascending
    slot: np.ndarray  # int64 [H]: its place in the step
    length: np.ndarray  # int64 [H]: items read
    item: np.ndarray  # int32 [sum of lengths]: the items read, history by history, earliest first
    negative: np.ndarray  # int32 [S, n]: may repeat, and may be items of the histories
    dropout: np.ndarray  # uint32 [H, 2]: the data of a key
    time: np.ndarray | None  # int32 [sum of lengths]: when each item was met; None: the model does not ask


def draw_sequences(
    population: Population, batching: Batching, clients: np.ndarray, seed: int, round: int
) -> DrawnSequences:
    """The latest train items of each client's users, once an epoch, with negatives drawn (up to 2^-32) from the
    catalogue but for its cold items, uniformly or by popularity: for each step, or for all clients of a round
    (`shared_negatives`).

    Users come in an order that is drawn for each epoch: by the numbers that are also the keys of their dropout.
    """
    assert batching.sequence
    drawn = 0 if batching.sequence.whole_catalogue else batching.negatives
    passes, epoch = np.repeat(clients, batching.epochs), np.tile(np.arange(batching.epochs), len(clients))
    users, most = np.diff(population.client_offsets)[passes], count_step_histories(population, batching)
    steps = -(-users // most)
    counts = users + steps * drawn
    raw = client_random_numbers(seed, Stream.EXAMPLES, passes, epoch, counts, round)
    begin = np.cumsum(counts) - counts
    keys = raw[concatenate_ranges(begin, users)]
    if batching.shared_negatives and drawn:
        every = host_rng(seed, Stream.SHARED_NEGATIVES, round).integers(0, 1 << 32, (batching.epochs, drawn), np.uint64)
        random32 = every[np.repeat(epoch, steps)]
    else:
        random32 = raw[concatenate_ranges(begin + users, steps * drawn)].reshape(steps.sum(), drawn) >> np.uint64(32)
    if popularity := population.popularity:
        rank = scale_random(random32, popularity.mass[-1])
        negative = (np.searchsorted(popularity.mass, rank, "right") - 1).astype(np.int32)
    else:
        warm = list_warm_items(population)
        negative = warm[scale_random(random32, len(warm))]

    order = np.lexsort((keys, np.repeat(np.arange(len(passes)), users)))
    user = concatenate_ranges(population.client_offsets[passes], users)[order]
    rank = concatenate_ranges(np.zeros_like(users), users)
    step = np.repeat(np.cumsum(steps) - steps, users) + rank // most
    end = population.train.start[user + 1]
    length = batching.count_read(end - population.train.start[user])
    read = concatenate_ranges(end - length, length)
    item, time = population.train.values[read], None
    if batching.sequence.times != "none":
        assert population.times
        time = population.times.train[read]
    client = np.repeat(np.repeat(np.arange(len(clients)), batching.epochs), steps)
    dropout = keys[order][:, None].view(np.uint32)
    place = concatenate_ranges(epoch * steps, steps)
    return DrawnSequences(client, place, step, rank % most, length, item, negative, dropout, time)


def describe_cut_histories(population: Population, length: int) -> str:
    """How many histories have more train items than a model of sequences reads; "": none.

    length: see `SequenceFormat`.
    """
    lengths = population.train.counts
    cut = int((lengths > length).sum())
    return f"{cut:,} of {len(lengths):,} histories have more than {length} items: the latest are read" if cut else ""


def list_warm_items(population: Population) -> np.ndarray:
    """int32: the items that may be negatives, ascending: all but the cold ones."""
    every = np.arange(population.num_items, dtype=np.int32)
    return every if population.cold_items is None else np.setdiff1d(every, population.cold_items)


def list_sequence_widths(shapes: BlockShapes, size: int) -> dict[str, int]:
    """{name: places} of what a step with so many items read holds. Where it has several histories, all steps have
    places for the longest."""
    rows = shapes.step_rows(size)
    return {"rows": rows, "negative": rows} | ({"sequence": size, "time": size} if shapes.columns == 1 else {})


def find_distinct(group: np.ndarray, item: np.ndarray, groups: int, items: int) -> tuple[np.ndarray, ...]:
    """The distinct items of each group: (int64 [d]: their groups, int64 [d]: the items, ascending in each, int64 [d]:
    the place of each in its group, int64 [n]: which of them each entry is)."""
    pair, order = sort_pairs(group, item, groups, items)
    fresh = np.diff(pair, prepend=-1) != 0
    number = np.empty(len(pair), np.int64)
    number[order] = np.cumsum(fresh) - 1
    owner, value = np.divmod(pair[fresh], items)
    start = np.searchsorted(owner, np.arange(groups))
    return owner, value, np.arange(len(owner)) - start[owner], number


class StepRows(NamedTuple):
    """The rows of S steps, D in all, and which of their clients' they are."""

    step: np.ndarray  # int64 [D]: the step of each row
    place: np.ndarray  # int64 [D]: among those of the step
    held: np.ndarray  # int64 [D]: the place among those of the client
    client: np.ndarray  # int64 [C]: the client of each row that clients hold
    held_place: np.ndarray  # int64 [C]: its place there
    held_item: np.ndarray  # int64 [C]: its item
    negative: np.ndarray  # int64 [D]: how often it was drawn
    read: np.ndarray  # int64 [sum of lengths]: the place of each item read among the rows of its step


def list_step_rows(drawn: DrawnSequences, clients: int, items: int, warm: np.ndarray) -> StepRows:
    """The distinct items of each step, ascending, and those of each client."""
    steps = len(drawn.client)
    step = np.concatenate([np.repeat(drawn.step, drawn.length), np.repeat(np.arange(steps), drawn.negative.shape[1])])
    entry = np.concatenate([drawn.item, drawn.negative.ravel()])
    owner, item, place, number = find_distinct(step, entry, steps + 1, items)
    client, held_item, held_place, held = find_distinct(drawn.client[owner], item, clients + 1, items)
    read = len(drawn.item)
    negative = np.bincount(number[read:], minlength=len(owner))
    return StepRows(owner, place, held_place[held], client, held_place, held_item, negative, place[number[:read]])


def list_whole_catalogue(drawn: DrawnSequences, clients: int, items: int, warm: np.ndarray) -> StepRows:
    """As `list_step_rows`, for steps that hold all items: a row's position is its item number, and each warm item is a
    negative once."""
    steps = len(drawn.client)
    every, places = np.tile(np.arange(items), steps), np.tile(np.arange(items), clients)
    owner, client = np.repeat(np.arange(steps), items), np.repeat(np.arange(clients), items)
    return StepRows(owner, every, every, client, places, places, np.isin(every, warm).astype(np.int64), drawn.item)


def lay_out_sequences(
    population: Population, batching: Batching, drawn: DrawnSequences, where: BlockPlan, shapes: BlockShapes
) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """The arrays of a `CohortLayout`, the clients in the order they lie.

    drawn: of these clients. where: their places, in blocks of these shapes.
    """
    assert batching.sequence
    _, all_steps, all_rows = where.sizes
    list_rows = list_whole_catalogue if batching.sequence.whole_catalogue else list_step_rows
    items, several, (_, longest) = population.num_items, shapes.columns, shapes.kinds[-1]
    warm = list_warm_items(population)
    found = list_rows(drawn, len(where.order), items, warm)
    if batching.negative_sampling == "in_batch":  # all that a step reads
        of_read = np.repeat(drawn.step, drawn.length), found.read
        counts = np.zeros((len(drawn.client), found.place.max(initial=0) + 1))
        np.add.at(counts, of_read, 1)
        found = found._replace(negative=counts[found.step, found.place])
    at = where.step[drawn.client] + drawn.place  # the place of each step among all

    held = np.full(all_rows, shapes.end, np.int32)
    held[where.row[found.client] + found.held_place] = found.held_item
    rows = np.full((all_steps, shapes.step_rows(longest)), items, np.int32)
    rows[at[found.step], found.place] = found.held
    negative = np.zeros(rows.shape, np.float32)
    negative[at[found.step], found.place] = found.negative

    history = at[drawn.step] * several + drawn.slot  # the place of each history among all
    sequence = np.full((all_steps * several, longest), items, np.int32)
    of_item = np.repeat(history, drawn.length), concatenate_ranges(np.zeros_like(drawn.length), drawn.length)
    sequence[of_item] = found.read
    times = {}
    if drawn.time is not None:
        times["time"] = np.zeros(sequence.shape, np.int32)
        times["time"][of_item] = drawn.time
    live, dropout = np.zeros(all_steps, bool), np.zeros((all_steps * several, 2), np.uint32)
    live[at], dropout[history] = True, drawn.dropout
    histories = {"sequence": sequence, "dropout": dropout, **times}
    if several > 1:
        histories = {name: x.reshape(all_steps, several, -1) for name, x in histories.items()}
    return held, rows, live, {**histories, "negative": negative, "catalogue": np.full(all_steps, len(warm), np.float32)}
