"""Algorithms: the textbook example, and neighbours that must agree where they meet."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxfed.algorithms import adaptive
from jaxfed.algorithms.fedsgd import fedsgd as fedsgd_method
from jaxfed.channels.average import mean, per_row_mean, weighted_mean
from jaxfed.channels.difference import difference
from jaxfed.config.optax_functions import server_schedule
from jaxfed.core.channel import chain
from jaxfed.core.client_work import Batches
from jaxfed.core.federate import federate
from jaxfed.core.link import link
from jaxfed.core.state import server_model
from jaxfed.core.tree import subtract
from jaxfed.core.types import Block, Cohort, Mean
from tests.laws.cover import parametrize_cover
from tests.named import fedavg, fedopt, fedsgd, fedsgd_difference
from tests.small import (
    DENSE,
    KEY,
    MARKED,
    USERS,
    WHO,
    N,
    X,
    Y,
    bce,
    close,
    dense_cohort,
    loss_model,  # fmt: skip
    mse,
    row_cohort,
    run,
    same,
    user,
)

GRADIENTS = np.array([[-3.0, -2.0, -1.0], [-2.0, -1.0, 0.0]], np.float32)
THETA = {"w": jnp.array([1.0, 2.0, 3.0])}


def inner(params, private, batch):
    """A loss whose gradient is the batch."""
    return Mean(jnp.vdot(params["w"], batch), 1.0)


def two_clients():
    steps = Batches(np.zeros((2, 1, 0), int), np.ones((2, 1), bool), GRADIENTS[:, None], np.ones(2, np.float32))
    return Cohort(
        np.arange(2), np.ones(2, bool), (Block(np.arange(2), np.zeros((2, 0), int), np.ones(2, np.float32), steps),)
    )


@pytest.mark.parametrize(
    "algorithm",
    [
        fedavg(inner, optax.sgd(0.1), 2),
        fedavg(inner, optax.sgd(0.1), 2, weighted_mean()),
        fedsgd(inner, optax.sgd(0.1), 2),
        fedsgd_difference(inner, optax.sgd(0.1), 2),
    ],
    ids=["fedavg", "fedavg weighted", "fedsgd", "fedsgd difference"],
)
def test_the_textbook_example(algorithm):
    got = server_model(run(algorithm, two_clients(), THETA, rounds=1)[0])["w"]
    np.testing.assert_allclose(got, [1.25, 2.15, 3.05], rtol=1e-6)


def test_full_participation_fedsgd_is_gradient_descent():
    def pooled(p):
        return jnp.mean((X @ p["w"] + p["b"] - Y) ** 2)

    got = server_model(run(fedsgd(mse, optax.sgd(0.3), N), dense_cohort(range(N)), DENSE, 2)[0])
    want = DENSE
    for _ in range(2):
        want = jax.tree.map(lambda p, g: p - 0.3 * g, want, jax.grad(pooled)(want))
    close(got, want)


def test_one_full_batch_step_of_fedavg_is_fedsgd():
    flat = X.reshape(N, 1, -1, X.shape[-1]), Y.reshape(N, 1, -1)
    cohort = dense_cohort(xy=flat)
    avg = run(fedavg(mse, optax.sgd(0.2), N), cohort, DENSE)[0]
    sgd = run(fedsgd(mse, optax.sgd(0.2), N), cohort, DENSE)[0]
    close(server_model(avg), server_model(sgd))


@parametrize_cover(
    weigh={
        "mean": mean,
        "examples": weighted_mean,
        "per row": per_row_mean,
        "activity": lambda: weighted_mean("activity", 0.5),
    },
    server={"sgd": optax.sgd(1.0), "adam": optax.adam(0.05)},
)
def test_the_reference_form_is_fedsgd_for_every_linear_channel(weigh, server):
    """With cohorts that change, so that rows come and go and are held by some clients only."""

    def go(channel):
        algorithm = fedsgd(bce, server, USERS, channel, user)
        state = algorithm.init(MARKED, KEY)
        for t in range(4):
            here = (np.arange(len(WHO)) + t) % 3 > 0
            state, _ = algorithm.step(state, row_cohort(present=here), KEY)
        return state

    plain, reference = go(weigh()), go(chain(difference(), weigh()))
    close(server_model(plain), server_model(reference), atol=1e-5)


def test_the_reference_form_sends_what_changed():
    """Clients that are all alike: after the first round only the change of the gradient travels."""
    alike = (jnp.broadcast_to(X[:1], X.shape), jnp.broadcast_to(Y[:1], Y.shape))
    norms = []

    def measure(update, sent, client):
        jax.debug.callback(lambda x: norms.append(float(x)), optax.tree.norm(update[0]))
        return update, client.link_state

    algorithm = fedsgd(mse, optax.sgd(0.01), N, chain(difference(), link(measure), mean()))
    run(algorithm, dense_cohort(xy=alike), DENSE, 2)
    jax.effects_barrier()
    first, second = np.array(norms).reshape(2, -1)
    gradient = jax.grad(lambda p: jnp.mean((X[0] @ p["w"] + p["b"] - Y[0]) ** 2))(DENSE)
    np.testing.assert_allclose(first, optax.tree.norm(gradient), rtol=1e-5)
    assert second.max() < 0.1 * first.min()


def test_server_optimisers_by_hand():
    """FedAvgM, and Optax's adagrad, adam and yogi, on a pseudo-gradient of ones."""
    steps = Batches(
        np.zeros((1, 1, 0), int), np.ones((1, 1), bool), np.ones((1, 1, 3), np.float32), np.ones(1, np.float32)
    )
    cohort = Cohort(np.arange(1), np.ones(1, bool), (Block(np.arange(1), np.zeros((1, 0), int), np.ones(1), steps),))

    def go(server, rounds=2):
        return np.asarray(server_model(run(fedopt(inner, optax.sgd(1.0), server, 1), cohort, THETA, rounds)[0])["w"])

    np.testing.assert_allclose(go(optax.sgd(1.0, momentum=0.5)), THETA["w"] - 1 - 1.5, rtol=1e-6)
    np.testing.assert_allclose(go(optax.adagrad(0.1, 0.0, 0.0)), THETA["w"] - 0.1 * (1 + 2**-0.5), rtol=1e-6)
    np.testing.assert_allclose(go(optax.adam(0.1, eps=0.0)), THETA["w"] - 0.2, rtol=1e-5)
    # v_0 = 1e-6, v_t = v_0 + .001 t; both moments corrected for their start
    v = (1e-6 + np.array([0.001, 0.002])) / (1 - 0.999 ** np.array([1, 2]))
    np.testing.assert_allclose(go(optax.yogi(0.1, eps=0.0)), THETA["w"] - (0.1 / np.sqrt(v)).sum(), rtol=1e-4)


