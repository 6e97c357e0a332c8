"""Membership inference: attacks on updates whose answer is known, and attackers that are given nothing but messages."""

import runpy
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxfed.attacks import membership
from jaxfed.channels.average import mean, per_row_mean
from jaxfed.channels.clip import clip, zero_out
from jaxfed.channels.noise import WholeTable, densify, local_gaussian
from jaxfed.config.config_files import read_config
from jaxfed.config.registry import REGISTRY
from jaxfed.config.sections import make_channel
from jaxfed.core.aggregate import gather_then, sum_messages
from jaxfed.core.channel import chain
from jaxfed.core.link import link
from jaxfed.core.tables import Table
from jaxfed.core.types import Broadcast
from jaxfed.core.wire import make_wire
from tests.small import DATA, EPS, ITEMS, MARKED, WHO, factorisation, row_cohort, run

ROOT = Path(__file__).parents[2]
N, D = 400, 6
FAR = np.array([N, N + 7])  # past the end: nobody's


def planted(seed=0, noise=0.0):
    """(message, held, members, u) of one step of a factorisation by hand: gradients are (p - y) (1, u)."""
    random = np.random.default_rng(seed)
    held = random.permutation(N)[:100]
    member, u = np.zeros(N, bool), random.normal(size=D)
    member[held[:30]] = True
    residual = np.where(member[held], -1, 1) * random.uniform(0.05, 0.95, len(held))
    tables = {
        "bias": Table(np.concatenate([residual, [3.0, -3.0]])),
        "item": Table(np.concatenate([residual[:, None] * u, np.ones((2, D))]) + noise * random.normal(size=(102, D))),
    }
    update = Broadcast({"tables": tables, "params": {"w": random.normal(size=(3, 2))}})
    return (update, Table(np.ones(102)), 1.0), np.concatenate([held, FAR]), member, u


def null_deviation(member):
    """Of the AUC of numbers that know nothing, without ties: that of Mann and Whitney's U."""
    m, n = member.sum(), (~member).sum()
    return np.sqrt((m + n + 1) / (12 * m * n))


def by_pairs(score, member):
    """The AUC as it is defined."""
    gap = score[member][:, None] - score[~member]
    return ((gap > 0) + 0.5 * (gap == 0)).mean()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=40))
def test_auc_is_a_mean_over_pairs(each):
    """Whole numbers: most are tied."""
    score, member = (np.array(x) for x in zip(*each, strict=True))
    if member.all() or not member.any():
        with pytest.raises(ValueError, match="needs both"):
            membership.area_under_curve(score, member)
        return
    assert membership.area_under_curve(score, member) == pytest.approx(by_pairs(score, member), abs=1e-12)
    assert membership.area_under_curve(-score, member) == pytest.approx(1 - by_pairs(score, member), abs=1e-12)


def test_a_planted_update_is_told_apart():
    """All members by the update; by the rows alone, one minus half the share of the others that were negatives."""
    message, held, member, _ = planted()
    scores = membership.score_membership(membership.collect_evidence(message, held, N), np.zeros((N, D + 1)))
    assert membership.area_under_curve(scores.update, member) == 1
    assert membership.area_under_curve(scores.rows, member) == pytest.approx(1 - 70 / (N - 30) / 2)
    assert membership.area_under_curve(scores.taste, member) == 0.5


def test_the_direction_is_the_clients_vector():
    """A taste is what the public model says to that vector."""
    message, held, _, u = planted()
    seen = membership.collect_evidence(message, held, N)
    want = np.concatenate([[1], u])
    np.testing.assert_allclose(membership.taste_direction(seen.steps), want / np.linalg.norm(want), atol=1e-6)
    public = np.random.default_rng(1).normal(size=(N, D + 1))
    got = membership.score_membership(seen, public).taste
    np.testing.assert_allclose(got, public @ want / np.linalg.norm(want), atol=1e-5)


def test_shuffled_members_are_at_chance():
    """The mean of 200 shuffles is 0.5 within five standard errors, for each attack; ties make them smaller."""
    message, held, member, _ = planted(noise=0.1)
    random = np.random.default_rng(2)
    scores = membership.score_membership(membership.collect_evidence(message, held, N), random.normal(size=(N, D + 1)))
    for score in scores:
        aucs = [membership.area_under_curve(score, random.permutation(member)) for _ in range(200)]
        assert abs(np.mean(aucs) - 0.5) < 5 * null_deviation(member) / np.sqrt(200)
    assert np.std(aucs) == pytest.approx(null_deviation(member), rel=5 / np.sqrt(2 * 200))


def test_nobodys_rows_say_nothing():
    """Rows past the end only fill a block; what rides beside the update is not taken for one."""
    message, held, _, _ = planted()
    seen = membership.collect_evidence(message, held, N)
    assert seen.sent.sum() == len(held) - len(FAR)
    assert seen.steps.shape == (N, D + 1)
    assert (seen.steps[~seen.sent] == 0).all()
    np.testing.assert_array_equal(seen.steps[held[:-2], 0], -message[0].params["tables"]["bias"].rows[:-2])


def test_whole_tables_name_no_rows():
    """A row of zeros was not held, of a sum as of a message; a named row of zeros was."""
    rows = np.zeros((N, D))
    rows[3] = 1
    assert membership.collect_evidence(Broadcast({"item": WholeTable(rows)}), FAR[:0], N).sent.sum() == 1
    assert (
        membership.collect_evidence(membership.evidence_of_sum(Broadcast({"item": Table(rows)})), FAR[:0], N).sent.sum()
        == 1
    )
    assert membership.collect_evidence(Broadcast({"item": Table(rows[:5])}), np.arange(5), N).sent.sum() == 5
    with pytest.raises(ValueError, match="a model with tables"):
        membership.collect_evidence(Broadcast({"w": rows}), FAR[:0], N)


