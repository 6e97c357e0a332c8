"""How strong order and groups of taste are in some interactions: the strength at which data that are made to the same
lengths and popularity look the same.

Neither can be read off directly: what is found depends on how long histories are and how popular items. So a number is
taken of the data that grows with the strength, and the strength is sought at which made data give the same number.
"""

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import scipy.sparse

from jaxfed.core.streams import SetupStream, setup_rng
from jaxfed.data.interactions import Interactions
from jaxfed.data.sources.shaped import make_interactions
from jaxfed.data.sources.shapes import Shape, quantiles_of_lengths, shares_of_items

ROWS = 100_000  # that are looked at: of so many users, drawn at random
MOST_GROUPS = 49  # that are told apart
SHUFFLES = 3  # orders by chance that the steps are compared with
ABOVE = 1.03  # a group stands out where its strength is larger than the largest one of chance by this factor
APART = 1.2  # a value stands apart from those of chance where it is larger than their median by this factor
STEPS = (0.0, 0.25, 0.5, 0.75, 1.0)  # strengths between which one is sought
NEAR = 0.01  # of a strength, where the search ends


class Strengths(NamedTuple):
    """See `Shape`."""

    order: float
    groups: int
    loyalty: float


class Histories(NamedTuple):
    """Rows by user, from the earliest to the latest."""

    user: np.ndarray  # int [n], ascending
    item: np.ndarray  # int [n]
    untied: np.ndarray  # bool [n - 1]: a step to a later row of the same user


def lay_out_histories(rows: Interactions) -> Histories:
    """Rows by user and time; of equal times a later row is later."""
    order = np.lexsort((np.arange(len(rows.user)), rows.time, rows.user))
    user, item, time = rows.user[order], rows.item[order], rows.time[order]
    return Histories(user, item, (user[1:] == user[:-1]) & (time[1:] > time[:-1]))


def measure_ties(rows: Interactions) -> float:
    """The share of the rows, but for each user's first, with the same time as the user's row before."""
    order = np.lexsort((rows.time, rows.user))
    same_user = np.diff(rows.user[order]) == 0
    return float((np.diff(rows.time[order])[same_user] == 0).mean()) if same_user.any() else 0.0


def draw_sample(rows: Interactions, users: int, random: np.random.Generator) -> tuple[Interactions, Shape]:
    """(the rows of so many of the users, drawn at random, that there are about `ROWS`, users and items numbered anew;
    their shape)."""
    if len(rows.user) > ROWS:
        kept = random.random(users) < ROWS / len(rows.user)
        rows = rows.at(kept[rows.user])
    user, item = (np.unique(column, return_inverse=True)[1].astype(np.int32) for column in (rows.user, rows.item))
    rows = rows._replace(user=user, item=item)
    length, count = np.bincount(user), np.bincount(item)
    curves = quantiles_of_lengths(length), shares_of_items(count)
    return rows, Shape(len(length), len(count), len(user), *curves, ties=measure_ties(rows))


