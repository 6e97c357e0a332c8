"""The central twin: its steps are those of federated rounds of one gradient a client, weighted by examples."""

import jax
import numpy as np
import optax
import pytest

import jaxfed as jf
from jaxfed.config.build import build_from_config, load_data
from jaxfed.config.central_twin import with_central
from jaxfed.config.schema import make_config
from jaxfed.data.sources.synthetic import synthetic_data
from jaxfed.training.rounds import initial_arrays, make_run_keys, prepare_round
from tests.small import close

TABLE = {
    "data": {"name": "synthetic", "users": 60, "items": 50, "mean_length": 12.0},
    "work": {"name": "gradient", "negatives": 6, "batch_size": 16},
    "channel": [{"name": "weighted_mean"}],
    "server": {"name": "sgd", "learning_rate": 1.0, "lazy": False},
    "cohort": {"name": "uniform", "size": 24, "dropout": 0.25},
}
MODELS = {
    "sasrec": {"name": "sasrec", "dim": 8, "length": 10, "dropout": 0.3},
    "all items": {"name": "sasrec", "dim": 8, "length": 10, "loss": "softmax"},
    "bert4rec": {"name": "bert4rec", "dim": 8, "length": 10, "loss": "gbce"},
    "shared vectors": {"name": "two_tower", "dim": 4},
    "low rank": {"name": "sasrec", "dim": 8, "length": 10},
}
PARAMETRIZED = {"low rank": {"parametrization": {"name": "low_rank", "rank": 3}}}
SILOS = {"data": TABLE["data"] | {"clients": "silo", "silos": 13}, "cohort": TABLE["cohort"] | {"size": 9}}
STEPS_OF_TWO = {"work": TABLE["work"] | {"batch_size": 2}}


def run_steps(table, rounds):
    """(the parameters before, and after each of some rounds, figures of the last)."""
    config = make_config(table)
    parts = build_from_config(config, load_data(config.data))
    state, key = initial_arrays(parts, config.seed)["state"], make_run_keys(config.seed).rounds
    found = [jax.device_get(state.shared.params)]
    for round in range(rounds):
        state, info = parts.algorithm.step(state, prepare_round(parts, config.seed, round).cohort, key)
        found.append(jax.device_get(state.shared.params))
    return found, jax.device_get(info), parts


@pytest.mark.parametrize(
    ("name", "clients"),
    [
        # silos have a masked model too, and the low rank is of a model of sequences
        *(pytest.param(name, {}, marks=[pytest.mark.full] * (name in ("bert4rec", "sasrec"))) for name in MODELS),
        pytest.param("sasrec", SILOS | STEPS_OF_TWO, marks=pytest.mark.full),
        ("bert4rec", SILOS),
    ],
    ids=[*MODELS, "silos in steps of two users", "silos, bert4rec"],
)
def test_one_step_is_the_gradient_of_the_batch_of_all_clients(name, clients):
    """To 1e-6 of the largest number of the gradient: clients of 1 to 30 items, a quarter of which drop out. Silos: of 4
    or 5 users, all of whose histories are in the batch."""
    table = TABLE | {"model": MODELS[name]} | PARAMETRIZED.get(name, {}) | clients
    (start, federated), figures, parts = run_steps(table, 1)
    (same_start, central), twin_figures, twin = run_steps(with_central(table), 1)
    close(start, same_start, atol=0, rtol=0)
    assert np.ptp(parts.data.population.num_train) > 15
    assert figures["clients/dropped"] == twin_figures["clients/dropped"] > 0
    for begin, one, other in zip(*map(jax.tree.leaves, (start, federated, central)), strict=True):
        size = np.abs(one - begin).max()
        np.testing.assert_allclose(other, one, atol=1e-6 * max(size, 1))
    assert max(np.abs(x - y).max() for x, y in zip(*map(jax.tree.leaves, (start, central)), strict=True)) > 1e-3
    assert twin_figures["train/loss"] == pytest.approx(figures["train/loss"], rel=1e-5)
    assert twin.wire.up(np.array([5, 7])).tolist() == [0, 0]
    assert twin.wire.sees == "all data"


