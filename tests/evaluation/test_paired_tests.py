"""Standard errors and paired tests over users, against scipy and by hand."""

import numpy as np
import pytest
from scipy import stats

from jaxfed.evaluation import paired_tests
from jaxfed.evaluation.paired_tests import bootstrap_paired, compare_paired, correct_holm, standard_error

RANKS = np.array([1, 3, 20, 2, 50, 1, 7, 11]), np.array([2, 3, 4, 1, 60, 5, 30, 1])  # of two models, user by user


def ndcg(rank):
    return np.where(rank <= 10, 1 / np.log2(1 + rank), 0)


def test_a_paired_test_of_known_ranks():
    one, other = map(ndcg, RANKS)
    found = compare_paired(one, other)
    assert found.mean == pytest.approx(one.mean() - other.mean())
    gap = one - other
    error = np.sqrt(((gap - gap.mean()) ** 2).sum() / 7 / 8)
    assert found.error == pytest.approx(error)
    assert found.p == pytest.approx(2 * stats.t.sf(abs(gap.mean()) / error, 7))
    assert found.p == pytest.approx(stats.ttest_rel(one, other).pvalue)
    assert compare_paired(other, one) == pytest.approx((-found.mean, found.error, found.p))


def test_pairs_tell_more_than_two_samples():
    """A small gain of all users is found, where the spread over users is much larger than it."""
    random = np.random.default_rng(0)
    one = random.uniform(0, 1, 200)
    other = one - 0.01 + random.normal(0, 0.01, 200)
    assert compare_paired(one, other).p < 1e-6
    assert stats.ttest_ind(one, other).pvalue > 0.5


def test_models_that_are_alike_do_not_differ():
    one = ndcg(RANKS[0])
    assert compare_paired(one, one) == (0.0, 0.0, 1.0)
    assert np.isnan(standard_error(np.ones(1)))


def test_holm_by_hand():
    """The smallest of four times 4, the next times 3, but never less than the one before, and at most 1."""
    assert correct_holm([0.03, 0.01, 0.04, 0.5]) == pytest.approx([0.09, 0.04, 0.09, 0.5])
    assert correct_holm([0.6, 0.9]) == [1.0, 1.0]
    assert correct_holm([0.02]) == [0.02]
    assert correct_holm([]) == []


def resampled_means(difference, resamples, seed):
    """Means of resamples, user by user, with random numbers of their own."""
    picked = np.random.default_rng(seed).integers(0, len(difference), (resamples, len(difference)))
    return difference[picked].mean(1)


def test_a_bootstrap_is_that_of_users_drawn_one_by_one():
    """Interval and p of 100,000 resamples, up to the error of so many."""
    random = np.random.default_rng(1)
    one, other = random.integers(0, 5, 60) / 4, random.integers(0, 4, 60) / 4
    found, means = bootstrap_paired(one, other, 100_000), resampled_means(one - other, 100_000, 2)
    assert found.mean == pytest.approx((one - other).mean())
    assert (found.low, found.high) == pytest.approx((*np.quantile(means, (0.025, 0.975)),), abs=0.005)
    assert found.p == pytest.approx((np.abs(means - found.mean) >= abs(found.mean) - 1e-12).mean(), abs=0.003)


def test_a_bootstrap_by_hand():
    """Of two users with differences 1 and 0 a resample has the mean 0, 1/2, 1/2 or 1: half of them are 1/2 away."""
    found = bootstrap_paired(np.array([1.0, 0.0]), np.zeros(2), 200_000)
    assert (found.mean, found.low, found.high) == (0.5, 0.0, 1.0)
    assert found.p == pytest.approx(0.5, abs=0.005)


def test_a_bootstrap_finds_what_is_there_and_nothing_else():
    """Under no difference p is below 5 % in about 5 % of the cases; a clear difference is found; equal models are."""
    random = np.random.default_rng(3)
    p = [bootstrap_paired(random.normal(size=50), random.normal(size=50), 400, seed).p for seed in range(400)]
    assert 0.02 < np.mean(np.array(p) < 0.05) < 0.1
    assert bootstrap_paired(random.normal(1, 1, 100), random.normal(0, 1, 100)).p < 0.001
    assert bootstrap_paired(ndcg(RANKS[0]), ndcg(RANKS[0])) == (0.0, 0.0, 0.0, 1.0)


def test_a_bootstrap_is_a_function_of_its_arguments(monkeypatch):
    """Whatever is in memory at once; another seed draws others; exchanged models give the opposite."""
    one, other = map(ndcg, RANKS)
    found = bootstrap_paired(one, other, 1_000)
    assert found == bootstrap_paired(one, other, 1_000) != bootstrap_paired(one, other, 1_000, seed=1)
    opposite = bootstrap_paired(other, one, 1_000)
    assert opposite.mean == -found.mean
    assert (opposite.low, opposite.high) == pytest.approx((-found.high, -found.low), abs=0.05)
    monkeypatch.setattr(paired_tests, "AT_ONCE", 100)
    assert bootstrap_paired(one, other, 1_000) == found
