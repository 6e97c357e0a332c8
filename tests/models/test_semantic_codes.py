"""Semantic codes: residual k-means, digits that tell items apart, rows of codes as a model's item vectors."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxfed as jf
from jaxfed.config.build import build_from_config, load_data
from jaxfed.config.schema import make_config
from jaxfed.core.model import with_frozen
from jaxfed.core.tables import num_rows, unwrap
from jaxfed.models.semantic_codes import code_rows, count_same_before, semantic_codes, sum_code_rows
from jaxfed.training.loop import train_run
from tests.small import KEY, close
from tests.small_text import write_encoder

_rng = np.random.default_rng(3)
VECTORS = _rng.normal(size=(60, 5))
MODELS = {
    "mf": lambda items, users=1: jf.models.mf(items, users, dim=4),
    "neumf": lambda items, users=1: jf.models.neumf(items, users, 4),
    "sasrec": lambda items, users=1: jf.models.sasrec(items, dim=4, length=6, dropout=0.0),
}


def test_codes_are_the_same_again_and_different_for_each_item():
    first, again = (semantic_codes(VECTORS, levels=2, size=4, seed=1) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert len(np.unique(first, axis=0)) == 60
    assert first[:, :2].max() == 3
    assert first[:, 2].max() >= 3  # 16 codes for 60 items
    assert (semantic_codes(VECTORS, levels=2, size=4, seed=2) != first).any()


def test_the_last_digit_counts_equal_codes():
    codes = np.array([[1, 0], [2, 0], [1, 0], [1, 1], [1, 0], [2, 0]])
    np.testing.assert_array_equal(count_same_before(codes), [0, 0, 1, 0, 2, 1])


def test_each_level_takes_off_what_the_clusters_leave():
    """More levels come nearer to the vectors; vectors on a grid are found without a rest."""
    grid = np.array([[x, y] for x in (0.0, 100.0) for y in (0.0, 1.0) for _ in range(3)])
    codes = semantic_codes(grid, levels=2, size=2)
    assert len(np.unique(codes[:, :2], axis=0)) == 4
    np.testing.assert_array_equal(codes[:, 2], [0, 1, 2] * 4)

    def rest(levels):
        codes, left = semantic_codes(VECTORS, levels, 5)[:, :levels], VECTORS
        for level in range(levels):
            left = left - np.array([left[codes[:, level] == code].mean(0) for code in codes[:, level]])
        return np.square(left).sum()

    assert rest(3) < 0.8 * rest(2) < 0.64 * rest(1)


def test_rows_that_are_no_items_have_no_codes():
    vectors = VECTORS.copy()
    vectors[7] = np.nan
    codes = semantic_codes(vectors, levels=2, size=4)
    assert (codes[7] == -1).all()
    assert (np.delete(codes, 7, 0) >= 0).all()
    got = sum_code_rows(jnp.ones((20, 2)), jnp.array(codes), np.array([0, 4, 8]))
    np.testing.assert_array_equal(got[6:9], [[3, 3], [0, 0], [3, 3]])


@pytest.mark.parametrize("name", MODELS)
def test_one_code_an_item_is_the_plain_table(name):
    """Its loss and its gradient; to the order of float32 sums."""
    plain = MODELS[name](50)
    made = code_rows(plain, np.random.default_rng(0).permutation(50)[:, None])
    codes = made.frozen["item_codes"].rows[:, 0]
    shared = unwrap(plain.init(KEY))
    shared = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(KEY, x.shape), shared)
    theta = {
        "params": {"model": shared["params"], "codes": jax.tree.map(lambda x: x[np.argsort(codes)], shared["tables"])}
    }
    assert jax.tree.map(jnp.shape, unwrap(made.init(KEY))) == jax.tree.map(jnp.shape, theta)
    if plain.sequence:
        batch = {"sequence": jnp.array([3, 9, 4, 11, 50]), "negative": jnp.ones(50), "catalogue": jnp.float32(50)}
        batch, private = batch | {"dropout": jnp.array([1, 2], jnp.uint32)}, ()
    else:
        batch, private = {"item": jnp.array([3, 9, 4]), "user": jnp.zeros(3, int)}, unwrap(plain.private(KEY))
        batch |= {"label": jnp.array([1.0, 0, 1]), "weight": jnp.ones(3)}

    def loss_of_codes(theta):
        return made.loss(with_frozen(theta, unwrap(made.frozen)), private, batch).total

    value, slope = jax.value_and_grad(loss_of_codes)(theta)
    want, wanted = jax.value_and_grad(lambda shared: plain.loss(shared, private, batch).total)(shared)
    assert value == pytest.approx(float(want), rel=1e-6)
    close(slope["params"]["model"], wanted["params"])
    close(jax.tree.map(lambda x: x[codes], slope["params"]["codes"]), wanted["tables"])


def test_a_vector_is_the_sum_of_its_rows():
    rows = jnp.arange(12.0).reshape(6, 2)
    got = sum_code_rows(rows, jnp.array([[0, 1, 0], [2, 0, 0]]), np.array([0, 3, 5]))
    np.testing.assert_array_equal(got, [rows[0] + rows[4] + rows[5], rows[2] + rows[3] + rows[5]])


def test_parameters_do_not_grow_with_the_catalogue():
    numbers = []
    for items in (80, 800):
        codes = semantic_codes(np.random.default_rng(0).normal(size=(items, 5)), 2, 6)
        shapes = jax.eval_shape(code_rows(MODELS["mf"](items), np.minimum(codes, 5)).init, KEY)
        assert num_rows(shapes) == 0
        numbers.append(sum(x.size for x in jax.tree.leaves(shapes)))
    assert numbers == [18 * (4 + 1)] * 2


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder with an encoder, clicks of users with very different histories, and titles."""
    pytest.importorskip("safetensors", reason="the extra `text` is not installed")
    pytest.importorskip("tokenizers", reason="the extra `text` is not installed")
    monkeypatch.setenv("JAXFED_DATA", str(tmp_path / "cache"))
    write_encoder(tmp_path / "model")
    rng = np.random.default_rng(0)
    clicks = [(u, i) for u in range(12) for i in rng.choice(23, 4 + u, replace=False)]
    lines = [f"{u},{i},{t}" for t, (u, i) in enumerate(clicks)]
    (tmp_path / "clicks.csv").write_text("user,item,time\n" + "\n".join(lines) + "\n")
    words = ["red", "blue", "night", "day", "comedy", "war"]
    titles = [f"{i},{' '.join(rng.choice(words, rng.integers(1, 5)))}" for i in range(23)]
    (tmp_path / "titles.csv").write_text("item,title\n" + "\n".join(titles) + "\n")
    return tmp_path


