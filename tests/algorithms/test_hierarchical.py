"""Edges: one is FedAvg, several that meet every round are FedAvg too, and in between each goes its own way."""

import jax
import numpy as np
import optax
import pytest

from jaxfed.algorithms.hierarchical import hierarchical
from jaxfed.algorithms.ifca import select_model
from jaxfed.algorithms.local_training import train_locally
from jaxfed.algorithms.scaffold import scaffold
from jaxfed.channels.average import mean, per_row_mean, weighted_mean
from jaxfed.channels.compress import quantize
from jaxfed.channels.robust import median
from jaxfed.config.build import build_from_config, load_data
from jaxfed.config.schema import make_config
from jaxfed.core.channel import chain
from jaxfed.core.federate import federate
from jaxfed.training.rounds import evaluate_model, initial_arrays, make_run_keys, prepare_round, scored_model
from tests.laws.cover import parametrize_cover
from tests.small import KEY, MARKED, USERS, WHO, bce, close, loss_model, on_rows, row_cohort, run, same, user

SGD = optax.sgd(0.1)
PLAIN = train_locally(loss_model(bce, user), SGD)
HALVES = np.arange(USERS) % 2
THREE = np.arange(USERS) % 3
TABLE = {"name": "synthetic", "users": 40, "items": 30, "mean_length": 9.0}


MEANS = {"whole": (weighted_mean, False), "rows": (lambda: per_row_mean("examples"), True)}


def edges(channel, edge=HALVES, every=1, method=PLAIN, **more):
    return hierarchical(method, channel, USERS, edge=edge, every=every, **more)


def flat(channel, method=PLAIN):
    return federate(method, channel, USERS)


LINKS = {
    "mean": mean,
    "weighted_mean": weighted_mean,
    "per_row_mean": per_row_mean,
    "codes": lambda: chain(per_row_mean(), quantize(8)),
}


@parametrize_cover(
    link=list(LINKS), cohort={"all": row_cohort(), "some": on_rows(row_cohort(present=[i != 3 for i in range(8)]))}
)
def test_one_edge_is_fedavg(link, cohort):
    got, info = run(edges(LINKS[link](), np.zeros(USERS, int)), cohort)
    want, told = run(flat(LINKS[link]()), cohort)
    close(select_model(got.shared.params, 0), want.shared.params)
    close(got.client_states, want.client_states)
    assert float(info["train/loss"]) == pytest.approx(float(told["train/loss"]), rel=1e-5)


@parametrize_cover(edge={"two": HALVES, "three": THREE}, means=MEANS)
def test_edges_that_meet_every_round_are_fedavg_by_examples(edge, means):
    """Means of means are the mean, also when some are absent; on the cohort's rows as on all."""
    link, per_row = means
    cohort = on_rows(row_cohort(present=[i != 3 for i in range(8)]))
    got, _ = run(edges(link(), edge, per_row=per_row), cohort)
    want, _ = run(flat(link()), cohort)
    for e in range(edge.max() + 1):
        close(select_model(got.shared.params, e), want.shared.params, atol=1e-5)
    close(got.client_states, want.client_states, atol=1e-5)


@pytest.mark.parametrize(("link", "per_row"), MEANS.values(), ids=MEANS)
def test_a_meeting_weighs_what_came_since_the_last_one(link, per_row):
    """Edges that meet in both of two rounds are FedAvg in both, though in the second most clients of one are away."""
    cohorts = [row_cohort(), row_cohort(present=[i in (0, 1, 2, 6) for i in range(8)])]
    states = []
    for algorithm in (edges(link(), per_row=per_row), flat(link())):
        state = algorithm.init(MARKED, KEY)
        for cohort in cohorts:
            state, _ = algorithm.step(state, cohort, KEY)
        states.append(state)
    for e in (0, 1):
        close(select_model(states[0].shared.params, e), states[1].shared.params, atol=1e-5)


