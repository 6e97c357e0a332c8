"""Whether two models differ by more than chance: standard errors, paired tests and a paired bootstrap over users."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from jaxfed.core.streams import SetupStream, setup_rng

RESAMPLES = 10_000
AT_ONCE = 1 << 22  # counts of resamples in memory
ROUNDING = 1e-12  # two means that differ by less are equal


class PairedDifference(NamedTuple):
    """How a model differs from another one on the same users.

    mean: of the users' differences. error: its standard error. p: of a two-sided paired t-test, of no difference.
    """

    mean: float
    error: float
    p: float


class BootstrapDifference(NamedTuple):
    """How a model differs from another one on the same users, by a paired bootstrap.

    mean: of the users' differences. low, high: of the interval that holds 95 % of the resampled means. p: two-sided, of
    no difference.
    """

    mean: float
    low: float
    high: float
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


def bootstrap_paired(
    values: np.ndarray, others: np.ndarray, resamples: int = RESAMPLES, seed: int = 0
) -> BootstrapDifference:
    """Compares two models by resampling their users with replacement, both models on the same ones.

    Efron and Tibshirani, "An introduction to the bootstrap" (1993), §13.3 and §16.4.

    Users with equal differences are drawn together, by multinomial counts, which has the same distribution.

    Args:
        values: float [users], of a model.
        others: float [users], of the other model, of the same users in the same order.
        resamples: Number of resamples.
        seed: What they are drawn from. Equal arguments give equal results.

    Returns:
        The mean of `values` - `others`; the percentile interval of 95 %; and p, the share of resampled means that are
        at least as far from `mean` as zero is, that of the users themselves counted as one more.

    Example:
        >>> found = bootstrap_paired(np.array([1.0, 1.0, 1.0, 0.0]), np.zeros(4))
        >>> found.mean, found.low, found.high
        (0.75, 0.25, 1.0)
    """
    different, counts = np.unique(np.asarray(values, np.float64) - np.asarray(others, np.float64), return_counts=True)
    users, rng = int(counts.sum()), setup_rng(seed, SetupStream.BOOTSTRAP)
    mean, at_once = float(counts @ different / users), max(AT_ONCE // len(different), 1)
    sizes = [min(at_once, resamples - done) for done in range(0, resamples, at_once)]
    means = np.concatenate([rng.multinomial(users, counts / users, size) @ different / users for size in sizes])
    low, high = np.quantile(means, (0.025, 0.975))
    as_far = int((np.abs(means - mean) >= abs(mean) - ROUNDING).sum())
    return BootstrapDifference(mean, float(low), float(high), (1 + as_far) / (1 + resamples))


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
