"""Sweeps whose combinations are proposed: ranges, trials that go on where they were, and what they are chosen by."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from jaxfed.config.config_files import read_config
from jaxfed.training import search as searching
from jaxfed.training import sweep_results
from jaxfed.training.records import SWEEP_FACTS
from jaxfed.training.search import Range, Search, parse_range, run_search
from jaxfed.training.sweep import SweepPoint, parse_grid
from tests.training.test_sweep import SMALL, swept

pytest.importorskip("optuna")
RATE, DIM = "work.optimizer.learning-rate", "model.dim"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "small.toml"
    path.write_text(SMALL)
    return path


def read_rows(out):
    return json.loads((out / "results.json").read_text())


def choices(rows):
    return [(row[RATE], row[DIM], row["seed"]) for row in rows]


WORDS = ["--grid", f"{RATE}=0.1:20:log", "--grid", f"{DIM}=2:6"]


def test_trials_are_in_their_ranges_and_go_on(config, tmp_path, monkeypatch, capsys):
    """Two trials, then three: those of an undisturbed search, from the same seed; another seed has others."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    code, printed, said = swept(monkeypatch, capsys, config, *WORDS, "--trials", 3, "--out", whole)
    assert code == 0, said
    rows = read_rows(whole)
    assert len({*choices(rows)}) == 3
    assert all(0.1 <= row[RATE] <= 20 and row[DIM] in (2, 3, 4, 5, 6) for row in rows)
    for row in rows:
        made = read_config(Path(row["run"]) / "config.toml")
        assert (made["work"]["optimizer"]["learning_rate"], made["model"]["dim"]) == (row[RATE], row[DIM])
        summary = json.loads((Path(row["run"]) / "summary.json").read_text())
        assert row["selected"] == summary["val/full/ndcg@10"]
    assert "3 runs" in printed
    assert (whole / "results.md").read_text().count("\n") == 2 + 3
    assert swept(monkeypatch, capsys, config, *WORDS, "--trials", 2, "--out", parts)[0] == 0
    assert choices(read_rows(parts)) == choices(rows)[:2]
    kept = {f: f.stat().st_mtime_ns for f in parts.rglob("*/*") if f.is_file()}
    code, _, said = swept(monkeypatch, capsys, config, *WORDS, "--trials", 3, "--out", parts)
    assert said.count("is finished") == 2
    assert choices(read_rows(parts)) == choices(rows)
    assert kept.items() <= {f: f.stat().st_mtime_ns for f in parts.rglob("*/*") if f.is_file()}.items()
    (parts / "results.json").unlink()  # the table comes from the runs again
    code, _, _ = swept(monkeypatch, capsys, config, *WORDS, "--trials", 3, "--out", parts)
    assert code == 0
    assert choices(read_rows(parts)) == choices(rows)
    other = ["--trials", 1, "--search-seed", 1, "--out", tmp_path / "other"]
    assert swept(monkeypatch, capsys, config, *WORDS, *other)[0] == 0
    assert not {*choices(read_rows(tmp_path / "other"))} & {*choices(rows)}