def test_what_is_frozen_is_frozen_in_the_twin_too():
    table = TABLE | {"model": MODELS["sasrec"], "work": TABLE["work"] | {"freeze": ["block_0/"]}}
    (start, _), _, parts = run_steps(with_central(table), 1)
    assert "block_0" not in start["params"]["encoder"]
    assert jax.tree.leaves(parts.model.frozen)


def test_three_steps_of_adam_are_central_adam():
    table = TABLE | {"model": MODELS["sasrec"], "server": {"name": "adam", "learning_rate": 0.01, "lazy": False}}
    federated, _, _ = run_steps(table, 3)
    central, _, _ = run_steps(with_central(table), 3)
    # the first steps of Adam are as long as its rate whatever the gradient: the sign of a rounding error may differ
    last = zip(*map(jax.tree.leaves, (federated[3], central[3])), strict=True)
    apart = np.concatenate([np.abs(one - other).ravel() for one, other in last])
    assert np.mean(apart > 1e-4) < 1e-3


def test_private_vectors_are_a_part_of_the_central_model():
    """Matrix factorisation: the vectors of asked clients move by their own gradient, those of others stay."""
    table = with_central(TABLE | {"model": {"name": "mf", "dim": 4}, "seed": 2})
    config = make_config(table)
    parts = build_from_config(config, load_data(config.data))
    arrays, key = initial_arrays(parts, 2), make_run_keys(2).rounds
    before = jax.device_get(arrays["state"].client_states.work)
    cohort = prepare_round(parts, 2, 0).cohort
    state, _ = parts.algorithm.step(arrays["state"], cohort, key)
    moved = np.abs(jax.device_get(state.client_states.work)["private"]["user"] - before["private"]["user"]).max((1, 2))
    assert set(np.flatnonzero(moved)) == set(np.asarray(cohort.ids)[np.asarray(cohort.present)].tolist())


def test_a_program_trains_centrally():
    data = jf.data.partition(synthetic_data(40, 30, mean_length=8), by="user", split="leave-one-out")
    model = jf.models.sasrec(data.num_items, dim=8, length=8)
    method = jf.algorithms.central(model, optax.adam(0.01))
    run = jf.Experiment(data, model, method, batching=jf.Batching(negatives=8), cohort=jf.sampling.uniform(20))
    rows = list(run.train(rounds=4, evaluate_every=2))
    assert rows[-1]["bytes_up_total"] == 0
    assert run.evaluate("test")["test/full/ndcg@10"] >= 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channel": [{"name": "weighted_mean"}]}, "central training has no messages"),
        ({"server": {"name": "sgd", "edges": 2}}, "leave server.edges"),
        ({"run": {"client_store": "host"}}, "leave run.client_store out"),
    ],
)
def test_what_central_training_has_no_place_for(change, message):
    config = make_config(with_central(TABLE | {"model": {"name": "mf"}}) | change)
    with pytest.raises(ValueError, match=message):
        build_from_config(config, load_data(config.data))


def test_a_model_that_is_solved_for_has_no_twin():
    with pytest.raises(ValueError, match="one round of everyone"):
        with_central({"model": {"name": "ease"}})


def test_a_twin_keeps_model_data_batches_server_and_cohort():
    table = TABLE | {
        "algorithm": {"name": "fedprox"},
        "work": {"epochs": 5, "negatives": 6, "optimizer": {"name": "sgd"}},
    }
    twin = with_central(table | {"privacy": {"delta": 1e-6}, "download": [{"name": "quantize"}], "rounds": 7})
    kept = {key: table[key] for key in ("data", "server", "cohort")} | {"rounds": 7}
    assert twin == kept | {"algorithm": {"name": "central"}, "work": {"negatives": 6}, "channel": []}
