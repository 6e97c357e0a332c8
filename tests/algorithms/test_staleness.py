"""Clients who were sent models of different rounds: FedBuff and FedAsync in NumPy, and beside synchronous rounds."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxfed.algorithms.local_training import local_steps
from jaxfed.channels.average import mean, per_row_mean
from jaxfed.channels.secure_sum import ring
from jaxfed.channels.staleness import mixing, staleness
from jaxfed.config.schema import make_config
from jaxfed.core.channel import chain
from jaxfed.core.federate import federate
from jaxfed.core.method import Method
from jaxfed.core.placement import make_placement
from jaxfed.core.state import server_model
from jaxfed.core.tables import unwrap
from jaxfed.training.loop import train_run
from tests.core.test_lowering import lowered
from tests.named import fedasync, fedbuff
from tests.small import (
    DATA,
    DENSE,
    IDS,
    ITEMS,
    KEY,
    MARKED,
    PLAIN,
    USERS,
    WHO,
    N,
    X,
    Y,
    bce,
    close,
    dense_cohort,
    factorisation,
    loss_model,  # fmt: skip
    mse,
    on_rows,
    row_cohort,
    same,
    user,
)

RATE, VERSIONS = 0.05, 4
SGD = optax.sgd(RATE)
XS, YS = np.asarray(X, np.float64), np.asarray(Y, np.float64)
AGES = [[0] * 6, [0, 1, 1, 0, 0, 1], [2, 0, 1, 2, 0, 0], [3, 3, 0, 1, 2, 0], [0, 3, 1, 0, 0, 2]]  # of five rounds


def trained(p, c):
    """A client's linear model after its local steps, from p = [w, b], in NumPy."""
    for x, y in zip(XS[c], YS[c], strict=True):
        gap = 2 * (x @ p[:-1] + p[-1] - y) / y.size
        p = p - RATE * np.append(x.T @ gap, gap.sum())
    return p


def vector(state):
    return np.append(np.asarray(server_model(state)["w"], np.float64), float(server_model(state)["b"]))


def steps(algorithm, cohorts, params=DENSE):
    state = algorithm.init(params, KEY)
    for cohort in cohorts:
        state, _ = algorithm.step(state, cohort, KEY)
    return state


def test_fedbuff_is_that_of_its_paper():
    """x <- x - rate * mean of (1 + age)^-1/2 (y_i - y_i trained), y_i the model of `age` rounds ago."""
    algorithm = fedbuff(mse, SGD, N, VERSIONS, 0.5, 0.7)
    got = vector(steps(algorithm, [dense_cohort()._replace(ages=np.array(ages)) for ages in AGES]))
    past = [np.append(np.asarray(DENSE["w"], np.float64), 0.0)]
    for ages in AGES:
        began = [past[-1 - age] for age in ages]
        updates = [(1 + age) ** -0.5 * (y - trained(y, c)) for y, age, c in zip(began, ages, IDS, strict=True)]
        past.append(past[-1] - 0.7 * np.mean(updates, 0))
    np.testing.assert_allclose(got, past[-1], rtol=1e-5)  # float32 against float64


def test_fedasync_is_that_of_its_paper():
    """x <- (1 - a) x + a y with y trained from a model of `age` rounds ago, one client a round."""
    algorithm = fedasync(mse, SGD, N, VERSIONS, 0.6, 0.5)
    order = [(3, 0), (7, 1), (1, 2), (4, 0), (3, 3)]
    cohorts = [dense_cohort([c])._replace(ages=np.array([age])) for c, age in order]
    past = [np.append(np.asarray(DENSE["w"], np.float64), 0.0)]
    for c, age in order:
        a = 0.6 * (1 + age) ** -0.5
        past.append((1 - a) * past[-1] + a * trained(past[-1 - age], c))
    np.testing.assert_allclose(vector(steps(algorithm, cohorts)), past[-1], rtol=1e-5)