def test_the_weights_are_those_of_least_squares():
    """Fisher's direction is that of a regression of the labels (a classical identity), up to its length."""
    random = np.random.default_rng(3)
    member = random.random(500) < 0.2
    scores = random.normal(size=(500, 3)) @ random.normal(size=(3, 3)) + member[:, None] * [1.0, 0.5, -2.0]
    got = membership.fit_discriminant(scores, member)
    want = np.linalg.lstsq(np.c_[np.ones(500), scores], 1.0 * member, rcond=None)[0][1:]
    np.testing.assert_allclose(got / np.linalg.norm(got), want / np.linalg.norm(want), atol=1e-4)


def test_standard_scores():
    x = membership.standardize([np.array([1.0, 2.0, 3.0]), np.ones(3)])
    np.testing.assert_allclose(x, [[-np.sqrt(1.5), 0], [0, 0], [np.sqrt(1.5), 0]], atol=1e-12)
    assert membership.mean_and_error([1.0, 2.0, 3.0]) == pytest.approx((2, 1 / np.sqrt(3)))


def overheard(channel, cohort=None):
    """The part that a server receives in a round of the small factorisation."""
    parts = []

    def reduce(part, size):
        seen = part._replace(client_states=(), metrics={})
        jax.debug.callback(lambda part: parts.append(jax.tree.map(np.asarray, part)), seen)
        return sum_messages(part, size)

    run(factorisation(chain(*channel, link(aggregator=gather_then(reduce)))), cohort or row_cohort(), rounds=1)
    jax.effects_barrier()
    return parts[0]


def seen_of(part):
    return {
        each.id: membership.collect_evidence(each.message, each.held, ITEMS)
        for each in membership.split_messages(part, ITEMS)
    }


@pytest.mark.parametrize("channel", [(mean(),), (per_row_mean(),), (clip(0.1), densify())])
def test_real_messages_tell(channel):
    """Through the compiled round: rows are those of the client's data, and its clicks move the other way."""
    found = seen_of(overheard(channel))
    assert found.keys() == set(WHO)
    for client, seen in found.items():
        items, labels = DATA[client]
        np.testing.assert_array_equal(np.flatnonzero(seen.sent), np.sort(items))
        member = np.isin(np.arange(ITEMS), items[labels == 1])
        assert (
            membership.area_under_curve(membership.score_membership(seen, np.zeros((ITEMS, 5))).update, member) > 0.95
        )


def test_the_absent_are_not_heard():
    there = np.arange(len(WHO)) != 2
    assert seen_of(overheard((mean(),), row_cohort(present=there))).keys() == set(WHO) - {WHO[2]}


def test_a_sum_is_the_sum_of_what_clients_say():
    """As the server has it before any link decodes it; it names no rows."""
    spy = link(decode=lambda total, state, round: (total, state, {"seen": total}), is_average=False)
    _, info = run(factorisation(chain(mean(), spy)), row_cohort(), rounds=1)
    sum = membership.collect_evidence(membership.evidence_of_sum(info["seen"]), np.zeros(0, int), ITEMS)
    each = seen_of(overheard((mean(),))).values()
    np.testing.assert_allclose(sum.steps, np.sum([seen.steps for seen in each], 0), atol=EPS)
    np.testing.assert_array_equal(sum.sent, np.any([seen.sent for seen in each], 0))


def test_an_attacker_is_given_messages_alone():
    """Clients differ in their rows, labels and private vectors: where their messages are alike, so are all scores."""
    silent = list(seen_of(overheard((zero_out(1e-9), densify()))).values())
    assert len(silent) == len(WHO)
    public = np.random.default_rng(4).normal(size=(ITEMS, 5))
    first, *others = (membership.score_membership(seen, public) for seen in silent)
    for other in others:
        jax.tree.map(np.testing.assert_array_equal, other, first)


def test_what_the_simulator_knows_is_not_read():
    """Of a part whose messages name no rows, the rows held, private parts and metrics may be anything."""
    part = overheard((clip(1.0), densify(), local_gaussian(0.1)))
    assert all(each.held.size == 0 for each in membership.split_messages(part, ITEMS))
    other = part._replace(held=np.flip(part.held), client_states=np.ones(3), sizes=0 * part.sizes, metrics={"x": 1.0})
    a, b = seen_of(part), seen_of(other)
    assert all(seen.sent.all() for seen in a.values())  # noise is on every row
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_the_table_has_the_chains_it_says(monkeypatch):
    """Every defence of the script can be built, and is seen as its row says."""
    script = runpy.run_path(str(ROOT / "scripts/membership.py"))
    added = {"listen": script["listen"], "look": script["look"]}
    monkeypatch.setitem(REGISTRY, "channel", REGISTRY["channel"] | added)
    table = read_config(ROOT / "configs/ml100k_fedavg.toml")
    sees = {}
    for defence in script["defences"](128):
        channel = make_channel(script["configuration"](table, defence, 128).channel, np.array([]), "channel", slots=128)
        sees[defence.name] = make_wire(channel, Broadcast(MARKED)).sees
    for name, what in sees.items():
        assert what == ("sum" if "ring" in name else "update" if "densify" in name else "update+rows"), name
