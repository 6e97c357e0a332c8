"""Exports: read by a process without jaxfed, they recommend what the run does; what was changed is refused."""

import itertools
import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfed.cli import main
from jaxfed.config.schema import make_config
from jaxfed.export.bundle import MOST_ITEMS, ExportedRun, export_run, make_client_example
from jaxfed.export.functions import CHUNK, find_top_items, name_leaves
from jaxfed.export.loader import load_export, recommend_by_history
from jaxfed.training.best_model import open_best_model
from jaxfed.training.loop import train_run
from jaxfed.training.recommend import locate_user, score_items
from tests.small import TABLE, child_environment

MODELS = {
    "mf": {},
    "neumf": {"model": {"name": "neumf", "dim": 4}},
    "sasrec": {"model": {"name": "sasrec", "dim": 8, "length": 6}, "work": {"optimizer": {"name": "sgd"}}},
    "bert4rec": {"model": {"name": "bert4rec", "dim": 8, "length": 6}, "work": {"optimizer": {"name": "sgd"}}},
    "bpr": {"model": {"name": "mf", "dim": 4, "loss": "bpr"}},
    "ease": {
        "model": {"name": "ease"},
        "work": {"name": "statistics"},
        "channel": [],
        "server": {"name": "solve"},
        "cohort": {"name": "everyone"},
        "evaluation": {"every": 1},
        "rounds": 1,
    },
    "bfloat16": {"model": {"name": "mf", "dim": 4, "table_dtype": "bfloat16"}},
}
BY_HISTORY = ("sasrec", "bert4rec", "ease")  # models that keep nothing of a user: evaluations read histories, too


def make_run(folder, **changes):
    """A small run in a folder."""
    table = {**TABLE, "rounds": 2, **changes, "run": {"out": str(folder)}}
    train_run(make_config(table))
    return str(folder)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """exported(model) -> (folder of a run, folder of its export with users), each made once."""
    made = {}

    def find(name):
        if name not in made:
            root = tmp_path_factory.mktemp(name)
            run = make_run(root / "run", **MODELS[name])
            export_run(run, root / "out", users=True)
            made[name] = run, root / "out"
        return made[name]

    return find


def expected_items(run, user, number):
    """(ids, scores) of the best items by the run itself."""
    parts, _, best = open_best_model(run)
    scores = score_items(parts, best, locate_user(parts.data.population, user, None))
    top = [i for i in np.argsort(-scores, kind="stable")[:number] if np.isfinite(scores[i])]
    return [str(parts.data.source.items[i]) for i in top], scores[top]


ALONE = """
import importlib.util, json, sys
sys.modules["jaxfed"] = None  # an import of it fails
spec = importlib.util.spec_from_file_location("load", sys.argv[1] + "/load.py")
load = importlib.util.module_from_spec(spec)
spec.loader.exec_module(load)
histories = json.loads(sys.stdin.read())
export = load.load_export(sys.argv[1])
print(json.dumps(load.recommend_by_history(export, histories)))
loaded = {name.split(".")[0] for name, module in sys.modules.items() if module}
assert not loaded & {"jaxfed", "flax", "optax", "safetensors"}
"""


@pytest.mark.parametrize("name", BY_HISTORY)
def test_a_process_without_jaxfed_recommends_what_the_run_does(exported, name):
    run, out = exported(name)
    parts, _, _ = open_best_model(run)
    with np.load(out / "users.npz") as users:
        names, start, history = users["ids"], users["start"], users["history"]
    ids = [str(item) for item in parts.data.source.items]
    histories = [[ids[i] for i in history[a:b]] for a, b in itertools.pairwise(start)]
    asked = subprocess.run(
        [sys.executable, "-c", ALONE, str(out)], input=json.dumps(histories), capture_output=True, text=True,
        env=child_environment(), cwd=out.parent, check=False,
    )  # fmt: skip
    assert not asked.returncode, asked.stderr
    items, scores = json.loads(asked.stdout)
    assert len(items) == len(names) > 20
    for user, found, values in zip(names, items, scores, strict=True):
        best, expected = expected_items(run, str(user), 10)
        assert found == best
        np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6)  # sums of a few dozen terms


FOR_USERS = """
import runpy, sys
sys.modules["jaxfed"] = None
sys.argv[1:] = [sys.argv[1], "--users"]
runpy.run_path(sys.argv[1] + "/load.py", run_name="__main__")
"""


@pytest.mark.parametrize("name", MODELS)
def test_all_users_are_recommended_to_without_jaxfed(exported, name):
    run, out = exported(name)
    asked = subprocess.run(
        [sys.executable, "-c", FOR_USERS, str(out)], capture_output=True, text=True, env=child_environment(), check=True
    )
    lines = [json.loads(line) for line in asked.stdout.splitlines()]
    with np.load(out / "users.npz") as users:
        assert [each["user"] for each in lines] == users["ids"].tolist()
    for each in lines:
        best, expected = expected_items(run, each["user"], 10)
        assert each["items"] == best
        np.testing.assert_allclose(each["scores"], expected, rtol=1e-5, atol=1e-6)  # sums of a few dozen terms


