"""Clients pulled to those like them: the server's graph against NumPy, and what it is at its neutral settings."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxfed.algorithms.gpfedrec import find_neighbours
from jaxfed.algorithms.gpfedrec import gpfedrec as gpfedrec_method
from jaxfed.algorithms.local_training import local_steps, loss_of_pair, proximal_optimizer
from jaxfed.channels.average import mean, per_row_mean
from jaxfed.channels.clip import clip
from jaxfed.config.build import build_from_config, load_data
from jaxfed.config.schema import make_config
from jaxfed.core.client_work import local_sgd
from jaxfed.core.federate import federate
from jaxfed.core.method import Method
from jaxfed.core.state import server_model
from jaxfed.core.tables import take_rows
from jaxfed.training.rounds import evaluate_model, initial_arrays, make_run_keys, prepare_round, scored_model
from tests.named import gpfedrec
from tests.small import (
    DATA,
    ITEMS,
    KEY,
    MARKED,
    USERS,
    WHO,
    bce,
    close,
    loss_model,
    row_block,
    row_cohort,
    run,
    same,
    user,
)

SGD = optax.sgd(1.0)  # large, so that clients differ by more than float32 loses in a cosine
TABLE = {"name": "synthetic", "users": 40, "items": 30, "mean_length": 9.0}
CONTENT = load_data(make_config({"data": TABLE}).data)


def guided(channel=None, **how):
    return federate(gpfedrec_method(loss_model(bce, user), SGD, **how), channel or mean(), USERS)


def graph_by_hand(models, known, count, threshold):
    """Pair by pair."""
    n, weights = len(models), np.zeros((len(models), len(models)))
    cosine = np.array([[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in models] for a in models])
    average = np.mean([cosine[i, j] for i in range(n) for j in range(n) if known[i] and known[j]])
    for i in range(n):
        if count:
            near = sorted(np.flatnonzero(known), key=lambda j: -cosine[i, j])[:count]
        else:
            near = [j for j in range(n) if known[j] and cosine[i, j] > threshold * average]
        for j in near or [i]:
            weights[i, j] = 1 / len(near or [i])
    return weights


@pytest.mark.parametrize(("count", "threshold"), [(0, 1.0), (0, 1.5), (0, 1e9), (1, 1.0), (3, 1.0)])
def test_neighbours_by_hand(count, threshold):
    random = np.random.default_rng(0)
    models, known = random.normal(0.3, 1, (9, 20)).astype(np.float32), np.arange(9) % 4 != 1
    got = find_neighbours(jnp.array(models), jnp.array(known), count, threshold)
    want = graph_by_hand(models, known, count, threshold)
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert len({row.tobytes() for row in np.asarray(got > 0)}) > 1 or not count  # a graph, not everybody


def test_the_servers_step_is_that_of_numpy():
    """From what clients sent in a round: models with rows of the server's where they hold none, and their means."""
    cohort = row_cohort(present=[1, 1, 0, 1, 1, 1, 1, 1])
    algorithm = guided(neighbours_count=3, strength=0.0)
    plain = federate(Method(local_steps(loss_model(bce, user), SGD)), mean(), USERS)
    state, info = run(algorithm, cohort, rounds=1)
    params = state.shared.params
    there = [c for i, c in enumerate(WHO) if cohort.present[i]]
    ends = {}
    for slot, c in enumerate(WHO):
        if c in there:  # alone, the server's model is where the client ended
            alone = row_cohort(present=[i == slot for i in range(len(WHO))])
            ends[c] = run(plain, alone, rounds=1)[0].shared.params

    def of(client, name):
        if client not in ends:
            return np.asarray(jax.tree.leaves(params[name])[0])
        server, own = (np.array(jax.tree.leaves(x[name])[0]) for x in (params, ends[client]))
        if name == "scale":
            return own
        held = np.unique(DATA[client][0])
        server[held] = own[held]
        return server

    models = {name: np.stack([of(c, name) for c in range(USERS)]) for name in params}
    flat = np.concatenate([models[name].reshape(USERS, -1) for name in models], 1)
    weights = graph_by_hand(flat, np.isin(np.arange(USERS), there), 3, 1.0)
    around = state.client_states[0].around
    for name, each in models.items():
        close(jax.tree.leaves(around[name])[0], np.tensordot(weights, each, 1).astype(np.float32))
    assert float(info["graph/neighbours"]) == pytest.approx(3)


