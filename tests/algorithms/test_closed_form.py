"""Closed forms: sums of clients are the central model of NumPy, through every kind of sum."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxfed as jf
from jaxfed.config.build import build_from_config, load_data
from jaxfed.config.registry import CLOSED
from jaxfed.config.schema import make_config
from jaxfed.core.pairs import to_dense
from jaxfed.core.types import History
from jaxfed.evaluation.evaluator import flatten_metrics
from jaxfed.models import closed_form
from jaxfed.models.ials import solve_positive
from jaxfed.models.item_item import mirror_lower
from jaxfed.training.loop import train_run
from jaxfed.training.rounds import compile_programs, initial_arrays, make_run_keys, prepare_round, scored_model

USERS, ITEMS = 40, 30
TABLE = {"name": "synthetic", "users": USERS, "items": ITEMS, "mean_length": 9.0}
DATA = load_data(make_config({"data": TABLE}).data)
HISTORIES = [DATA.population.train.of(u) for u in range(USERS)]


def made(model, channel=(), rounds=1, data=DATA, **more):
    """(experiment, state) after some rounds of everyone."""
    table = {"model": model, "work": {"name": "statistics", "batch_size": 4}, "server": {"name": "solve"}}
    config = make_config({"cohort": {"name": "everyone"}, "channel": list(channel), **table, **more})
    it = build_from_config(config, data)
    state = initial_arrays(it, 0)["state"]
    for t in range(rounds):
        state, _ = it.algorithm.step(state, prepare_round(it, 0, t).cohort, make_run_keys(0).rounds)
    return it, state


def tables(state):
    return {name: np.asarray(x.rows, np.float64) for name, x in state.shared.params["tables"].items()}


def binary():
    x = np.zeros((USERS, ITEMS))
    for u, items in enumerate(HISTORIES):
        x[u, items] = 1
    return x


def central_ease(l2):
    p = np.linalg.inv(binary().T @ binary() + l2 * np.eye(ITEMS))
    b = -p / np.diag(p)
    np.fill_diagonal(b, 0)
    return b


def central_transitions(window, decay):
    c = np.zeros((ITEMS, ITEMS))
    for items in HISTORIES:
        for a in range(len(items)):
            for b in range(a + 1, min(a + window, len(items) - 1) + 1):
                c[items[a], items[b]] += decay ** (b - a - 1)
    return c / np.sqrt(np.outer(np.maximum(c.sum(1), 1), np.maximum(c.sum(0), 1)))


def test_the_sums_of_ease_are_whole_numbers_and_exact(monkeypatch):
    monkeypatch.setattr(closed_form, "ridge_weights", lambda sums, l2: mirror_lower(to_dense(sums)))
    for channel in ((), [{"name": "clip", "bound": 1e6}, {"name": "ring", "fraction_bits": 4}]):
        _, state = made({"name": "ease"}, channel)
        np.testing.assert_array_equal(tables(state)["item"], binary().T @ binary())


@pytest.mark.parametrize(
    "channel", [(), [{"name": "clip", "bound": 1e5}, {"name": "ring", "fraction_bits": 8}]], ids=["sum", "secure sum"]
)
def test_ease_is_the_central_model(channel):
    _, state = made({"name": "ease", "l2": 5.0}, channel)
    np.testing.assert_allclose(tables(state)["item"], central_ease(5.0), rtol=1e-4, atol=1e-6)  # float32 inversion


def test_item_knn_is_the_central_model():
    _, state = made({"name": "item_knn", "neighbours": 7, "shrink": 3.0})
    g = binary().T @ binary()
    near = g / (np.sqrt(np.outer(np.diag(g), np.diag(g))) + 3)
    np.fill_diagonal(near, 0)
    for i in range(ITEMS):
        near[i, near[i] < np.sort(near[i])[-7] - 1e-6] = 0  # equals of the last neighbour stay
    np.testing.assert_allclose(tables(state)["item"], near.T, rtol=1e-5, atol=1e-7)


def test_transitions_are_the_central_model():
    _, state = made({"name": "transitions", "l2": 5.0, "window": 3, "decay": 0.8})
    got = tables(state)
    np.testing.assert_allclose(got["item"], central_ease(5.0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(got["next"], central_transitions(3, 0.8), rtol=1e-5, atol=1e-7)


def test_ials_is_the_central_model():
    """Three epochs of alternating least squares over the whole matrix, in NumPy."""
    l2, w, d, x = 0.02, 0.3, 4, binary()
    it, state = made({"name": "ials", "dim": d, "l2": l2, "unobserved": w}, rounds=3)
    y = np.asarray(initial_arrays(it, 0)["state"].shared.params["tables"]["item"].rows, np.float64)

    def side(other, seen):
        out = np.zeros((len(seen), d))
        for i, row in enumerate(seen):
            left = other.T @ (other * (row + w)[:, None]) + l2 * (row.sum() + w * len(row)) * np.eye(d)
            out[i] = np.linalg.solve(left, other.T @ row)
        return out

    for _ in range(3):
        users = side(y, x)
        y = side(users, x.T)
    np.testing.assert_allclose(tables(state)["item"], y, rtol=2e-3, atol=2e-4)  # float32 solves, one on the other
    np.testing.assert_allclose(state.shared.params["params"]["gram"], y.T @ y, rtol=1e-3, atol=1e-4)
    model, params = it.model, state.shared.params
    history = History(*[jnp.array([*HISTORIES[3], ITEMS])] * 2, ITEMS)
    np.testing.assert_allclose(model.fold_in(params, history), side(y, x[3:4])[0], rtol=2e-3, atol=2e-4)


def test_solutions_are_those_of_lapack_without_its_calls():
    """Batches of LAPACK calls in programs that run side by side wait for each other for ever; no client makes any."""
    for dim in (1, 3, 8, 21, 64):  # less than the columns of a step, a multiple of them, and a rest
        factors = np.random.default_rng(0).normal(size=(50, dim, dim))
        matrix, right = factors @ factors.transpose(0, 2, 1) + 0.5 * np.eye(dim), factors[:, 0]
        got = jax.vmap(solve_positive)(jnp.float32(matrix), jnp.float32(right))
        np.testing.assert_allclose(got, np.linalg.solve(matrix, right[..., None])[..., 0], rtol=1e-3, atol=1e-4)
    assert "lapack" in jax.jit(jnp.linalg.solve).lower(matrix, right[..., None]).as_text()
    for name in CLOSED:
        it, state = made({"name": name}, rounds=0)
        for client in (it.model.fold_in, it.model.closed.statistics):
            each = jax.vmap(lambda params, ids, client=client: client(params, History(ids, ids, ITEMS)), (None, 0))
            text = jax.jit(each).lower(state.shared.params, jnp.array([HISTORIES[3]])).as_text()
            assert "lapack" not in text, name


def test_a_history_is_scored_by_its_order():
    """recency^age of EASE weights, last^age of transitions, both standardised."""
    it, state = made({"name": "transitions", "l2": 5.0, "half_life": 2.0, "last": 0.5, "blend": 1.5})
    got, items = tables(state), HISTORIES[0]
    age = np.arange(len(items))[::-1]
    a = 0.5 ** (age / 2.0) @ got["item"][items]
    b = 0.5**age @ got["next"][items]
    want = (a - a.mean()) / a.std() + 1.5 * (b - b.mean()) / b.std()
    padded = jnp.array([*items, ITEMS, ITEMS])
    private = it.model.fold_in(state.shared.params, History(padded, padded, ITEMS))
    np.testing.assert_allclose(it.model.score(state.shared.params, private, 0), want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("past", ["train", "all"])
def test_what_is_folded_in_at_the_test_is_asked_for(past):
    it, state = made({"name": "ease", "l2": 5.0}, evaluation={"history": past})
    sums = it.evaluator(*scored_model(it, state), it.eval_splits["test"], make_run_keys(0).evaluation)
    got, weights, ranks = flatten_metrics("test", sums), tables(state)["item"], []
    for u, items in enumerate(HISTORIES):
        valid, test = DATA.population.valid.of(u), DATA.population.test.of(u)
        score = weights[np.append(items, valid) if past == "all" else items].sum(0)
        others = np.setdiff1d(np.arange(ITEMS), np.concatenate([items, valid, test]))
        ranks.append((score[others] >= score[test[0]] - 1e-6).sum())
    assert got["test/full/hr@10"] == pytest.approx(np.mean(np.array(ranks) < 10), abs=1.5 / USERS)


def test_rounds_of_some_clients_sum_those():
    """A cohort that is not everyone: the model of those who were asked."""
    it, state = made({"name": "ease", "l2": 5.0}, cohort={"name": "uniform", "size": 9})
    ids = np.asarray(prepare_round(it, 0, 0).cohort.ids)
    x = binary()[ids]
    p = np.linalg.inv(x.T @ x + 5 * np.eye(ITEMS))
    want = -p / np.diag(p)
    np.fill_diagonal(want, 0)
    np.testing.assert_allclose(tables(state)["item"], want, rtol=1e-4, atol=1e-6)


GRID = {"model": {"name": "ease", "l2_grid": [0.5, 5.0, 500.0]}, "algorithm": {"name": "closed_form"}, "channel": []}


@pytest.fixture
def solved(monkeypatch):
    """The penalties that X'X was inverted with, one after the other."""
    asked, solve = [], closed_form.ridge_weights
    monkeypatch.setattr(closed_form, "ridge_weights", lambda sums, l2: asked.append(l2) or solve(sums, l2))
    return asked


