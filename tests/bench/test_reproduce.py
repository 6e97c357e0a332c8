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

OWN = {"factors": script.TableRow("fedavg", "--model.dim 4", (0, 1))}
CENTRAL = "SASRec, all data in one place"


def test_the_commands_are_those_of_the_figures(tmp_path):
    """What the table of the documentation was made by."""
    known = {row["name"]: row["command"] for row in json.loads((ROOT / "configs/results/ml100k.json").read_text())}
    assert {plan.name: plan.command for plan in script.plan_runs(script.ROWS, tmp_path, False, [])} == known


def test_every_row_is_a_configuration(tmp_path):
    """With folders, commands and, but for the evaluation, data that agree; leaky ones are only what they say."""
    plans = script.plan_runs(script.ROWS, tmp_path, False, [])
    assert {plan.name for plan in plans} == script.ROWS.keys()
    assert len({plan.config.run.out for plan in plans}) == len(plans)
    assert all(plan.config.data.name == "ml-100k" for plan in plans)
    for plan in plans:
        assert (plan.config.data.protocol == "loo-clean") == ("compat" not in plan.name), plan.name
        assert (f"--seeds {plan.seed}" in plan.command) or (f"--seed {plan.seed}" in plan.command) or plan.seed
        assert (getattr(plan.config.algorithm, "name", "") == "central") == (plan.name == CENTRAL)
        assert (" --central" in plan.command) == (plan.name == CENTRAL)
    assert [plan.seed for plan in plans if plan.name == "FedAvg of MF"] == [0, 1, 2]
    quick = script.plan_runs(script.ROWS, tmp_path, True, [])
    assert [plan.name for plan in quick] == [*script.ROWS]
    assert max(plan.config.rounds for plan in quick) == script.QUICK


def run(monkeypatch, capsys, *words):
    """(exit code, what was printed, what was said) of the command in this process."""
    monkeypatch.setattr(sys, "argv", ["jaxfed", "reproduce", *map(str, words)])
    try:
        main.main()
    except SystemExit as stopped:
        return stopped.code, *capsys.readouterr()
    return 0, *capsys.readouterr()


def test_the_table_is_that_of_the_runs(tmp_path, monkeypatch, capsys):
    """Two seeds of a row, resumed, by hand from the files of the runs; a row that fails loses no others."""
    data = "--data.name synthetic --data.users 20 --data.items 100"
    rows = {
        "tiny": script.TableRow("popularity", data, (0, 1)),
        "no": script.TableRow("fedavg", f"{data} --cohort.name uniform --cohort.size 500"),
        "factors": script.TableRow("fedavg", f"{data} --model.dim 4"),
    }
    monkeypatch.setattr(script, "ROWS", rows)
    out, results, page = tmp_path / "t", tmp_path / "ml100k.json", tmp_path / "page.md"
    page.write_text("<!-- table: ml100k -->\nold\n<!-- end -->\n")
    words = ["--table", "ml100k", "--out", out, "--results", results, "--page", page]
    code, printed, said = run(monkeypatch, capsys, *words, "--only", "tiny", "no")
    assert code == 2
    assert "failed: cohort.size 500 is larger" in said
    (row,) = json.loads(results.read_text())
    runs = [out / "tiny" / f"seed_{seed}" for seed in (0, 1)]
    found = [json.loads((each / "summary.json").read_text()) for each in runs]
    values = [each["test/sampled/hr@10"] for each in found]
    assert row["test/sampled/hr@10"] == pytest.approx(np.mean(values))
    assert row["test/sampled/hr@10_sd"] == pytest.approx(np.std(values, ddof=1))
    assert (row["name"], row["leaky"], row["seeds"]) == ("tiny", False, 2)
    assert row["bytes_up"] == np.mean([each["bytes_up_total"] for each in found]) / 20  # of one round, its best
    assert row["bytes_total"] == np.mean([each["bytes_up_total"] + each["bytes_down_total"] for each in found])
    assert row["command"].startswith("jaxfed sweep configs/ml100k_popularity.toml --seeds 0 1 --data.name synthetic")
    assert all(isinstance(value, int | float | str) for value in row.values())
    assert printed == script.table_markdown([row])
    assert page.read_text() == f"<!-- table: ml100k -->\n{printed}<!-- end -->\n"

    monkeypatch.setattr(script, "QUICK", 3)
    quick = run(monkeypatch, capsys, *words[:2], "--out", tmp_path / "q", "--quick", "--only", "factors", "tiny")
    assert quick[0] == 0
    assert quick[1].count("QUICK") == 2
    made = json.loads((tmp_path / "q" / "results.json").read_text())
    assert [(each["name"], each["seeds"], each["rounds"]) for each in made] == [("tiny", 1, 1), ("factors", 1, 3)]

    before = {f: f.stat().st_mtime_ns for f in (out / "tiny").rglob("*") if f.is_file()}
    code, _, said = run(monkeypatch, capsys, *words, "--only", "tiny")
    assert (code, said.count("is finished")) == (0, 2)
    assert before == {f: f.stat().st_mtime_ns for f in (out / "tiny").rglob("*") if f.is_file()}


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("--only factor", 'no row "factor"; did you mean "factors"'),
        ("--user who", "--user: loader options are only for --table FILE"),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path, monkeypatch, capsys, words, text):
    monkeypatch.setattr(script, "ROWS", OWN)
    code, printed, said = run(monkeypatch, capsys, "--table", "ml100k", *words.split(), "--out", tmp_path / "t")
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
