"""ONNX files: they score as JAX does, for any number of users, and what cannot be one is refused by name."""

import json
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from jaxfed import models
from jaxfed.cli import main
from jaxfed.config.schema import make_config
from jaxfed.export import bundle, onnx_files
from jaxfed.export.functions import make_functions, name_leaves
from jaxfed.export.loader import load_export
from jaxfed.export.onnx_files import IR_VERSION, OPSET, call_scorer, convert_function
from jaxfed.export.onnx_graph import NoOnnxFormError
from jaxfed.training.loop import train_run
from tests.small import SEQUENCES, TABLE

ITEMS, LENGTH, LATEST = 20, 9, 2**31 - 1
SMALL = {"dim": 8, "length": 6}
BLOCK = {**SMALL, "blocks": 1}
BY_HISTORY = {name: (name, SMALL if name == "gru4rec" else BLOCK) for name in SEQUENCES} | {
    "ligr": ("sasrec", {**BLOCK, "block": "ligr"}),
    "cosine": ("gru4rec", {**SMALL, "temperature": 0.1}),
    "times": ("hstu", {**BLOCK, "time_bias": "known"}),
    "bfloat16": ("sasrec", {**BLOCK, "table_dtype": "bfloat16"}),
    "ease": ("ease", {}),
    "transitions": ("transitions", {}),
}
BY_PRIVATE_PART = ("mf", "fm", "neumf", "two_tower", "metamf", "pfedrec", "fedrap")
HISTORIES = np.array(
    [
        [-1] * LENGTH,  # none
        [4, 7, 2] + [-1] * (LENGTH - 3),
        [3, 1, 4, 15, 9, 2, 6, 5, 3],  # more than the models of sequences read
        [-1, 5, -1, -1, 0, -1, 19, -1, -1],
        [1, LATEST, ITEMS, 3, -7, ITEMS + 1, -1, -1, -1],  # what is no item is no item
        [LATEST] * LENGTH,
    ],
    np.int32,
)


def make_scorers(name, **settings):
    """(functions, weights by their paths, private parts by theirs) of a model, all numbers drawn at random."""
    random = np.random.default_rng(0)

    def draw(x):
        return jnp.asarray(0.3 * random.normal(size=x.shape), x.dtype)

    model = getattr(models, name)(num_items=ITEMS, num_users=3, **settings)
    shared = name_leaves(jax.tree.map(draw, model.init(jax.random.key(0))))
    private = name_leaves(jax.eval_shape(model.private, jax.random.key(0)))
    return make_functions(model, shared, private, ITEMS, 5), shared.leaves, private.leaves


def convert_for_any(function, weights, asked):
    """The ONNX model of a function, for any length of the first dimension of what is asked."""
    (b,) = jax.export.symbolic_shape("b")
    return convert_function(
        function, weights, {k: jax.ShapeDtypeStruct((b, *x.shape[1:]), x.dtype) for k, x in asked.items()}
    )


def check_scores(function, weights, asked, rtol=1e-5):
    """Holds the scores of the ONNX model, for all users and for one, to those of JAX."""
    model = convert_for_any(function, weights, asked)
    onnx.checker.check_model(model, full_check=True)
    assert (model.opset_import[0].version, model.ir_version) == (OPSET, IR_VERSION)
    expected = np.asarray(jax.jit(function)(weights, asked))
    assert np.isfinite(expected).all()
    run = ReferenceEvaluator(model).run
    for users in (len(expected), 1):
        (found,) = run(None, {name: x[:users] for name, x in asked.items()})
        assert found.dtype == expected.dtype
        # sums of a few dozen terms in another order
        np.testing.assert_allclose(found, expected[:users], rtol=rtol, atol=1e-6 * np.abs(expected).max())
    return model, expected


