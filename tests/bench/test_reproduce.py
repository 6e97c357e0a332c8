"""The table of results: its rows are configurations, and what it writes is what the runs found."""

import json
import re
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

from jaxfed.bench import pages
from jaxfed.bench import reproduce as script
from jaxfed.cli import main
from jaxfed.config.schema import make_config

ROOT = Path(__file__).parents[2]

OWN = {
    "tiny": script.TableRow("popularity", seeds=(0, 1)),
    "factors": script.TableRow("fedavg", "--model.dim 4", (0, 1)),
}
OWN["leak"] = script.TableRow("counter", "--data.protocol compat-pfedrec")


def test_every_row_is_a_configuration(tmp_path):
    """With folders, commands and, but for the evaluation, data that agree; leaky ones are only what they say."""
    plans = script.plan_runs(script.ROWS, tmp_path, False, [])
    assert {plan.name for plan in plans} == script.ROWS.keys()
    assert len({plan.config.run.out for plan in plans}) == len(plans)
    assert all(plan.config.data.name == "ml-100k" for plan in plans)
    for plan in plans:
        assert (plan.config.data.protocol == "loo-clean") == ("compat" not in plan.name), plan.name
        assert (f"--seeds {plan.seed}" in plan.command) or (f"--seed {plan.seed}" in plan.command) or plan.seed
    assert [plan.seed for plan in plans if plan.name == "FedAvg of MF"] == [0, 1, 2]
    quick = script.plan_runs(script.ROWS, tmp_path, True, [])
    assert [plan.name for plan in quick] == [*script.ROWS]
    assert max(plan.config.rounds for plan in quick) == script.QUICK


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A file of 20 people, with a column that must be named."""
    path, random = tmp_path_factory.mktemp("data") / "tiny.csv", np.random.default_rng(0)
    lines = [f"{who},{item}" for who in range(20) for item in random.permutation(30)[:6]]
    path.write_text("\n".join(["who,item_id", *lines]) + "\n")
    return path


def run(monkeypatch, capsys, *words):
    """(exit code, what was printed, what was said) of the command in this process."""
    monkeypatch.setattr(sys, "argv", ["jaxfed", "reproduce", *map(str, words)])
    try:
        main.main()
    except SystemExit as stopped:
        return stopped.code, *capsys.readouterr()
    return 0, *capsys.readouterr()


def test_a_file_of_ones_own(file, tmp_path, monkeypatch, capsys):
    """Two seeds of two clean rows, resumed, by hand from the files of the runs."""
    monkeypatch.setattr(
        script, "ROWS", OWN | {"no": script.TableRow("fedavg", "--cohort.name uniform --cohort.size 500")}
    )
    out = tmp_path / "t"
    words = ["--table", file, "--out", out, "--user", "who", "--only", "tiny", "factors"]
    monkeypatch.setattr(script, "QUICK", 3)
    code, printed, said = run(monkeypatch, capsys, *words, "--quick")
    assert code == 0, said
    assert printed.count("QUICK") == 2
    rows = json.loads((out / "results.json").read_text())
    assert [(row["name"], row["seeds"], row["rounds"]) for row in rows] == [("tiny", 1, 1), ("factors", 1, 3)]
    assert all(row["quick"] for row in rows)
    assert "test/full/hr@10_sd" not in rows[0]

    code, _, said = run(monkeypatch, capsys, *words[:-2], "tiny", "no")
    assert code == 2
    assert "failed: cohort.size 500 is larger" in said
    row = json.loads((out / "results.json").read_text())[0]
    runs = [out / "tiny" / f"seed_{seed}" for seed in (0, 1)]
    found = [json.loads((each / "summary.json").read_text()) for each in runs]
    values = [each["test/sampled/hr@10"] for each in found]
    assert row["test/sampled/hr@10"] == pytest.approx(np.mean(values))
    assert row["test/sampled/hr@10_sd"] == pytest.approx(np.std(values, ddof=1))
    assert row["protocol"] == "loo-clean (order of the file)"  # it has no times
    assert (row["name"], row["leaky"], row["seeds"]) == ("tiny", False, 2)
    assert row["bytes_up"] == np.mean([each["bytes_up_total"] for each in found]) / 20  # of one round, its best
    assert row["bytes_total"] == np.mean([each["bytes_up_total"] + each["bytes_down_total"] for each in found])
    assert row["command"].startswith("jaxfed sweep configs/ml100k_popularity.toml --seeds 0 1 --data.path=")
    assert all(isinstance(value, int | float | str) for value in row.values())
    assert run(monkeypatch, capsys, *words[:-2], "leak")[:2] == (0, "nothing to run")  # the clean protocol only

    before = {f: f.stat().st_mtime_ns for f in (out / "tiny").rglob("*") if f.is_file()}
    code, _, said = run(monkeypatch, capsys, *words[:-1])
    assert code == 0
    assert said.count("is finished") == 2
    assert before == {f: f.stat().st_mtime_ns for f in (out / "tiny").rglob("*") if f.is_file()}


def test_settings_that_changed_are_not_told_as_the_row(file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "ROWS", {"tiny": OWN["tiny"]})
    words = ["--table", file, "--out", tmp_path / "t", "--user", "who", "--seeds", "0"]
    assert run(monkeypatch, capsys, *words)[0] == 0
    monkeypatch.setattr(script, "ROWS", {"tiny": script.TableRow("popularity", "--evaluation.seed 1", (0, 1))})
    code, printed, said = run(monkeypatch, capsys, *words)
    assert code == 2
    assert "was run with another configuration" in said
    assert "| tiny" not in printed


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("--table ml100k --only factor", 'no row "factor"; did you mean "factors"'),
        ("--table ml100k --user who", "--user: loader options are only for --table FILE"),
        ("--table no.csv", "a file that is there"),
        ("--table FILE --only tiny --usr who", "unknown option --data.usr"),
    ],
)
def test_what_cannot_be_is_one_line(file, tmp_path, monkeypatch, capsys, words, text):
    given = [str(file) if word == "FILE" else word for word in words.split()]
    monkeypatch.setattr(script, "ROWS", OWN)
    code, printed, said = run(monkeypatch, capsys, *given, "--out", tmp_path / "t")
    assert (code, printed) == (2, "")
    assert text in said
    assert said.count("\n") == 1


def figures(**more):
    row = {"name": "Ditto", "protocol": "loo-clean", "leaky": False, "seeds": 1, "best_round": 10, "seconds": 5.0}
    row |= {f"test/{part}/{metric}@10": 0.25 for part in ("full", "sampled") for metric in ("hr", "ndcg")}
    return row | {"bytes_up": 1.5e6, "bytes_down": 2e6} | more


def test_the_table_says_what_leaks_and_what_is_personal():
    personal = {f"test/personal/{part}/{metric}@10": 0.5 for part in ("full", "sampled") for metric in ("hr", "ndcg")}
    spread = {"test/full/hr@10_sd": 0.0123, "seeds": 3, "leaky": True}
    table = script.table_markdown([figures(), figures(**personal), figures(**spread)])
    first, second, own, leaky = table.splitlines()[2:]
    assert first == second == "| Ditto | .250 | .250 | .250 | .250 | 10 | 1.50 | 2.00 | 5.0 | 1 |"
    assert own == "| Ditto, personal | .500 | .500 | .500 | .500 |  |  |  |  |  |"
    assert leaky.startswith("| Ditto: LEAKY | .250 | .250 | .250 ± .012 | .250 |")
    assert len({line.count("|") for line in table.splitlines()}) == 1


def test_a_page_is_changed_between_its_markers_only(tmp_path, capsys):
    page = tmp_path / "ml100k.md"
    page.write_text("before\n<!-- table: ml100k -->\nold\n<!-- end -->\nafter <!-- end -->\n")
    script.write_table([figures()], tmp_path / "runs", tmp_path / "results" / "ml100k.json", page)
    table = script.table_markdown([figures()])
    assert page.read_text() == f"before\n<!-- table: ml100k -->\n{table}<!-- end -->\nafter <!-- end -->\n"
    assert json.loads((tmp_path / "results" / "ml100k.json").read_text()) == [figures()]
    assert pages.find_table_place(page, "ml100k") == page
    pages.write_page(str(page), "ml100k", "| new |\n")
    assert page.read_text() == "before\n<!-- table: ml100k -->\n| new |\n<!-- end -->\nafter <!-- end -->\n"
    assert capsys.readouterr().err == ""
    for other in (tmp_path / "none.md", tmp_path / "runs" / "results.json"):
        before = other.read_text() if other.exists() else None
        pages.write_page(str(other), "ml100k", table)
        assert (other.read_text() if other.exists() else None) == before
        assert "not written there" in capsys.readouterr().err


def test_the_page_of_the_site_is_that_of_the_results():
    """And what is quick, or of a file, is not written there."""
    page, results = ROOT / "docs/results/ml100k.md", ROOT / "configs/results/ml100k.json"
    assert pages.find_table_place(page, results.stem) == page
    assert script.table_markdown(json.loads(results.read_text())) in page.read_text()


def test_new_configurations_keep_their_headers_honest():
    """A configuration that the table runs names its own command."""
    for row in script.ROWS.values():
        path = ROOT / f"configs/ml100k_{row.config}.toml"
        assert re.search(rf"^#\s+jaxfed train configs/{path.name}$", path.read_text(), re.MULTILINE), path.name
        assert make_config(tomllib.loads(path.read_text())).run.out == f"runs/{path.stem}"


def test_rows_that_were_not_run_here_keep_their_figures(tmp_path):
    rows = {"one": script.TableRow("fedavg"), "two": script.TableRow("fedavg", "--seed 3")}
    plans = script.plan_runs(rows, tmp_path / "none", False, [])
    results = tmp_path / "ml100k.json"
    known = [figures() | {"name": each.name, "command": each.command} for each in plans]
    known[1]["command"] += " --rounds 7"  # other settings than the row's
    results.write_text(json.dumps(known))
    assert script.collect_rows(plans, lambda config: 1, False, results) == known[:1]
    assert script.collect_rows(plans, lambda config: 1, False, None) == []
