"""Renyi divergences of one round's release from its neighbour's, as functions of the order, and what they say.

Vectors run over `orders`. Those of a few releases of the same cohort add up before sampling, those of rounds after it.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator

import numpy as np

Vector = np.ndarray
Base = Callable[[Vector], Vector]  # integer orders -> divergences without sampling


def gaussian_rdp(orders: Vector, multiplier: float) -> Vector:
    """Noise of `multiplier` sensitivities (Mironov 2017, proposition 7); 0: no noise."""
    return orders / (2 * multiplier**2) if multiplier else np.full(len(orders), np.inf)


def skellam_rdp(orders: Vector, multiplier: float, l1: float, l2: float) -> Vector:
    """Integer noise of variance (multiplier * l2)^2, integer orders; l1, l2: sensitivities in grid units.

    Agarwal, Kairouz and Liu 2021, theorem 3.5. Not an equality: 1.02 times the divergence at a variance of 100, l1 = 1.
    """
    if not multiplier:
        return np.full(len(orders), np.inf)
    variance = (multiplier * l2) ** 2
    more = np.minimum(((2 * orders - 1) * l2**2 + 6 * l1) / (4 * variance**2), 3 * l1 / (2 * variance))
    return gaussian_rdp(orders, multiplier) + more


def pure_rdp(orders: Vector, epsilon: float) -> Vector:
    """Any mechanism of pure `epsilon`: at worst it is randomised response (Mironov 2017, proposition 5)."""
    stay, leave = -np.logaddexp(0, [-epsilon, epsilon])  # log probabilities of its two answers
    log_moment = np.logaddexp(orders * stay + (1 - orders) * leave, orders * leave + (1 - orders) * stay)
    return log_moment / (orders - 1)


def log_binomials(order: int) -> Vector:
    """log C(order, j) for j = 0 ... order."""
    from scipy.special import gammaln

    j = np.arange(order + 1)
    return gammaln(order + 1) - gammaln(j + 1) - gammaln(order - j + 1)


def poisson_rdp(base: Base, order: int, rate: float) -> float:
    """At an integer order, of clients that each take part with probability `rate`; with one against without it.

    The sum is exact for the run with the client against the run without. The other way round is no larger if a
    reflection swaps the two unsampled distributions (Mironov, Talwar and Zhang 2019, theorem 5), as it does for added
    symmetric noise, Gaussian or Skellam: the factor 3 of Zhu and Wang 2019, theorem 5, is not needed. Mechanisms
    without that symmetry must not come here.
    """
    from scipy.special import logsumexp

    if rate == 1:
        return float(base(np.array([order]))[0])
    j = np.arange(order + 1)
    moments = np.concatenate([[0, 0], (j[2:] - 1) * base(j[2:])])
    terms = log_binomials(order) + j * np.log(rate) + (order - j) * np.log1p(-rate) + moments
    return max(0.0, float(logsumexp(terms)) / (order - 1))


def fixed_rdp(base: Base, order: int, rate: float) -> float:
    """At an integer order, of a cohort drawn without replacement; one client against another in its place.

    `base` is of that change, too. Wang, Balle and Kasiviswanathan 2019, theorem 9, for a mechanism without a pure
    guarantee. It can be larger than without sampling.
    """
    from scipy.special import logsumexp

    j = np.arange(2, order + 1)
    costs = base(j)
    factors = np.full(len(j), np.log(2))
    factors[0] = min(np.log(2), np.log(4) + np.log(-np.expm1(-costs[0])))
    terms = log_binomials(order)[2:] + j * np.log(rate) + (j - 1) * costs + factors
    return float(logsumexp(np.concatenate([[0.0], terms]))) / (order - 1)


def sampled_gaussian_rdp(orders: Vector, multiplier: float, population: int, size: int, replaced: bool) -> Vector:
    """Gaussian noise and Poisson cohorts, or (replaced) fixed ones, where `multiplier` is of a replacement.

    As dp-accounting has it, at every order.
    """
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    noise, relation = dp_accounting.GaussianDpEvent(multiplier), dp_accounting.NeighboringRelation
    if replaced:
        one = RdpAccountant(list(orders), relation.REPLACE_ONE)
        event = dp_accounting.SampledWithoutReplacementDpEvent(population, size, noise)
    else:
        one = RdpAccountant(list(orders), relation.ADD_OR_REMOVE_ONE)
        event = dp_accounting.PoissonSampledDpEvent(size / population, noise)
    with quiet_absl():
        return one.compose(event).rdp


def mixture_rdp(orders: Vector, usual: Vector, rare: Vector, probability: float) -> Vector:
    """`rare` happens with this probability, `usual` else, independently of the data; which of them may be known."""
    with np.errstate(divide="ignore", invalid="ignore"):
        parts = np.log1p(-probability) + (orders - 1) * usual, np.log(probability) + (orders - 1) * rare
    return np.logaddexp(*parts) / (orders - 1)


def rdp_epsilon(orders: Vector, divergences: Vector, delta: float) -> float:
    """The epsilon at `delta` (Canonne, Kamath and Steinke 2020, proposition 12); inf where no delta is left."""
    from dp_accounting.rdp import compute_epsilon

    finite = np.isfinite(divergences)
    if delta <= 0 or not finite.any():
        return math.inf
    return float(compute_epsilon(orders[finite], divergences[finite], delta)[0])


@contextlib.contextmanager
def quiet_absl() -> Iterator[None]:
    """Without the warnings of series that do not converge: dp-accounting leaves their orders out."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