def test_fedasync_on_rows_mixes_the_rows_that_a_client_holds():
    algorithm = fedasync(bce, optax.sgd(0.1), USERS, VERSIONS, 0.5, 0.0, user)
    both = row_cohort(blocks=((0,), (1,)))
    one = lambda slot, age: both._replace(
        ids=np.where(np.arange(len(WHO)) == slot, WHO, USERS).astype(np.int32),
        blocks=(both.blocks[slot],),
        ages=np.full(len(WHO), age, np.int32),
    )
    first = steps(algorithm, [one(0, 0)], MARKED)
    fresh = steps(algorithm, [one(1, 0)], MARKED)  # what the second client makes of the first model
    got = server_model(steps(algorithm, [one(0, 0), one(1, 1)], MARKED))["item"]
    held = np.isin(np.arange(ITEMS), DATA[WHO[1]][0])
    moved = 2 * (server_model(fresh)["item"] - PLAIN["item"]) + PLAIN["item"]  # y itself: half of it was mixed in
    want = np.where(held[:, None], 0.5 * (server_model(first)["item"] + moved), server_model(first)["item"])
    close(got, jnp.asarray(want), atol=1e-5)


@pytest.mark.parametrize("lists", [lambda cohort: cohort, on_rows], ids=["all rows", "listed rows"])
@pytest.mark.parametrize("server", [optax.sgd(0.5), optax.adam(0.1)], ids=["sgd", "adam"])
def test_without_delay_it_is_a_synchronous_round(lists, server):
    """Bit for bit, whatever the exponent: a model of this round is this round's model."""
    synchronous = factorisation(per_row_mean(), server=server)
    late = factorisation(chain(staleness(0.7), per_row_mean()), server=server, history_length=3)
    cohort = lists(row_cohort())
    a = steps(synchronous, [cohort] * 4, MARKED)
    b = steps(late, [cohort._replace(ages=np.zeros(len(WHO), np.int32))] * 4, MARKED)
    same((a.shared, a.client_states[0], a.opt), (b.shared, b.client_states[0], b.opt))


def test_late_rows_are_those_of_their_round():
    """On listed rows, with clients of several ages, as on all of them; the ring holds the models of the last rounds."""
    late = factorisation(chain(staleness(0.5), mean()), history_length=3)
    ages = [np.array(a, np.int32) for a in ([0] * 8, [1, 0] * 4, [2, 1, 0, 0] * 2, [0, 1, 2, 1] * 2)]
    blocks = ((0, 1, 2, 3), (4, 5, 6, 7)), ((0, 1), (2, 3), (4, 5), (6, 7))
    cohorts = [[lists(row_cohort(blocks=b))._replace(ages=a) for a in ages]
               for b in blocks for lists in (lambda x: x, on_rows)]  # fmt: skip
    first, *others = [steps(late, each, MARKED) for each in cohorts]
    for other in others:
        close(server_model(first), server_model(other), atol=1e-5)
    for back in range(3):
        then = steps(late, cohorts[0][: 4 - back], MARKED)
        slot = jax.tree.map(lambda x, at=4 - back: x[at % 3], first.model_history)
        same(unwrap(slot.params), server_model(then))


def test_what_clients_keep_is_what_they_left():
    """A client's private part is its own of its last report, however old the model it was sent."""
    late = factorisation(mean(), history_length=2)
    cohort = row_cohort()
    a = late.step(late.init(MARKED, KEY), cohort._replace(ages=np.zeros(8, np.int32)), KEY)[0]
    kept = np.array(a.client_states[0]["user"])
    b = late.step(a, cohort._replace(ages=np.ones(8, np.int32)), KEY)[0]
    assert (np.array(b.client_states[0]["user"])[WHO] != kept[WHO]).any(1).all()
    rest = np.setdiff1d(np.arange(USERS), WHO)
    assert (np.array(b.client_states[0]["user"])[rest] == kept[rest]).all()