@pytest.mark.full
def test_a_trial_that_was_stopped_goes_on_as_the_same_trial(config, tmp_path, monkeypatch, capsys):
    """Stopped in its second trial: afterwards the trials are those of a search that nobody stopped."""
    words = [config, *WORDS, "--trials", 3, "--out"]
    assert swept(monkeypatch, capsys, *words, tmp_path / "whole")[0] == 0
    tell, calls = searching.run_sweep, []

    def stops(points, *rest):
        calls.append(points)
        if len(calls) == 2:
            raise SystemExit(130)
        return tell(points, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(searching, "run_sweep", stops)
        assert swept(monkeypatch, capsys, *words, tmp_path / "stopped")[0] == 130
    assert len(read_rows(tmp_path / "stopped")) == 1
    assert swept(monkeypatch, capsys, *words, tmp_path / "stopped")[0] == 0
    assert choices(read_rows(tmp_path / "stopped")) == choices(read_rows(tmp_path / "whole"))


def test_seeds_are_averaged_and_words_are_chosen_from(config, tmp_path, monkeypatch, capsys):
    words = ["--grid", "server.name=sgd,adam", "--grid", f"{RATE}=0.5:5.0", "--seeds", 0, 1, "--trials", 2]
    code, _, said = swept(monkeypatch, capsys, config, *words, "--out", tmp_path / "s")
    assert code == 0, said
    rows = read_rows(tmp_path / "s")
    assert [row["seed"] for row in rows] == [0, 1, 0, 1]
    assert {row["server.name"] for row in rows} <= {"sgd", "adam"}
    every = sweep_results.average_seeds(rows, ["server.name", RATE])
    assert [each["seeds"] for each in every] == [2, 2]


# --- without a run -------------------------------


def searched(folder, score, trials, seed=0, select="val/full/ndcg@10", low=0.01, high=100.0):
    """The values that a search of a function of one number tries."""
    search = Search({"a.x": Range(low, high, False, True)}, trials, seed, select)
    tried = []

    config = SimpleNamespace(run=SimpleNamespace(out=""), evaluation=SimpleNamespace(select=select))

    def points(choice):
        tried.append(float(choice["a.x"]))
        return [SweepPoint(choice, 0, config)]

    def run(config):
        value = score(tried[-1])
        if value is None:
            return {}, "diverged"
        facts = dict.fromkeys(("test/full/hr@10", "test/full/ndcg@10", "test/rating/rmse"), -value)
        return {**dict.fromkeys(SWEEP_FACTS, 0), select: value, **facts}, ""

    for _ in run_search(search, folder, points, run, lambda text: None):
        pass
    return tried


def peak(x):
    """Best at 3; None where it cannot be."""
    return None if x > 50 else -(math.log10(x / 3) ** 2)


def test_a_search_comes_nearer_to_the_best_by_validation(tmp_path):
    """By the figure of validation: that of the test, which is its opposite here, is not looked at. What fails counts as
    the worst, and does not end the search. Where less is better, less is looked for."""
    tried = searched(tmp_path / "a", peak, 40)
    assert len(tried) == 40
    late = sorted(abs(math.log10(x / 3)) for x in tried[25:])
    assert late[7] < 0.7  # the median; of a random search it is 1
    lower = searched(tmp_path / "b", lambda x: -(peak(x) or -9), 40, select="val/rating/rmse")
    late = sorted(abs(math.log10(x / 3)) for x in lower[25:])
    assert late[7] < 0.7


def test_a_search_in_parts_is_the_whole(tmp_path):
    """Beyond the trials that are drawn by chance, too: each sampler is made from the seed and the trials before."""
    whole = searched(tmp_path / "whole", peak, 16)
    searched(tmp_path / "parts", peak, 12)
    assert searched(tmp_path / "parts", peak, 16) == whole  # the first twelve are read


def test_another_search_in_the_folder_is_refused(tmp_path):
    searched(tmp_path, peak, 2)
    with pytest.raises(ValueError, match="holds a search with other ranges"):
        searched(tmp_path, peak, 2, low=0.1)
    with pytest.raises(ValueError, match="holds a search with other seed"):
        searched(tmp_path, peak, 2, seed=1)
    with pytest.raises(ValueError, match="holds a search with other select"):
        searched(tmp_path, peak, 2, select="val/full/mrr")


def test_ranges():
    assert parse_range("k", "1:8") == Range(1, 8, True, False)
    assert parse_range("k", "1:8:log") == Range(1, 8, True, True)
    assert parse_range("k", "1e-3:1.0:log") == Range(0.001, 1, False, True)
    assert parse_range("k", "-2:3.5") == Range(-2, 3.5, False, False)
    assert parse_grid([f"{RATE}=0.1:1:log"]) == {RATE: ["0.1:1:log"]}


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (f"--grid {RATE}=0.1:1", "is a range: pass --trials N"),
        (f"--grid {RATE}=1:0.1 --trials 2", "the lower end must be below the upper one"),
        (f"--grid {RATE}=1:1 --trials 2", "the lower end must be below the upper one"),
        (f"--grid {RATE}=0:1:log --trials 2", "a logarithmic range begins above zero"),
        (f"--grid {RATE}=0.1:1:lin --trials 2", "there can be :log, not :lin"),
        (f"--grid {RATE}=1:1e999 --trials 2", "the lower end must be below the upper one"),
        (f"--grid {RATE}=0.1:x --trials 2", 'work.optimizer.learning-rate is "0.1:x": it must be a number'),
        (f"--grid {DIM}=0.5:2.5 --trials 2", 'model.dim is "0.5": it must be a whole number'),
        (f"--grid {DIM}=0:8 --trials 2", "model.dim is 0: it must be a whole number from 1"),
        ("--grid work.optimizer.learning-rte=0.1:1 --trials 2", "did you mean"),
        ("--grid server.name=sgd,adma --trials 2", 'no server "adma"; did you mean'),
        (f"--grid {DIM}=2:8 --trials -1", "a number above zero"),
        ("--seeds 1 2 --trials 3", "and --grid section.key=low:high"),
        (f"--grid {DIM}=2:8 --trials 2 --together", "--together goes with a grid"),
        (f"--grid {DIM}=2:8 --trials 2 --model.dim 4", "leave one of them out"),
        ("--grid evaluation.select=val/full/mrr,val/full/auc --trials 2", "all are chosen by one figure"),
    ],
)
def test_what_cannot_be_searched_is_one_line(config, tmp_path, monkeypatch, capsys, words, text):
    code, printed, said = swept(monkeypatch, capsys, config, "--out", tmp_path / "no", *words.split())
    assert (code, printed, said.count("\n")) == (2, "", 1)
    assert text in said
    assert not (tmp_path / "no").exists()


def test_nothing_is_chosen_by_the_test(config, tmp_path, monkeypatch, capsys):
    words = ["--grid", f"{DIM}=2:8", "--trials", 1, "--evaluation.select", "test/full/ndcg@10"]
    code, _, said = swept(monkeypatch, capsys, config, *words, "--out", tmp_path / "s")
    assert code == 2
    assert 'no metric "test/full/ndcg@10"' in said


def test_without_optuna_a_line_says_what_to_install(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "optuna", None)
    words = [config, "--grid", f"{DIM}=2:8", "--trials", 2, "--out", tmp_path / "no"]
    code, printed, said = swept(monkeypatch, capsys, *words)
    assert (code, printed, said.count("\n")) == (2, "", 1)
    assert 'pip install "jaxfed[optuna]"' in said
    assert not (tmp_path / "no").exists()
