"""Clients held out entirely: nothing of theirs is trained on, and they are ranked from their histories."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxfed.config.build import build_from_config, load_data
from jaxfed.config.schema import make_config
from jaxfed.core.types import History
from jaxfed.data.interactions import select_rows
from jaxfed.data.preparation import prepare_population
from jaxfed.data.sources.synthetic import synthetic_data
from jaxfed.training.rounds import evaluate_model, initial_arrays, make_run_keys, prepare_round, scored_model
from tests.data.test_data import owned
from tests.small import same

KEY = make_run_keys(0).evaluation
TABLE = {"name": "synthetic", "users": 60, "items": 40, "mean_length": 9.0, "cold": 0.25}
MF = {"model": {"name": "mf", "dim": 4, "init_scale": 0.5}, "channel": [{"name": "mean"}]}


def trained(data, rounds=4, **table):
    """(experiment, state) after some rounds of everyone."""
    it = build_from_config(make_config({"cohort": {"name": "everyone"}} | table), data)
    state = initial_arrays(it, 0)["state"]
    for t in range(rounds):
        state, _ = it.algorithm.step(state, prepare_round(it, 0, t).cohort, make_run_keys(0).rounds)
    return it, state


def by_hand(scores, population):
    """HR@10 of the users of a population: their test item among all others that they did not have; scores(user)."""
    hits = []
    for u in range(len(population.user_names)):
        had = np.concatenate([population.train.of(u), population.valid.of(u)])
        (target,), score = population.test.of(u), np.asarray(scores(population.train.of(u)))
        others = np.setdiff1d(np.arange(population.num_items), [*had, target])
        hits.append((score[others] >= score[target]).sum() < 10)
    return np.mean(hits)


@pytest.mark.parametrize("clients", ["user", "silo"])
def test_cold_clients_are_a_share_of_all_by_the_seed_and_have_what_they_had(clients):
    source, kind = synthetic_data(60, 40, mean_length=9.0), {"clients": clients, "silos": 12}
    whole = owned(prepare_population(source, **kind)[1])
    data, population = prepare_population(source, **kind, cold=0.25)
    warm, cold = owned(population), owned(population.cold)
    assert not warm.keys() & cold.keys()
    assert warm | cold == whole
    count = {"user": 15, "silo": 3}[clients]
    assert population.cold.num_clients == count
    assert f"{count} of {len({name for name, _ in whole})} clients are cold" in data.notes[-1]
    others = prepare_population(source, **kind, cold=0.25, deal=1)[1]
    assert set(others.cold.names) != set(population.cold.names)


def test_a_run_beside_cold_clients_is_the_run_without_them():
    """Bit by bit, warm figures too: the same as of data from which their rows are gone."""
    data = load_data(make_config({"data": TABLE}).data)
    cold = set(data.population.cold.user_names.tolist())
    rows = data.source.interactions
    kept = select_rows(data.source, np.array([data.source.users[u] not in cold for u in rows.user]))
    assert len(kept.items) == len(data.source.items)  # or items would be numbered differently
    without = data._replace(source=kept, population=prepare_population(kept)[1])
    (a, x), (b, y) = trained(data, **MF), trained(without, **MF)
    same(x, y)
    values, want = (evaluate_model(it, scored_model(it, state), "test", KEY) for it, state in ((a, x), (b, y)))
    assert {name: values[name] for name in want} == want
    assert "test/cold/full/hr@10" in values


@pytest.mark.parametrize("work", ["reconstruct", "ditto"])
def test_cold_clients_are_ranked_from_their_histories(work):
    """One user after the other, folded in by the model and ranked in NumPy. What warm clients keep does not matter."""
    data = load_data(make_config({"data": TABLE}).data)
    it, state = trained(data, work={"name": work}, **MF)
    values = evaluate_model(it, scored_model(it, state), "test", KEY)

    def scores(items):
        ids = jnp.array(items)
        return it.model.score(state.shared.params, it.model.fold_in(state.shared.params, History(ids, ids, 40)), 0)

    assert values["test/cold/full/hr@10"] == pytest.approx(by_hand(scores, data.population.cold), abs=1e-6)
    assert not any(name.startswith("test/cold/personal") for name in values)


def test_a_closed_form_is_that_of_the_warm_clients_alone():
    """EASE of the warm users in NumPy, then ranked for the cold ones."""
    data = load_data(make_config({"data": TABLE}).data)
    closed = {"model": {"name": "ease", "l2": 10.0}, "work": {"name": "statistics"}, "server": {"name": "solve"}}
    it, state = trained(data, 1, channel=[], **closed)
    x = np.zeros((45, 40))
    for u in range(45):
        x[u, data.population.train.of(u)] = 1
    p = np.linalg.inv(x.T @ x + 10.0 * np.eye(40))
    b = -p / np.diag(p)
    np.fill_diagonal(b, 0)
    values = evaluate_model(it, scored_model(it, state), "test", KEY)
    want = by_hand(lambda items: np.round(b[items].sum(0), 5), data.population.cold)
    assert values["test/cold/full/hr@10"] == pytest.approx(want, abs=1e-6)


def test_cold_clients_of_silos_are_folded_in_too():
    data = load_data(make_config({"data": TABLE | {"clients": "silo", "silos": 8}}).data)
    it, state = trained(data, **MF)
    assert data.population.cold.num_clients == 2
    assert 0 <= evaluate_model(it, scored_model(it, state), "test", KEY)["test/cold/full/hr@10"] <= 1
