"""Blocks: a cohort's examples in few static shapes, longest clients first; and the rows of the tables it holds."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jaxfed.core.client_work import Batches
from jaxfed.core.types import Block, Cohort
from jaxfed.data.batching import Batching, DrawnExamples, draw_examples
from jaxfed.data.population import ALONE, Population, ProcessShare
from jaxfed.data.ragged import concatenate_ranges, sort_pairs


class BlockShapes(NamedTuple):
    """The shapes of blocks: clients of S steps run `steps_per_block` / S at a time, so that blocks cost alike."""

    kinds: tuple[tuple[int, int], ...]  # (steps, examples of a step at most), both ascending; see `block_kinds`
    steps_per_block: int
    slots: int  # clients in a cohort
    devices: int
    columns: int  # rows an example may touch
    num_items: int
    room: int  # rows of the tables that a cohort may touch; a cohort that touches more gets twice the room
    end: int  # past the end of the tables, which may have more rows than there are items
    share: ProcessShare = ALONE  # of the clients, and of the places in every block

    def clients(self, steps: int) -> int:
        """Clients side by side in a block of this length, a multiple of the devices."""
        return min(max(self.steps_per_block // steps, 1), -(-self.slots // self.devices)) * self.devices

    def rows(self, steps: int, size: int) -> int:
        """Rows a client of this kind may hold."""
        return min(steps * size * self.columns, self.num_items)

    @property
    def padded_shape(self) -> tuple[int, int]:
        """(clients, table rows) that the part of any block fits in."""
        clients, rows = zip(*((self.clients(s), self.clients(s) * self.rows(s, n)) for s, n in self.kinds), strict=True)
        return max(clients), max(rows)


def make_block_shapes(
    population: Population,
    batching: Batching,
    slots: int,
    devices: int = 1,
    steps_per_block: int = 0,
    lazy: bool = True,
    share: ProcessShare = ALONE,
    end: int = 0,
) -> BlockShapes:
    """The shapes that serve this population; lazy: a round runs on the rows its cohort holds, else on all; end: rows of
    the tables, at least the items (0: as many).

    Raises ValueError where batches or negatives cannot be drawn.
    """
    for key, least in (("batch_size", 1), ("epochs", 1), ("negatives", 0)):
        if (value := getattr(batching, key)) < least:
            raise ValueError(f"work.{key} is {value}: it must be at least {least}")
    if population.labels is not None and (batching.negatives or batching.pairwise):
        raise ValueError(
            f'data.label = "{population.labels.kind}": rows have labels, none are drawn: set work.negatives to 0'
        )
    if batching.pairwise and batching.negatives < 1:
        raise ValueError("a pairwise loss compares with negatives: set work.negatives to 1 or more")
    full = population.excluded.counts >= population.span(np.arange(len(population.user_names)))[1]
    if batching.negatives and full.any():
        raise ValueError(
            f"negatives asked for, but user {population.user_names[full.argmax()]} has every item: "
            "set work.negatives = 0 or leave such users out"
        )
    kinds = block_kinds(batching, population.num_train)
    expected = int(batching.steps(population.num_train).mean() * slots)
    # some sixteen blocks a round
    steps_per_block = steps_per_block or max(64, kinds[-1][0], 1 << (expected // 16).bit_length())
    room = rows_expected(population, batching, slots) if lazy else 0
    items, columns = population.num_items, batching.width // batching.batch_size
    return BlockShapes(kinds, steps_per_block, slots, devices, columns, items, room, end or items, share)


def block_kinds(batching: Batching, num_train: np.ndarray, narrow: int = 256) -> tuple[tuple[int, int], ...]:
    """(steps, examples of a step at most) of blocks, both ascending: steps are powers of two and their 3/4 points.

    A step is as wide as a batch, but for clients whose epoch is one batch: it is then as wide as theirs, rounded up to
    `narrow` times a power of two. So batches of all that a client has cost what it has, not what others have.
    """
    steps, size = batching.steps(num_train), batching.largest(num_train)
    longest, top = int(steps.max()), int(size.max())
    points = sorted({p for i in range(longest.bit_length() + 1) for p in (1 << i, 3 << i >> 2) if p})
    points = [p for p in points if p < longest] + [min(p for p in points if p >= longest)]
    widths = np.array([narrow << i for i in range(top.bit_length()) if narrow << i < top] + [top])
    used = widths[np.unique(np.searchsorted(widths, size[steps == batching.epochs]))].tolist() or [top]
    one = next(p for p in points if p >= batching.epochs)
    low, high = ([p for p in points if p < one], [p for p in points if p > one])
    return (*((p, used[0]) for p in low), *((one, width) for width in used), *((p, top) for p in high))


def rows_expected(population: Population, batching: Batching, slots: int) -> int:
    """Rows that hardly any cohort of so many clients exceeds: six standard deviations above the mean of its examples,
    the negatives among them uniform over the catalogue."""
    items, num_train = population.num_items, population.num_train
    positives = slots * num_train.mean() + 6 * np.sqrt(slots) * num_train.std()
    positives = min(positives, num_train.sum())
    negatives = batching.epochs * batching.negatives * positives
    distinct = min(positives, np.count_nonzero(np.bincount(population.train.values))) + items * -np.expm1(
        -negatives / items
    )
    return int(min(items, -(-distinct // 1024) * 1024))


class BlockPlan(NamedTuple):
    """Where the M clients of a cohort, or this process's among them, lie: longest first, side by side in blocks, all of
    them end to end."""

    order: np.ndarray  # int64 [M]: the clients in the order they lie
    shapes: list[tuple[int, int, int, int]]  # of each block: clients, steps, rows of a client, examples of a step
    lane: np.ndarray  # int64 [M]: its place among the clients of all blocks
    step: np.ndarray  # int64 [M]: its first step among those of all blocks
    row: np.ndarray  # int64 [M]: its first row

    @property
    def sizes(self) -> np.ndarray:
        """int64 [3]: places for clients, steps and rows in all blocks."""
        return np.sum([(m, m * s, m * k) for m, s, k, _ in self.shapes], 0)


def block_shape(shapes: BlockShapes, steps: int, size: int) -> tuple[int, int, int, int]:
    """A process's part of a block of this kind; see `Plan.shapes`."""
    return shapes.clients(steps) // shapes.share.size, steps, shapes.rows(steps, size), size


