"""Where rows go: files that resume to the same bytes, packages that may be missing, and writers of one's own."""

import csv
import json
import shutil
import sys
import types
from importlib import metadata

import pytest

from jaxfed.config.registry import WRITERS, register
from jaxfed.config.schema import make_config
from jaxfed.training import writers
from jaxfed.training.loop import train_run
from jaxfed.training.opened_experiment import from_config
from tests.small import TABLE


def config_of(folder, names, rounds=8, **more):
    table = {
        **TABLE,
        "rounds": rounds,
        "evaluation": {"every": 2},
        "run": {"out": str(folder), "writers": names, **more},
    }
    return make_config(table)


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def table_of(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return [*csv.DictReader(file)]


def untimed(rows):
    """Rows without what a clock says."""
    return [{name: value for name, value in row.items() if not name.startswith("seconds")} for row in rows]


def same_cells(table, rows):
    """Whether a table has the rows of metrics.jsonl, cell by cell."""
    names = [*dict.fromkeys(name for row in rows for name in row)]
    assert [*table[0]] == names
    for cells, row in zip(table, rows, strict=True):
        for name in names:
            value = row.get(name)
            known = value if isinstance(value, str) else "" if value is None else json.dumps(value)
            assert cells[name] == known, name


def test_a_table_has_the_rows_of_the_file(tmp_path):
    """Those of the test too, whose figures are other ones; no TensorBoard where it is not asked for."""
    train_run(config_of(tmp_path / "a", ["csv"]))
    rows = rows_of(tmp_path / "a")
    assert len(rows) == 5
    same_cells(table_of(tmp_path / "a"), rows)
    assert not (tmp_path / "a" / "tensorboard").exists()
    train_run(config_of(tmp_path / "b", []))
    assert not (tmp_path / "b" / "metrics.csv").exists()


class StopsAfter:
    """A logger that ends the run as a crash would, after a number of rows."""

    def __init__(self, rows):
        self.left = rows

    def log_row(self, row):
        self.left -= 1
        if not self.left:
            raise RuntimeError("crash")

    def close(self):
        pass


def test_no_row_is_written_twice_after_a_crash(tmp_path):
    """Rows after the newest checkpoint were in the table, and come once more; they are there once."""
    whole = tmp_path / "whole"
    train_run(config_of(whole, ["csv"], checkpoint_every=4))
    crashed = tmp_path / "crashed"
    with pytest.raises(RuntimeError, match="crash"):
        train_run(config_of(crashed, ["csv"], checkpoint_every=4), loggers=[StopsAfter(3)])
    assert [row["round"] for row in table_of(crashed)] == ["2", "4", "6"]  # and the checkpoint is of round 4
    train_run(config_of(crashed, ["csv"], checkpoint_every=4), resume=True)
    same_cells(table_of(crashed), rows_of(crashed))
    assert untimed(table_of(crashed)) == untimed(table_of(whole))


def test_a_run_that_is_extended_goes_on_with_its_table(tmp_path):
    """The row of the first test is left out, as in metrics.jsonl."""
    train_run(config_of(tmp_path / "a", ["csv"], 4))
    train_run(config_of(tmp_path / "a", ["csv"], 8), resume=True)
    train_run(config_of(tmp_path / "b", ["csv"], 8))
    same_cells(table_of(tmp_path / "a"), rows_of(tmp_path / "a"))
    assert untimed(table_of(tmp_path / "a")) == untimed(table_of(tmp_path / "b"))


def test_a_writer_that_is_added_later_has_all_rows(tmp_path):
    train_run(config_of(tmp_path / "a", ["tensorboard"], 4))
    train_run(config_of(tmp_path / "a", ["tensorboard", "csv"], 8), resume=True)
    same_cells(table_of(tmp_path / "a"), rows_of(tmp_path / "a"))


def test_a_program_that_saves_has_its_writers(tmp_path):
    table = {**TABLE, "rounds": 4, "evaluation": {"every": 2}, "run": {"writers": ["csv"]}}
    run = from_config(table)
    list(run.train())
    run.save(tmp_path / "a")
    run.save(tmp_path / "a")
    same_cells(table_of(tmp_path / "a"), rows_of(tmp_path / "a"))
    train_run(make_config({**table, "rounds": 6, "run": {"writers": ["csv"], "out": str(tmp_path / "a")}}), resume=True)
    same_cells(table_of(tmp_path / "a"), rows_of(tmp_path / "a"))


def test_cells_of_odd_rows(tmp_path):
    """Numbers that are none are empty as in metrics.jsonl they are null; words may hold commas and quotes."""
    writer = writers.CsvWriter(writers.RunStart(tmp_path, {}, 0, ()))
    assert (tmp_path / "metrics.csv").read_text() == ""
    writer.log_row({"round": 1, "a": float("nan"), "b": None, "c": True, "d": 'x,"y"'})
    writer.log_row({"round": 2, "a": 0.5, "e": float("inf")})
    writer.log_row({"round": 3, "e": 1e-9})
    expected = [["1", "", "", "true", 'x,"y"', ""], ["2", "0.5", "", "", "", ""], ["3", "", "", "", "", "1e-09"]]
    assert [[*row.values()] for row in table_of(tmp_path)] == expected


# --- packages ------------------------------------


class FakeWandb(types.ModuleType):
    """W&B as far as it is used: a run takes steps that do not go back."""

    def __init__(self):
        super().__init__("wandb")
        self.runs, self.begun = {}, []

    def init(self, **options):
        self.begun.append(options)
        name = options.get("id") or f"id_{len(self.runs)}"
        return self.runs.setdefault(name, FakeWandbRun(name))


class FakeWandbRun:
    def __init__(self, id):
        self.id, self.history, self.summary, self.ended = id, {}, {}, 0

    def log(self, values, step):
        if step > max(self.history, default=0):  # W&B leaves steps out that it has
            self.history[step] = values

    def finish(self):
        self.ended += 1


def test_weights_and_biases(tmp_path, monkeypatch):
    """A run that crashed goes on as the same run, with every step once."""
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with pytest.raises(RuntimeError, match="crash"):
        train_run(config_of(tmp_path / "a", ["wandb"], checkpoint_every=4), loggers=[StopsAfter(3)])
    summary = train_run(config_of(tmp_path / "a", ["wandb"], checkpoint_every=4), resume=True)
    assert [*fake.runs] == ["id_0"]
    run = fake.runs["id_0"]
    assert [*run.history] == [2, 4, 6, 8]
    assert run.history[4]["val/full/ndcg@10"] == rows_of(tmp_path / "a")[1]["val/full/ndcg@10"]
    assert run.summary["test/full/ndcg@10"] == summary["test/full/ndcg@10"]
    assert run.ended == 2
    assert "id" not in fake.begun[0]
    assert (fake.begun[1]["id"], fake.begun[1]["resume"]) == ("id_0", "allow")
    assert fake.begun[0]["config"]["model"]["name"] == "mf"


class FakeMlflow(types.ModuleType):
    """MLflow as far as it is used."""

    def __init__(self):
        super().__init__("mlflow")
        self.logged, self.files, self.ended = {}, {}, []
        self.entities = types.ModuleType("mlflow.entities")
        self.entities.Metric = lambda *parts: parts

    def set_experiment(self, name):
        return types.SimpleNamespace(experiment_id=f"of {name}")

    def MlflowClient(self):  # noqa: N802  its own name
        return self

    def create_run(self, experiment, run_name):
        self.logged[f"run_{len(self.logged)}"] = []
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=f"run_{len(self.logged) - 1}"))

    def get_run(self, run):
        newest = {name: value for name, value, _, _ in self.logged[run]}
        return types.SimpleNamespace(data=types.SimpleNamespace(metrics=newest))

    def log_dict(self, run, values, name):
        self.files[run, name] = values

    def log_batch(self, run, metrics):
        assert all("@" not in name for name, *_ in metrics)  # which MLflow refuses
        self.logged[run] += metrics

    def set_terminated(self, run):
        self.ended.append(run)