@pytest.mark.parametrize("name", ["mf", "sasrec"])
def test_each_client_sends_the_same_bytes(files, name):
    """However long its history is; and a run learns."""
    table = {
        "rounds": 30,
        "data": {"name": "csv", "path": str(files / "clicks.csv"), "titles": str(files / "titles.csv")},
        "model": {"name": name, "dim": 4} | ({"dropout": 0.0} if name == "sasrec" else {}),
        "parametrization": {"name": "codes", "folder": str(files / "model"), "levels": 2, "size": 8},
        "work": {"name": "gradient", "negatives": 4, "optimizer": {"name": "sgd", "learning_rate": 0.5}},
        "channel": [{"name": "weighted_mean"}],
        "server": {"name": "adam", "learning_rate": 0.05},
        "cohort": {"name": "everyone"},
        "evaluation": {"every": 1, "patience": 0},
        "run": {"out": str(files / "run")},
    }
    config = make_config(table)
    made = build_from_config(config, load_data(config.data))
    up = made.wire.up(np.array([1, 4, 23]))
    assert len(np.unique(up)) == 1
    assert up[0] >= 4 * sum(x.size for x in jax.tree.leaves(jax.eval_shape(made.model.init, KEY)))
    done = train_run(config)
    assert done["bytes_up_total"] == 30 * 12 * up[0]
    lines = map(json.loads, (files / "run" / "metrics.jsonl").read_text().splitlines())
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: code_rows(jf.models.ease(9), np.zeros((9, 1), int)), "a closed form"),
        (lambda: code_rows(jf.models.mf(9, dim=2), np.zeros((8, 1), int)), "codes of 8 items, the model has 9"),
        (lambda: semantic_codes(VECTORS, 0), "levels is 0"),
        (lambda: semantic_codes(VECTORS, 2, 0), "size is 0"),
        (lambda: semantic_codes(np.full((3, 2), np.nan)), "there is no item"),
    ],
)
def test_what_cannot_be_is_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()
