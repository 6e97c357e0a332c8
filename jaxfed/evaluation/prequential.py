"""Interactions that are predicted one after the other: at which place the item of each stood."""

from typing import NamedTuple

import numpy as np


class Outcomes(NamedTuple):
    """What came of some predictions.

    ranks: float [n]: the place of each item among those that its user did not have, 1 the first; inf where the item was
    not known.
    """

    ranks: np.ndarray

    def figures(self, cutoffs: tuple[int, ...]) -> dict[str, float]:
        """{hr@k, ndcg@k}: means over the predictions; NDCG of one item at place r is 1 / log2(1 + r)."""
        gain = 1 / np.log2(1 + self.ranks)
        found = {}
        for k in cutoffs:
            there = self.ranks <= k
            found |= {f"hr@{k}": float(there.mean()), f"ndcg@{k}": float(np.where(there, gain, 0.0).mean())}
        return found


def predict_window(scores: np.ndarray, users: np.ndarray, user: np.ndarray, item: np.ndarray, first: int) -> Outcomes:
    """Predicts rows one by one: before each, its user has the items of the user's rows before it.

    Args:
        scores: float [u, items]: of the users of the window, -inf for items that are not known.
        users: int [u], ascending: who they are.
        user: int [n]: the user of each row, in time order, up to the end of the window.
        item: int [n]: the item of each.
        first: the first row that is predicted.

    Returns:
        The rank of each predicted item. Items with an equal score stand before it; one that is not known, or whose
        score is no number, has the rank inf.

    Example:
        >>> rows = np.array([0, 0, 1]), np.array([2, 0, 0])
        >>> predict_window(np.array([[3.0, 2.0, 9.0], [1.0, 1.0, 0.0]]), np.array([0, 1]), *rows, first=1).ranks
        array([1., 2.])
    """
    place = np.searchsorted(users, user)
    of_window = (place < len(users)) & (users[np.minimum(place, len(users) - 1)] == user)
    rows = np.flatnonzero(of_window)
    rows = rows[np.argsort(place[rows], kind="stable")]
    starts = np.searchsorted(place[rows], np.arange(len(users) + 1))
    ranks = np.full(len(user), np.inf)
    for who in range(len(users)):
        left, own = np.array(scores[who], np.float64), rows[starts[who] : starts[who + 1]]
        left[item[own[own < first]]] = -np.inf
        for row in own[own >= first]:
            target = left[item[row]]
            if target > -np.inf:  # a NaN is not
                left[item[row]] = -np.inf
                ranks[row] = 1 + np.count_nonzero(~(left < target))
            left[item[row]] = -np.inf
    return Outcomes(ranks[first:])