@pytest.mark.parametrize("case", BY_HISTORY)
def test_histories_are_scored_as_by_jax(case):
    name, settings = BY_HISTORY[case]
    functions, weights, _ = make_scorers(name, **settings)
    asked = {"history": HISTORIES}
    if case == "times":
        times = np.random.default_rng(1).integers(0, 10**6, (len(HISTORIES), LENGTH + 1))
        asked["times"] = np.sort(times, 1).astype(np.int32)
    model, scores = check_scores(partial(call_scorer, functions["score_histories"]), weights, asked)
    assert scores[1].std() > 0  # else nothing is compared
    np.testing.assert_array_equal(scores[0], scores[5])
    names = {each.name for each in model.graph.initializer}
    assert weights.keys() <= names, "a weight is not in the file by its path"


@pytest.mark.parametrize("name", BY_PRIVATE_PART)
def test_users_are_scored_by_what_clients_keep_as_by_jax(name):
    functions, weights, private = make_scorers(name)
    random, users = np.random.default_rng(2), np.array([0, 1, 2, 1, 7, 0], np.int32)
    own = {f"private:{path}": random.normal(size=(len(users), *x.shape)).astype(x.dtype) for path, x in private.items()}
    check_scores(partial(call_scorer, functions["score_private"]), weights, {"user": users, **own})


@pytest.mark.parametrize("name", ["mf", "neumf", "ials"])
def test_what_is_trained_from_a_history_is_refused_by_name(name):
    functions, weights, _ = make_scorers(name)
    with pytest.raises(NoOnnxFormError, match="^the primitive (scatter|rem) is not built in ONNX$"):
        convert_for_any(partial(call_scorer, functions["score_histories"]), weights, {"history": HISTORIES})


ODD = np.array([[0, 3], [-1, 4], [LATEST, -LATEST], [2, 5]], np.int32)  # of a table of five rows
FUNCTIONS = {
    "rows, zeros past the end": lambda table, x: table.at[x].get(mode="fill", fill_value=0),
    "rows, the last past the end": lambda table, x: table.at[x].get(mode="clip"),
    "numbers of each user": lambda table, x: jax.vmap(lambda own, i: own.at[i].get(mode="fill", fill_value=7))(x, x),
    "sums by item": lambda table, x: jax.vmap(lambda i: jnp.zeros(5).at[i].add(2.0, mode="drop"))(x),
    "truth values": lambda table, x: jnp.where(x > 0, x == 3, x < -5).astype(jnp.float32) + (x != 2).any(-1)[:, None],
    "all": lambda table, x: (x < 4).all(-1),
    "running sums": lambda table, x: jnp.cumsum(table.at[x].get(mode="clip"), 1),
    "running sums, backwards": lambda table, x: jax.lax.cumsum(table.at[x].get(mode="clip"), 1, reverse=True),
    "slices": lambda table, x: jax.lax.slice_in_dim(table.at[x].get(mode="clip"), 1, 4, 2, axis=2),
    "a scan": lambda table, x: jax.lax.scan(
        lambda sum, row: (sum + row[None] * x.max(-1)[:, None], sum.max(-1)), jnp.zeros((x.shape[0], 4)), table
    )[1],
    "a scan over users": lambda table, x: jax.lax.map(lambda one: table[jnp.clip(one[0], 0, 4)] * 2, x),
    "parts": lambda table, x: sum(jnp.split(table.at[x].get(mode="clip"), [1], axis=2)[0:1]) + jnp.unstack(table)[3][1],
    "powers": lambda table, x: table.at[x].get(mode="clip") ** 3 + jax.nn.gelu(table[0], approximate=False),
    "products": lambda table, x: jnp.einsum("bij,kj->kbi", table.at[x].get(mode="clip"), table),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_primitives_are_those_of_jax(name):
    table = np.random.default_rng(3).normal(size=(5, 4)).astype(np.float32)

    def function(weights, asked):
        return FUNCTIONS[name](weights["table"], asked["x"])

    model = convert_for_any(function, {"table": table}, {"x": ODD})
    (found,) = ReferenceEvaluator(model).run(None, {"x": ODD})
    np.testing.assert_allclose(found, function({"table": jnp.array(table)}, {"x": ODD}), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (lambda x: jnp.sort(x, -1), "the primitive sort is not built"),
        (lambda x: jax.lax.scan(lambda s, y: (s, y), 0, x, reverse=True)[1], "scan is not built in ONNX backwards"),
        (lambda x: x & 3, "and is not built in ONNX of numbers"),
        (lambda x: jnp.broadcast_to(x[:, None], (x.shape[0], 2 * x.shape[0], 2)), "a dimension of the length 2[*]b"),
        (lambda x: jnp.arange(6.0).reshape(2, 3)[:, jnp.clip(x, 0, 2)], "gather is not built in ONNX but for rows"),
    ],
)
def test_what_is_not_built_is_refused_by_name(function, says):
    with pytest.raises(NoOnnxFormError, match=says):
        convert_for_any(lambda weights, asked: function(asked["x"]), {}, {"x": ODD})


