"""DP-FTRL: that its noise is the one accounted for, for the rounds that clients really take part in."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfed.channels.average import mean
from jaxfed.channels.clip import clip
from jaxfed.channels.correlated import correlated, noise_strategy, participation_patterns, strategy_norm, tree_strategy
from jaxfed.channels.sparse import top_k
from jaxfed.core.channel import chain
from jaxfed.core.state import server_model
from jaxfed.core.types import RoundView
from jaxfed.sampling import cohort
from tests.small import PLAIN, WHO, factorisation, row_cohort, run, same

ROUNDS, CLIENTS, SIZE = 12, 11, 4
SAMPLER = cohort.cyclic_cohort(CLIENTS, SIZE)
KINDS = ["tree", "banded", "blt"]


@pytest.fixture(scope="module")
def strategies():
    return {kind: noise_strategy(kind, ROUNDS, 2, 5) for kind in KINDS}


def test_patterns_are_those_of_the_sampler():
    """Every client of the real sampler follows a pattern of the schedule, and every pattern has its client."""
    took_part = np.zeros((CLIENTS, ROUNDS), bool)
    for t in range(ROUNDS):
        took_part[SAMPLER.draw(3, t)[0], t] = True
    assert {*map(bytes, took_part)} == {*map(bytes, participation_patterns("cyclic", CLIENTS, SIZE, ROUNDS))}
    assert participation_patterns("everyone", CLIENTS, CLIENTS, ROUNDS).tolist() == [[True] * ROUNDS]


@pytest.mark.parametrize("kind", KINDS)
def test_the_noise_is_the_strategys_inverse(strategies, kind):
    matrix, stream = strategies[kind]
    np.testing.assert_allclose(np.asarray(stream.materialize(ROUNDS)) @ matrix, np.eye(ROUNDS), atol=1e-5)


def test_a_tree_by_hand():
    """Rows are dyadic intervals that end at 1, 2, ... 6."""
    assert tree_strategy(6).astype(int).tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 1, 1],
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_nobody_changes_the_run_by_more_than_its_sensitivity(strategies, kind):
    """Clients that know everything: the best of many signs and directions reach it, and none is above it."""
    matrix, _ = strategies[kind]
    patterns = participation_patterns("cyclic", CLIENTS, SIZE, ROUNDS)
    claimed, random, worst = strategy_norm(matrix, patterns), np.random.default_rng(0), 0.0
    for pattern in patterns:
        rounds = np.flatnonzero(pattern)
        for signs in itertools.product([-1, 1], repeat=len(rounds)):
            worst = max(worst, np.linalg.norm(matrix[:, rounds] @ np.array(signs)))
        for _ in range(20):  # directions in three dimensions
            x = random.normal(size=(len(rounds), 3))
            x /= np.linalg.norm(x, axis=1, keepdims=True)
            worst = max(worst, np.linalg.norm(matrix[:, rounds] @ x))
    assert worst == pytest.approx(claimed, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_sums_of_rounds_have_the_covariance_of_the_mechanism(kind):
    """What the link adds round by round, over many numbers, against A C^-1 by hand."""
    made = chain(clip(2.0), correlated(ROUNDS, CLIENTS, SAMPLER, 0.5, kind))
    zero = {"w": jnp.zeros(4000)}
    state, _ = made.init(zero)
    added = []
    for t in range(ROUNDS):
        round = RoundView(jax.random.fold_in(jax.random.key(0), t), jnp.arange(4), jnp.ones(4, bool))
        out, state, _ = made.decode(zero, state, round)
        added.append(np.asarray(out["w"]))
    matrix, _ = noise_strategy(kind, ROUNDS, 2, 5)
    mix = (
        np.cumsum(np.linalg.inv(matrix), 0)
        * 0.5
        * 2.0
        * strategy_norm(matrix, participation_patterns("cyclic", CLIENTS, SIZE, ROUNDS))
    )
    seen, want = np.cov(np.cumsum(added, 0), bias=True), mix @ mix.T
    scale = np.sqrt(np.outer(np.diag(want), np.diag(want)))
    assert np.abs((seen - want) / scale).max() < 6 / math.sqrt(4000)  # six standard errors of a covariance


@pytest.mark.parametrize(("kind", "rounds"), [("banded", 64), ("tree", 512)])
def test_less_noise_than_independent_noise(kind, rounds):
    """Of equal sensitivity over the run, in the mean over its rounds; a tree is for clients who take part seldom."""
    patterns = participation_patterns("cyclic", 943, 128 if kind == "banded" else 16, rounds)
    alone = strategy_norm(np.eye(rounds), patterns) * math.sqrt(np.arange(1, rounds + 1).mean())
    matrix, _ = noise_strategy(kind, rounds, 7, int(patterns.sum(1).max()))
    error = np.cumsum(np.linalg.inv(matrix), 0)
    assert strategy_norm(matrix, patterns) * math.sqrt((error**2).sum(1).mean()) < 0.8 * alone


def test_in_a_round_and_after_a_pause():
    """The noise of a round depends on those before: a state that comes back from the host goes on alike."""
    made = chain(mean(len(WHO)), clip(0.1), correlated(ROUNDS, CLIENTS, SAMPLER, 1.0, "tree"))
    straight, info = run(factorisation(made), row_cohort(), rounds=4)
    again, _ = run(factorisation(made), row_cohort(), rounds=4)
    same(straight, again)
    assert float(info["noise/stddev"]) > 0
    assert (np.asarray(server_model(straight)["item"]) != np.asarray(PLAIN["item"])).all()  # rows nobody holds too


REFUSED = {
    "a sampler of chance": (lambda: correlated(ROUNDS, 11, cohort.poisson_cohort(11, 4)), "poisson cohorts do not say"),
    "cohorts of a fixed size": (
        lambda: correlated(ROUNDS, 11, cohort.uniform_cohort(11, 4)),
        "fixed cohorts do not say",
    ),
    "nothing bounds": (lambda: chain(mean(4), correlated(ROUNDS, 11, SAMPLER, 1.0, "tree")), "put clip before it"),
    "before top-k": (
        lambda: chain(clip(), correlated(ROUNDS, 11, SAMPLER, 1.0, "tree"), top_k()),
        "top_k after correlated",
    ),
    "too long": (lambda: correlated(5000, 11, SAMPLER), "4,096 rounds at most"),
    "no noise": (lambda: chain(clip(), correlated(ROUNDS, 11, SAMPLER, 0.0, "tree")), "must be positive"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        make()
