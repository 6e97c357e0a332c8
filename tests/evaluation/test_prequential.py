"""Ranks of interactions one after the other, against a count in plain Python."""

import math

import numpy as np
import pytest

from jaxfed.evaluation.prequential import make_timeline, rank_rows, summarize_ranks


def counted(scores, users, user, item, first):
    """The ranks, by lists."""
    found = []
    for row in range(first, len(user)):
        line = dict(enumerate(scores[users.index(user[row])]))
        for before in range(row):
            if user[before] == user[row]:
                line.pop(item[before], None)
        target = line.pop(item[row])
        if not target > -math.inf:
            found.append(math.inf)
            continue
        found.append(1 + sum(1 for other in line.values() if not other < target))
    return found


def test_ranks_are_those_that_one_counts():
    """With ties, unknown items and scores that are no numbers; users of other windows are not asked."""
    random = np.random.default_rng(0)
    for _ in range(20):
        pairs = random.permutation([(user, item) for user in range(6) for item in range(8)])[:30]
        user, item = pairs.T
        users = np.unique(user[18:])
        scores = random.integers(0, 4, (len(users), 8)).astype(float)
        scores[random.random(scores.shape) < 0.2] = -np.inf
        scores[random.random(scores.shape) < 0.05] = np.nan
        expected = counted(scores.tolist(), users.tolist(), user.tolist(), item.tolist(), 18)
        line, question = make_timeline(user, item), np.searchsorted(users, user[18:])
        assert rank_rows(line, scores, question, 18).tolist() == expected
        assert rank_rows(line, scores, question[4:7], 22).tolist() == expected[4:7]
        for row in range(30):
            before = [item[other] for other in range(row) if user[other] == user[row]]
            assert line.before(row).tolist() == before
            assert line.count_before(row, row + 1).tolist() == [len(before)]


def test_figures_by_hand():
    found = summarize_ranks(np.array([1.0, 3.0, 11.0, np.inf]), (1, 3, 11))
    assert found["hr@1"] == found["ndcg@1"] == 0.25
    assert found["hr@3"] == 0.5
    assert found["ndcg@3"] == pytest.approx((1 + 1 / 2) / 4)
    assert found["ndcg@11"] == pytest.approx((1 + 1 / 2 + 1 / math.log2(12)) / 4)


def test_scores_are_left_as_they_are():
    scores = np.arange(6.0).reshape(2, 3)
    rank_rows(make_timeline(np.array([0, 1, 0]), np.array([0, 1, 2])), scores, np.array([1, 0]), 1)
    assert (scores == np.arange(6.0).reshape(2, 3)).all()
