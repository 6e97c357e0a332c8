"""The items that held-out ones are ranked among in `sampled` figures: drawn, or given with the data."""

from typing import NamedTuple

import numpy as np

from jaxfed.core.streams import Stream
from jaxfed.data.batching import client_random_numbers, find_touched_items, sample_untouched_items
from jaxfed.data.population import SAMPLED, Population
from jaxfed.data.ragged import sort_pairs

DRAWS = 5
AT_ONCE = 1 << 22  # random numbers that are in memory at a time
TRIES = 4  # draws from all items for each candidate, before the rest is drawn from the items that are left


class SampleOptions(NamedTuple):
    """How candidates are drawn.

    size: of a sample; 0: there is none. draws: how many samples each user has. popularity: float [N], by which items
    are drawn; None: all alike.
    """

    size: int = SAMPLED
    draws: int = DRAWS
    popularity: np.ndarray | None = None


UNIFORM = SampleOptions()


def make_candidates(population: Population, users: np.ndarray, options: SampleOptions, seed: int) -> np.ndarray:
    """int32 [len(users), draws, most]: the candidates of each user beside the held-out items; N where there are fewer.

    Of given negatives there is one draw. Rows with labels are ranked among nothing.
    """
    if population.labels is not None or not options.size:
        return np.zeros((len(users), options.draws, 0), np.int32)
    if population.negatives is not None:
        return population.negatives.padded(users, population.num_items)[:, None].astype(np.int32)
    if options.popularity is None:
        return sample_untouched_items(population, users, options.draws, options.size, seed)
    return sample_popular_items(population, users, options, seed)


def count_train_interactions(population: Population) -> np.ndarray:
    """float [N]: the train interactions of each item."""
    return np.bincount(population.train.values, minlength=population.num_items).astype(np.float64)


class OpenItems(NamedTuple):
    """Which items may be candidates of which users: of their domain, and untouched by them."""

    num_items: int
    touched: np.ndarray  # int64, ascending: user * N + item of all interactions
    domain_of_item: np.ndarray  # int [N]
    domain_of_user: np.ndarray  # int [users]

    def allows(self, user: np.ndarray, item: np.ndarray) -> np.ndarray:
        """bool, of the two shapes together: whether an item may be drawn for a user."""
        pair = user * self.num_items + item
        at = np.minimum(np.searchsorted(self.touched, pair), max(len(self.touched) - 1, 0))
        return (self.touched[at] != pair) & (self.domain_of_item[item] == self.domain_of_user[user])


def find_open_items(population: Population, users: np.ndarray) -> OpenItems:
    """Which items may be candidates of these users, who are numbered in their order."""
    touched, items, domains = find_touched_items(population, users), population.num_items, population.domains
    pairs = np.repeat(np.arange(len(users)) * items, touched.counts) + touched.values
    if domains is None:
        return OpenItems(items, pairs, np.zeros(items, int), np.zeros(len(users), int))
    return OpenItems(items, pairs, domains.of, domains.of[population.train.values[population.train.start[users]]])


def sample_popular_items(population: Population, users: np.ndarray, options: SampleOptions, seed: int) -> np.ndarray:
    """int32 [len(users), draws, size]: distinct items that each user never interacted with, drawn one after the other
    in proportion to their popularity among those that are left, by (seed, user, draw); N where there are fewer.

    Items without popularity are never drawn.
    """
    size, draws, weights = options.size, options.draws, options.popularity
    assert weights is not None
    may_draw, row = find_open_items(population, users), np.arange(len(users) * draws)
    out = [np.zeros((0, size), np.int32)]
    for some in np.array_split(row, -(-len(row) * max(TRIES * size, population.num_items) // AT_ONCE) or 1):
        user, draw = some // draws, some % draws
        first = draw_with_repeats(may_draw, size, user, users[user], draw, weights, seed)
        out.append(draw_the_rest(may_draw, first, user, users[user], draw, weights, seed))
    return np.concatenate(out).reshape(len(users), draws, size)


def draw_chances(seed: int, clients: np.ndarray, epochs: np.ndarray, length: int) -> np.ndarray:
    """float [len(clients), length]: uniform numbers from 0 to below 1."""
    lengths = np.full(len(clients), length)
    raw = client_random_numbers(seed, Stream.EVALUATION_NEGATIVES, clients, epochs, lengths)
    return (raw >> np.uint64(11)).reshape(len(clients), length) * 2.0**-53


def draw_with_repeats(
    may_draw: OpenItems,
    size: int,
    user: np.ndarray,
    number: np.ndarray,
    draw: np.ndarray,
    weights: np.ndarray,
    seed: int,
) -> np.ndarray:
    """int32 [rows, size]: the distinct open items among a few draws from all items, in their order; N where they are
    fewer. As what is left does not change its proportions, these are draws from what is left.

    user, number, draw [rows]: of each row, the user's place among `may_draw`, the user, and which sample.
    """
    items, length = may_draw.num_items, TRIES * size
    chance = draw_chances(seed, number, 2 * draw, length)
    share = np.cumsum(weights) / max(weights.sum(), 1.0)
    item = np.minimum(np.searchsorted(share, chance, "right"), items - 1)
    row = np.repeat(np.arange(len(user)), length)
    pair, order = sort_pairs(row, item.ravel(), len(user), items)
    new = np.zeros(item.size, bool)
    new[order[np.diff(pair, prepend=-1) != 0]] = True
    new = new.reshape(item.shape) & may_draw.allows(user[:, None], item)
    rank = np.cumsum(new, 1)
    kept = new & (rank <= size)
    out = np.full((len(user), size), items, np.int32)
    out[np.nonzero(kept)[0], rank[kept] - 1] = item[kept]
    return out


def draw_the_rest(
    may_draw: OpenItems,
    first: np.ndarray,
    user: np.ndarray,
    number: np.ndarray,
    draw: np.ndarray,
    weights: np.ndarray,
    seed: int,
) -> np.ndarray:
    """The same rows, filled up: each open item that is left comes after an exponential time at the rate of its weight,
    and the earliest are drawn. The arguments are those of `draw_with_repeats`; first: what it gave."""
    items = may_draw.num_items
    short = np.flatnonzero((first == items).any(1))
    if not len(short):
        return first
    chance = draw_chances(seed, number[short], 2 * draw[short] + 1, items)
    time = np.full(chance.shape, np.inf)
    np.divide(-np.log1p(-chance), weights, out=time, where=weights > 0)
    time[~may_draw.allows(user[short][:, None], np.arange(items))] = np.inf
    place, at = np.nonzero(first[short] < items)
    time[place, first[short][place, at]] = np.inf
    order = np.argsort(time, 1)[:, : first.shape[1]]
    later = np.where(np.isfinite(np.take_along_axis(time, order, 1)), order, items)
    filled = (first[short] < items).sum(1)[:, None]
    column = np.arange(first.shape[1])
    shifted = np.take_along_axis(pad_columns(later, first.shape[1], items), np.maximum(column - filled, 0), 1)
    first[short] = np.where(column < filled, first[short], shifted)
    return first


def pad_columns(array: np.ndarray, columns: int, fill: int) -> np.ndarray:
    """[n, columns]: an array [n, at most columns], filled up on the right."""
    return np.pad(array, ((0, 0), (0, columns - array.shape[1])), constant_values=fill)