def test_one_sum_serves_all_candidates_and_validation_chooses(solved, tmp_path):
    table = GRID | {"data": TABLE, "rounds": 1, "cohort": {"name": "everyone"}, "evaluation": {"every": 1}}
    summary = train_run(make_config(table | {"run": {"out": str(tmp_path / "grid")}}))
    assert solved == [0.5, 5.0, 500.0]
    alone = {}
    for l2 in GRID["model"]["l2_grid"]:
        single = table | {"model": {"name": "ease", "l2": l2}, "run": {"out": str(tmp_path / f"{l2}")}}
        alone[l2] = train_run(make_config(single))
    best = max(alone, key=lambda l2: alone[l2]["val/full/ndcg@10"])
    assert summary["params_sha256"] == alone[best]["params_sha256"]
    rows = [json.loads(line) for line in (tmp_path / "grid" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["solve/candidate"] == best
    assert summary["bytes_up_total"] == alone[best]["bytes_up_total"]  # one sum


@pytest.mark.parametrize("items", [5, 13])  # fewer than the shortest block, and than the next one
@pytest.mark.parametrize("name", CLOSED)
def test_users_who_have_all_items(name, items):
    """Histories are padded, but never beyond the catalogue: a client has as many pairs as its block has places for."""
    users, numbers = np.repeat(np.arange(6), items), np.tile(np.arange(items), 6)
    clients = jf.data.partition(jf.data.from_arrays(users, numbers, times=numbers))
    assert clients.population.num_items == items
    it, state = made({"name": name}, data=clients)
    assert max(length for length, _ in it.shapes.kinds) <= items
    if name == "ease":
        x = np.zeros((6, items))
        x[:, : items - 2] = 1  # one item validates, one tests
        p = np.linalg.inv(x.T @ x + 400 * np.eye(items))
        want = -p / np.diag(p)
        np.fill_diagonal(want, 0)
        np.testing.assert_allclose(tables(state)["item"], want, rtol=1e-4, atol=1e-7)


def test_compiling_solves_nothing(solved):
    it, _ = made({"name": "ease"}, rounds=0)
    state = initial_arrays(it, 0)["state"]
    compile_programs(it, state, make_run_keys(0).rounds)
    assert solved == []
    it.algorithm.step(state, prepare_round(it, 0, 0).cohort, make_run_keys(0).rounds)
    assert solved == [400.0]


def test_where_nobody_reports_the_model_stays(solved):
    it, state = made({"name": "ease"})
    cohort = prepare_round(it, 0, 1).cohort
    after, _ = it.algorithm.step(state, cohort._replace(present=np.zeros_like(cohort.present)), make_run_keys(0).rounds)
    assert len(solved) == 1
    assert int(after.round) == 2
    np.testing.assert_array_equal(tables(after)["item"], tables(state)["item"])


@pytest.mark.parametrize("name", ["ease", "transitions", "ials"])
def test_sums_do_not_depend_on_blocks_and_chunks(name):
    first, second = (made({"name": name}, run=run)[1] for run in ({"area": 24}, {"area": 640, "chunk": 1}))
    for a, b in zip(*(jax.tree.leaves(x.shared.params) for x in (first, second)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-4)  # sums of float32 in another order, then solved


def test_pairs_that_occur_are_summed_where_they_are_few():
    """Few users of many items: the sum has a place for each pair of some client, not for all pairs."""
    data = load_data(make_config({"data": TABLE | {"users": 12, "items": 400, "mean_length": 5.0}}).data)
    sparse, _ = made({"name": "ease"}, rounds=0, data=data)
    whole, _ = made({"name": "ease"}, rounds=0, data=data, server={"name": "solve", "lazy": False})
    cohort = prepare_round(sparse, 0, 0).cohort
    assert len(cohort.rows) == sparse.shapes.room < 400 * 401 // 20
    assert prepare_round(whole, 0, 0).cohort.rows is None
    one, two = (made({"name": "ease"}, data=data, server={"name": "solve", "lazy": lazy})[1] for lazy in (True, False))
    np.testing.assert_array_equal(tables(one)["item"], tables(two)["item"])


def test_noise_on_all_pairs_needs_their_whole_sum():
    channel = [{"name": "clip", "bound": 4.0}, {"name": "gaussian", "multiplier": 1.0}]
    data = load_data(make_config({"data": TABLE | {"users": 12, "items": 400, "mean_length": 5.0}}).data)
    it, state = made({"name": "ease"}, channel, data=data)
    assert prepare_round(it, 0, 0).cohort.rows is None
    weights = tables(state)["item"]
    seen = np.unique(data.population.train.values)
    unseen = np.setdiff1d(np.arange(400), seen)[:2]
    assert (weights[np.ix_(unseen, unseen)] != 0).sum() == 2  # pairs that nobody has are noised as all others


def test_weights_of_ials_suit_small_and_sparse_catalogues():
    """The weight of what is not seen is relative to what is: predictions do not shrink to 0 on a sparse catalogue."""
    data = load_data(make_config({"data": TABLE | {"users": 300, "items": 3000, "mean_length": 5.0}}).data)
    it, state = made({"name": "ials", "dim": 8}, rounds=4, data=data)
    items = data.population.train.of(0)
    history = History(*[jnp.asarray(items)] * 2, 3000)
    scores = it.model.score(state.shared.params, it.model.fold_in(state.shared.params, history), 0)
    assert float(scores[items].mean()) > 0.1
    absolute, state = made({"name": "ials", "dim": 8, "unobserved": 0.3}, rounds=4, data=data)
    scores = absolute.model.score(state.shared.params, absolute.model.fold_in(state.shared.params, history), 0)
    assert float(jnp.abs(scores).max()) < 0.01


def test_a_clipped_statistic_is_bounded_by_the_norm_of_the_history():
    """A message has 1 for each of L (L + 1) / 2 pairs, so that clipping bounds it, for differential privacy."""
    it, _ = made({"name": "ease"})
    history = History(*[jnp.array(HISTORIES[5])] * 2, ITEMS)
    told, _ = it.model.closed.statistics(initial_arrays(it, 0)["state"].shared.params, history)
    length = len(HISTORIES[5])
    assert float(jnp.linalg.norm(told["tables"]["pairs"].rows)) == pytest.approx((length * (length + 1) / 2) ** 0.5)
    it, state = made({"name": "ease"}, [{"name": "clip", "bound": 4.0}, {"name": "gaussian", "multiplier": 1.0}])
    assert it.account.mechanisms
    assert np.isfinite(tables(state)["item"]).all()


REFUSED = {
    "mf has no closed form": ({"name": "mf"}, {}, "closed form"),
    "a mean": ({"name": "ease"}, {"channel": [{"name": "weighted_mean"}]}, "take the mean out"),
    "an optimiser": ({"name": "ease"}, {"server": {"name": "adam"}}, "together"),
    "local steps": ({"name": "ease"}, {"work": {"name": "local_steps"}}, "together"),
    "organisations": ({"name": "ease"}, {"data": TABLE | {"clients": "silo", "silos": 4}}, "one user"),
    "a penalty of 0": ({"name": "ease", "l2_grid": [1.0, 0.0]}, {}, "l2_grid: 0 is no penalty"),
    "a part of the way": (
        {"name": "ease", "neighbours": 3},
        {"server": {"name": "solve", "learning_rate": 0.5}},
        "leave it at 1",
    ),
    "codes of a download": ({"name": "ease"}, {"download": [{"name": "quantize"}]}, "download nothing"),
    "a reduction": ({"name": "ease"}, {"channel": [{"name": "median"}]}, "take the link"),
    "no way from a history": (
        {"name": "mf", "loss": "bpr"},
        {"work": {}, "server": {}, "channel": [{"name": "mean"}], "evaluation": {"fold_in": True}},
        "history",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(name):
    model, more, message = REFUSED[name]
    table = {"data": TABLE, "model": model, "work": {"name": "statistics"}, "server": {"name": "solve"}, "channel": []}
    config = make_config(table | {"cohort": {"name": "everyone"}} | more)
    with pytest.raises(ValueError, match=message):
        build_from_config(config, load_data(config.data))


def test_a_closed_form_has_no_loss():
    it, state = made({"name": "ease"})
    with pytest.raises(ValueError, match="no loss"):
        it.model.loss(state.shared.params, (), {})


@pytest.mark.parametrize("name", CLOSED)
def test_tables_over_several_devices_are_those_of_one(name):
    """Also where they have rows past the items, to divide evenly."""
    data = load_data(make_config({"data": TABLE | {"items": 29}}).data)
    one, two = (made({"name": name}, (), 2, data, run=run)[1] for run in ({}, {"devices": 2, "shard_tables": True}))
    for a, b in zip(*(jax.tree.leaves(x.shared.params["tables"]) for x in (one, two)), strict=True):
        size = min(a.shape[0], b.shape[0])
        np.testing.assert_allclose(np.asarray(a)[:size, :size], np.asarray(b)[:size, :size], rtol=1e-4, atol=1e-5)