def test_a_client_is_pulled_to_its_neighbours():
    """The next round, written out for one client."""
    algorithm = guided(neighbours_count=3, strength=2.0)
    cohort = row_cohort()
    state, _ = run(algorithm, cohort, rounds=1)
    before = jax.tree.map(lambda x: jnp.array(x[WHO[0]]), state.client_states[0])
    start = jax.tree.map(jnp.array, state.shared.params)
    state, _ = algorithm.step(state, cohort, KEY)
    block = row_block([0])
    steps = jax.tree.map(lambda x: x[0], block.data)
    slices, around = take_rows(start, block.rows[0]), take_rows(before.around, block.rows[0])
    both = slices, before.own.private
    (end, mine), _, _ = local_sgd(loss_of_pair(bce), proximal_optimizer(SGD, 2.0), both, steps, anchor=around)
    held = DATA[WHO[0]][0]
    own = jax.tree.map(lambda x: x[WHO[0]], state.client_states[0]).own
    close(own.copy["item"].rows[held], end["item"].rows[: len(held)])
    close(own.private, mine)
    free, _, _ = local_sgd(loss_of_pair(bce), SGD, both, steps)
    assert np.abs(free[0]["item"].rows - end["item"].rows).max() > 1e-2  # or the pull is nothing


def test_without_a_pull_it_is_fedavg():
    for channel in (mean, per_row_mean):
        algorithm = guided(channel(), strength=0.0)
        got, _ = run(algorithm, row_cohort())
        want, _ = run(federate(Method(local_steps(loss_model(bce, user), SGD)), channel(), USERS), row_cohort())
        same(server_model(got), server_model(want))
        same(got.client_states[0].own.private, want.client_states[0])


def test_everyone_a_neighbour_is_the_mean_and_fedprox():
    """All clients take part and are all neighbours: what a client is pulled to is the server's model, where it
    starts."""
    algorithm = guided(strength=0.5, threshold=-1e9)
    prox = federate(Method(local_steps(loss_model(bce, user), SGD, proximal=0.5)), mean(), USERS)
    got, info = run(algorithm, row_cohort(), rounds=1)
    assert float(info["graph/neighbours"]) == len(WHO)
    around = jax.tree.map(lambda x: x[WHO[0]], got.client_states[0].around)
    for name in ("item", "bias"):  # rows that a client does not hold are the server's, which has moved by the others
        share = np.array([np.isin(np.arange(ITEMS), DATA[c][0]) for c in WHO]).mean(0)
        start, now, seen = (np.asarray(x[name].rows) for x in (MARKED, got.shared.params, around))
        rest = (1 - share).reshape((-1,) + (1,) * (now.ndim - 1)) * (now - start)
        close(seen - rest, now)
    first, _ = run(prox, row_cohort(), rounds=1)  # in the first round all are pulled to where they start
    close(server_model(got), server_model(first))


def test_it_is_evaluated_three_ways_and_priced():
    table = {"data": TABLE, "work": {"name": "graph_guided"}, "model": {"name": "pfedrec", "dim": 4}}
    table |= {"channel": [{"name": "mean"}], "cohort": {"name": "everyone"}}
    it = build_from_config(make_config(table), CONTENT)
    state = initial_arrays(it, 0)["state"]
    state, info = it.algorithm.step(state, prepare_round(it, 0, 0).cohort, make_run_keys(0).rounds)
    assert 1 <= float(info["graph/neighbours"]) < 40
    values = evaluate_model(it, scored_model(it, state), "val", KEY)
    assert {"val/full/hr@10", "val/personal/full/hr@10", "val/neighbours/sampled/ndcg@10"} <= values.keys()
    assert it.wire.down(10) == 10 * (4 + 2 * 4 * 4)  # the server's rows and those around, ids once
    assert it.wire.up(10) == 10 * (4 + 4 * 4)


def test_what_the_server_cannot_compare_is_refused():
    with pytest.raises(ValueError, match="clip changes it: keep to a mean"):
        guided(channel=clip(1.0))
    with pytest.raises(ValueError, match="must not be negative"):
        gpfedrec_method(loss_model(bce, user), SGD, strength=-1.0)
    table = {"data": TABLE, "work": {"name": "graph_guided"}, "cohort": {"name": "everyone"}}
    table["run"] = {"client_store": "host"}
    with pytest.raises(ValueError, match="reads all clients"):
        build_from_config(make_config(table), CONTENT)
    table["run"] = {"client_memory_gb": 1e-5}
    with pytest.raises(ValueError, match="client states take"):
        initial_arrays(build_from_config(make_config(table), CONTENT), 0)


def test_by_its_name():
    state, _ = run(gpfedrec(bce, SGD, USERS, private=user), row_cohort(), rounds=2)
    want, _ = run(guided(), row_cohort(), rounds=2)
    same(server_model(state), server_model(want))
