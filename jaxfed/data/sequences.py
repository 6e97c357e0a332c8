"""Histories in their order as batches, in NumPy: each step of a client is one, with negatives for all of it.

All of it is a function of (seed, round, client), as examples are; see `batching`. The arrays are those of
`packing.CohortLayout`.
"""

from typing import NamedTuple

import numpy as np

from jaxfed.core.streams import Stream, host_rng
from jaxfed.data.batching import Batching, client_random_numbers
from jaxfed.data.blocks import BlockPlan, BlockShapes
from jaxfed.data.population import Population
from jaxfed.data.ragged import concatenate_ranges, sort_pairs


class DrawnSequences(NamedTuple):
    """The steps of some clients, S in all, client by client."""

    client: np.ndarray  # int64 [S]: which of the clients asked for
    epoch: np.ndarray  # int64 [S]
    length: np.ndarray  # int64 [S]: items read
    item: np.ndarray  # int32 [sum of lengths]: the items read, step by step, earliest first
    negative: np.ndarray  # int32 [S, n]: may repeat, and may be items of the history
    dropout: np.ndarray  # uint32 [S, 2]: the data of a key


def draw_sequences(
    population: Population, batching: Batching, clients: np.ndarray, seed: int, round: int
) -> DrawnSequences:
    """Each client's latest train items, once an epoch, with negatives drawn uniformly (up to 2^-32) from the catalogue
    but for its cold items: for each client, or for all clients of a round (`shared_negatives`)."""
    assert batching.sequence
    drawn = 0 if batching.sequence.whole_catalogue else batching.negatives
    passes, epoch = np.repeat(clients, batching.epochs), np.tile(np.arange(batching.epochs), len(clients))
    raw = client_random_numbers(seed, Stream.EXAMPLES, passes, epoch, np.full(len(passes), 1 + drawn), round)
    raw = raw.reshape(-1, 1 + drawn)
    if batching.shared_negatives and drawn:
        every = host_rng(seed, Stream.SHARED_NEGATIVES, round).integers(0, 1 << 32, (batching.epochs, drawn), np.uint64)
        random32 = every[epoch]
    else:
        random32 = raw[:, 1:] >> np.uint64(32)
    warm = list_warm_items(population)
    negative = warm[(random32 * np.uint64(len(warm)) >> np.uint64(32)).astype(np.int64)]
    length = batching.largest(population.num_train[passes])
    begin = population.train.start[population.client_offsets[passes] + 1] - length  # one user is a client
    item = population.train.values[concatenate_ranges(begin, length)]
    dropout = np.ascontiguousarray(raw[:, :1]).view(np.uint32).reshape(-1, 2)
    return DrawnSequences(np.repeat(np.arange(len(clients)), batching.epochs), epoch, length, item, negative, dropout)


def describe_cut_histories(population: Population, length: int) -> str:
    """How many clients have more train items than a model of sequences reads; "": none.

    length: see `SequenceFormat`.
    """
    cut = int((population.num_train > length).sum())
    clients = len(population.num_train)
    return f"{cut:,} of {clients:,} clients have more than {length} items: the latest are read" if cut else ""


def list_warm_items(population: Population) -> np.ndarray:
    """int32: the items that may be negatives, ascending: all but the cold ones."""
    every = np.arange(population.num_items, dtype=np.int32)
    return every if population.cold_items is None else np.setdiff1d(every, population.cold_items)


def list_sequence_widths(shapes: BlockShapes, size: int) -> dict[str, int]:
    """{name: places} of what a step with so many items read holds."""
    return {"rows": shapes.step_rows(size), "negative": shapes.step_rows(size), "sequence": size}


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
    steps, lengths = len(drawn.client), (drawn.length, np.full(len(drawn.client), drawn.negative.shape[1]))
    step = np.concatenate([np.repeat(np.arange(steps), count) for count in lengths])
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
    population: Population, batching: Batching, drawn: DrawnSequences, where: BlockPlan, end: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """The arrays of a `CohortLayout`, the clients in the order they lie.

    drawn: of these clients. where: their places. end: what marks a row that no client holds.
    """
    assert batching.sequence
    _, all_steps, all_rows = where.sizes
    list_rows = list_whole_catalogue if batching.sequence.whole_catalogue else list_step_rows
    items = population.num_items
    warm = list_warm_items(population)
    found = list_rows(drawn, len(where.order), items, warm)
    at = where.step[drawn.client] + drawn.epoch  # the place of each step among all

    held = np.full(all_rows, end, np.int32)
    held[where.row[found.client] + found.held_place] = found.held_item
    width = max((rows for _, _, rows, _ in where.shapes), default=0)
    rows = np.full((all_steps, width), items, np.int32)
    rows[at[found.step], found.place] = found.held
    negative = np.zeros((all_steps, width), np.float32)
    negative[at[found.step], found.place] = found.negative

    sequence = np.full((all_steps, batching.sequence.length), items, np.int32)
    of_item = np.repeat(at, drawn.length), concatenate_ranges(np.zeros_like(drawn.length), drawn.length)
    sequence[of_item] = found.read
    live, dropout = np.zeros(all_steps, bool), np.zeros((all_steps, 2), np.uint32)
    live[at], dropout[at] = True, drawn.dropout
    catalogue = np.full(all_steps, len(warm), np.float32)
    return held, rows, live, {"sequence": sequence, "negative": negative, "dropout": dropout, "catalogue": catalogue}
