"""A privacy loss distribution that dp-accounting does not have: Gaussian noise on cohorts of a fixed size."""

import math

import numpy as np

INTERVAL = 1e-4  # of the grid of losses
OUTSIDE = 1e-6  # share of delta for all losses beyond the grid


def hockey_stick_divergence(losses: np.ndarray, multiplier: float, rate: float) -> np.ndarray:
    """delta of one round at each epsilon of `losses`, one client against another in its place.

    multiplier: noise over what a replacement can change. rate: the cohort's share of the clients.

    With the client in the cohort (probability `rate`) the two sums have means that differ by a replacement; without
    it, both are sums of the same clients, one of whom has its place, which differs from either mean by a replacement,
    too. By advanced joint convexity (Balle, Barthe and Gaboardi 2018, theorem 2) delta at an epsilon >= 0 is at most
    that of N(1, multiplier^2) with probability `rate` and N(0, multiplier^2) else, against N(0, multiplier^2). This
    holds in either order of the two, which gives epsilons below 0. Such a bound at every epsilon may be composed (Zhu,
    Dong and Wang 2022, "Optimal accounting of differential privacy via characteristic function").
    """
    from scipy.special import log_ndtr

    size = np.abs(losses)
    inner = np.log1p(np.expm1(size) / rate)  # the epsilon without sampling
    low, high = (log_ndtr(sign / (2 * multiplier) - multiplier * inner) for sign in (-1, 1))
    positive = np.maximum(rate * (np.exp(high) - np.exp(inner + low)), 0)
    return np.where(losses >= 0, positive, -np.expm1(-size) + np.exp(-size) * positive)


def fixed_cohort_epsilon(multiplier: float, rate: float, rounds: int, delta: float) -> float:
    """epsilon at `delta` after some rounds of cohorts drawn without replacement; see `hockey_stick_divergence`.

    The distribution of one round is the least one on a grid that is not below the true one ("connect the dots",
    Doroshenko et al. 2022), composed by dp-accounting.
    """
    from dp_accounting.pld import pld_pmf
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

    most = 1.0
    while hockey_stick_divergence(np.array([most]), multiplier, rate)[0] > OUTSIDE * delta / rounds:
        most *= 1.25
    last = math.ceil(most / INTERVAL)
    deltas = hockey_stick_divergence(INTERVAL * np.arange(-last, last + 1), multiplier, rate)
    one = pld_pmf.create_pmf_pessimistic_connect_dots_fixed_gap(INTERVAL, -last, last, deltas)
    return float(PrivacyLossDistribution(one).self_compose(rounds).get_epsilon_for_delta(delta))
