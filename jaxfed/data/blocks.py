"""The static shapes of blocks of clients, and where the clients of a cohort lie in them, the longest first."""

from typing import NamedTuple

import numpy as np

from jaxfed.core.pairs import count_pairs
from jaxfed.data.batch_checks import check_batching
from jaxfed.data.batching import Batching, ClientSizes, count_step_histories, measure_clients
from jaxfed.data.population import ALONE, Population, ProcessShare

LEAST_STEPS = 64  # of a block, side by side and one after the other
PAIR_STEPS = 1 << 13  # items of a block of histories whose clients send pairs of them
HISTORY_STEPS = 1 << 14  # items of a block of other histories
SHORTEST_PAIRED = 8  # items to which shorter histories are padded, whose pairs are sent
SHORTEST_HISTORY = 64  # items to which other histories are padded
# as expensive as compiling one more program, 2 s of a core:
WORTH_PAIRS = 60_000_000  # padded places of pairs, in the one round of a model that sums pairs
WORTH_SEQUENCES = 2_000  # padded places of items, in one round of hundreds
WORTH_ITEMS = 200_000  # padded places of items in a round, of about ten rounds


class BlockShapes(NamedTuple):
    """The shapes of blocks: clients of S steps run `steps_per_block` / S at a time, so that blocks cost alike."""

    kinds: tuple[tuple[int, int], ...]  # (steps, examples of a step at most), both ascending; see `block_kinds`
    steps_per_block: int
    slots: int  # clients in a cohort
    devices: int
    columns: int  # rows an example may touch; of histories, how many a step reads at most
    num_items: int
    room: int  # rows of the tables that a cohort may touch; a cohort that touches more gets twice the room
    end: int  # past the end of the tables, which may have more rows than there are items
    share: ProcessShare = ALONE  # of the clients, and of the places in every block
    pairs: bool = False  # `room` is that of the pairs of a client's rows, and so is what a cohort touches
    negatives: int = 0  # rows of a step beside those of its examples
    most_clients: int = 0  # of a device, side by side; 0: as many as the steps allow

    def clients(self, steps: int) -> int:
        """Clients side by side in a block of this length, a multiple of the devices."""
        most = min(self.most_clients or self.slots, -(-self.slots // self.devices))
        return min(max(self.steps_per_block // steps, 1), most) * self.devices

    def step_rows(self, size: int) -> int:
        """Rows a step of this size may hold."""
        return min(size * self.columns + self.negatives, self.num_items)

    def rows(self, steps: int, size: int) -> int:
        """Rows a client of this kind may hold."""
        return min(steps * (size * self.columns + self.negatives), self.num_items)

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
    pairs: bool = False,
) -> BlockShapes:
    """The shapes that serve this population; lazy: a round runs on the rows its cohort holds, else on all; end: rows of
    the tables, at least the items (0: as many); pairs: sums are over pairs of rows.

    Raises ValueError where batches or negatives cannot be drawn.
    """
    check_batching(population, batching)
    lengths, sizes = population.num_train, measure_clients(population, batching, np.arange(population.num_clients))
    items, columns, negatives, least = population.num_items, batching.width // batching.batch_size, 0, LEAST_STEPS
    if batching.sequence:
        columns = count_step_histories(population, batching)
        kinds = organisation_kinds(sizes) if population.users_per_client > 1 else sequence_kinds(batching, lengths)
        negatives, least = items if batching.sequence.whole_catalogue else batching.negatives, least // columns
    else:
        kinds = history_kinds(lengths, items, pairs) if batching.ordered else block_kinds(batching, lengths)
    expected = int(sizes.steps.mean() * slots)
    # some sixteen blocks a round; more of histories, from which long messages are made
    most = (PAIR_STEPS if pairs else HISTORY_STEPS) if batching.ordered else 1 << 62
    steps_per_block = steps_per_block or max(least, kinds[-1][0], min(1 << (expected // 16).bit_length(), most))
    room = rows_expected(population, batching, sizes, slots) if lazy else 0
    if pairs:
        room = count_expected_pairs(population, slots, end or items) if lazy and share.size == 1 else 0
    return BlockShapes(
        kinds, steps_per_block, slots, devices, columns, items, room, end or items, share, pairs, negatives
    )


def block_kinds(batching: Batching, num_train: np.ndarray, narrow: int = 256) -> tuple[tuple[int, int], ...]:
    """(steps, examples of a step at most) of blocks, both ascending: steps are powers of two and their 3/4 points.

    A step is as wide as a batch, but for clients whose epoch is one batch: it is then as wide as theirs, rounded up to
    `narrow` times a power of two. So batches of all that a client has cost what it has, not what others have.
    """
    steps, size = batching.steps(num_train), batching.largest(num_train)
    longest, top = int(steps.max()), int(size.max())
    points = list_step_points(longest)
    widths = np.array([narrow << i for i in range(top.bit_length()) if narrow << i < top] + [top])
    used = widths[np.unique(np.searchsorted(widths, size[steps == batching.epochs]))].tolist() or [top]
    one = next(p for p in points if p >= batching.epochs)
    low, high = ([p for p in points if p < one], [p for p in points if p > one])
    return (*((p, used[0]) for p in low), *((one, width) for width in used), *((p, top) for p in high))


def list_step_points(longest: int) -> list[int]:
    """Powers of two and their 3/4 points, ascending, up to the first that is not below the longest."""
    points = sorted({p for i in range(longest.bit_length() + 1) for p in (1 << i, 3 << i >> 2) if p})
    return [p for p in points if p < longest] + [min(p for p in points if p >= longest)]


def organisation_kinds(sizes: ClientSizes) -> tuple[tuple[int, int], ...]:
    """(steps, items read at most) of blocks of clients with several histories, ascending. Clients differ in steps, and
    all histories have as many places as the longest that is read. Lengths of no client are left out."""
    points = list_step_points(int(sizes.steps.max()))
    used = np.unique(np.searchsorted(points, sizes.steps))
    return tuple((points[i], int(sizes.largest.max())) for i in used)


def sequence_kinds(batching: Batching, num_train: np.ndarray) -> tuple[tuple[int, int], ...]:
    """(steps, items read at most) of blocks of histories, ascending: lengths are powers of two, up to the longest."""
    assert batching.sequence
    longest = int(batching.largest(num_train).max())
    points = [1 << i for i in range(3, longest.bit_length()) if 1 << i < longest] + [longest]
    lengths = choose_padded_lengths(points, batching.largest(num_train), 1, WORTH_SEQUENCES)
    return tuple((batching.epochs, length) for length in lengths)


def history_kinds(lengths: np.ndarray, items: int, pairs: bool) -> tuple[tuple[int, int], ...]:
    """(items, 1) of blocks of whole histories, ascending, never more than there are items. What pairs of items cost
    grows with the square of a length: lengths are then powers of two and their 3/4 points. Else they are powers of
    four. A length is left out where padding to the next one costs less than compiling another program."""
    longest = int(lengths.max())
    least, grow = (SHORTEST_PAIRED, (1.5, 4 / 3)) if pairs else (SHORTEST_HISTORY, (4, 4))
    points = [least]
    while points[-1] < longest:
        points.append(round(points[-1] * grow[(len(points) - 1) % 2]))
    points[-1] = min(points[-1], -(-longest // least) * least, items)
    return tuple(
        (point, 1)
        for point in choose_padded_lengths(points, lengths, *((2, WORTH_PAIRS) if pairs else (1, WORTH_ITEMS)))
    )


def choose_padded_lengths(points: list[int], lengths: np.ndarray, power: int, compile_cost: float) -> list[int]:
    """Chooses the lengths to which histories are padded, so that padding and compilation together cost least.

    points: what can be chosen, ascending; the last is at least the longest length, and is always chosen. lengths: int
    [histories]. power: a history that is padded to a point costs point**power places. compile_cost: in places, for each
    point that is chosen.
    """
    fitting = [0, *np.searchsorted(np.sort(lengths), points, "right")]  # histories that fit into each point
    cheapest: list[tuple[float, list[int]]] = [(0.0, [])]  # (cost, points) of the histories up to each point
    for end, point in enumerate(points, 1):
        costs = [
            (before + compile_cost + float(fitting[end] - fitting[start]) * point**power, [*kept, point])
            for start, (before, kept) in enumerate(cheapest)
        ]
        cheapest.append(min(costs))
    return cheapest[-1][1]


def rows_expected(population: Population, batching: Batching, sizes: ClientSizes, slots: int) -> int:
    """Rows that hardly any cohort of so many clients exceeds: six standard deviations above the mean of its examples,
    the negatives among them uniform over the catalogue."""
    items, read = population.num_items, sizes.read
    positives, steps = (slots * each.mean() + 6 * np.sqrt(slots) * each.std() for each in (read, sizes.steps))
    positives = min(positives, read.sum())
    negatives = batching.epochs * batching.negatives * positives
    if batching.sequence:
        negatives = batching.negatives * (batching.epochs if batching.shared_negatives else steps)
        negatives = items**2 if batching.sequence.whole_catalogue else negatives
    distinct = min(positives, np.count_nonzero(np.bincount(population.train.values))) + items * -np.expm1(
        -negatives / items
    )
    return int(min(items, -(-distinct // 1024) * 1024))


def count_expected_pairs(population: Population, slots: int, items: int) -> int:
    """Pairs of items that no cohort of so many clients exceeds; 0 where all pairs are few enough to be summed whole."""
    lengths = np.sort(population.num_train)[-slots:]
    most = int(count_pairs(lengths).sum())
    return -(-most // 1024) * 1024 if 2 * most < count_pairs(items) else 0


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


def find_kinds(shapes: BlockShapes, sizes: ClientSizes) -> np.ndarray:
    """int64 [C]: the number of the narrowest kind of block that each client fits in; see `BlockShapes.kinds`."""
    steps, largest = np.transpose(shapes.kinds)
    return np.maximum(np.searchsorted(steps, sizes.steps), np.searchsorted(largest, sizes.largest))


def plan_blocks(shapes: BlockShapes, sizes: ClientSizes, owner: np.ndarray) -> BlockPlan:
    """Clients fill blocks from the longest down: a block's clients differ little in length, and only the last blocks
    have empty places.

    sizes: of the clients; owner: of each its process. All processes plan the same blocks, of which each has an equal
    part of the places.
    """
    kind = find_kinds(shapes, sizes)
    order, low = np.lexsort((-sizes.steps, -kind)), 0
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
