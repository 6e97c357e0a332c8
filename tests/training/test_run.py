"""Runs in this process: where evaluation happens, what is counted, and what is marked."""

import json
import shutil

import numpy as np
import pytest

from jaxfed.config.build import build_from_config, load_data
from jaxfed.config.schema import make_config
from jaxfed.data.population import Labels
from jaxfed.training.loop import train_run
from jaxfed.training.rounds import Progress, initial_arrays, make_run_keys, prepare_round
from jaxfed.training.summary import describe_decline, worse_than_the_mean
from tests.small import TABLE


def run(out, **changes):
    table = {**TABLE, **changes, "run": {"out": str(out)}}
    summary = train_run(make_config(table))
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


def test_a_client_store_on_the_host_changes_nothing(plain, tmp_path):
    """Nor does going back to a checkpoint: what is restored is written in place again."""

    def figures(summary):
        return {name: value for name, value in summary.items() if "/" in name and "seconds" not in name}

    config = make_config({**TABLE, "run": {"out": str(tmp_path / "h"), "client_store": "host", "checkpoint_every": 2}})
    for again in (False, True):
        summary = train_run(config, resume=again)
        assert summary["params_sha256"] == plain[0]["params_sha256"]
        assert figures(summary) == figures(plain[0])
        (tmp_path / "h" / "summary.json").unlink()
        if not again:
            shutil.rmtree(tmp_path / "h" / "checkpoints" / "4")


@pytest.mark.parametrize("lazy", [True, False])
def test_tables_over_devices_have_rows_that_nobody_is_asked_about(plain, tmp_path, lazy):
    """48 items do not divide among 5 devices: the tables get more rows, which no client holds and no ranking shows."""
    on = {"out": str(tmp_path / "t"), "devices": 5, "shard_tables": True}
    config = make_config({**TABLE, "server": {"lazy": lazy}, "run": on})
    experiment = build_from_config(config, load_data(config.data))
    assert experiment.shapes.end == 640 > experiment.data.population.num_items
    before, key = initial_arrays(experiment, 0)["state"], make_run_keys(0).rounds
    start = np.array(before.shared.params["tables"]["item"].rows)
    assert {x.data.shape[0] for x in before.shared.params["tables"]["item"].rows.addressable_shards} == {128}
    state, _ = experiment.algorithm.step(before, prepare_round(experiment, 0, 0).cohort, key)
    end, moved = experiment.data.population.num_items, np.array(state.shared.params["tables"]["item"].rows) != start
    assert moved[:end].any()
    assert not moved[end:].any()
    summary = train_run(config)
    figures = {name for name in summary if name.startswith(("val/", "test/"))}
    assert {m: summary[m] for m in figures} == pytest.approx({m: plain[0][m] for m in figures}, abs=1e-6)
    assert summary["bytes_up_total"] == plain[0]["bytes_up_total"]
    assert summary["bytes_down_total"] == plain[0]["bytes_down_total"]


def test_early_stopping(tmp_path, capsys):
    frozen = {"optimizer": {"name": "sgd", "learning_rate": 0.0}, "batch_size": 64}
    summary, rows = run(tmp_path / "e", work=frozen, rounds=40, evaluation={"every": 2, "patience": 3})
    assert (summary["rounds"], summary["best_round"]) == (8, 2)
    assert [row["round"] for row in rows] == [2, 4, 6, 8, 2]
    said = capsys.readouterr().err
    assert "stopped after round 8 of 40: val/full/ndcg@10 was best at round 2" in said
    assert "--evaluation.patience 0 turns this off" in said


def test_patience_is_the_default_but_under_noise(tmp_path):
    frozen = {"optimizer": {"name": "sgd", "learning_rate": 0.0}, "batch_size": 64}
    summary, _ = run(tmp_path / "e", work=frozen, rounds=40, evaluation={"every": 1})
    assert (summary["rounds"], summary["best_round"]) == (11, 1)  # and ten evaluations that are no better
    private = [{"name": "clip"}, {"name": "mean", "count": 32}, {"name": "gaussian"}]
    assert make_config(TABLE | {"channel": private}).evaluation.patience == 0
    assert make_config(TABLE | {"channel": private, "evaluation": {"patience": 3}}).evaluation.patience == 3


