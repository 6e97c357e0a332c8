"""Sweeps: what a grid is, what fits, runs that share what they can, and the files that tell."""

import json
import sys
from pathlib import Path

import pytest

from jaxfed.cli import main
from jaxfed.config.config_files import read_config
from jaxfed.config.overrides import override_config
from jaxfed.config.schema import make_config
from jaxfed.training import runs, sweep, sweep_results
from jaxfed.training.loop import train_run
from jaxfed.training.records import HEADLINES, SWEEP_FACTS
from tests.programs import run_program

SMALL = """
rounds = 4
[data]
name = "synthetic"
users = 20
items = 50
mean_length = 6.0
[model]
dim = 4
[work]
batch_size = 16
[cohort]
name = "everyone"
[evaluation]
every = 2
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "small.toml"
    path.write_text(SMALL)
    return path


def swept(monkeypatch, capsys, *words):
    """(exit code, what was printed, what was said) of `jaxfed sweep` in this process."""
    return run_program(monkeypatch, capsys, "sweep", *words)


def test_from_the_command_line_and_again(config, tmp_path, monkeypatch, capsys):
    """Every combination with every seed has its run and its row; repeated, all are read and nothing is written anew."""
    out = tmp_path / "s"
    words = [config, "--grid", "work.optimizer.learning_rate=0.5,20", "--grid", "evaluation.every=1,2"]
    words += ["--seeds", 0, 3, "--server.learning-rate", 0.5, "--out", out]
    code, printed, said = swept(monkeypatch, capsys, *words)
    assert code == 0, said
    rows = json.loads((out / "results.json").read_text())
    key = "work.optimizer.learning-rate"
    assert [(row[key], row["evaluation.every"], row["seed"]) for row in rows] == [
        (rate, every, seed) for rate in (0.5, 20) for every in (1, 2) for seed in (0, 3)
    ]
    for row in rows:
        summary = json.loads((Path(row["run"]) / "summary.json").read_text())
        assert row["problem"] == ""
        assert row["selected"] == summary["val/full/ndcg@10"]
        assert {name: row[name] for name in HEADLINES} == {name: summary[name] for name in HEADLINES}
        assert all(isinstance(value, int | float | str | None) for value in row.values())
        made = read_config(Path(row["run"]) / "config.toml")
        chosen = made["work"]["optimizer"]["learning_rate"], made["evaluation"]["every"]
        assert chosen == (row[key], row["evaluation.every"])
        assert (made["seed"], made["server"]["learning_rate"], made["rounds"]) == (row["seed"], 0.5, 4)
    table = (out / "results.md").read_text().splitlines()
    assert len(table) == 2 + 4
    assert sum(line.startswith("| * ") for line in table) == 1
    assert "±" in table[2]
    assert "learning-rate" in printed
    assert "8 runs" in printed
    kept = {f: f.stat().st_mtime_ns for f in out.rglob("*/*") if f.is_file()}
    code, again, said = swept(monkeypatch, capsys, *words)
    assert code == 0
    assert said.count("is finished") == 8
    assert again == printed
    assert kept == {f: f.stat().st_mtime_ns for f in out.rglob("*/*") if f.is_file()}


def test_central_runs_are_those_of_train(config, tmp_path, monkeypatch, capsys):
    words = ["--central", "--server.name", "adam", "--server.learning-rate", "0.01", "--out"]
    code, _, said = swept(monkeypatch, capsys, config, "--seeds", 1, 2, *words, tmp_path / "s")
    assert code == 0, said
    second = json.loads((tmp_path / "s" / "results.json").read_text())[1]
    monkeypatch.setattr(sys, "argv", ["jaxfed", "train", str(config), "--seed", "2", *words, str(tmp_path / "t")])
    main.main()
    folders = Path(second["run"]), tmp_path / "t"
    one, other = (json.loads((each / "summary.json").read_text())["params_sha256"] for each in folders)
    assert one == other
    assert read_config(folders[0] / "config.toml")["algorithm"]["name"] == "central"


def test_runs_together_are_those_alone(config, tmp_path, compiled):
    """To the bit; the second seed of a configuration compiles none of the programs of a round again."""
    run, counts, shas = runs.shared_runner(), [], []
    for seed in (0, 1):
        table = read_config(config) | {"seed": seed, "run": {"out": str(tmp_path / f"together_{seed}")}}
        compiled.clear()
        shas.append(run(make_config(table))[0]["params_sha256"])
        counts.append(len(compiled))
    alone = read_config(config) | {"seed": 1, "run": {"out": str(tmp_path / "alone")}}
    assert train_run(make_config(alone))["params_sha256"] == shas[1] != shas[0]
    compiled.clear()
    run(make_config(read_config(config) | {"model": {"dim": 8}, "run": {"out": str(tmp_path / "other")}}))
    assert counts[1] < 0.3 * len(compiled)  # another model compiles all of them


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("--grid work.optimizer.learning-rte=1,2", "unknown option --work.optimizer.learning-rte; did you mean"),
        ("--grid model.dim=8,x", 'model.dim is "x": it must be a whole number'),
        ("--grid model.dim=0.5", 'model.dim is "0.5": it must be a whole number'),
        ("--grid server.name=sgd,adma", 'no server "adma"; did you mean'),
        ("--grid server.learning-rate=nan", "it must be a finite number"),
        ("--grid model.dim=", "a value is missing"),
        ("--grid model.dim=8,,16", "a value is missing"),
        ("--grid model.dim", "it must be section.key=value,value"),
        ("--grid =8", "it must be section.key=value,value"),
        ("--grid model.dim=8,8", "a value is there twice"),
        ("--grid model.dim=8 --grid model.dim=16", "given twice"),
        ("--grid work.batch-size=8 --grid work.batch_size=16", "given twice"),
        ("--grid model.dim=8 --model.dim 16", "leave one of them out"),
        ("--grid run.out=a,b", "pass --out FOLDER"),
        ("--grid model.dim=8 --run.out a", "pass --out FOLDER"),
        ("--grid seed=1,2 --seeds 1", "seed is given beside --seeds"),
        ("--seeds 1 1", "a seed is there twice"),
        ("", "nothing to sweep"),
        ("--seeds 1", "nothing to sweep"),
    ],
)
def test_what_cannot_be_is_one_line(config, tmp_path, monkeypatch, capsys, words, text):
    code, printed, said = swept(monkeypatch, capsys, config, "--out", tmp_path / "no", *words.split())
    assert code == 2
    assert printed == ""
    assert said.count("\n") == 1
    assert text in said
    assert not (tmp_path / "no").exists()


def test_a_run_that_cannot_be_does_not_lose_the_others(config, tmp_path, monkeypatch, capsys):
    """Neither one that its configuration refuses (adam has no momentum) nor one that its data do (21 of 20 clients)."""
    out = tmp_path / "s"
    words = [config, "--out", out, "--rounds", 2, "--cohort.name", "uniform", "--grid", "cohort.size=10,21"]
    code, printed, said = swept(
        monkeypatch, capsys, *words, "--grid", "server.name=sgd,adam", "--grid", "server.momentum=0.5"
    )
    assert code == 0, said
    rows = json.loads((out / "results.json").read_text())
    assert ["test/full/hr@10" in row for row in rows] == [True, False, False, False]
    assert [row["problem"][:30] for row in rows[:3]] == [
        "",
        "unknown option --server.moment",
        "cohort.size 21 is larger than ",
    ]
    assert "problem" in printed
    words[2] = tmp_path / "other"
    code, _, said = swept(monkeypatch, capsys, *words[:-1], "cohort.size=21,22")
    assert code == 2
    assert said.splitlines()[-1].startswith("jaxfed: no run worked: cohort.size 21 is larger")


def test_leaky_runs_stay_marked(config, tmp_path, monkeypatch, capsys):
    out = tmp_path / "s"
    grid = ["--grid", "data.protocol=loo-clean,compat-pfedrec"]
    code, printed, said = swept(monkeypatch, capsys, config, "--rounds", 2, "--out", out, *grid)
    assert code == 0, said
    clean, leaky = json.loads((out / "results.json").read_text())
    assert "leaky" not in clean
    assert (leaky["leaky"], leaky["protocol"]) == (True, "compat-pfedrec (LEAKY)")
    assert ["LEAKY" in line for line in (out / "results.md").read_text().splitlines()[2:]] == [False, True]
    assert "LEAKY" in printed


def test_options_are_as_the_command_line_has_them():
    grid = sweep.parse_grid(["work.by_row=true,False", "model.hidden=32 16, 8", "--server.learning-rate=-1"])
    assert grid == {"work.by-row": ["true", "False"], "model.hidden": ["32 16", "8"], "server.learning-rate": ["-1"]}
    assert sweep.option_words("work.by-row", "true") == "--work.by-row"
    assert sweep.option_words("work.by-row", "False") == "--work.no-by-row"
    table = {"model": {"name": "neumf"}}
    made = sweep.sweep_points(override_config, table, grid, [5], ["--model.dim", "8"], Path("out"))
    assert len(made) == 4
    assert [point.config.work.by_row for point in made] == [True, True, False, False]
    assert [point.config.model.hidden for point in made] == [(32, 16), (8,)] * 2
    assert {(point.config.seed, point.config.server.learning_rate) for point in made} == {(5, -1.0)}
    assert len({point.config.run.out for point in made}) == 4
    assert override_config({"model": {"name": "neumf"}}, [*made[3].words().split(" "), "--model.dim=8"]).model.dim == 8


def figures(dim, rate, seed, value, problem=""):
    made = {"seed": seed, "problem": problem, "dim": dim, "rate": rate}
    known = dict.fromkeys(HEADLINES, value) | dict.fromkeys(SWEEP_FACTS, 1)
    return made if problem else made | known | {"select": "val/x", "selected": value}


def test_means_are_over_the_seeds_that_worked():
    """By hand: of .1 and .3 the mean is .2, the deviation of the sample .1 sqrt 2."""
    rows = [figures(8, 1, 0, 0.1), figures(8, 1, 1, 0.3), figures(8, 1, 2, 0, "no room")]
    rows += [figures(16, 1, 0, 0.15), figures(16, 10, 0, 0, "too large")]
    first, second, third = sweep_results.average_seeds(rows, ["dim", "rate"])
    assert (first["seeds"], first["problem"]) == (2, "no room")
    assert first["test/full/hr@10"] == pytest.approx(0.2)
    assert first["test/full/hr@10_sd"] == pytest.approx(0.1 * 2**0.5)
    assert (second["selected"], "selected_sd" in second) == (0.15, False)
    assert (third["seeds"], third["problem"]) == (0, "too large")
    assert sweep_results.best_row([first, second, third]) is first
    assert (
        len(
            {
                line.count("|")
                for line in sweep_results.sweep_markdown([first, second, third], ["dim", "rate"]).splitlines()
            }
        )
        == 1
    )


def test_the_best_of_errors_is_the_least():
    every = [
        {"rate": rate, "selected": error, "select": "val/rating/rmse", "test/rating/rmse": error + 0.1, "seeds": 1}
        | {"best_round": 1, "seconds": 1.0, "problem": ""}
        for rate, error in ((1, 0.95), (2, 0.92), (3, 1.0))
    ]
    assert sweep_results.best_row(every)["rate"] == 2
    heads, *lines = sweep_results.table_cells(every, ["rate"])
    assert heads[2:4] == ["val rating rmse", "test rating rmse"]
    assert [line[0] for line in lines] == ["", "*", ""]
    assert lines[1][3] == "1.0200"


def test_a_line_for_each_value_of_the_other_keys_in_order():
    rows = [figures(dim, rate, 0, rate * dim) for dim in (16, 8) for rate in (10, 2)]
    made = sweep_results.figure_lines(sweep_results.average_seeds(rows, ["rate", "dim"]), ["rate", "dim"], "selected")
    assert made == {"dim 16": [(2, 32, 0.0), (10, 160, 0.0)], "dim 8": [(2, 16, 0.0), (10, 80, 0.0)]}


def test_the_figure(tmp_path, capsys, monkeypatch):
    every = sweep_results.average_seeds([figures(8, rate, seed, rate) for rate in (1, 30) for seed in (0, 1)], ["rate"])
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        assert not sweep_results.draw_figure(every, ["rate"], tmp_path / "figure.png", print)
        assert "matplotlib is missing" in capsys.readouterr().out
    pytest.importorskip("matplotlib")
    assert sweep_results.draw_figure(every, ["rate"], tmp_path / "figure.png", print)
    assert (tmp_path / "figure.png").stat().st_size > 5000


def test_a_later_sweep_keeps_the_rows_of_an_earlier_one(config, tmp_path, monkeypatch, capsys):
    out, more = tmp_path / "s", ["--rounds", 2]
    for values in ("0.5", "0.25,0.5"):
        code, _, _ = swept(monkeypatch, capsys, config, *more, "--out", out, "--grid", f"server.learning-rate={values}")
        assert code == 0
    code, _, _ = swept(monkeypatch, capsys, config, *more, "--out", out, "--grid", "server.learning-rate=0.125")
    rows = json.loads((out / "results.json").read_text())
    assert sorted(row["server.learning-rate"] for row in rows) == [0.125, 0.25, 0.5]
    before = (out / "results.json").read_bytes()
    code, _, told = swept(monkeypatch, capsys, config, *more, "--out", out, "--grid", "model.dim=2")
    assert code == 2
    assert "holds a sweep over server.learning-rate: pass another --out" in told
    assert (out / "results.json").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--rounds", 3], "rounds: 2 -> 3"),
        (["--rounds", 1], "rounds: 2 -> 1"),
        (["--rounds", 2, "--data.users", 30], "data.users: 20 -> 30"),
        (["--rounds", 2, "--evaluation.every", 1], "evaluation.every: 2 -> 1"),
    ],
)
@pytest.mark.parametrize("rate", ["0.5", "0.125"])
def test_a_folder_of_a_sweep_with_other_options_is_refused(
    config, two_rounds, capsys, monkeypatch, options, said, rate
):
    """Figures of other data or other rounds once stood in one table, and finished ones were thrown away."""
    before = {f: f.read_bytes() for f in two_rounds.rglob("*") if f.is_file()}
    words = [config, "--out", two_rounds, "--grid", f"server.learning-rate={rate}", "--seeds", 0, *options]
    code, printed, told = swept(monkeypatch, capsys, *words)
    assert (code, printed, told.count("\n")) == (2, "", 1)
    assert f"{two_rounds} holds a sweep with other options ({said}): pass another --out" in told
    assert {f: f.read_bytes() for f in two_rounds.rglob("*") if f.is_file()} == before


@pytest.fixture(scope="module")
def two_rounds(config, tmp_path_factory):
    """The folder of a sweep of two rounds at one rate."""
    out = tmp_path_factory.mktemp("two") / "s"
    words = ["--out", str(out), "--grid", "server.learning-rate=0.5", "--seeds", "0", "--rounds", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["jaxfed", "sweep", str(config), *words])
        main.main()
    return out


def test_a_refusal_leaves_the_figures_of_a_finished_run():
    points = [sweep.SweepPoint({"dim": str(dim), "rate": "1"}, 0, None, "refused") for dim in (8, 16)]
    told = []
    made = list(sweep.run_sweep(points, None, told.append, [figures(8, 1, 0, 0.1), figures(16, 1, 0, 0, "no room")]))
    assert made[0] == figures(8, 1, 0, 0.1)
    assert made[1]["problem"] == "refused"
    assert told.count("its figures of before are kept") == 1
