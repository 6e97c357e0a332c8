"""Runs in this process: where evaluation happens, what is counted, and what is marked."""

import json

import pytest

from jaxfed.config import config_of
from jaxfed.train import train

TABLE = {
    "rounds": 4,
    "data": {"name": "synthetic", "users": 40, "items": 50, "mean_length": 6.0},
    "model": {"dim": 4},
    "work": {"batch_size": 16},
    "cohort": {"name": "everyone", "dropout": 0.2},
    "evaluation": {"every": 2},
}


def run(out, **changes):
    table = {**TABLE, **changes, "run": {"out": str(out)}}
    summary = train(config_of(table))
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return summary, rows


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return run(tmp_path_factory.mktemp("run") / "a")


def test_on_the_clients_through_a_channel_of_their_own_the_figures_are_the_same(plain, tmp_path):
    asked = {"every": 2, "where": "clients", "channel": [{"name": "weighted_mean"}]}
    summary, rows = run(tmp_path / "c", evaluation=asked)
    for a, b in zip([plain[0], *plain[1]], [summary, *rows], strict=True):
        metrics = [name for name in a if name.startswith(("val/", "test/"))]
        assert metrics
        assert {m: a[m] for m in metrics} == pytest.approx({m: b[m] for m in metrics}, abs=1e-6)
    assert summary["params_sha256"] == plain[0]["params_sha256"]


def test_a_leaky_protocol_marks_every_row_and_the_summary(plain, tmp_path, capsys):
    summary, rows = run(tmp_path / "l", data={**TABLE["data"], "protocol": "compat-pfedrec"})
    assert all(row["leaky"] is True and "LEAKY" in row["protocol"] for row in [summary, *rows])
    assert capsys.readouterr().err.count("LEAKY") >= len(rows) - 1
    assert not any("leaky" in row for row in [plain[0], *plain[1]])


def test_traffic_counts_those_who_were_asked_and_those_who_reported(plain):
    """40 clients in 4 rounds were asked; a fifth of them stays silent, but has downloaded."""
    summary, rows = plain
    asked, reported = 4 * 40, summary["bytes_up_total"] / summary["bytes_up_per_client"]
    assert summary["bytes_down_total"] / summary["bytes_down_per_client"] == pytest.approx(asked, rel=1e-3)
    assert 0.6 * asked < reported < asked
    assert [row["bytes_up_total"] for row in rows[:2]] == sorted(row["bytes_up_total"] for row in rows[:2])
    assert rows[1]["bytes_up_total"] == summary["bytes_up_total"]


def test_early_stopping(tmp_path):
    frozen = {"optimizer": {"learning_rate": 0.0}, "batch_size": 16}
    summary, rows = run(tmp_path / "e", work=frozen, rounds=40, evaluation={"every": 2, "patience": 3})
    assert (summary["rounds"], summary["best_round"]) == (8, 2)
    assert [row["round"] for row in rows] == [2, 4, 6, 8, 2]


def test_bytes_are_those_of_the_arrays_a_client_sends(plain, tmp_path):
    """By hand: rows x (4 factors + 1 bias + 1 id) x 4 bytes, and the weight."""
    from jaxfed.experiment import assemble, load
    from jaxfed.train import prepare_round

    config = config_of(TABLE)
    experiment = assemble(config, load(config.data))
    ready = prepare_round(experiment, 0, 0)
    items = experiment.data.population.num_items
    rows = sum(int((block.rows[j] < items).sum()) for block in ready.cohort.blocks
               for j, slot in enumerate(block.slots) if slot < 40 and ready.cohort.present[slot])  # fmt: skip
    assert ready.bytes_up == rows * (4 + 1 + 1) * 4 + 4 * ready.reported