def test_adaptive_server_optimisers_are_those_of_the_paper():
    """Reddi et al. 2021, algorithm 2, in NumPy: no correction of the bias, tau beside the root, v from tau^2 on."""
    updates = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    second = {
        "fedadam": lambda v, x: 0.99 * v + 0.01 * x**2,
        "fedyogi": lambda v, x: v - 0.01 * x**2 * np.sign(v - x**2),
        "fedadagrad": lambda v, x: v + x**2,
    }
    for name, follow in second.items():
        b1 = 0.0 if name == "fedadagrad" else 0.9
        optimizer = getattr(adaptive, name)(0.1, tau=0.05)
        w, state = jnp.zeros(3), optimizer.init(jnp.zeros(3))
        want, m, v = np.zeros(3), np.zeros(3), np.full(3, 0.05**2)
        for x in updates:
            step, state = optimizer.update(jnp.asarray(x), state)
            w = w + step
            m, v = b1 * m + (1 - b1) * x, follow(v, x)
            want = want - 0.1 * m / (np.sqrt(v) + 0.05)
        np.testing.assert_allclose(w, want, rtol=1e-5, atol=1e-7)


def test_adaptive_server_optimisers_have_the_values_that_others_have():
    """w = .1, updates .2 and 1: FedAdagrad comes to .15, as in Flower's tests. FedAdam, two updates of 1: .2347."""
    optimizer = adaptive.fedadagrad(0.1, tau=0.5, initial=0.0)
    step, _ = optimizer.update(jnp.float32(0.1 - (0.2 + 1.0) / 2), optimizer.init(jnp.float32(0.1)))
    assert 0.1 + float(step) == pytest.approx(0.15)
    optimizer = adaptive.fedadam(0.1, tau=0.0)
    state, moved = optimizer.init(jnp.float32(0)), 0.0
    for _ in range(2):
        step, state = optimizer.update(jnp.float32(-1), state)
        moved += float(step)
    assert moved == pytest.approx(0.2347, abs=5e-5)
    with pytest.raises(ValueError, match="b1 lies in"):
        adaptive.fedyogi(0.1, b1=1.0)


