"""Rounds of data: shuffled positives and negatives of a cohort, in NumPy; `blocks` lays them out.

All of it is a function of (seed, round, client): the random numbers of a client are a counter-based stream of its own,
whatever cohort it is in. Everything else is done for the whole cohort at once, without a loop over clients.
"""

from typing import Any, Literal, NamedTuple

import numpy as np

from jaxfed.core.model import SequenceFormat
from jaxfed.core.streams import Stream, philox_key
from jaxfed.data.batch_negatives import draw_batch_negatives, mark_excluded_items
from jaxfed.data.popular_negatives import find_popular_items, scale_random
from jaxfed.data.population import Population
from jaxfed.data.ragged import Ragged, concatenate_ranges, find_gaps, make_ragged, sort_pairs
from jaxfed.data.sorting import sort_by_group

NUMBERS_AT_ONCE = 1 << 20  # random numbers of candidates that are in memory at a time


class Batching(NamedTuple):
    """How clients cut their data into steps.

    Args:
        batch_size: Examples of a step, negatives included; pairs of a positive and a negative where the loss is of
            pairs. Of a model of sequences: histories of a step, each of another user of the client. A client with one
            user has one history in a step.
        negatives: Items drawn for each positive, anew in every epoch.
        epochs: Passes of a client over its data in a round.
        pairwise: Whether examples are pairs of a positive and a negative; the model says so.
        ordered: Whether positives come in their order, earliest first, in place of a shuffle: for histories.
        features: The sides (`user`, `item`) whose features batches carry: those of a step's users and of its rows.
        sequence: A step reads histories in place of examples, with so many `negatives` for all of it, drawn from the
            whole catalogue. The model says so.
        shared_negatives: Of histories: the clients of a round have the same negatives, from public randomness.
        negative_sampling: uniform: all items but the train items of the user, equally likely. popularity: the same, in
            proportion to the train interactions of all clients with them. Clients must know these counts; their bytes
            are not in the figures. Models of histories draw from all items, those of the history among them. in_batch
            (clients with several users): other positives of the same batch, so that a client holds no row for a
            negative; a train item of the user has weight 0. Models of histories: all items that a step reads, whatever
            `negatives` says.
        draw_on: Where shuffles and negatives are drawn: host, by NumPy, or device, with other random numbers. There, a
            client with one user has a uniform negative again in a round only after all others were drawn. auto: on a
            GPU or TPU that has room for what clients train on, where it can draw these batches; else on the host. The
            run writes down which, and stays with it.

    Example:
        >>> import jaxfed as jf
        >>> jf.Batching(batch_size=64, negatives=4).examples(10)  # of one epoch over 10 positives
        50
    """

    batch_size: int = 64
    negatives: int = 4
    epochs: int = 1
    pairwise: bool = False
    ordered: bool = False
    features: tuple[str, ...] = ()
    sequence: SequenceFormat | None = None
    shared_negatives: bool = False
    negative_sampling: Literal["uniform", "popularity", "in_batch"] = "uniform"
    draw_on: Literal["host", "device", "auto"] = "host"

    @property
    def width(self) -> int:
        """Rows that a step may touch."""
        return self.batch_size * (2 if self.pairwise else 1)

    def examples(self, positives: Any) -> Any:
        """Examples of one epoch over so many positives; of a history its targets, all items read but the first, or all
        where none are compared with."""
        if self.sequence and not self.sequence.compares:
            return np.minimum(positives, self.sequence.length)
        if self.sequence:
            return np.maximum(np.minimum(positives, self.sequence.length) - 1, 0)
        return positives * (self.negatives if self.pairwise else 1 + self.negatives)

    def count_read(self, positives: Any) -> Any:
        """How many of so many positives are read."""
        return np.minimum(positives, self.sequence.length) if self.sequence else positives

    def largest(self, positives: Any) -> Any:
        """Examples of the longest step over so many positives; the items read of a history."""
        if self.sequence:
            return np.minimum(positives, self.sequence.length)
        return np.minimum(self.examples(positives), self.batch_size)

    def steps(self, positives: np.ndarray) -> np.ndarray:
        """Steps of a round over so many positives; an epoch ends with a short batch."""
        if self.sequence:
            return np.full_like(positives, self.epochs)
        return self.epochs * -(-self.examples(positives) // self.batch_size)


class ClientSizes(NamedTuple):
    """How much C clients train on."""

    steps: np.ndarray  # int64 [C]: of a round
    largest: np.ndarray  # int64 [C]: examples of the longest step; of histories, items read of the longest
    examples: np.ndarray  # int64 [C]: of a round; what a client weighs
    read: np.ndarray  # int64 [C]: positives of an epoch


def count_step_histories(population: Population, batching: Batching) -> int:
    """The most histories of a step of a model of sequences: no client has more users."""
    return min(batching.batch_size, population.users_per_client)


def measure_clients(population: Population, batching: Batching, clients: np.ndarray) -> ClientSizes:
    """The sizes of some clients int [C]; of a model of sequences, those of the histories of their users."""
    num_train, epochs = population.num_train[clients], batching.epochs
    if not batching.sequence or population.users_per_client == 1:
        read = batching.count_read(num_train)
        return ClientSizes(
            batching.steps(num_train), batching.largest(num_train), epochs * batching.examples(num_train), read
        )
    first, users = population.client_offsets[clients], np.diff(population.client_offsets)[clients]
    user, owner = concatenate_ranges(first, users), np.repeat(np.arange(len(clients)), users)
    lengths = population.train.start[user + 1] - population.train.start[user]
    read, examples, largest = np.zeros((3, len(clients)), np.int64)
    np.add.at(read, owner, batching.count_read(lengths))
    np.add.at(examples, owner, epochs * batching.examples(lengths))
    np.maximum.at(largest, owner, batching.largest(lengths))
    return ClientSizes(epochs * -(-users // count_step_histories(population, batching)), largest, examples, read)


def client_random_numbers(
    seed: int, stream: Stream, clients: np.ndarray, epochs: np.ndarray, counts: np.ndarray, round: int = 0
) -> np.ndarray:
    """uint64 [sum of counts]: so many random numbers of each (client, epoch), end to end.

    Each has a range of a counter-based stream of the (seed, stream, round) to itself. One generator walks them all:
    making one for each costs four times as much as the numbers.
    """
    philox, at, drawn = np.random.Philox(key=philox_key(seed, stream, round)), 0, [np.zeros(0, np.uint64)]
    for client, epoch, count in zip(clients.tolist(), epochs.tolist(), counts.tolist(), strict=True):
        begin = (client << 64) + (epoch << 32)
        philox.advance((begin - at) % (1 << 256))  # in steps of the counter, four numbers each
        drawn.append(philox.random_raw(count))
        at = begin - (-count // 4)
    return np.concatenate(drawn)


class DrawnExamples(NamedTuple):
    """Examples of some clients, pass by pass (an epoch of a client), in the order of training: P passes, E examples."""

    client: np.ndarray  # int64 [P]: which of the clients asked for
    first: np.ndarray  # int64 [P]: the first of that client's users among all
    step: np.ndarray  # int64 [P]: the first step of the pass among those of its client
    examples: np.ndarray  # int64 [P]
    user: np.ndarray  # int64 [E]: which of the client's users
    item: np.ndarray  # int32 [E, 1]; [E, 2] where pairwise: a positive and a negative
    label: np.ndarray  # bool [E]: whether the (first) item is a positive; float [E] where rows are labelled
    is_learned: np.ndarray | None = None  # bool [E]: whether each example counts; None: all do


def draw_examples(
    population: Population, batching: Batching, clients: np.ndarray, seed: int, round: int
) -> DrawnExamples:
    """Shuffled (or ordered) positives of the clients, each with its negatives: items that are not excluded for its
    user, or other positives of the batch."""
    passes = np.repeat(clients, batching.epochs)
    epoch = np.tile(np.arange(batching.epochs), len(clients))
    first, count = population.client_offsets[passes], population.num_train[passes]
    raw = client_random_numbers(seed, Stream.EXAMPLES, passes, epoch, count * (1 + batching.negatives), round)
    raw = raw.reshape(-1, 1 + batching.negatives)  # a positive's place, and its negatives
    owner = np.repeat(np.arange(len(passes)), count)
    label_flipped = None if population.label_flipped is None else population.label_flipped[passes][owner]

    chance = (raw[:, 0] >> np.uint64(40)).astype(np.int64)
    row = concatenate_ranges(population.train.start[first], count)
    row = row if batching.ordered else row[sort_pairs(owner, chance, len(passes), 1 << 24)[1]]
    one_user = population.users_per_client == 1
    user = first[owner] if one_user else np.searchsorted(population.train.start, row, "right") - 1
    positive, random32, each = population.train.values[row][:, None], raw[:, 1:] >> np.uint64(32), batching.examples(1)
    is_learned = None
    if batching.negative_sampling == "in_batch":
        place = draw_batch_negatives(count, random32, each, batching.batch_size)
        negative = positive[place, 0]
        is_negative = ~mark_excluded_items(population.excluded, user, negative, population.num_items)
        is_learned = np.concatenate([np.ones((len(row), each - batching.negatives), bool), is_negative], 1).ravel()
    else:
        negative = draw_negatives(population, user, random32)
    pairs = np.stack([np.broadcast_to(positive, negative.shape), negative], -1)
    if label_flipped is not None:
        pairs[label_flipped] = pairs[label_flipped][..., ::-1]
    item = pairs.reshape(-1, 2) if batching.pairwise else np.concatenate([positive, negative], 1).reshape(-1, 1)
    label = np.full((len(row), each), batching.pairwise)
    label[:, :1] = True
    if population.labels is not None:
        label = population.labels.train[row][:, None]
    if label_flipped is not None and not batching.pairwise:
        label ^= label_flipped[:, None]
    local = np.broadcast_to(0, len(item)) if one_user else np.repeat(user - first[owner], each)
    step = epoch * (batching.steps(count) // batching.epochs)
    client = np.repeat(np.arange(len(clients)), batching.epochs)
    return DrawnExamples(client, first, step, count * each, local, item, label.ravel(), is_learned)


def draw_negatives(population: Population, user: np.ndarray, random32: np.ndarray) -> np.ndarray:
    """int32 [n, k]: items of each user's domain that are not excluded, uniform or by popularity, up to 2^-32, without
    rejection.

    user [n]; random32 [n, k]: 32 random bits each. The r-th item outside a sorted list a is r + #{j: a[j] - j <= r}.
    """
    excluded, items = population.excluded, population.num_items
    if popularity := population.popularity:
        rank = scale_random(random32, popularity.open[user][:, None])
        place = find_popular_items(popularity, excluded, user, rank)
        return place.astype(np.int32) if population.domains is None else population.domains.items[place]
    start = excluded.start[user]
    begin, size = population.span(user)
    num_negatives = size - (excluded.start[user + 1] - start)
    r = scale_random(random32, num_negatives[:, None])
    gaps, negatives = population.negative_index
    if negatives is not None:
        return negatives[(user * items - start)[:, None] + r]
    low, high = (excluded.start[user.min()], excluded.start[user.max() + 1]) if len(user) else (0, 0)
    before = np.searchsorted(gaps[low:high], (user * (items + 1))[:, None] + r, "right")
    before += low - start[:, None]
    place = r + before
    return place.astype(np.int32) if population.domains is None else population.domains.items[begin[:, None] + place]


def find_touched_items(population: Population, users: np.ndarray) -> Ragged:
    """The items that each of the users interacted with, in any part: sorted and distinct."""
    lists = [part.some(users) for part in (population.train, population.valid, population.test)]
    owner = np.concatenate([np.repeat(np.arange(len(users), dtype=np.int32), part.counts) for part in lists])
    order = sort_by_group(owner, len(users))
    values = np.concatenate([part.values for part in lists])[order]
    return make_ragged(values, owner, len(users)).distinct(population.num_items)


def sample_untouched_items(population: Population, users: np.ndarray, draws: int, size: int, seed: int) -> np.ndarray:
    """int32 [len(users), draws, size]: distinct items of its domain that each user never interacted with, uniform, by
    (seed, user, draw); N where there are fewer."""
    parts = -(-len(users) * draws * 2 * size // NUMBERS_AT_ONCE) or 1  # numbers of a part stay in the cache
    some = [sample_untouched_at_once(population, each, draws, size, seed) for each in np.array_split(users, parts)]
    return np.concatenate(some)


def sample_untouched_at_once(population: Population, users: np.ndarray, draws: int, size: int, seed: int) -> np.ndarray:
    """As `sample_untouched_items`, for all of these users at once."""
    items, touched = population.num_items, find_touched_items(population, users)
    gaps = find_gaps(touched, items, population.domains)
    begin, most = population.span(users)
    row = np.repeat(np.arange(len(users)), draws)
    num_untouched = (most - touched.counts)[row]
    counts, out = np.minimum(num_untouched, size), np.full((len(row), size), items, np.int32)
    left, length = np.arange(len(row)), 2 * size
    while len(left):  # the first distinct numbers of a stream, of a longer one where they are too few
        raw = client_random_numbers(
            seed, Stream.EVALUATION_NEGATIVES, users[row[left]], left % draws, np.full(len(left), length)
        ) >> np.uint64(32)
        r = (raw * np.repeat(num_untouched[left], length).astype(np.uint64) >> np.uint64(32)).astype(np.int64)
        pair, order = sort_pairs(np.repeat(np.arange(len(left)), length), r, len(left), items)
        new = np.zeros(len(order), bool)
        new[order[np.diff(pair, prepend=-1) != 0]] = True
        rank = np.cumsum(new.reshape(len(left), length), 1)
        full = rank[:, -1] >= counts[left]
        kept = (new.reshape(rank.shape) & (rank <= counts[left][:, None]) & full[:, None]).ravel()
        at, r = np.repeat(left, length)[kept], r[kept]
        before = np.searchsorted(gaps, row[at] * (items + 1) + r, "right") - touched.start[row[at]]
        place = r + before
        place = place if population.domains is None else population.domains.items[begin[row[at]] + place]
        out[at, rank.ravel()[kept] - 1] = place
        left, length = left[~full], 2 * length
    return out.reshape(len(users), draws, size)