def test_mlflow(tmp_path, monkeypatch):
    fake = FakeMlflow()
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    monkeypatch.setitem(sys.modules, "mlflow.entities", fake.entities)
    with pytest.raises(RuntimeError, match="crash"):
        train_run(config_of(tmp_path / "a", ["mlflow"], checkpoint_every=4), loggers=[StopsAfter(3)])
    summary = train_run(config_of(tmp_path / "a", ["mlflow"], checkpoint_every=4), resume=True)
    assert [*fake.logged] == ["run_0"]
    curve = [(step, value) for name, value, _, step in fake.logged["run_0"] if name == "val/full/ndcg_at_10"]
    rows = [row for row in rows_of(tmp_path / "a") if "val/full/ndcg@10" in row]
    assert curve == [(row["round"], row["val/full/ndcg@10"]) for row in rows]
    tested = [(step, value) for name, value, _, step in fake.logged["run_0"] if name == "test/full/ndcg_at_10"]
    assert tested == [(summary["best_round"], summary["test/full/ndcg@10"])]
    assert fake.ended == ["run_0", "run_0"]
    assert fake.files["run_0", "config.json"]["model"]["name"] == "mf"


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_package_that_is_missing_is_one_line(tmp_path, monkeypatch, name):
    """Before anything is written."""
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=f'^run.writers: "{name}" needs the package {name}: pip install {name}$'):
        train_run(config_of(tmp_path / "a", [name]))
    assert not (tmp_path / "a").exists()