@pytest.mark.parametrize(
    ("name", "best", "last", "said"),
    [
        ("val/full/ndcg@10", (30, 0.081), (100, 0.017), "best at round 30 (val/full/ndcg@10 0.0810); at round 100 it"),
        ("val/full/ndcg@10", (30, 0.081), (100, 0.041), ""),  # a little more than half is left
        ("val/full/ndcg@10", (30, 0.081), (30, 0.081), ""),
        ("val/full/ndcg@10", (30, 0.081), (100, float("nan")), "at round 100 numbers were not finite"),
        ("val/rating/rmse", (30, 0.9), (100, 1.9), "at round 100 it was 1.9000"),
        ("val/rating/rmse", (30, 0.9), (100, 1.7), ""),
        ("val/full/ndcg@10", (30, 0.081), (100, None), ""),  # nothing was evaluated since the run was resumed
    ],
)
def test_a_decline_is_one_to_half_of_the_best(name, best, last, said):
    got = describe_decline(name, best, last)
    assert said in got
    assert bool(got) == bool(said)
    assert ("stop earlier" in got) == bool(said)


def test_a_run_that_trained_past_its_best_says_so(plain, tmp_path, capsys, monkeypatch):
    """With a rate far beyond what is stable. On so few items chance alone keeps more than half: any loss counts."""
    monkeypatch.setattr("jaxfed.training.summary.KEPT", 1.0)
    wild = {"optimizer": {"name": "sgd", "learning_rate": 400.0}, "batch_size": 64}
    summary, rows = run(tmp_path / "w", work=wild, rounds=8, evaluation={"every": 1, "patience": 0})
    values = [row["val/full/ndcg@10"] for row in rows if "val/full/ndcg@10" in row]
    assert values[-1] < max(values)  # else the run shows nothing
    assert summary["past_its_best"].startswith(f"best at round {summary['best_round']} (val/full/ndcg@10")
    assert summary["past_its_best"] in " ".join(capsys.readouterr().err.split())
    assert "past_its_best" not in plain[0]


def test_bytes_are_those_of_the_arrays_a_client_sends(plain, tmp_path):
    """By hand: rows x (4 factors + 1 bias + 1 id) x 4 bytes, and the weight."""
    config = make_config(TABLE)
    experiment = build_from_config(config, load_data(config.data))
    ready = prepare_round(experiment, 0, 0)
    items = experiment.data.population.num_items
    held = [(int((block.rows[j] < items).sum()), bool(ready.cohort.present[slot]))
            for block in ready.cohort.blocks for j, slot in enumerate(block.slots) if slot < 40]  # fmt: skip
    assert ready.bytes_down == sum(rows for rows, _ in held) * (4 + 1 + 1) * 4
    keys, standing = make_run_keys(0), Progress()
    _, info = experiment.algorithm.step(initial_arrays(experiment, 0)["state"], ready.cohort, keys.rounds)
    standing.record_round(experiment.wire, info)
    assert standing.updates == sum(here for _, here in held)
    assert standing.bytes_up == sum(rows * (4 + 1 + 1) * 4 + 4 for rows, here in held if here)


def test_clients_that_withdraw_are_counted_whenever_it_was(tmp_path, capsys):
    """The rate is so large that updates overflow within two rounds; rows are written every other round."""
    wild = {"optimizer": {"name": "sgd", "learning_rate": 1e30}, "batch_size": 16}
    summary, rows = run(tmp_path / "w", work=wild)
    assert summary["clients/refused_total"] > 0
    assert rows[1]["clients/refused_total"] == summary["clients/refused_total"]
    assert "clients were discarded because they held NaN" in capsys.readouterr().err


def test_a_sd_or_a_decile_is_nothing_to_choose_by(tmp_path):
    for name in ("val/sampled/hr@10_sd", "val/full/hr@10/decile_3"):
        with pytest.raises(ValueError, match="no metric"):
            run(tmp_path / "s", evaluation={"every": 2, "select": name})


def test_another_process_in_the_same_folder(tmp_path):
    from jaxfed.training.run_dir import lock_folder

    (tmp_path / "a").mkdir()
    with (
        lock_folder(tmp_path / "a"),
        pytest.raises(ValueError, match="another process is running here"),
        lock_folder(tmp_path / "a"),
    ):
        pass


def test_resuming_where_no_run_is_loses_nothing(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "metrics.jsonl").write_text("precious")
    with pytest.raises(ValueError, match="contains files that are not from a run"):
        train_run(make_config({**TABLE, "run": {"out": str(tmp_path / "a")}}), resume=True)
    assert (tmp_path / "a" / "metrics.jsonl").read_text() == "precious"