def plan_blocks(shapes: BlockShapes, batching: Batching, num_train: np.ndarray, owner: np.ndarray) -> BlockPlan:
    """Clients fill blocks from the longest down: a block's clients differ little in length, and only the last blocks
    have empty places.

    num_train: train interactions of each client; owner: its process. All processes plan the same blocks, of which each
    has an equal part of the places.
    """
    steps, size = batching.steps(num_train), batching.largest(num_train)
    kind = np.maximum(*(np.searchsorted(*each) for each in zip(np.transpose(shapes.kinds), (steps, size), strict=True)))
    order, low = np.lexsort((-steps, -kind)), 0
    owned = [order[owner[order] == process] for process in range(shapes.share.size)]
    own_order = owned[shapes.share.rank]
    block_dims: list[tuple[int, int, int, int]] = []
    places, at = [], np.zeros((3, 1), np.int64)
    while not block_dims or any(low < len(some) for some in owned):
        longest = max((kind[some[low]] for some in owned if low < len(some)), default=0)
        block_dims.append(block_shape(shapes, *shapes.kinds[longest]))
        each = np.array([[1], block_dims[-1][1:2], block_dims[-1][2:3]])
        places.append(at + each * np.arange(np.clip(len(own_order) - low, 0, block_dims[-1][0])))
        low, at = low + block_dims[-1][0], at + each * block_dims[-1][0]
    return BlockPlan(own_order, block_dims, *np.concatenate(places, 1))


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


