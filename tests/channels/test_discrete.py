"""Discrete Gaussian noise: its distribution, its divergences, and the sum under it."""

import jax
import mpmath
import numpy as np
import pytest
from scipy import stats

from jaxfed.channels.average import mean
from jaxfed.channels.clip import clip
from jaxfed.channels.discrete import LARGEST, discrete_gaussian, draw_discrete_gaussian, magnitude_table
from jaxfed.core.channel import chain
from jaxfed.core.state import server_model
from jaxfed.core.types import Mechanism
from jaxfed.privacy.accountant import compute_spent
from jaxfed.privacy.releases import Sampling
from jaxfed.privacy.renyi import gaussian_rdp as gaussian_divergence
from tests.small import WHO, close, factorisation, row_cohort, run

COHORT = len(WHO)
DRAWS = 200_000


@pytest.mark.parametrize("stddev", [4.0, 33.3, 500.0])
def test_the_table_is_right_to_the_last_bits(stddev):
    """Against sums with 50 digits: the total variation is what doubles lose of a sum of 1, and a table of 64 bits."""
    mpmath.mp.dps = 50
    table = magnitude_table(stddev)
    k = range(len(table) + int(5 * stddev))
    weights = [(2 if i else 1) * mpmath.exp(-((i / mpmath.mpf(stddev)) ** 2) / 2) for i in k]
    shares = np.diff(table.astype(object), prepend=0)
    shares[-1] += 1  # of 2^64
    got = [int(each) / mpmath.mpf(2) ** 64 for each in shares] + [0] * int(5 * stddev)
    total = sum(weights)
    away = sum(abs(share - weight / total) for share, weight in zip(got, weights, strict=True))
    assert away <= 2.0**-51 + len(table) * 2.0**-63


@pytest.mark.parametrize("stddev", [4.0, 100.0, LARGEST])
def test_the_numbers_are_of_the_distribution(stddev):
    """Cells of about equal probability, by a chi-square test; both signs, and no zero counted twice."""
    drawn = np.asarray(draw_discrete_gaussian(jax.random.key(1), stddev, (DRAWS,)))
    k = np.arange(-int(10 * stddev), int(10 * stddev) + 1)
    law = np.exp(-0.5 * (k / stddev) ** 2)
    law /= law.sum()
    edges = np.unique(np.searchsorted(np.cumsum(law), np.linspace(0, 1, 42)[1:-1]))
    expected = np.add.reduceat(law, np.concatenate([[0], edges]))
    cells = np.bincount(np.searchsorted(k[edges], drawn, "right"), minlength=len(expected))
    assert stats.chisquare(cells, DRAWS * expected).pvalue > 1e-4


@pytest.mark.parametrize("stddev", [0.5, 1.0, 5.0])
def test_its_divergences_are_at_most_those_of_a_gaussian(stddev):
    """Of the exact distributions, moved by whole numbers (Canonne, Kamath and Steinke 2020, proposition 5)."""
    x = np.arange(-400, 401)
    log_law = -0.5 * (x / stddev) ** 2
    log_law -= np.logaddexp.reduce(log_law)
    for order in (2, 5, 32):
        for shift in (1, 3):
            moved = np.roll(log_law, shift)[100:-100], log_law[100:-100]
            exact = np.logaddexp.reduce(order * moved[0] + (1 - order) * moved[1]) / (order - 1)
            assert exact <= gaussian_divergence(np.array([order]), stddev / shift)[0] * (1 + 1e-12)


def test_a_sum_under_noise_is_the_sum_but_for_it():
    noisy = chain(mean(COHORT), clip(0.3), discrete_gaussian(COHORT, 0.01, 14))
    got, info = run(factorisation(noisy), row_cohort(), rounds=1)
    want, _ = run(factorisation(chain(mean(COHORT), clip(0.3))), row_cohort(), rounds=1)
    stddev = float(info["noise/stddev"])
    assert stddev == pytest.approx(0.01 * 0.3, rel=0.07)  # and the room for rounding
    gap = np.concatenate(
        [np.ravel(x) for x in jax.tree.leaves(jax.tree.map(np.subtract, server_model(got), server_model(want)))]
    )
    noise = COHORT * gap * 2.0**14
    close(
        noise, np.round(noise), atol=0.7
    )  # the mean of eight, and the rounding of their messages: no more than eighths
    assert noise.std() / 2.0**14 == pytest.approx(stddev, rel=0.15)


def test_the_accountant_counts_it_as_gaussian_noise_or_more():
    for kind in ("poisson", "fixed", "everyone"):
        sampling = Sampling(kind, 900, 900 if kind == "everyone" else 90)
        discrete = compute_spent([Mechanism("discrete_gaussian", 4.0, 1e4, 1e2)], sampling, 50, 1e-5, "pld")
        whole = compute_spent([Mechanism("gaussian", 4.0)], sampling, 50, 1e-5, "rdp")
        assert discrete.accountant == "rdp"
        assert whole.epsilon * (1 - 1e-9) <= discrete.epsilon <= 1.15 * whole.epsilon


def test_what_cannot_be_drawn_or_summed_is_refused():
    with pytest.raises(ValueError, match=r"set discrete_gaussian.fraction_bits to 11"):
        chain(clip(1.0), discrete_gaussian(8, 1.0, 20))
    with pytest.raises(ValueError, match=r"4 to 4096 can be drawn: set discrete_gaussian.fraction_bits to 2"):
        chain(clip(1.0), discrete_gaussian(8, 1.0, 1))
    with pytest.raises(ValueError, match="the ring has 32: lower discrete_gaussian.fraction_bits"):
        chain(clip(1.0), discrete_gaussian(1 << 30, 0.1, 8))
    with pytest.raises(ValueError, match="discrete_gaussian: nothing to its left bounds"):
        chain(discrete_gaussian(8))
