"""What a model reads and nobody trains: as if it were a constant of the model, and paid for once."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxfed as jf
from jaxfed.config.build import build_from_config, load_data
from jaxfed.config.registry import REGISTRY
from jaxfed.config.schema import make_config
from jaxfed.core.tree import count_bytes, tree_digest
from jaxfed.data.packing import pack_cohort
from jaxfed.models.model import find_loss, from_module, normal_variable, score_rows, take_vectors
from jaxfed.training.best_model import open_best_model
from jaxfed.training.checkpoint import newest_record
from jaxfed.training.loop import train_run
from jaxfed.training.recommend import UserPlace, score_items
from jaxfed.training.rounds import evaluate_model, initial_arrays, make_run_keys, scored_model
from tests.small import close, same

ITEMS, WIDTH = 46, 7  # of 50 items, those that occur
TEXT = np.random.default_rng(5).normal(size=(ITEMS, WIDTH)).astype(np.float32)
SCALE = np.float32(0.7)


class Projected(nn.Module):
    """Item vectors are projections of text vectors. by: how the module comes to these."""

    num_users: int
    dim: int
    by: str
    bias: bool
    text: tuple  # a module's attributes are hashed

    @nn.compact
    def __call__(self, user, item=None):
        text = jnp.asarray(np.array(self.text, np.float32))
        if self.by == "frozen":
            text = self.variable("frozen_tables", "text", lambda: text).value
            scale = self.variable("frozen", "scale", lambda: jnp.asarray(SCALE)).value
        else:  # constants, of which the number of a row is known from a table that has no gradient
            numbers = self.variable("tables", "number", lambda: jnp.arange(len(self.text), dtype=jnp.float32)).value
            text, scale = text[jax.lax.stop_gradient(numbers).astype(jnp.int32)], SCALE
        projection = normal_variable(self, "params", "projection", (WIDTH, self.dim), 0.3)
        users = normal_variable(self, "private", "user", (self.num_users, self.dim), 0.3)
        logit = scale * score_rows(take_vectors(text @ projection, item), users[user])
        if self.bias:
            logit += take_vectors(self.variable("tables", "bias", jnp.zeros, len(self.text)).value, item)
        return logit


def make(by, bias, text=TEXT):
    def projected(num_items, num_users, dim: int = 4):
        """Projected text vectors.

        Args:
            dim: Numbers in a vector.
        """
        rows = tuple(map(tuple, np.pad(text, ((0, num_items - ITEMS), (0, 0))).tolist()))
        return from_module(Projected(num_users, dim, by, bias, rows), find_loss("bce"))

    return projected


MODELS = {f"{by}_{bias}": make(by, bias) for by in ("frozen", "constant") for bias in (False, True)}
TABLE = {
    "rounds": 3,
    "data": {"name": "synthetic", "users": 24, "items": 50, "mean_length": 8.0},
    "work": {"batch_size": 32, "optimizer": {"name": "sgd", "learning_rate": 0.3}},
    "channel": [{"name": "mean"}],
    "cohort": {"name": "uniform", "size": 12, "dropout": 0.2},
    "evaluation": {"every": 1},
}


@pytest.fixture
def named(monkeypatch):
    """build(name, **sections) -> the pieces of a run of one of MODELS."""
    for name, function in MODELS.items():
        monkeypatch.setitem(REGISTRY["model"], name, function)

    def build(name, **more):
        config = make_config(TABLE | {"model": {"name": name}} | more)
        return build_from_config(config, load_data(config.data))

    return build


def rounds_of(it, rounds=3):
    """(the state after some rounds, figures of the test)."""
    arrays, keys = initial_arrays(it, 0), make_run_keys(0)
    state = arrays["state"]
    for t in range(rounds):
        ids, present = it.sampler.draw(0, t)
        cohort = pack_cohort(it.data.population, it.batching, it.shapes, ids, present, 0, t)
        cohort = cohort._replace(ages=it.sampler.ages(0, t).astype(np.int32) if it.sampler.ages else None)
        state, _ = it.algorithm.step(state, cohort, keys.rounds)
    model = scored_model(it, state)
    return state, model, evaluate_model(it, model, "test", keys.evaluation)


WORKS = {
    "by row": {},
    "whole": {"by_row": False},
    "gradient": {"name": "gradient"},
    "mime": {"name": "mime"},
    "scaffold": {"name": "scaffold"},
    "alternate": {"name": "alternate"},
    "apfl": {"name": "apfl"},
    "ditto": {"name": "ditto"},
}


@pytest.mark.parametrize(
    ("work", "bias"),
    [
        pytest.param(work, bias, id=f"{work}-{'rows' if bias else 'dense'}", marks=[] if main else pytest.mark.full)
        for work in WORKS
        for bias in (False, True)
        # each way to take a gradient with a table and without one, and what keeps a state at the clients
        for main in [work in ("by row", "gradient") or (bias and work in ("scaffold", "apfl"))]
    ],
)
def test_it_is_as_a_constant_of_the_model(named, work, bias):
    """With a table that is trained and without one; in float32, to the order of sums."""
    section = {"work": TABLE["work"] | WORKS[work]}
    (state, model, figures), (_, want, wanted) = (
        rounds_of(named(f"{by}_{bias}", **section)) for by in ("frozen", "constant")
    )
    assert "number" not in state.shared.params["tables"]
    close(model[0]["params"], want[0]["params"], atol=1e-5)
    close(*(jax.tree.leaves(each[1])[-1] for each in (model, want)), atol=1e-5)
    assert figures.keys() == wanted.keys()
    for name, value in figures.items():
        assert value == pytest.approx(wanted[name], abs=1e-4), name
    start = initial_arrays(named(f"frozen_{bias}", **section), 0)["state"].shared.params["params"]["projection"]
    assert np.abs(model[0]["params"]["projection"] - start).max() > 1e-3


def test_no_message_no_state_and_no_model_holds_it(named):
    it = named("frozen_True")
    state, model, _ = rounds_of(it, 1)
    for each in (state, model):
        assert not any("frozen" in jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(each))
    assert it.wire.frozen == TEXT.nbytes + SCALE.nbytes == count_bytes(it.model.frozen)
    plain = named("frozen_True", model={"name": "mf", "dim": 4})
    assert plain.wire.frozen == 0
    rows = np.array([1, 9])
    sent = 4 * WIDTH * 4 + rows * (4 + 4)  # the projection; and of a row its bias and its id
    np.testing.assert_array_equal(it.wire.up(rows), sent)
    np.testing.assert_array_equal(it.wire.down(rows), sent)


def test_it_is_an_argument_of_the_programs(named):
    """And no constant that is compiled into each of them."""
    it = named("frozen_True")
    state = initial_arrays(it, 0)["state"]
    _, programs, frozen = it.algorithm.step.args
    ids, present = it.sampler.draw(0, 0)
    cohort = pack_cohort(it.data.population, it.batching, it.shapes, ids, present, 0, 0)
    given = state, cohort.ids, cohort.present, cohort.rows, None, jax.random.key(0), cohort.blocks[0], None
    text = programs.run_client_block.lower(*given, None, frozen.clients).as_text()
    assert f"tensor<{ITEMS}x{WIDTH}xf32>" in text
    assert not re.search(rf"constant .*tensor<{ITEMS}x{WIDTH}xf32>", text)


def test_a_step_by_rows_reads_the_rows_of_the_cohort_alone(named):
    """On the rows of a cohort, and on all rows: the same."""
    states = [rounds_of(named("frozen_True", server={"lazy": lazy}), 2)[1] for lazy in (True, False)]
    close(*states, atol=1e-6)


SETTINGS = {
    "devices": {"run": {"devices": 4}},
    "split tables": {"run": {"devices": 4, "shard_tables": True}},
    "host": {"run": {"client_store": "host"}},
    "edges": {"server": {"edges": 2}},
    "ages": {"cohort": {"name": "buffered", "size": 6, "dropout": 0.2}, "clock": {"name": "lognormal"}},
    "fold in": {"evaluation": {"every": 1, "fold_in": True}},
    "codes": {"channel": [{"name": "mean"}, {"name": "quantise"}], "download": [{"name": "quantise", "bits": 16}]},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_wherever_clients_run_and_whatever_they_are_sent(named, name):
    """Against the same as a constant; where the table of its row numbers must not change, against one device."""
    frozen = rounds_of(named("frozen_True", **SETTINGS[name]))
    if name in ("devices", "split tables", "host"):
        wanted = rounds_of(named("frozen_True"))
    elif name == "codes":  # which act on the row numbers, too: that it trains is what is left
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(frozen[1]))
        return
    else:
        wanted = rounds_of(named("constant_True", **SETTINGS[name]))
    close(*(each[1][0]["params"] for each in (frozen, wanted)), atol=1e-5)
    for metric in ("test/full/ndcg@10", "test/sampled/hr@10"):
        assert frozen[2][metric] == pytest.approx(wanted[2][metric], abs=1e-4)


def test_recommendations_read_it(named):
    it = named("frozen_True")
    _, model, _ = rounds_of(it)
    home = int(it.data.population.homes[0])
    user = int(it.data.population.client_offsets[0])
    got = score_items(it, model, UserPlace(it.data.population, user, 0, home))
    own = np.asarray(model[1]["private"]["user"][home, 0])
    want = SCALE * TEXT @ np.asarray(model[0]["params"]["projection"]) @ own
    want = want + np.asarray(model[0]["tables"]["bias"].rows)
    offered = np.isfinite(got)
    assert 0 < offered.sum() < ITEMS
    np.testing.assert_allclose(got[offered], want[offered], atol=1e-5)


def test_a_run_that_goes_on_has_the_same_frozen_part(tmp_path, named, monkeypatch):
    def trained(rounds, folder):
        return train_run(
            make_config(TABLE | {"rounds": rounds, "model": {"name": "frozen_True"}, "run": {"out": str(folder)}}), True
        )

    trained(2, tmp_path / "two")
    record = newest_record(tmp_path / "two" / "checkpoints")
    it = named("frozen_True")
    assert record["frozen"] == tree_digest(jax.tree.map(np.asarray, it.model.frozen))
    assert open_best_model(tmp_path / "two")
    whole = trained(3, tmp_path / "whole")
    assert trained(3, tmp_path / "two")["params_sha256"] == whole["params_sha256"]
    assert whole["bytes_frozen"] == it.wire.frozen
    text = TEXT.copy()
    text[3, 2] += 1e-3
    monkeypatch.setitem(REGISTRY["model"], "frozen_True", make("frozen", True, text))
    with pytest.raises(ValueError, match="was run with other frozen values of its model") as error:
        trained(4, tmp_path / "two")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="was run with other frozen values of its model"):
        open_best_model(tmp_path / "two")


def test_checkpoints_do_not_grow_with_it(tmp_path, monkeypatch):
    """8 MB of vectors; the arrays of the run are a few kB."""
    text = np.random.default_rng(1).normal(size=(ITEMS, WIDTH)).astype(np.float32)

    class Wide(nn.Module):
        num_users: int
        by_text: bool = True

        @nn.compact
        def __call__(self, user, item=None):
            wide = self.variable("frozen", "wide", lambda: jax.random.normal(jax.random.key(2), (2_000_000,))).value
            vectors = self.variable("frozen_tables", "text", lambda: jnp.asarray(text)).value
            projection = normal_variable(self, "params", "projection", (WIDTH, 4), 0.3)
            users = normal_variable(self, "private", "user", (self.num_users, 4), 0.3)
            return score_rows(take_vectors(vectors @ projection, item), users[user]) + wide[0]

    monkeypatch.setitem(
        REGISTRY["model"], "wide", lambda num_items, num_users: from_module(Wide(num_users), find_loss("bce"))
    )
    found = train_run(make_config(TABLE | {"model": {"name": "wide"}, "run": {"out": str(tmp_path / "run")}}))
    assert found["bytes_frozen"] > 8_000_000
    assert sum(file.stat().st_size for file in (tmp_path / "run").rglob("*") if file.is_file()) < 1_000_000


def test_a_module_without_it_has_none(named):
    assert named("constant_True").model.frozen == ()
    a, b = (
        from_module(Projected(2, 4, "frozen", False, tuple(map(tuple, TEXT.tolist()))), find_loss("bce")).frozen
        for _ in range(2)
    )
    same(a, b)


def test_a_program_s_own_module(tmp_path):
    """Pieces without names: saved and restored, and refused with other values."""
    clients = jf.data.partition(jf.data.load("synthetic", users=24, items=50, mean_length=8.0))

    def own_run(text):
        model = make("frozen", True, text)(clients.num_items, 1)
        method = jf.algorithms.fedavg(model, optax.sgd(0.3))
        return jf.Experiment(clients, model, method, cohort=jf.sampling.uniform(8))

    run, whole = own_run(TEXT), own_run(TEXT)
    list(run.train(2))
    run.save(tmp_path / "saved")
    again = own_run(TEXT)
    again.restore(tmp_path / "saved")
    list(again.train(3))
    list(whole.train(3))
    assert again.params_sha256 == whole.params_sha256
    with pytest.raises(ValueError, match="was run with other frozen values of its model"):
        own_run(TEXT + 1).restore(tmp_path / "saved")