@pytest.mark.parametrize("name", [name for name in MODELS if name not in BY_HISTORY])
def test_scores_by_what_a_client_keeps_are_those_of_the_run(exported, name):
    run, out = exported(name)
    export = load_export(out)
    parts, _, best = open_best_model(run)
    with np.load(out / "users.npz") as users:
        found = dict(users)
    private = {path.partition(":")[2]: x[found["client"]] for path, x in found.items() if path.startswith("private:")}
    scores = np.asarray(export.functions["score_private"](export.weights, private, {"user": found["user"]}))
    assert len(scores) == len(found["ids"]) > 20
    for row, user in zip(scores, found["ids"], strict=True):
        expected = score_items(parts, best, locate_user(parts.data.population, str(user), None))
        seen = ~np.isfinite(expected)
        assert seen.any()
        np.testing.assert_allclose(row[~seen], expected[~seen], rtol=1e-5, atol=1e-6)  # sums of a few dozen terms


@pytest.mark.parametrize("name", ["mf", "sasrec"])
def test_the_training_of_a_client_is_that_of_the_run(exported, name):
    """The exported step against `ClientWork.update` on arrays that were drawn at random."""
    run, out = exported(name)
    export, (parts, _, (shared, _)) = load_export(out), open_best_model(run)
    inputs = export.manifest["functions"]["update_client"]["inputs"]
    random = np.random.default_rng(0)

    def draw(path, described):
        kind, _, shape = described.partition("[")
        shape = tuple(int(word) for word in shape.rstrip("]").split(",") if word)
        if path == "rows":
            return np.stack([random.permutation(shape[1]) for _ in range(shape[0])]).astype(np.int32)
        if kind == "bool":
            return np.ones(shape, bool)
        if path == "batch/catalogue":  # the number of items
            return np.full(shape, 50, np.float32)
        if kind == "float32":
            return random.uniform(0, 1, shape).astype(np.float32)
        return random.integers(0, 5, shape).astype(kind)

    broadcast, state, batches, key = (
        {path: draw(path, one) for path, one in part.items()} if isinstance(part, dict) else draw("key", part)
        for part in inputs
    )
    found = export.functions["update_client"](broadcast, state, batches, key)
    example = make_client_example(ExportedRun(parts, name_leaves(shared), (), 1))
    given = (broadcast, state, batches)
    trees = (part.rebuild(jax.tree.map(jnp.array, one)) for part, one in zip(example, given, strict=True))
    expected = parts.method.work.update(*trees, jax.random.wrap_key_data(jnp.array(key)))
    assert any(np.abs(leaf).max() > 0 for leaf in found["update"].values())
    for path, leaf in name_leaves(expected.update).leaves.items():
        np.testing.assert_allclose(found["update"][path], leaf, rtol=1e-4, atol=1e-6)  # a few steps, fused otherwise
    np.testing.assert_allclose(found["weight"], expected.weight)


def by_hand(scores, excluded, most):
    """The best of a row of scores, by a stable sort."""
    scores = scores.copy()
    scores[[item for item in excluded if 0 <= item < len(scores)]] = -np.inf
    best = np.argsort(-scores, kind="stable")[:most]
    return np.where(np.isfinite(scores[best]), best, -1), scores[best]


@pytest.mark.parametrize("size", [7, 40, 16 * CHUNK, 16 * CHUNK + 1, 20 * CHUNK + 17, 50 * CHUNK])
@pytest.mark.parametrize("levels", [3, 1000])
def test_the_best_items_are_those_of_a_stable_sort(size, levels):
    """Few levels: nearly all scores are ties, and the lower number comes first, in other chunks too."""
    random = np.random.default_rng(size)
    scores = random.integers(0, levels, (3, size)).astype(np.float32)
    excluded = random.integers(-1, size + 2, (3, 5)).astype(np.int32)
    most = min(10, size)
    items, values = find_top_items(most, jnp.array(scores), jnp.array(excluded))
    for row in range(3):
        expected, best = by_hand(scores[row], excluded[row], most)
        np.testing.assert_array_equal(items[row], expected)
        np.testing.assert_array_equal(values[row], best)


def test_where_all_is_excluded_there_is_no_item():
    items, values = find_top_items(3, jnp.zeros((1, 4)), jnp.array([[0, 1, 2, 3]]))
    assert items.tolist() == [[-1, -1, -1]]
    assert np.isneginf(values).all()


# --- files ----------------------------------------


