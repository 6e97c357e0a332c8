"""Standard errors and paired tests over users, against scipy and by hand."""

import numpy as np
import pytest
from scipy import stats

from jaxfed.evaluation.paired_tests import compare_paired, correct_holm, standard_error

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