@pytest.mark.parametrize("kind", ["jit", "pmap"])
def test_over_devices_it_is_the_same(kind):
    ages = [np.array(a, np.int32) for a in ([0] * 8, [1, 0] * 4, [2, 1, 0, 0] * 2)]
    cohorts = [on_rows(row_cohort())._replace(ages=a) for a in ages]
    links = chain(staleness(0.5), mean())
    one, four = (
        factorisation(links, history_length=3),
        factorisation(links, history_length=3, placement=make_placement(kind, 4)),
    )
    close(server_model(steps(one, cohorts, MARKED)), jax.device_get(server_model(steps(four, cohorts, MARKED))))


def test_it_lowers():
    late = factorisation(chain(mixing(), mean()), history_length=3)
    cohort = on_rows(row_cohort())._replace(ages=np.zeros(len(WHO), np.int32))
    lowered(jax.jit(late.step), jax.eval_shape(late.init, MARKED, KEY), cohort, KEY)


def test_what_cannot_be():
    work = local_steps(loss_model(mse), SGD)
    with pytest.raises(ValueError, match="hides all but the sum"):
        chain(mixing(), mean(), ring(4, 8, bound=1.0))
    with pytest.raises(ValueError, match="cannot work on the codes"):
        chain(mixing(), per_row_mean())
    with pytest.raises(ValueError, match="put it first"):
        federate(Method(work), chain(per_row_mean(), mixing()), N).init(DENSE, KEY)
    with pytest.raises(ValueError, match="pass history_length to federate"):
        steps(federate(Method(work), mean(), N), [dense_cohort()._replace(ages=np.zeros(6, int))])
    with pytest.raises(ValueError, match="3 versions of the model take"):
        federate(Method(work), mean(), N, client_memory_budget=10.0, history_length=3).init(DENSE, KEY)
    for wrong in (lambda: staleness(-1.0), lambda: mixing(exponent=-1.0), lambda: mixing(0.0), lambda: mixing(1.5)):
        with pytest.raises(ValueError, match=r"must not be negative|lies above 0"):
            wrong()


TABLE = {
    "rounds": 6,
    "data": {"name": "synthetic", "users": 60, "items": 50, "mean_length": 6.0},
    "model": {"dim": 4},
    "work": {"batch_size": 32},
    "channel": [{"name": "staleness"}, {"name": "per_row_mean"}],
    "cohort": {"name": "buffered", "size": 5, "concurrency": 15, "dropout": 0.2},
    "clock": {"name": "lognormal"},
    "evaluation": {"every": 3},
}


def test_a_run_tells_the_time_and_resumes(tmp_path):
    """Simulated seconds in the rows, those who are lost counted, and the ring in the checkpoint: same bits."""
    out = tmp_path / "a"
    config = make_config({**TABLE, "run": {"out": str(out), "checkpoint_every": 3}})
    summary = train_run(config)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    times = [row["simulated_seconds"] for row in rows if "simulated_seconds" in row]
    assert 0 < times[0] < times[1] == summary["simulated_seconds"]
    assert rows[1]["clients/age"] > 0
    assert summary["clients/dropped_total"] > 0
    shutil.rmtree(out / "checkpoints" / "6")
    (out / "summary.json").unlink()
    assert train_run(config, resume=True)["params_sha256"] == summary["params_sha256"]


REFUSED = {
    "among those with a bound": {"channel": [{"name": "mean", "count": 5}, {"name": "clip"}, {"name": "gaussian"}]},
    "leave \\[\\[download\\]\\]": {"download": [{"name": "quantize"}]},
    "who is quick": {"clock": {"name": "none"}},
    "who is awake": {"cohort": {"name": "uniform", "size": 5}, "clock": {"name": "constant", "awake": [0.5]}},
}


@pytest.mark.parametrize("message", REFUSED)
def test_runs_that_cannot_be(message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train_run(make_config({**TABLE, **REFUSED[message], "run": {"out": str(tmp_path / "r")}}))