def test_without_users_nothing_of_a_user_leaves(exported, tmp_path):
    run, _ = exported("mf")
    export_run(run, tmp_path / "out")
    assert not (tmp_path / "out" / "users.npz").exists()
    assert (tmp_path / "out" / "manifest.json").stat().st_mode & 0o077  # as any folder, others may read it
    parts, _, (_, private) = open_best_model(run)
    every = b"".join(path.read_bytes() for path in (tmp_path / "out").iterdir())
    own = np.asarray(jax.tree.leaves(private)[0])
    assert own.shape[0] == parts.data.population.num_clients
    assert not any(row.tobytes() in every for row in own)


@pytest.mark.parametrize("name", ["weights.safetensors", "items.json", "score_histories.stablehlo", "load.py"])
def test_what_was_changed_is_refused(exported, tmp_path, name):
    out = tmp_path / "out"
    shutil.copytree(exported("sasrec")[1], out)
    data = bytearray((out / name).read_bytes())
    data[len(data) // 2] ^= 1
    (out / name).write_bytes(bytes(data))
    with pytest.raises(ValueError, match=f"{name} was changed or damaged"):
        load_export(out)
    (out / name).unlink()
    with pytest.raises(ValueError, match=f"{name} is missing"):
        load_export(out)


@pytest.mark.parametrize(
    ("text", "says"),
    [("", "damaged"), ("[]", "another format"), ('{"format": 99}', "another format"), ("{", "damaged")],
)
def test_a_manifest_that_is_none_is_refused(tmp_path, text, says):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=says):
        load_export(tmp_path)


def test_nothing_is_overwritten(exported, tmp_path):
    run, out = exported("mf")
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="no export"):
        export_run(run, tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(ValueError, match="--replace"):
        export_run(run, out)
    before = json.loads((out / "manifest.json").read_text())
    export_run(run, out, users=True, replace=True)
    assert json.loads((out / "manifest.json").read_text())["files"].keys() == before["files"].keys()
    assert not out.with_name("out.old").exists()
    assert not out.with_name("out.partial").exists()


def test_a_run_that_diverged_is_not_exported(tmp_path):
    """Rates so high that scores are no numbers, while each weight is one."""
    run = make_run(tmp_path / "run", model={"name": "metamf"})
    with pytest.raises(ValueError, match="diverged"):
        export_run(run, tmp_path / "out")
    assert [each.name for each in tmp_path.iterdir()] == ["run"]


def test_the_card_says_what_a_reader_must_know(exported, tmp_path):
    card = (exported("mf")[1] / "README.md").read_text()
    assert "no differential privacy" in card
    assert "loo-clean" in card
    assert "test/full/hr@10" in card
    assert "the least active first" in card
    run = make_run(tmp_path / "run", data={**TABLE["data"], "protocol": "compat-pfedrec"})
    export_run(run, tmp_path / "out")
    assert "LEAKY" in (tmp_path / "out" / "README.md").read_text()
    assert load_export(tmp_path / "out").manifest["leaky"]


def test_no_path_of_the_machine_is_in_an_export(tmp_path):
    rows = [f"{user},{item},5,{user * 31 + item}" for user in range(30) for item in range(user % 5, 20, 2)]
    (tmp_path / "mine.csv").write_text("user,item,rating,time\n" + "\n".join(rows) + "\n")
    run = make_run(tmp_path / "run", data={"name": "csv", "path": str(tmp_path / "mine.csv")})
    export_run(run, tmp_path / "out", users=True)
    for path in (tmp_path / "out").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path.name


def test_the_command(exported, tmp_path, monkeypatch, capsys):
    run, _ = exported("sasrec")
    monkeypatch.setattr(sys, "argv", ["jaxfed", "export", run, str(tmp_path / "out"), "--platforms", "cpu,cuda"])
    main.main()
    assert "score_histories" in capsys.readouterr().out
    export = load_export(tmp_path / "out")
    assert export.manifest["platforms"] == ["cpu", "cuda"]
    items, scores = recommend_by_history(export, [[export.items[3]]], number=4)
    assert len(items[0]) == len(scores[0]) == 4
    assert export.items[3] not in items[0]
    with pytest.raises(ValueError, match="no item 'none'"):
        recommend_by_history(export, [["none"]])
    for words, says in (
        (["export", run, str(tmp_path / "b"), "--platforms", "cpu,gpu"], "no platform 'gpu'"),
        (["export", str(tmp_path / "none"), str(tmp_path / "b")], "no run here"),
    ):
        monkeypatch.setattr(sys, "argv", ["jaxfed", *words])
        with pytest.raises(SystemExit) as stopped:
            main.main()
        assert stopped.value.code == 2
        assert says in capsys.readouterr().err
        assert not (tmp_path / "b").exists()


def test_long_lists_of_items_are_as_long_as_the_manifest_says(exported):
    export = load_export(exported("sasrec")[1])
    assert export.manifest["most_items"] == min(MOST_ITEMS, export.manifest["num_items"])