def test_weights_that_no_file_can_hold_are_refused(monkeypatch):
    monkeypatch.setattr(onnx_files, "MOST_BYTES", 15)
    with pytest.raises(NoOnnxFormError, match="less than 2 GB"):
        convert_for_any(lambda weights, asked: weights["w"] + asked["x"], {"w": np.zeros(2)}, {"x": ODD})


def export_as_onnx(folder, out, monkeypatch, **changes):
    """Trains a run and exports it by the command."""
    train_run(make_config({**TABLE, "rounds": 1, **changes, "run": {"out": str(folder)}}))
    monkeypatch.setattr(sys, "argv", ["jaxfed", "export", str(folder), str(out), "--onnx", "--platforms", "cpu"])
    main.main()
    return json.loads((out / "manifest.json").read_text())


def test_the_command_writes_what_can_be_written(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    manifest = export_as_onnx(tmp_path / "run", out, monkeypatch)
    assert manifest["onnx"]["files"] == {"score_private": "score_private.onnx"}
    assert "score_private.onnx" in manifest["files"]
    assert manifest["onnx"]["refused"].keys() == {"score_histories"}
    assert "no score_histories.onnx: the primitive scatter" in capsys.readouterr().out
    assert not (out / "score_histories.onnx").exists()
    export = load_export(out)
    _, own, _ = export.manifest["functions"]["score_private"]["inputs"]
    (path,), random = own, np.random.default_rng(4)
    shape = [int(word) for word in own[path].rstrip("]").split(",")[1:]]
    private, users = random.normal(size=(3, *shape)).astype(np.float32), np.zeros(3, np.int32)
    expected = export.functions["score_private"](export.weights, {path: private}, {"user": users})
    model = onnx.load(out / "score_private.onnx")
    (found,) = ReferenceEvaluator(model).run(None, {f"private:{path}": private, "user": users})
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    (out / "score_private.onnx").write_bytes(b"other")
    with pytest.raises(ValueError, match=r"score_private.onnx was changed or damaged"):
        load_export(out)


def test_a_run_of_sequences_is_written(tmp_path, monkeypatch):
    model, out = {"name": "sasrec", "dim": 8, "length": 6, "blocks": 1}, tmp_path / "out"
    manifest = export_as_onnx(tmp_path / "run", out, monkeypatch, model=model, work={"optimizer": {"name": "sgd"}})
    assert manifest["onnx"] == {"opset": OPSET, "files": {"score_histories": "score_histories.onnx"}, "refused": {}}
    export, history = load_export(out), HISTORIES[:, : manifest["history_length"]]
    expected = export.functions["score_histories"](export.weights, {"history": history})
    (found,) = ReferenceEvaluator(onnx.load(out / "score_histories.onnx")).run(None, {"history": history})
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)  # sums of a few dozen terms


def test_without_the_package_it_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bundle, "find_spec", lambda name: None if name == "onnx" else name)
    monkeypatch.setattr(sys, "argv", ["jaxfed", "export", str(tmp_path / "run"), str(tmp_path / "out"), "--onnx"])
    with pytest.raises(SystemExit) as stopped:
        main.main()
    assert stopped.value.code == 2
    assert 'pip install "jaxfed[onnx]"' in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
