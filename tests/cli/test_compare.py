"""`jaxfed compare`: runs beside each other, and user by user."""

import json
import shutil

import numpy as np
import pytest

from jaxfed.config.schema import make_config
from jaxfed.evaluation.paired_tests import bootstrap_paired, correct_holm
from jaxfed.training.opened_experiment import load_run
from jaxfed.training.runs import shared_runner
from tests.programs import run_program

NDCG, SAMPLED = "test/full/ndcg@10", "test/sampled/hr@10"
SMALL = {
    "rounds": 4,
    "data": {"name": "synthetic", "users": 24, "items": 50, "mean_length": 6.0},
    "model": {"dim": 4},
    "work": {"batch_size": 16},
    "cohort": {"name": "everyone"},
    "evaluation": {"every": 2},
}
RUNS = {
    "base": {},
    "wide": {"model": {"dim": 8}, "rounds": 2},
    "seed": {"seed": 3},
    "few": {"evaluation": {"every": 2, "negatives": 20}},
    "other": {"data": {**SMALL["data"], "users": 30}},
    "leaky": {"data": {**SMALL["data"], "protocol": "compat-pfedrec"}},
    "ratio": {"data": {**SMALL["data"], "protocol": "ratio-clean"}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of some runs."""
    out, run = tmp_path_factory.mktemp("runs"), shared_runner()
    for name, more in RUNS.items():
        summary, problem = run(make_config({**SMALL, **more, "run": {"out": str(out / name)}}))
        assert summary, problem
    return out


def compared(monkeypatch, capsys, *words):
    """The JSON of `jaxfed compare`."""
    code, printed, said = run_program(monkeypatch, capsys, "compare", *words, "--json")
    assert code == 0, said
    return json.loads(printed)


def test_differences_are_those_of_the_users(folder, monkeypatch, capsys):
    """The bootstrap of what `evaluate_users` says, in the same order of users, and corrected over the runs."""
    names = ["base", "wide", "seed"]
    found = compared(monkeypatch, capsys, *(folder / name for name in names))
    users = {name: load_run(folder / name).best.evaluate_users("test") for name in names}
    p = []
    for name in names[1:]:
        assert (users[name]["user"] == users["base"]["user"]).all()
        expected = bootstrap_paired(users[name][NDCG], users["base"][NDCG])
        row = next(each for each in found["paired"] if each["run"] == str(folder / name) and each["metric"] == NDCG)
        assert (row["mean"], row["low"], row["high"], row["p"]) == pytest.approx(expected)
        assert row["users"] == 24
        p.append(row)
    assert [each["p_holm"] for each in p] == pytest.approx(correct_holm([each["p"] for each in p]))
    assert {each["metric"] for each in found["paired"]} == {
        f"test/{part}/{metric}@10" for part in ("full", "sampled") for metric in ("hr", "ndcg")
    }
    means = [each[NDCG] for each in found["runs"]]
    assert p[0]["mean"] == pytest.approx(means[1] - means[0])
    assert found["differences"] == {"model.dim": ["4", "8", "4"], "rounds": ["4", "2", "4"], "seed": ["0", "0", "3"]}
    assert found["notes"] == []


def test_what_is_printed(folder, monkeypatch, capsys):
    code, printed, _ = run_program(monkeypatch, capsys, "compare", folder / "base", folder / "wide")
    assert code == 0
    for words in ("model.dim", "test full ndcg@10", "MB up", "epsilon", "95 % interval", "paired bootstrap over users"):
        assert words in printed
    assert "Holm" not in printed  # there is one run to compare
    assert (
        "Holm" in run_program(monkeypatch, capsys, "compare", *(folder / each for each in ("base", "wide", "seed")))[1]
    )


def test_figures_of_users_are_kept_and_read_again(folder, tmp_path, monkeypatch, capsys):
    """With zeros in what is kept of one run the difference is the other's figure; a damaged file is made anew."""
    base, wide = (shutil.copytree(folder / name, tmp_path / name) for name in ("base", "wide"))
    first = compared(monkeypatch, capsys, base, wide)
    with np.load(wide / "users.npz") as file:
        kept = dict(file)
    with open(wide / "users.npz", "wb") as file:
        np.savez(file, **{name: value * 0 if "/" in name else value for name, value in kept.items()})
    second = compared(monkeypatch, capsys, base, wide, "--metric", NDCG)
    assert second["paired"][0]["mean"] == pytest.approx(-second["runs"][0][NDCG])
    (wide / "users.npz").write_bytes(b"PK nothing")
    assert compared(monkeypatch, capsys, base, wide) == first


def test_validation_and_other_figures(folder, monkeypatch, capsys):
    words = [
        folder / "base",
        folder / "wide",
        "--part",
        "val",
        "--metric",
        "val/full/mrr",
        "--metric",
        "val/full/ndcg@10",
    ]
    found = compared(monkeypatch, capsys, *words)
    assert [each["metric"] for each in found["paired"]] == ["val/full/mrr", "val/full/ndcg@10"]
    summary = json.loads((folder / "base" / "summary.json").read_text())
    assert found["runs"][0]["val/full/mrr"] == summary["val/full/mrr"]


@pytest.mark.parametrize(
    ("name", "why"), [("other", "other data"), ("ratio", "another protocol"), ("leaky", "another protocol")]
)
def test_other_data_and_protocols_are_not_compared_user_by_user(folder, monkeypatch, capsys, name, why):
    """A line says so; figures and configurations stand beside each other all the same."""
    found = compared(monkeypatch, capsys, folder / "base", folder / name, folder / "wide")
    assert {each["run"] for each in found["paired"]} == {str(folder / "wide")}
    assert found["notes"] == [f"{folder / name} is not compared with {folder / 'base'} user by user: {why}"]
    assert [each["leaky"] for each in found["runs"]] == [False, name == "leaky", False]
    code, printed, _ = run_program(monkeypatch, capsys, "compare", folder / "base", folder / name)
    assert code == 0
    assert why in printed
    assert ("leaky LEAKY" in printed.replace("\n", "")) == ("held-out items, or the model reads" in printed)
    assert ("LEAKY" in printed) == (name == "leaky")


def test_the_same_held_out_items_are_asked_for(folder, tmp_path, monkeypatch, capsys):
    """Runs whose summaries agree, but of whom other items are held out."""
    base, wide = (shutil.copytree(folder / name, tmp_path / name) for name in ("base", "wide"))
    compared(monkeypatch, capsys, base, wide)
    with np.load(wide / "users.npz") as file:
        kept = dict(file)
    with open(wide / "users.npz", "wb") as file:
        np.savez(file, **kept | {"held_out_sha256": np.array("of others")})
    found = compared(monkeypatch, capsys, base, wide)
    assert found["paired"] == []
    assert found["notes"][0].endswith("user by user: other held-out items")


def test_other_negatives_are_not_compared(folder, monkeypatch, capsys):
    found = compared(monkeypatch, capsys, folder / "base", folder / "few")
    assert {each["metric"] for each in found["paired"]} == {"test/full/hr@10", NDCG}
    assert "sampled figures are not compared: other negatives" in found["notes"][0]


def test_a_test_that_knows_more_of_a_user_is_said_to(folder, tmp_path, monkeypatch, capsys):
    """As that of a model of sequences, beside one that reads train items alone."""
    wide = shutil.copytree(folder / "wide", tmp_path / "wide")
    summary = json.loads((wide / "summary.json").read_text())
    (wide / "summary.json").write_text(json.dumps(summary | {"history": "train and validation items"}))
    found = compared(monkeypatch, capsys, folder / "base", wide)
    assert found["paired"]
    assert "its test knows other items of a user" in found["notes"][0]


def test_rows_with_labels_have_no_users_to_compare(tmp_path, monkeypatch, capsys):
    run = shared_runner()
    rows = [f"{user},{item},{1 + (user * item) % 5},{user + item}" for user in range(12) for item in range(6)]
    (tmp_path / "rows.csv").write_text("\n".join(["user,item,rating,time", *rows]) + "\n")
    data = {"name": "csv", "path": str(tmp_path / "rows.csv"), "label": "rating"}
    table = {"rounds": 2, "data": data, "model": {"name": "mf", "loss": "squared"}, "work": {"negatives": 0}}
    table |= {"evaluation": {"every": 2, "select": "val/rating/rmse"}}
    for seed in (0, 1):
        summary, problem = run(make_config({**table, "seed": seed, "run": {"out": str(tmp_path / str(seed))}}))
        assert summary, problem
    found = compared(monkeypatch, capsys, tmp_path / "0", tmp_path / "1")
    assert found["paired"] == []
    assert "have labels" in found["notes"][0]
    assert found["runs"][0]["test/rating/rmse"] is not None


def test_what_cannot_be_compared_is_one_line(folder, tmp_path, monkeypatch, capsys):
    unfinished = shutil.copytree(folder / "base", tmp_path / "unfinished")
    (unfinished / "summary.json").unlink()
    damaged = shutil.copytree(folder / "base", tmp_path / "damaged")
    (damaged / "metrics.jsonl").write_text('{"round": 2}\n{"round": \n')
    for words, text in (
        ([folder / "base"], "name two runs or more"),
        ([folder / "base", folder / "base"], "is named twice"),
        ([folder / "base", tmp_path / "nothing"], "no run here"),
        ([folder / "base", tmp_path], "no run here"),
        ([folder / "base", folder / "base" / "config.toml"], "is a file"),
        ([folder / "base", unfinished], "is not finished"),
        ([folder / "base", damaged], "line 2 is no row of figures"),
        ([folder / "base", folder / "wide", "--metric", "test/full/ndgc@10"], 'did you mean "test/full/ndcg@10"'),
    ):
        code, printed, said = run_program(monkeypatch, capsys, "compare", *words)
        assert (code, printed, said.count("\n")) == (2, "", 1), said
        assert text in said