def test_a_signal_during_an_evaluation_still_saves(tmp_path, monkeypatch):
    """The likeliest moment for Ctrl-C is when a line was just printed."""
    import os
    import signal

    from jaxfed.training import session as session_module

    judge = session_module.evaluate_session

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGINT)
        return judge(*args)

    monkeypatch.setattr(session_module, "evaluate_session", interrupted)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "i", rounds=40)
    assert stop.value.code == 128 + signal.SIGINT
    saved = [int(f.name) for f in (tmp_path / "i" / "checkpoints").iterdir() if f.name.isdigit()]
    assert max(saved) == 3  # the round after the one that was judged
    monkeypatch.setattr(session_module, "evaluate_session", judge)
    table = {**TABLE, "rounds": 40, "run": {"out": str(tmp_path / "i")}}
    assert (
        train_run(make_config(table), resume=True)["params_sha256"]
        == run(tmp_path / "j", rounds=40)[0]["params_sha256"]
    )


def test_where_the_time_went_is_in_every_row_and_goes_on_counting_after_a_resume(plain):
    from jaxfed.training.timing import STAGES

    summary, rows = plain
    names = [f"seconds/{name}" for name in STAGES]
    for row in [summary, *rows[:2]]:
        assert set(names) <= row.keys()
        assert row["seconds/wait"] + row["seconds/compute"] <= row["seconds"] + 0.01
    assert all(rows[0][name] <= rows[1][name] <= summary[name] for name in names)
    assert all(summary[f"seconds/{name}"] > 0 for name in ("pack", "compute", "evaluate"))


def test_a_profile_is_a_trace_of_some_rounds_by_stage(tmp_path, plain):
    """TensorBoard reads the one file, Perfetto the other."""
    import gzip

    summary = train_run(make_config({**TABLE, "run": {"out": str(tmp_path / "p"), "profile": 2}}))
    assert summary["params_sha256"] == plain[0]["params_sha256"]
    (board,) = (tmp_path / "p" / "profile").rglob("*.xplane.pb")
    assert board.stat().st_size
    (file,) = (tmp_path / "p" / "profile").rglob("*.trace.json.gz")
    names = [event.get("name") for event in json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]]
    assert names.count("wait") == 2  # rounds 3 and 4 of 4
    assert {"pack", "compute", "PjitFunction(run_client_block)"} <= set(names)


def test_a_profile_of_more_rounds_than_there_are_ends_with_them(tmp_path):
    train_run(make_config({**TABLE, "rounds": 1, "run": {"out": str(tmp_path / "p"), "profile": 9}}))
    assert len(list((tmp_path / "p" / "profile").rglob("*.xplane.pb"))) == 1


def test_a_chosen_round_is_the_best_of_the_evaluations():
    """One evaluation in three rounds was called the best of three rounds."""
    from jaxfed.cli.summary import describe_best

    said = {
        (3, 10): "best of 1 evaluation in 3 rounds, by validation: round 3",
        (400, 20): "best of 20 evaluations in 400 rounds, by validation: round 3",
        (7, 3): "best of 3 evaluations in 7 rounds, by validation: round 3",
    }
    for (rounds, every), text in said.items():
        assert describe_best({"rounds": rounds, "best_round": 3}, every) == text


def test_an_error_larger_than_that_of_the_mean_is_said():
    """A run whose error was 5e11 stars once was a success."""
    ratings = np.array([1.0, 5.0], np.float32)
    labels = Labels("rating", ratings, ratings, ratings)
    said = worse_than_the_mean(labels, {"val/rating/rmse": 5.2e11})
    assert said.startswith("val/rating/rmse 5.2e+11 is worse than predicting the mean rating for everybody (2): ")
    assert "work.optimizer.learning_rate, server.learning_rate" in said
    assert worse_than_the_mean(labels, {"val/rating/rmse": 1.9}) == ""
    assert worse_than_the_mean(labels._replace(kind="click"), {"val/click/log_loss": 9.0}) == ""
    assert worse_than_the_mean(None, {"val/full/ndcg@10": 0.1}) == ""


def test_the_star_is_explained_once(tmp_path, capsys):
    train_run(make_config({**TABLE, "run": {"out": str(tmp_path / "run")}}))
    told = capsys.readouterr().err
    assert told.count(" * best so far\n") == 1
    assert "round     2" in next(line for line in told.splitlines() if line.endswith("* best so far"))


def test_figures_of_fewer_than_99_negatives_are_marked(plain, capsys):
    """50 items: nobody has 99 that they never met."""
    from jaxfed.cli.summary import print_summary

    most = plain[0]["sampled_negatives"]
    assert 0 < most < 50
    print_summary(plain[0], "run")
    printed = " ".join(capsys.readouterr().out.split())
    assert f"test/sampled (≤ {most} negatives)" in printed
    assert "test/full (" not in printed
    whole = {name: value for name, value in plain[0].items() if name != "sampled_negatives"}
    print_summary(whole, "run")
    assert "(≤" not in capsys.readouterr().out
