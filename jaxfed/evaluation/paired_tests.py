"""Whether two models differ by more than chance: standard errors and paired tests over users."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats


class PairedDifference(NamedTuple):
    """How a model differs from another one on the same users.

    mean: of the users' differences. error: its standard error. p: of a two-sided paired t-test, of no difference.
    """

    mean: float
    error: float
    p: float


def standard_error(values: np.ndarray) -> float:
    """The standard error of the mean of a user's value, over users: their standard deviation / sqrt(their number).

    Args:
        values: float [users].

    Returns:
        The error; NaN for a single user.

    Example:
        >>> standard_error(np.array([0.0, 0.0, 1.0, 1.0])) == (1 / 3) ** 0.5 / 2
        True
    """
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")


def compare_paired(values: np.ndarray, others: np.ndarray) -> PairedDifference:
    """Compares two models user by user, by a paired t-test (`scipy.stats.ttest_rel`).

    Args:
        values: float [users], of a model.
        others: float [users], of the other model, of the same users in the same order.

    Returns:
        The mean of `values` - `others`, its standard error, and p. Where all users are equal p is 1.

    Example:
        >>> compare_paired(np.array([1.0, 0.0, 1.0]), np.array([1.0, 0.0, 1.0])).p
        1.0
    """
    difference = values - others
    alike = not difference.any()
    p = 1.0 if alike else float(stats.ttest_rel(values, others).pvalue)
    return PairedDifference(float(difference.mean()), standard_error(difference), p)


def correct_holm(p: Sequence[float]) -> list[float]:
    """p-values of several tests, corrected so that the probability of any false finding among them stays that of one
    (Holm 1979): the smallest times the number of tests, the next times one less, and so on, in their order, at most 1.

    Example:
        >>> correct_holm([0.5, 0.01, 0.02])
        [0.5, 0.03, 0.04]
    """
    order = np.argsort(p, kind="stable")
    raised = np.maximum.accumulate(np.asarray(p)[order] * (len(p) - np.arange(len(p))))
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(raised, 1.0)
    return corrected.tolist()