def lay_out_examples(
    population: Population, batching: Batching, drawn: DrawnExamples, where: BlockPlan, end: int
) -> CohortLayout:
    """Puts examples, their clients in the order they lie, at their places.

    A step's rows are distinct: an item lies where the step has it first. Where one user is a client, an example is its
    item alone, and repeats in a step become one row whose weight is their number and whose label is their mean; see
    `models.model.Loss`.
    """
    items, width, size = population.num_items, batching.width, batching.batch_size
    _, steps, rows = where.sizes

    def table(at, values, fill=0, dtype=np.int32, wide=size):
        out = np.full(steps * wide, fill, dtype)
        out[at] = values
        return out.reshape(steps, wide)

    columns = drawn.item.shape[1]
    begin, count = (where.step[drawn.client] + drawn.step) * width, drawn.examples * columns
    entry, client, item = concatenate_ranges(begin, count), np.repeat(drawn.client, count), drawn.item.ravel()
    pair, order = sort_pairs(client, item, len(where.order), items)
    entry = entry[order]
    fresh = np.diff(pair, prepend=-1) != 0  # the client has the item here for the first time
    step_firsts = np.flatnonzero(fresh | (np.diff(entry // width, prepend=-1) != 0))  # and a step has it
    first_entries = np.flatnonzero(fresh)
    new, place = order[first_entries], order_by_first_use(order[first_entries], client, len(where.order))
    held_items = np.full(rows, end, np.int32)
    held_items[where.row[client[new]] + place] = item[new]
    positions = table(
        entry[step_firsts], np.repeat(place, np.diff(first_entries, append=len(pair)))[step_firsts], items, wide=width
    )
    features = {}
    if batching.features:
        features = batch_features(
            population, batching, drawn, where, table(entry[step_firsts], item[order][step_firsts], items, wide=width)
        )
    live = np.zeros(steps, bool)
    live[concatenate_ranges(begin // width, -(-count // width))] = True

    if population.users_per_client == 1 and not batching.pairwise:
        weight = np.diff(step_firsts, append=len(pair))
        labels = np.add.reduceat(drawn.label[order], step_firsts, dtype=np.float64)
        batch = features | {"label": table(entry[step_firsts], labels / weight, 0, np.float32)}
        if batching.ordered:
            batch["id"] = table(entry[step_firsts], item[order][step_firsts], end)
        return CohortLayout(
            held_items, positions, live, batch | {"weight": table(entry[step_firsts], weight, 0, np.float32)}
        )
    slot = np.empty(len(pair), np.int64)
    slot[order] = np.repeat(entry[step_firsts] % width, np.diff(step_firsts, append=len(pair)))
    slots = slot.reshape(-1, columns)
    example = concatenate_ranges(begin // columns, drawn.examples)
    batch = features | {"weight": table(example, 1, 0, np.float32), "item": table(example, slots[:, 0])}
    if population.users_per_client > 1:
        batch["user"] = table(example, drawn.user)
    if batching.pairwise:
        return CohortLayout(held_items, positions, live, batch | {"other": table(example, slots[:, 1])})
    return CohortLayout(held_items, positions, live, batch | {"label": table(example, drawn.label, 0, np.float32)})


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
    rows = np.arange(end, end + room, dtype=np.int32)
    rows[: len(distinct)] = distinct
    position = np.empty(end + 1, np.int32)
    position[distinct], position[end] = np.arange(len(distinct)), room
    return rows, position[held]


def split_blocks(
    where: BlockPlan, laid: CohortLayout, slots: np.ndarray, examples: np.ndarray, num_train: np.ndarray
) -> tuple[Block, ...]:
    """The blocks of what is laid end to end; slots, examples and num_train are [places for clients]."""
    blocks, at, columns = [], (0, 0, 0), laid.rows.shape[1] // laid.batch["weight"].shape[1]
    for m, length, k, size in where.shapes:
        to = at[0] + m, at[1] + m * length, at[2] + m * k
        lanes, steps, rows = map(slice, at, to)
        live = laid.live[steps].reshape(m, length)
        # a step lies in its first places: the others are unused in all steps of a narrower block
        positions = laid.rows[steps, : size * columns].reshape(m, length, -1)
        wide = {"item_features": size * columns, "user_features": size}
        cuts = {
            name: x[steps] if x.ndim < 2 + (name in wide) else x[steps, : wide.get(name, size)]
            for name, x in laid.batch.items()
        }  # features of one user have no places
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
    union: Callable[[np.ndarray], np.ndarray] = lambda there: there,
) -> Cohort:
    """A cohort with its data for one round. ids int [M]: past the end is an empty slot; present bool [M].

    Blocks depend on the cohort and the shapes alone. Of several processes each has its own part of every block, and
    reads the data of its own clients alone; `union` adds the rows the others hold to bool [end + 1].
    """
    clients = ids[ids < population.num_clients]
    owner = shapes.share.owner(clients, population.num_clients)
    where = plan_blocks(shapes, batching, population.num_train[clients], owner)
    return pack_planned(population, batching, shapes, ids, present, where, seed, round, union)


def empty_cohort(population: Population, batching: Batching, shapes: BlockShapes) -> Cohort:
    """An empty cohort with one block of every shape: what compiles all the programs of a run."""
    ids, none = np.full(shapes.slots, population.num_clients), np.zeros(0, np.int64)
    blocks = [block_shape(shapes, *kind) for kind in shapes.kinds]
    every = BlockPlan(none, blocks, none, none, none)
    return pack_planned(
        population, batching, shapes, ids, np.zeros(shapes.slots, bool), every, 0, 0, lambda there: there
    )


def pack_planned(population, batching, shapes, ids, present, where, seed, round, union) -> Cohort:
    """The cohort whose clients lie as planned."""
    batching = batching._replace(batch_size=shapes.kinds[-1][1])  # no wider than what any client fills
    slots = np.flatnonzero(ids < population.num_clients)[where.order]
    clients = ids[slots].astype(np.int64)
    laid = lay_out_examples(
        population, batching, draw_examples(population, batching, clients, seed, round), where, shapes.end
    )
    rows = None
    if shapes.room:
        rows, held = list_cohort_rows(laid.held, shapes.end, shapes.room, union)
        laid = laid._replace(held=held)

    def lanes(values, fill, dtype):
        out = np.full(where.sizes[0], fill, dtype)
        out[where.lane] = values
        return out

    num_train = population.num_train[clients]
    examples = lanes(batching.epochs * batching.examples(num_train), 0, np.float32)
    blocks = split_blocks(where, laid, lanes(slots, len(ids), np.int32), examples, lanes(num_train, 0, np.float32))
    return Cohort(ids.astype(np.int32), present, blocks, rows)
