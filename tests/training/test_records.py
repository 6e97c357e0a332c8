"""The table of the figures of run files: complete for runs of many kinds, and consistent in itself."""

import json
import subprocess
import sys

import pytest
import tomli_w

from jaxfed.config.schema import make_config
from jaxfed.training.loop import train_run
from jaxfed.training.records import (
    ERROR_COLUMNS,
    FIGURES,
    METRICS,
    SWEEP_FACTS,
    TERMINAL_FACTS,
    describe_figure,
    figure_digits,
    find_figure,
    lower_is_better,
    ranking_columns,
)
from jaxfed.training.run_dir import SUMMARY
from tests.small import TABLE, child_environment

PRIVATE = [{"name": "mean", "count": 10}, {"name": "adaptive_clip", "count": 10}, {"name": "gaussian"}]
RING = [{"name": "mean"}, {"name": "zero_out"}, {"name": "ring"}]
PFEDREC = {"model": {"name": "pfedrec", "dim": 4}, "work": {"name": "graph_guided"}, "channel": [{"name": "mean"}]}
KINDS = {  # what differs from TABLE, and a figure that only such runs have
    "private": ({"channel": PRIVATE, "cohort": {"name": "uniform", "size": 10}}, "noise/stddev"),
    "ring": ({"channel": RING}, "zero_out/clients"),
    "edges": ({"server": {"edges": 2, "edge_rounds": 2}}, "edges/bytes_total"),
    "buffered": (
        {"cohort": {"name": "buffered", "size": 4, "concurrency": 8}, "clock": {"name": "lognormal"}},
        "simulated_seconds",
    ),
    "devices": ({"data": {**TABLE["data"], "clients": "device"}}, "clients/merged"),
    "cold": ({"data": {**TABLE["data"], "cold": 0.2}}, "test/cold/full/hr@10"),
    "clusters": ({"work": {"name": "clustered"}, "channel": [{"name": "cluster_mean"}]}, "clusters/0"),
    "groups": ({"channel": [{"name": "agnostic"}]}, "agnostic/largest"),
    "graph": (PFEDREC, "graph/neighbours"),
    "personal": ({"work": {"name": "ditto"}}, "test/personal/full/hr@10"),
    "promoted": ({"evaluation": {"every": 2, "targets": ("1", "2")}}, "test/full/er@5"),
    "leaky": ({"data": {**TABLE["data"], "protocol": "compat-pfedrec"}}, "leaky"),
}


def unlisted(summary, rows):
    return sorted({name for each in [summary, *rows] for name in each if find_figure(name) is None})


def read_rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", KINDS)
def test_every_figure_of_a_run_is_listed(kind, tmp_path):
    changes, own = KINDS[kind]
    summary = train_run(make_config({**TABLE, "rounds": 2, **changes, "run": {"out": str(tmp_path / "a")}}))
    rows = read_rows(tmp_path / "a")
    assert unlisted(summary, rows) == []
    assert any(own in each for each in [summary, *rows])


@pytest.mark.parametrize(("label", "own"), [("rating", "test/rating/rmse"), ("click", "test/click/log_loss")])
def test_every_figure_of_labelled_rows_is_listed(label, own, tmp_path):
    lines = [f"{u},{i},{(u * i) % 5 + 1},{u + 7 * i}" for u in range(20) for i in range(u % 3, 40, 3)]
    (tmp_path / "r.csv").write_text("\n".join(["user,item,rating,time", *lines]) + "\n")
    data = {"name": "csv", "path": str(tmp_path / "r.csv"), "protocol": "ratio-clean", "label": label, "threshold": 3.0}
    changes = {"evaluation": {"every": 2, "select": f"val/{own[5:]}"}, "rounds": 2, "data": data}
    table = {**TABLE, **changes, "model": {"name": "mf", "dim": 4, "loss": "squared" if label == "rating" else "bce"}}
    summary = train_run(make_config({**table, "work": {"negatives": 0}, "run": {"out": str(tmp_path / "a")}}))
    assert unlisted(summary, read_rows(tmp_path / "a")) == []
    assert own in summary


@pytest.mark.full
def test_every_figure_of_several_processes_is_listed(tmp_path):
    (tmp_path / "small.toml").write_text(tomli_w.dumps({**TABLE, "rounds": 2, "run": {"devices": 2}}))
    words = ["--processes", 2, "--", "train", tmp_path / "small.toml", "--out", tmp_path / "a"]
    command = [sys.executable, "-m", "jaxfed", "launch", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=child_environment())
    assert done.returncode == 0, done.stderr
    assert unlisted(json.loads((tmp_path / "a" / "summary.json").read_text()), read_rows(tmp_path / "a")) == []


def test_what_others_read_is_listed():
    assert all(find_figure(name) for name in (*SUMMARY, *TERMINAL_FACTS, *SWEEP_FACTS))
    assert all(find_figure(f"test/full/{name}") for name in (*ranking_columns(["x/hr@10"]), *ERROR_COLUMNS))
    assert {*SWEEP_FACTS} <= {*SUMMARY}


def test_meanings_are_sentences_and_units_are_few():
    for name, figure in (FIGURES | METRICS).items():
        assert figure.meaning[0].isupper() or figure.meaning.startswith("true: "), name
        assert figure.meaning.endswith("."), name
    assert len({figure.unit for figure in (FIGURES | METRICS).values()}) <= 16


def test_patterns():
    assert find_figure("my_link/figure") is None
    assert describe_figure("my_link/figure") == ""
    assert figure_digits("my_link/figure") == 4
    assert lower_is_better("val/rating/rmse")
    assert lower_is_better("test/personal/click/log_loss")
    assert not lower_is_better("val/sampled/log_loss_sd")
    assert "Decile 3" in describe_figure("val/full/hr@10/decile_3")
    assert "Standard deviation" in describe_figure("val/sampled/hr@10_sd")
    assert describe_figure("clusters/7") == "Share of the clients in a cluster."
    assert describe_figure("clusters/empty").startswith("Clusters without a client")
    assert [figure_digits(name) for name in ("best_round", "seconds", "selected", "val/full/mrr")] == [0, 1, 4, 4]