def test_leaky_numbers_are_marked():
    row = {"round": 2, "leaky": True, "protocol": "LEAKY", "val/full/mrr": 0.5, "x": float("nan"), "epsilon": None}
    assert writers.list_numbers(row) == {"LEAKY/val/full/mrr": 0.5}
    assert writers.list_numbers(row | {"leaky": False}) == {"val/full/mrr": 0.5}


# --- one's own -----------------------------------


class Mine:
    """A writer of one's own, which keeps what it is told."""

    def __init__(self, start):
        self.start, self.rows, self.closed = start, [], 0
        MADE.append(self)

    def log_row(self, row):
        self.rows.append(row)

    def close(self):
        self.closed += 1


MADE: list[Mine] = []


@pytest.fixture
def made(monkeypatch):
    """The writers that are made in a test; what is registered in it goes away."""
    MADE.clear()
    for name in {*WRITERS}:
        monkeypatch.delitem(WRITERS, name)
    yield MADE
    WRITERS.clear()


def offer(monkeypatch, value):
    point = metadata.EntryPoint("mine", value, writers.GROUP)
    monkeypatch.setattr(metadata, "entry_points", lambda group: [point] if group == writers.GROUP else [])


def test_a_writer_of_a_package_is_told_all(tmp_path, monkeypatch, made):
    """Where it goes on, it is told the rows before the checkpoint, and those after it once more."""
    offer(monkeypatch, "tests.training.test_writers:Mine")
    with pytest.raises(RuntimeError, match="crash"):
        train_run(config_of(tmp_path / "a", ["mine"], checkpoint_every=4), loggers=[StopsAfter(3)])
    train_run(config_of(tmp_path / "a", ["mine"], checkpoint_every=4), resume=True)
    first, second = made
    assert (first.start.round, first.start.rows, first.closed) == (0, (), 1)
    assert [row["round"] for row in first.rows] == [2, 4, 6]
    assert (second.start.round, [row["round"] for row in second.start.rows]) == (4, [2, 4])
    rows = rows_of(tmp_path / "a")
    assert json.loads(json.dumps([*second.start.rows, *second.rows])) == rows
    assert second.start.config["rounds"] == 8
    assert second.start.folder == tmp_path / "a"


def test_a_writer_that_is_registered(tmp_path, made):
    assert register("writer", "mine", Mine) is Mine
    register("writer", "mine", Mine)  # a module may be imported anew
    with pytest.raises(ValueError, match="the writer 'mine' is there already"):
        register("writer", "mine", StopsAfter)
    train_run(config_of(tmp_path / "a", ["mine", "csv"], 4))
    assert len(made[0].rows) == len(table_of(tmp_path / "a")) == 3


@pytest.mark.parametrize(
    ("value", "name", "text"),
    [
        ("nowhere:f", "mine", r"^run.writers: mine \(nowhere:f\) of an installed package cannot be imported: Module"),
        ("nowhere:f", "tensorbord", r'^run.writers: no writer "tensorbord"; did you mean "tensorboard"\?$'),
        ("nowhere:f", "min", r'^run.writers: no writer "min"; did you mean "mine"\?$'),
    ],
)
def test_what_is_no_writer_is_one_line(tmp_path, monkeypatch, made, value, name, text):
    offer(monkeypatch, value)
    with pytest.raises(ValueError, match=text):
        train_run(config_of(tmp_path / "a", [name]))
    assert not (tmp_path / "a").exists()


def test_where_one_cannot_begin_the_others_are_closed(tmp_path, monkeypatch, made):
    def broken(start):
        raise ValueError("cannot begin")

    register("writer", "mine", Mine)
    register("writer", "broken", broken)
    with pytest.raises(ValueError, match="cannot begin"):
        train_run(config_of(tmp_path / "a", ["mine", "broken"]))
    assert made[0].closed == 1
    shutil.rmtree(tmp_path / "a")