def test_a_server_rate_of_zero_moves_nothing_shared_but_trains_the_private_part():
    algorithm = fedsgd(bce, optax.sgd(0.0), USERS, private=user)
    before = jax.tree.map(np.asarray, algorithm.init(MARKED, KEY))
    state, _ = run(algorithm, row_cohort(), rounds=1)
    same(server_model(state), server_model(before))
    moved = np.abs(subtract(state.client_states[0], before.client_states[0])["user"]).max(1) > 0
    assert set(np.flatnonzero(moved)) == set(WHO)


def test_gradient_of_uneven_batches_is_that_of_the_pooled_mean():
    """The last batch is short; examples weigh alike, not batches."""
    algorithm = federate(fedsgd_method(loss_model(bce, user), optax.sgd(0.0)), weighted_mean(), USERS)
    init = algorithm.init(MARKED, KEY)
    users = np.asarray(init.client_states[0]["user"])
    state, _ = algorithm.step(init, row_cohort(), KEY)

    def pooled(item):
        from tests.small import DATA

        total = count = 0.0
        for c in WHO:
            i, y = DATA[c]
            logit = item[i] @ users[c]
            total += jnp.sum(jnp.logaddexp(0, logit) - y * logit)
            count += len(i)
        return total / count

    item = MARKED["item"].rows
    close(server_model(state)["item"], item - jax.grad(pooled)(item))


def test_a_server_s_rate_follows_its_schedule():
    """Ten rounds of a pseudo-gradient of one: each round's move is that round's rate."""
    steps = Batches(
        np.zeros((1, 1, 0), int), np.ones((1, 1), bool), np.ones((1, 1, 3), np.float32), np.ones(1, np.float32)
    )
    cohort = Cohort(np.arange(1), np.ones(1, bool), (Block(np.arange(1), np.zeros((1, 0), int), np.ones(1), steps),))
    half = 0.5 * (1 + np.cos(np.pi * np.arange(8) / 7))
    wanted = {
        "constant": np.ones(8),
        "linear": 1 - 0.8 * np.arange(8) / 7,
        "cosine": 0.2 + 0.8 * half,
        "exponential": 0.2 ** (np.arange(8) / 7),
    }
    for name, rest in wanted.items():
        algorithm = fedopt(inner, optax.sgd(1.0), optax.sgd(server_schedule(0.5, 10, name, 2, 0.2)), 1)
        state, path = algorithm.init(THETA, KEY), []
        for _ in range(10):
            path.append(float(server_model(state)["w"][0]))
            state, _ = algorithm.step(state, cohort, KEY)
        moves = -np.diff([*path, float(server_model(state)["w"][0])])
        np.testing.assert_allclose(moves, 0.5 * np.concatenate([[0, 0.5], rest]), atol=1e-6)
    assert server_schedule(0.5, 10, "constant", 0, 0.1) == 0.5


@pytest.mark.parametrize("asked", [("steps", 0, 0.1), ("linear", 10, 0.1), ("cosine", 0, 1.5), ("exponential", 0, 0.0)])
def test_schedules_that_cannot_be(asked):
    with pytest.raises(ValueError, match="server"):
        server_schedule(1.0, 10, *asked)