def test_edges_that_meet_every_second_round_by_hand():
    """Each edge is FedAvg of its own clients; at the second round both take the mean by the examples of both rounds."""
    examples = np.concatenate([block.data.examples for block in row_cohort().blocks])
    algorithm = edges(weighted_mean(), every=2)
    alone, mass = [], []
    for e in (0, 1):
        mine = row_cohort(present=HALVES[WHO] == e)
        alone.append([run(flat(weighted_mean()), mine, rounds=n)[0].shared.params for n in (1, 2)])
        mass.append(2 * examples[HALVES[WHO] == e].sum())
    after, info = run(algorithm, row_cohort(), rounds=1)
    for e in (0, 1):
        close(select_model(after.shared.params, e), alone[e][0])
    assert float(info["edges/bytes_total"]) == 0
    after, info = run(algorithm, row_cohort(), rounds=2)
    want = jax.tree.map(lambda a, b: (mass[0] * a + mass[1] * b) / sum(mass), alone[0][1], alone[1][1])
    for e in (0, 1):
        close(select_model(after.shared.params, e), want, atol=1e-5)
    size = sum(x.nbytes for x in jax.tree.leaves(MARKED))
    assert float(info["edges/bytes_total"]) == 2 * 2 * size  # two edges, up and down, once


def test_an_edge_of_which_nobody_reports_rests_and_then_takes_the_mean():
    cohort = row_cohort(present=HALVES[WHO] == 0)
    want, _ = run(flat(weighted_mean()), cohort, rounds=2)
    state, info = run(edges(weighted_mean(), every=2), cohort, rounds=1)
    same(select_model(state.shared.params, 1), MARKED)
    assert int(info["edges/silent"]) == 1
    state, _ = run(edges(weighted_mean(), every=2), cohort, rounds=2)
    for e in (0, 1):
        close(select_model(state.shared.params, e), want.shared.params)


def test_works_with_a_state_have_one_at_each_edge():
    """SCAFFOLD at two edges that never meet is SCAFFOLD of each half."""
    method = scaffold(loss_model(bce, user), SGD, num_clients=4)
    state, _ = run(edges(mean(), every=99, method=method), row_cohort(), rounds=2)
    for e in (0, 1):
        want, _ = run(flat(mean(), method), row_cohort(present=HALVES[WHO] == e), rounds=2)
        close(select_model(state.shared, e), want.shared, atol=1e-5)


def test_edges_that_cannot_be():
    with pytest.raises(ValueError, match="edge 1 has no clients"):
        edges(mean(), 2 * HALVES)
    with pytest.raises(ValueError, match="3 clients have one of 14"):
        edges(mean(), np.array([0, 1, 0]))
    with pytest.raises(ValueError, match="edge_rounds is 0"):
        edges(mean(), every=0)
    with pytest.raises(ValueError, match="secure sums and robust rules are for one"):
        edges(median())


# --- as configured ----------------------------------------


def trained(rounds=4, server=None, **more):
    table = {"model": {"name": "mf", "dim": 4, "init_scale": 0.5}, "channel": [{"name": "per_row_mean"}]} | more
    config = make_config({"data": TABLE, "cohort": {"name": "everyone"}, "server": server or {}} | table)
    it = build_from_config(config, load_data(config.data))
    state = initial_arrays(it, 0)["state"]
    for t in range(rounds):
        state, info = it.algorithm.step(state, prepare_round(it, 0, t).cohort, make_run_keys(0).rounds)
    return it, state, info


@pytest.mark.parametrize("link", [{"name": "weighted_mean"}, {"name": "per_row_mean", "by": "examples"}])
def test_configured_edges_that_meet_every_round_are_a_run_without(link):
    """Edges average rows as the channel does: over all clients, or over those that hold them."""
    (_, met, _), (_, want, _) = (trained(2, server, channel=[link]) for server in ({"edges": 4}, {"edges": 0}))
    close(select_model(met.shared.params, 3), want.shared.params, atol=1e-5)


def test_a_client_pays_for_one_model_and_is_scored_by_that_of_its_edge():
    it, state, _ = trained(server={"edges": 4, "edge_rounds": 99})
    plain, *_ = trained(1)
    held = np.arange(5)
    assert (it.wire.up(held) == plain.wire.up(held)).all()
    assert (it.wire.down(held) == plain.wire.down(held)).all()
    params, own = scored_model(it, state)
    values = evaluate_model(it, (params, own), "val", KEY)
    assert np.bincount(own.cluster).tolist() == [10] * 4
    assert evaluate_model(it, (params, own._replace(cluster=(own.cluster + 1) % 4)), "val", KEY) != values


def test_configured_edges_that_cannot_be():
    for words, more in (
        ("edge 40 has no clients", {"server": {"edges": 41}}),
        ("codes of the download", {"server": {"edges": 2}, "download": [{"name": "quantize"}]}),
        ("new clients have none", {"server": {"edges": 2}, "data": TABLE | {"cold": 0.1}}),
        ("leave it out", {"server": {"edges": 2}, "run": {"client_store": "host"}}),
    ):
        with pytest.raises(ValueError, match=words):
            trained(0, **more)
