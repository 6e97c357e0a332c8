"""Integer noise in a secure sum: its distribution, what a client can add, and which grids are refused."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from jaxfed.channels.average import mean
from jaxfed.channels.clip import clip
from jaxfed.channels.compress import quantize
from jaxfed.channels.integer_noise import FLOAT, ROOM, draw_centred_poisson, draw_skellam, skellam
from jaxfed.channels.noise import densify, gaussian
from jaxfed.channels.secure_sum import pads
from jaxfed.channels.sparse import top_k
from jaxfed.core.channel import chain
from jaxfed.core.channel_checks import shape_client
from jaxfed.core.link import list_mechanisms
from jaxfed.core.state import server_model
from jaxfed.core.types import RoundView
from tests.small import WHO, close, factorisation, row_cohort, run, same

COHORT = len(WHO)
DRAWS = 200_000


def test_messages_in_a_secure_sum_are_hidden():
    """The server sees the sum alone, and codes that it would have to open one by one are refused beside it."""
    made = chain(mean(8), clip(1.0), skellam(8))
    assert made.claims.reveals == "sum"
    with pytest.raises(ValueError, match="top_k must be opened one message at a time, and skellam hides"):
        chain(mean(8), clip(1.0), top_k(0.5, keep_error=False), skellam(8))


@pytest.mark.parametrize("mean", [10.0, 37.3, 1000.5, 3e6, 4e9])
def test_centred_poisson_is_poisson(mean):
    """Cells of equal probability under SciPy's distribution, by a chi-square test."""
    drawn = np.asarray(draw_centred_poisson(jax.random.key(1), mean, (DRAWS,))).astype(np.float64) + math.floor(mean)
    law = stats.poisson(mean)
    edges = np.unique(law.ppf(np.linspace(0, 1, 42)[1:-1]))
    expected = np.diff(np.concatenate([[0], law.cdf(edges), [1]]))
    cells = np.bincount(np.searchsorted(edges, drawn), minlength=len(expected))
    assert stats.chisquare(cells, DRAWS * expected).pvalue > 1e-4
    # the third moment tells it from a Gaussian, and from numbers cut to float32
    assert np.mean((drawn - mean) ** 2) / mean == pytest.approx(1, abs=6 * math.sqrt(2 / DRAWS))


@pytest.mark.parametrize("variance", [100.0, 5e3, 6e6, 9e9])
def test_the_noise_is_skellam(variance):
    drawn = np.asarray(draw_skellam(jax.random.key(2), variance, (DRAWS,))).astype(np.float64)
    assert drawn.mean() == pytest.approx(0, abs=5 * math.sqrt(variance / DRAWS))
    assert drawn.var() == pytest.approx(variance, rel=5 * math.sqrt(2 / DRAWS))
    law = stats.skellam(variance / 2, variance / 2) if variance < 1e5 else stats.norm(0, math.sqrt(variance))
    edges = np.unique(np.floor(stats.norm(0, math.sqrt(variance)).ppf(np.linspace(0, 1, 31)[1:-1])))
    half = 0 if variance < 1e5 else 0.5  # of a whole number, where a density stands for it
    expected = np.diff(np.concatenate([[0], law.cdf(edges + half), [1]]))
    cells = np.bincount(np.searchsorted(edges, drawn), minlength=len(expected))
    assert stats.chisquare(cells, DRAWS * expected).pvalue > 1e-4


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.sampled_from([1, 3, 200, 5000]), st.floats(-4, 4), st.integers(3, 12), st.booleans())
def test_no_rounding_makes_a_client_longer_than_is_accounted_for(seed, length, power, bits, spread):
    """Long updates of many small numbers are those that rounding lengthens most."""
    made = chain(clip(1.0), skellam(8, 2.0, bits))
    (released,) = list_mechanisms(made)
    random = np.random.default_rng(seed)
    x = np.ones(length) if spread else random.normal(size=length)
    client = shape_client(((), ()), 0, 0)._replace(key=jax.random.key(seed))
    sent, _ = made.encode({"w": jnp.float32(x * 10.0**power)}, ((), ()), client)
    whole = np.asarray(sent["w"]).astype(np.float64)
    assert np.linalg.norm(whole) <= released.l2 == pytest.approx(2**bits * ROOM * FLOAT)
    assert np.abs(whole).sum() <= released.l1


def test_the_sum_is_that_of_the_clients_and_noise_of_the_claimed_size():
    """Against the run without noise: what differs is rounding and noise, of the standard deviation that is said."""
    made = chain(mean(COHORT), clip(0.5), skellam(COHORT, 1.5, 12))
    noisy, info = run(factorisation(made), row_cohort(), rounds=1)
    still, _ = run(factorisation(chain(mean(COHORT), clip(0.5))), row_cohort(), rounds=1)
    pairs = zip(*(jax.tree.leaves(server_model(s)) for s in (noisy, still)), strict=True)
    noise = np.concatenate([np.ravel(a - b) for a, b in pairs]) * COHORT
    assert float(info["noise/stddev"]) == pytest.approx(1.5 * 0.5 * ROOM * FLOAT)
    assert noise.std() == pytest.approx(1.5 * 0.5 * ROOM, rel=5 / math.sqrt(2 * noise.size))


def test_who_takes_part_does_not_change_the_noise():
    """Half of the clients or none: the same noise, bit by bit."""
    made = chain(clip(0.5), skellam(COHORT))
    zero = {"w": jnp.zeros(50, jnp.int32)}
    state, _ = made.init({"w": jnp.zeros(50)})
    for here in (np.ones(4, bool), np.zeros(4, bool)):
        out, _, _ = made.decode(zero, state, RoundView(jax.random.key(0), jnp.arange(4), jnp.array(here)))
        if here.all():
            first = out
    same(first, out)


def test_pads_cancel_over_it():
    there = np.arange(COHORT) != 2
    padded = chain(mean(COHORT), clip(0.5), densify(), skellam(COHORT), pads())
    plain = chain(mean(COHORT), clip(0.5), densify(), skellam(COHORT))
    close(
        *(server_model(run(factorisation(c), row_cohort(present=there), rounds=1)[0]) for c in (padded, plain)), atol=0
    )


REFUSED = {
    "nothing bounds": (lambda: chain(skellam(8)), "put clip before it"),
    "too coarse": (lambda: chain(clip(0.001), skellam(8, 1.0, 12)), "set skellam.fraction_bits to 14"),
    "too fine": (lambda: chain(clip(1.0), skellam(8, 1.0, 20)), "set skellam.fraction_bits to 16"),
    "too many": (lambda: chain(clip(1.0), skellam(10**6, 1.0, 14)), "lower skellam.fraction_bits to 10"),
    "codes": (lambda: chain(clip(), quantize(), skellam(8)), "nothing to its left bounds"),
    "noise twice": (lambda: chain(clip(), skellam(8), gaussian(), quantize()), "quantize after gaussian lets"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        make()
