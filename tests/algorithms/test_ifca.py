"""Several models side by side: one is FedAvg, two part the clients that differ."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxfed.algorithms.ifca import ifca, select_model
from jaxfed.algorithms.local_training import local_steps
from jaxfed.channels.average import cluster_mean, mean, per_row_mean
from jaxfed.config.build import build_from_config, load_data
from jaxfed.config.schema import make_config
from jaxfed.core.federate import federate
from jaxfed.core.link import link
from jaxfed.core.method import Method
from jaxfed.core.state import server_model
from jaxfed.training.rounds import evaluate_model, initial_arrays, make_run_keys, prepare_round, scored_model
from tests.small import (
    DENSE,
    KEY,
    MARKED,
    USERS,
    WHO,
    N,
    X,
    bce,
    close,
    dense_cohort,
    loss_model,
    mse,
    row_cohort,
    run,
    same,
    user,
)

SGD = optax.sgd(0.1)


def far(key):
    """A second linear model, far from the first."""
    return jax.tree.map(lambda x: x + 3.0, DENSE)


@pytest.mark.optimised
def test_one_cluster_is_fedavg():
    work = ifca(loss_model(bce, user, init=lambda key: MARKED), SGD, clusters=1)
    got, info = run(federate(work, link(), USERS), row_cohort())
    want, _ = run(federate(Method(local_steps(loss_model(bce, user), SGD)), per_row_mean(), USERS), row_cohort())
    close(select_model(got.shared.params, 0), want.shared.params)
    same(got.client_states[0].private, want.client_states[0])
    assert float(info["clusters/0"]) == 1


def test_two_clusters_by_hand():
    """Clients whose truth is one of two models choose it; each model moves by the mean of its own members."""
    truth = [DENSE, far(KEY)]
    side = np.arange(N) % 2
    y = jnp.stack([X[i] @ truth[side[i]]["w"] + truth[side[i]]["b"] for i in range(N)]) + 0.1
    work = ifca(loss_model(mse, init=far), SGD, clusters=2)
    algorithm = federate(work, link(), N)
    state, info = run(algorithm, dense_cohort(range(N), xy=(X, y)), DENSE, 1)
    np.testing.assert_array_equal(state.client_states[0].cluster, side)
    assert [float(info[f"clusters/{j}"]) for j in (0, 1)] == [0.5, 0.5]
    for j in (0, 1):
        alone = federate(Method(local_steps(loss_model(mse), SGD)), mean(), N)
        mine = dense_cohort(np.flatnonzero(side == j), xy=(X, y))
        want, _ = run(alone, mine, truth[j], 1)
        close(select_model(server_model(state), j), server_model(want))


def test_a_model_that_nobody_chooses_rests():
    work = ifca(loss_model(mse, init=lambda key: jax.tree.map(lambda x: x + 50.0, DENSE)), SGD, clusters=3)
    algorithm = federate(work, link(), N)
    before = jax.tree.map(np.asarray, server_model(algorithm.init(DENSE, KEY)))
    state, info = run(algorithm, dense_cohort(), DENSE, 2)
    assert int(info["clusters/empty"]) == 2
    for j in (1, 2):
        same(select_model(server_model(state), j), select_model(before, j))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(server_model(state)))


def test_rows_are_averaged_over_members_that_hold_them():
    """With tables: each member's row counts in its own model alone, whoever else holds the row."""
    other = MARKED | {"item": jax.tree.map(lambda x: -x, MARKED["item"])}
    work = ifca(loss_model(bce, user, init=lambda key: other), SGD, clusters=2)
    state, _ = run(federate(work, link(), USERS), row_cohort(), rounds=1)
    chosen = np.asarray(state.client_states[0].cluster)[WHO]
    assert 0 < chosen.sum() < len(WHO)  # else this shows nothing
    for j, start in enumerate((MARKED, other)):
        alone = federate(Method(local_steps(loss_model(bce, user), SGD)), per_row_mean(), USERS)
        want, _ = run(alone, row_cohort(present=chosen == j), start, 1)
        close(select_model(state.shared.params, j), want.shared.params)


def test_a_client_is_scored_by_the_model_that_it_chose():
    table = {"name": "synthetic", "users": 40, "items": 30, "mean_length": 9.0}
    config = {
        "data": table,
        "model": {"name": "mf", "dim": 4, "init_scale": 1.0},
        "work": {"name": "clustered"},
        "channel": [{"name": "cluster_mean"}],
        "cohort": {"name": "everyone"},
    }
    it = build_from_config(make_config(config), load_data(make_config({"data": table}).data))
    state = initial_arrays(it, 0)["state"]
    state, _ = it.algorithm.step(state, prepare_round(it, 0, 0).cohort, make_run_keys(0).rounds)
    assert 0 < np.asarray(state.client_states[0].cluster).sum() < 40
    values = evaluate_model(it, scored_model(it, state), "val", KEY)
    swapped = state.client_states[0]._replace(cluster=1 - state.client_states[0].cluster)
    assert evaluate_model(it, (state.shared.params, swapped), "val", KEY) != values


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="clusters is 0"):
        ifca(loss_model(mse, init=far), SGD, clusters=0)
    with pytest.raises(ValueError, match="nothing says who chose"):
        federate(Method(local_steps(loss_model(mse), SGD)), cluster_mean(), N).init(DENSE, KEY)


def test_models_without_shared_tables_have_clusters_too():
    table = {"name": "synthetic", "users": 40, "items": 30, "mean_length": 9.0}
    config = {
        "data": table,
        "model": {"name": "counter"},
        "work": {"name": "clustered"},
        "channel": [{"name": "cluster_mean"}],
        "cohort": {"name": "everyone"},
    }
    it = build_from_config(make_config(config), load_data(make_config({"data": table}).data))
    _, info = it.algorithm.step(initial_arrays(it, 0)["state"], prepare_round(it, 0, 0).cohort, make_run_keys(0).rounds)
    assert int(info["clusters/empty"]) == 1  # equal models: all take the first
