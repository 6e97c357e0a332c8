"""Rounds of data: negatives and mini-batches of a cohort, packed into blocks of few static shapes, in NumPy.

All of it is a function of (seed, round, client): the random numbers of a client are a counter-based stream of its own,
whatever cohort it is in. Everything else is done for the whole cohort at once, without a loop over clients.
"""

import itertools
from typing import Any, NamedTuple

import numpy as np

from jaxfed.data.clients import Population, Ragged
from jaxfed.types import Block, Cohort
from jaxfed.work import Steps


class Batching(NamedTuple):
    """How clients cut their data into steps."""

    batch_size: int = 64  # examples of a step, negatives included; pairs of (positive, negative) where pairwise
    negatives: int = 4  # drawn per positive, anew in every epoch
    epochs: int = 1
    pairwise: bool = False

    @property
    def width(self) -> int:
        """Rows that a step may touch."""
        return self.batch_size * (2 if self.pairwise else 1)

    def examples(self, positives: Any) -> Any:
        """Examples of one epoch over so many positives."""
        return positives * (self.negatives if self.pairwise else 1 + self.negatives)

    def steps(self, positives: np.ndarray) -> np.ndarray:
        """Steps of a round over so many positives; an epoch ends with a short batch."""
        return self.epochs * -(-self.examples(positives) // self.batch_size)


class Lengths(NamedTuple):
    """The shapes of blocks: clients of S steps run `area` / S at a time, so that blocks cost alike."""

    steps: tuple[int, ...]  # powers of two and their 3/4 points
    area: int  # steps in a block
    slots: int  # clients in a cohort
    devices: int
    width: int  # rows a step may touch
    num_items: int

    def clients(self, steps: int) -> int:
        """Clients side by side in a block of this length, a multiple of the devices."""
        return min(max(self.area // steps, 1), -(-self.slots // self.devices)) * self.devices

    def rows(self, steps: int) -> int:
        """Rows a client of this length may hold."""
        return min(steps * self.width, self.num_items)

    @property
    def lay(self) -> tuple[int, int]:
        """(clients, table rows) that the part of any block fits in."""
        return max(map(self.clients, self.steps)), max(self.clients(s) * self.rows(s) for s in self.steps)


def lengths(population: Population, batching: Batching, slots: int, devices: int = 1, area: int = 0) -> Lengths:
    """The shapes that serve this population. Raises ValueError where batches or negatives cannot be drawn."""
    if batching.batch_size < 1 or batching.epochs < 1 or batching.negatives < 0:
        raise ValueError("batch_size and epochs must be at least 1, negatives at least 0")
    if batching.pairwise and batching.negatives < 1:
        raise ValueError("a pairwise loss compares with negatives: set work.negatives to 1 or more")
    full = population.avoid.counts >= population.num_items
    if batching.negatives and full.any():
        raise ValueError(
            f"negatives asked for, but user {population.user_names[full.argmax()]} has every item: "
            "set work.negatives = 0 or leave such users out"
        )
    longest = int(batching.steps(population.activity).max())
    points = sorted({p for i in range(longest.bit_length() + 1) for p in (1 << i, 3 << i >> 2) if p})
    shapes = [p for p in points if p < longest] + [min(p for p in points if p >= longest)]
    expected = int(batching.steps(population.activity).mean() * slots)
    area = area or max(64, shapes[-1], 1 << (expected // 16).bit_length())  # some sixteen blocks a round
    return Lengths(tuple(shapes), area, slots, devices, batching.width, population.num_items)


def ranges(start: np.ndarray, count: np.ndarray) -> np.ndarray:
    """start[0], start[0] + 1, ... (count[0] of them), start[1], ...: many ranges end to end."""
    end = np.cumsum(count)
    return np.arange(end[-1] if len(end) else 0) + np.repeat(start - (end - count), count)


def streams(seed: int, round: int, clients: np.ndarray, epochs: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """uint64 [sum of counts]: so many random numbers of each (client, epoch), end to end.

    Each has a range of a counter-based stream of the (seed, round) to itself. One generator walks them all: making one
    for each costs four times as much as the numbers.
    """
    philox, at, drawn = np.random.Philox(key=[seed, (1 << 32) + round]), 0, [np.zeros(0, np.uint64)]
    for client, epoch, count in zip(clients.tolist(), epochs.tolist(), counts.tolist(), strict=True):
        begin = (client << 64) + (epoch << 32)
        philox.advance((begin - at) % (1 << 256))  # in steps of the counter, four numbers each
        drawn.append(philox.random_raw(count))
        at = begin - (-count // 4)
    return np.concatenate(drawn)


def first_occurrence(group: np.ndarray, value: np.ndarray, values: int) -> np.ndarray:
    """int64 [n]: for each entry the index of the first of the same (group, value); groups sorted, value < values.

    Written through a scratch table instead of a sort: an assignment to repeated places keeps the last, so entries are
    written in reverse. Groups go in runs that keep the table small enough for the cache.
    """
    first = np.empty(len(group), np.int64)
    if not len(group):
        return first
    run = max(1, (1 << 19) // values)
    scratch = np.empty(min(run, int(group[-1]) + 1) * values, np.int32)
    edges = np.searchsorted(group, np.arange(0, int(group[-1]) + run + 1, run))
    for number, (low, high) in enumerate(itertools.pairwise(edges)):
        place = (group[low:high] - number * run) * values + value[low:high]
        scratch[place[::-1]] = np.arange(high - low - 1, -1, -1, dtype=np.int32)
        first[low:high] = scratch[place]
        first[low:high] += low
    return first


class Drawn(NamedTuple):
    """Examples of a cohort, pass by pass (a client's epoch), in the order of training."""

    step: np.ndarray  # int64 [E]: number of the step, counted over the whole cohort
    user: np.ndarray  # int64 [E]: which of the population's users
    positive: np.ndarray  # int32 [E]: an item the user has (pairwise), or the example's item
    other: np.ndarray  # int32 [E]: the negative of a pair, or the label 1 / 0


def draw(population: Population, batching: Batching, clients: np.ndarray, seed: int, round: int) -> Drawn:
    """Shuffled positives of the clients, each with its negatives: uniform over the items its user may not avoid."""
    passes = np.repeat(clients, batching.epochs)
    low, count = population.train.start[population.first[passes]], population.activity[passes]
    epoch = np.arange(len(passes)) % batching.epochs
    needed = count * (1 + batching.negatives)
    raw = streams(seed, round, passes, epoch, needed)
    begin = np.cumsum(needed) - needed
    owner = np.repeat(np.arange(len(passes)), count)

    shuffle = (owner.astype(np.uint64) << np.uint64(32)) | (raw[ranges(begin, count)] >> np.uint64(32))
    row = ranges(low, count)[np.argsort(shuffle)]
    alone = population.users_per_client == 1
    user = population.first[passes][owner] if alone else np.searchsorted(population.train.start, row, "right") - 1
    positive = population.train.values[row]

    spare = raw[ranges(begin + count, needed - count)] >> np.uint64(32)
    negative = outside(population, np.repeat(user, batching.negatives), spare).reshape(len(row), batching.negatives)
    if batching.pairwise:
        pair = np.repeat(positive, batching.negatives), negative.ravel()
    else:
        item = np.concatenate([positive[:, None], negative], 1)
        pair = item.ravel(), np.broadcast_to(np.arange(item.shape[1]) == 0, item.shape).ravel()
    each = batching.examples(1)
    examples, steps = count * each, batching.steps(count) // batching.epochs
    inside = ranges(np.zeros_like(examples), examples)
    step = np.repeat(np.cumsum(steps) - steps, examples) + inside // batching.batch_size
    return Drawn(step, np.repeat(user, each), *pair)


def outside(population: Population, user: np.ndarray, random32: np.ndarray) -> np.ndarray:
    """int32 [n]: an item that each user does not avoid, exactly uniform up to 2^-32, without rejection.

    The r-th item outside a sorted list a is r + #{j: a[j] - j <= r}.
    """
    avoid, items = population.avoid, population.num_items
    if population.free is not None:
        start = (np.arange(len(avoid.start)) * items - avoid.start)[user]
        free = (items - avoid.counts)[user].astype(np.uint64)
        return population.free[start + (random32 * free >> np.uint64(32)).astype(np.int64)]
    r = (random32 * (items - avoid.counts)[user].astype(np.uint64) >> np.uint64(32)).astype(np.int64)
    before = np.searchsorted(population.gaps, user * (items + 1) + r, "right") - avoid.start[user]
    return (r + before).astype(np.int32)


class Flat(NamedTuple):
    """The steps of a cohort end to end, T of them, and one more that pads; M clients and, last, nobody."""

    rows: np.ndarray  # int32 [T + 1, k]: positions in the client's rows; N where unused
    batch: dict[str, np.ndarray]  # [T + 1, ...]
    start: np.ndarray  # int64 [M + 2]: the steps of each client
    held: Ragged  # the distinct items of each client, by first use
    examples: np.ndarray  # int64 [M + 1]: examples of each client
    activity: np.ndarray  # int64 [M + 1]


def slots_of(step: np.ndarray, item: np.ndarray, items: int) -> tuple[np.ndarray, np.ndarray]:
    """(for each entry its item's place among the distinct items of its step, whether it is the first of them)."""
    first = first_occurrence(step, item, items)
    new = first == np.arange(len(item))
    rank = np.cumsum(new) - 1
    begin = np.searchsorted(step, np.arange(int(step[-1]) + 1 if len(step) else 0))
    return (rank - rank[begin][step])[first], new


def lay_steps(population: Population, batching: Batching, clients: np.ndarray, drawn: Drawn) -> Flat:
    """Turns examples into steps over distinct rows.

    Where one user is a client, an example is its item alone: repeats in a step become one row whose weight is their
    number and whose label is their mean; see `models.model.Loss`.
    """
    items, width, size = population.num_items, batching.width, batching.batch_size
    activity = np.append(population.activity[clients], 0)
    start = np.concatenate([[0], np.cumsum(batching.steps(activity))])
    total = int(start[-1]) + 1

    def table(place, values, shape, fill=0, dtype=np.int32):
        out = np.full(total * shape, fill, dtype)
        out[place] = values
        return out.reshape(total, shape)

    columns = (drawn.positive, drawn.other) if batching.pairwise else (drawn.positive,)
    entry = np.stack(columns, 1).ravel()
    step = np.repeat(drawn.step, len(columns))
    slot, new = slots_of(step, entry, items)
    owner = np.repeat(np.arange(len(activity)), np.diff(start))  # of each step
    client = owner[step[new]]
    position, fresh = slots_of(client, entry[new], items)
    rows = table((step * width + slot)[new], position, width, items)
    distinct = np.bincount(client[fresh], minlength=len(activity))
    held = Ragged(np.append(entry[new][fresh], items), np.concatenate([[0], np.cumsum(distinct)]))

    if population.users_per_client == 1 and not batching.pairwise:
        place = step * width + slot
        weight = np.bincount(place, minlength=total * width)
        label = np.bincount(place, drawn.other, total * width) / np.maximum(weight, 1)
        merged = {"label": label, "weight": weight}
        batch = {name: x.astype(np.float32).reshape(total, width) for name, x in merged.items()}
    else:
        begin = np.searchsorted(drawn.step, np.arange(total))
        place = drawn.step * size + np.arange(len(drawn.step)) - begin[drawn.step]
        slot = slot.reshape(-1, len(columns))
        batch = {"weight": table(place, 1, size, 0, np.float32), "item": table(place, slot[:, 0], size)}
        if batching.pairwise:
            batch["other"] = table(place, slot[:, 1], size)
        else:
            batch["label"] = table(place, drawn.other, size, 0, np.float32)
        if population.users_per_client > 1:
            local = drawn.user - population.first[clients][owner[drawn.step]]
            batch["user"] = table(place, local, size)
    return Flat(rows, batch, start, held, batching.epochs * batching.examples(activity), activity)


def block(flat: Flat, shapes: Lengths, slots: np.ndarray, steps: int) -> Block:
    """Some clients of the cohort (slots int [m]; the last list of `flat` is nobody) as one block of `steps` steps."""
    at = np.arange(steps)
    live = at < np.diff(flat.start)[slots][:, None]
    which = np.where(live, flat.start[slots][:, None] + at, len(flat.rows) - 1)
    at = np.arange(shapes.rows(steps))
    holds = at < flat.held.counts[slots][:, None]
    rows = np.where(holds, flat.held.values[np.where(holds, flat.held.start[slots][:, None] + at, 0)], shapes.num_items)
    batch = {name: values[which] for name, values in flat.batch.items()}
    data = Steps(flat.rows[which], live, batch, flat.examples[slots].astype(np.float32))
    return Block(slots.astype(np.int32), rows.astype(np.int32), flat.activity[slots].astype(np.float32), data)


def pack(
    population: Population,
    batching: Batching,
    shapes: Lengths,
    ids: np.ndarray,
    present: np.ndarray,
    seed: int,
    round: int,
) -> Cohort:
    """A cohort with its data for one round. ids int [M]: past the end is an empty slot; present bool [M].

    Clients are sorted by length and fill blocks from the longest down, so a block's clients differ little in length
    and only the last block has empty places. Blocks depend on the cohort and the shapes alone.
    """
    place = np.flatnonzero(ids < population.num_clients)
    clients = ids[place].astype(np.int64)
    flat = lay_steps(population, batching, clients, draw(population, batching, clients, seed, round))
    slot_of = np.append(place, len(ids)).astype(np.int32)
    steps = np.diff(flat.start)[:-1]
    left = np.argsort(-steps, kind="stable")
    blocks: list[Block] = []
    while len(left) or not blocks:
        longest = steps[left[0]] if len(left) else 1
        shape = next(s for s in shapes.steps if s >= longest)
        some, left = left[: shapes.clients(shape)], left[shapes.clients(shape) :]
        some = np.append(some, np.full(shapes.clients(shape) - len(some), len(clients), int))
        blocks.append(block(flat, shapes, some, shape)._replace(slots=slot_of[some]))
    return Cohort(ids.astype(np.int32), present, tuple(blocks))


def nobody(population: Population, batching: Batching, shapes: Lengths) -> Cohort:
    """An empty cohort with one block of every shape: what compiles all the programs of a run."""
    none = np.zeros(0, np.int64)
    flat = lay_steps(population, batching, none, draw(population, batching, none, 0, 0))
    made = (block(flat, shapes, np.zeros(shapes.clients(steps), int), steps) for steps in shapes.steps)
    blocks = tuple(each._replace(slots=np.full(each.slots.shape, shapes.slots, np.int32)) for each in made)
    absent = np.zeros(shapes.slots, bool)
    return Cohort(np.full(shapes.slots, population.num_clients, np.int32), absent, blocks)