def measure_order(histories: Histories, random: np.random.Generator) -> float:
    """How many pairs of users make the same step from an item to the next, beyond those of the same histories in an
    order by chance; its root, which grows as the share of steps that follow a rule. A step counts less the more popular
    its items are."""
    items = int(histories.item.max()) + 1
    count = np.bincount(histories.item).astype(np.float64)

    def pairs(item):
        step = (item[:-1].astype(np.int64) * items + item[1:])[histories.untied]
        step, times = np.unique(step, return_counts=True)
        step, times = step[times > 1], times[times > 1].astype(np.float64)
        return (times * (times - 1) / np.sqrt(count[step // items] * count[step % items])).sum()

    orders = [np.lexsort((random.random(len(histories.user)), histories.user)) for _ in range(SHUFFLES)]
    beyond = pairs(histories.item) - np.mean([pairs(histories.item[order]) for order in orders])
    return float(np.sqrt(max(beyond, 0)))


def measure_groups(rows: Interactions, random: np.random.Generator) -> np.ndarray:
    """float [MOST_GROUPS], descending: singular values of the matrix of users and items after the first, with every
    entry divided by the roots of the lengths of its row and column (regularized spectral clustering: Chaudhuri, Chung
    and Tsiatas 2012). k groups lift k - 1 of them above those of chance."""
    length, count = (np.bincount(column).astype(np.float32) for column in (rows.user, rows.item))
    scale = (length + length.mean())[rows.user] * (count + count.mean())[rows.item]
    matrix = scipy.sparse.csr_matrix((1 / np.sqrt(scale), (rows.user, rows.item)))
    size = min(MOST_GROUPS + 9, *matrix.shape)
    vectors = random.normal(size=(matrix.shape[1], size)).astype(np.float32)
    for _ in range(5):  # subspace iteration: values that stand out are exact to three digits
        vectors = matrix.T @ (matrix @ vectors)
        exact = vectors.astype(np.float64)
        products = exact.T @ exact
        products += np.eye(size) * 1e-9 * np.trace(products)  # the matrix may have fewer directions
        vectors = (exact @ np.linalg.inv(np.linalg.cholesky(products)).T).astype(np.float32)
    images = matrix @ vectors
    values = np.sqrt(np.maximum(np.linalg.eigvalsh(images.T @ images)[::-1][1:], 0))
    return np.pad(values, (0, MOST_GROUPS))[:MOST_GROUPS]


def fit_order(rows: Interactions, shape: Shape, random: np.random.Generator, seed: int) -> float:
    """The order of rows, whose shape is known but for it."""

    def agreement(order):
        return measure_order(
            lay_out_histories(make_interactions(shape._replace(order=order), seed).interactions), random
        )

    return search_strength(agreement, measure_order(lay_out_histories(rows), random))


def estimate_order(rows: Interactions, users: int, seed: int = 0) -> float:
    """The order of interactions as if there were no groups of taste; see `estimate_strengths`."""
    random = setup_rng(seed, SetupStream.SHAPE_ESTIMATES)
    return fit_order(*draw_sample(rows, users, random), random, seed)


def estimate_ties(rows: Interactions, users: int, seed: int = 0) -> float:
    """The share of interactions with the same time as the user's one before, of some of the users."""
    return draw_sample(rows, users, setup_rng(seed, SetupStream.SHAPE_ESTIMATES))[1].ties


def estimate_strengths(rows: Interactions, users: int, times: bool, seed: int = 0) -> Strengths:
    """The order and the groups of interactions, no two of the same user and item.

    Args:
        rows: the interactions.
        users: number of users.
        times: whether times say what came first; without them there is no order.
        seed: of the users that are looked at, and of the data that are made.
    """
    random = setup_rng(seed, SetupStream.SHAPE_ESTIMATES)
    rows, shape = draw_sample(rows, users, random)
    shape = shape._replace(order=fit_order(rows, shape, random, seed) if times else 0.0)

    def groups_of(made):
        return measure_groups(make_interactions(made, seed).interactions, random)

    found, by_chance = measure_groups(rows, random), groups_of(shape)
    apart = int((by_chance > APART * np.median(by_chance)).sum())  # by lengths and popularity alone: long histories
    above = int((found > ABOVE * by_chance[apart]).sum())
    if above <= apart:
        return Strengths(shape.order, 1, 0.0)
    shape = shape._replace(groups=1 + above - apart)
    loyalty = search_strength(lambda x: groups_of(shape._replace(loyalty=x))[:above].mean(), found[:above].mean())
    shape = shape._replace(loyalty=loyalty)
    return Strengths(fit_order(rows, shape, random, seed) if times else 0.0, shape.groups, loyalty)


def search_strength(measure: Callable[[float], float], wanted: float) -> float:
    """The least strength in [0, 1] at which a measure reaches the `wanted` value; where it nowhere does, that of its
    largest value. In dense data it falls again: where a group has hardly any items left that a user lacks."""
    from scipy.optimize import brentq

    @cache
    def gap(strength):
        return measure(strength) - wanted

    for low, high in pairwise(STEPS):
        if gap(low) >= 0:
            return low
        if gap(high) > 0:
            return float(brentq(gap, low, high, xtol=NEAR))
    return max(STEPS, key=gap)
