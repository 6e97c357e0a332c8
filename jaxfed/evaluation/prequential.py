"""Interactions that are predicted one after the other: at which place the item of each stood."""

from typing import NamedTuple

import numpy as np


class TimeLine(NamedTuple):
    """Who met which item, in time order, and where the rows of each user are."""

    user: np.ndarray  # int [n]
    item: np.ndarray  # int [n]
    order: np.ndarray  # int [n]: rows by user, each user's in time order
    place: np.ndarray  # int [n]: where each row is in `order`
    start: np.ndarray  # int [n]: where the rows of its user begin there

    def before(self, row: int) -> np.ndarray:
        """The items of a row's user before that row, earliest first."""
        return self.item[self.order[self.start[row] : self.place[row]]]

    def count_before(self, first: int, last: int) -> np.ndarray:
        """int [last - first]: how many items the users of rows `first` to before `last` had before them."""
        return (self.place - self.start)[first:last]


def make_timeline(user: np.ndarray, item: np.ndarray) -> TimeLine:
    """The time line of rows in time order.

    Example:
        >>> make_timeline(np.array([7, 8, 7]), np.array([0, 1, 2])).before(2)
        array([0])
    """
    order = np.argsort(user, kind="stable")
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    return TimeLine(user, item, order, place, np.searchsorted(user[order], user))


def rank_rows(line: TimeLine, scores: np.ndarray, question: np.ndarray, first: int) -> np.ndarray:
    """Predicts rows one by one, each among the items that its user did not have before.

    Args:
        line: the rows in time order.
        scores: float [q, items]: -inf for items that are not known.
        question: int [m]: which of these scores each predicted row is ranked by.
        first: the first row that is predicted; the others follow it.

    Returns:
        float [m]: the place of each item, 1 the first. Items with an equal score stand before it; one that is not
        known, or whose score is no number, has the rank inf.

    Example:
        >>> line = make_timeline(np.array([0, 0, 1]), np.array([2, 0, 0]))
        >>> rank_rows(line, np.array([[3.0, 2.0, 9.0], [1.0, 1.0, 0.0]]), np.array([0, 1]), first=1)
        array([1., 2.])
    """
    ranks = np.full(len(question), np.inf)
    for number, of in enumerate(question):
        left, item = np.array(scores[of], np.float64), line.item[first + number]
        left[line.before(first + number)] = -np.inf
        target = left[item]
        if target > -np.inf:  # a NaN is not
            left[item] = -np.inf
            ranks[number] = 1 + np.count_nonzero(~(left < target))
    return ranks


def summarize_ranks(ranks: np.ndarray, cutoffs: tuple[int, ...]) -> dict[str, float]:
    """{hr@k, ndcg@k}: means over predictions; NDCG of one item at place r is 1 / log2(1 + r). NaN of none.

    Args:
        ranks: float [m], see `rank_rows`.
        cutoffs: the k.
    """
    found: dict[str, float] = {}
    gain = 1 / np.log2(1 + ranks)
    for k in cutoffs:
        there = ranks <= k
        means = (there.mean(), np.where(there, gain, 0.0).mean()) if len(ranks) else (np.nan, np.nan)
        found |= {f"hr@{k}": float(means[0]), f"ndcg@{k}": float(means[1])}
    return found
