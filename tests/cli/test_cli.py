"""The program as a user runs it."""

import contextlib
import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from jaxfed.cli import main
from jaxfed.config.overrides import override_config
from tests.small import SMALL, child_environment

SUMMARY = {
    "rounds", "seconds", "compile_seconds", "client_updates_per_second", "peak_memory_mb", "bytes_up_per_client",
    "bytes_down_per_client", "bytes_up_total", "bytes_down_total", "server_sees", "params_sha256",
    "test/full/hr@10", "test/full/ndcg@10", "test/sampled/hr@10", "test/sampled/ndcg@10", "test/full/mrr",
    "test/full/auc", "test/sampled/accuracy", "test/sampled/precision", "test/sampled/recall",
    "test/sampled/f1", "val/full/ndcg@10",
}  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "small.toml"
    path.write_text(SMALL)
    return path


def jaxfed(*args, **kw):
    """Runs the program in a process of its own, on one device."""
    env = child_environment()
    return subprocess.run(
        [sys.executable, "-m", "jaxfed", *map(str, args)], capture_output=True, text=True, env=env, **kw
    )


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """A run that nobody disturbed."""
    out = tmp_path_factory.mktemp("runs") / "a"
    done = jaxfed("train", config, "--out", out)
    assert done.returncode == 0, done.stderr
    return out, done


def test_a_run_leaves_its_files(finished):
    out, done = finished
    summary = json.loads((out / "summary.json").read_text())
    assert summary.keys() >= SUMMARY
    assert summary["rounds"] == 12
    assert summary["server_sees"] == "update+rows"
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rows] == [4, 8, 12, summary["best_round"]]
    assert all("val/full/ndcg@10" in row for row in rows[:3])
    assert "test/full/hr@10" in rows[3]
    assert max(row["val/full/ndcg@10"] for row in rows[:3]) == summary["val/full/ndcg@10"]
    whole = tomllib.loads((out / "config.toml").read_text())
    assert whole["evaluation"]["select"] == "val/full/ndcg@10"
    assert list((out / "tensorboard").iterdir())
    assert (out / "checkpoints" / "12").is_dir()
    assert "hr@10" in done.stdout
    assert "round    12" in done.stderr
    assert "leaky" not in summary


def test_its_config_reproduces_it(finished, tmp_path):
    out, _ = finished
    assert jaxfed("train", out / "config.toml", "--out", tmp_path / "b").returncode == 0
    a, b = (json.loads((run / "summary.json").read_text()) for run in (out, tmp_path / "b"))
    assert a["params_sha256"] == b["params_sha256"]
    timed = {"seconds", "compile_seconds", "client_updates_per_second", "peak_memory_mb"}
    untimed = [{k: v for k, v in each.items() if k not in timed and not k.startswith("seconds/")} for each in (a, b)]
    assert untimed[0] == untimed[1]


def test_a_finished_run_resumes_to_its_summary(finished, config):
    out, first = finished
    before = {f: f.stat().st_mtime_ns for f in out.rglob("*") if f.is_file()}
    again = jaxfed("train", config, "--out", out, "--resume")
    assert again.returncode == 0
    assert again.stdout == first.stdout
    assert before == {f: f.stat().st_mtime_ns for f in out.rglob("*") if f.is_file()}


def start(*args):
    env = child_environment()
    command = [sys.executable, "-m", "jaxfed", *map(str, args)]
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # which a suite in the background ignores
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, **pipes, text=True, env=env, preexec_fn=heard)


def wait_for(condition, process, seconds=120):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.002)


def checks(out, finished):
    """The summary and the metrics are those of the undisturbed run."""
    a, b = (json.loads((run / "summary.json").read_text()) for run in (finished[0], out))
    assert a["params_sha256"] == b["params_sha256"]
    rows = [
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (finished[0], out)
    ]
    clean = [[{k: v for k, v in row.items() if not k.startswith("seconds")} for row in some] for some in rows]
    assert clean[0] == clean[1]


def test_killed_in_the_middle_of_a_save_it_resumes_to_the_same_parameters(config, finished, tmp_path):
    out = tmp_path / "k"
    saving = lambda: (
        any("tmp" in f.name for f in (out / "checkpoints").glob("*"))
        and any(f.name.isdigit() for f in (out / "checkpoints").glob("*"))
    )
    process = start("train", config, "--out", out)
    wait_for(saving, process)  # a second checkpoint is being written
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "summary.json").exists()
    again = jaxfed("train", config, "--out", out, "--resume")
    assert again.returncode == 0, again.stderr
    assert "resuming" in again.stderr
    checks(out, finished)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_it_checkpoints_and_says_how_to_go_on(config, finished, tmp_path, number):
    out = tmp_path / "s"
    process = start("train", config, "--out", out)
    wait_for(lambda: (out / "metrics.jsonl").exists(), process)
    wait_for(lambda: any(f.name.isdigit() for f in (out / "checkpoints").glob("*")), process)
    process.send_signal(number)
    _, told = process.communicate(timeout=120)
    if process.returncode == 0:
        pytest.fail("the run ended before the signal came: make it longer")
    assert process.returncode == 128 + number
    assert f"go on with: jaxfed train {out}/config.toml --resume" in told
    again = jaxfed("train", out / "config.toml", "--resume")
    assert again.returncode == 0, again.stderr
    checks(out, finished)


def test_damaged_it_goes_back_to_the_newest_good_checkpoint(config, finished, tmp_path):
    out = tmp_path / "d"
    process = start("train", config, "--out", out)
    wait_for(lambda: any(f.name == "6" for f in (out / "checkpoints").glob("*")), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    newest = max((f for f in (out / "checkpoints").iterdir() if f.name.isdigit()), key=lambda f: int(f.name))
    arrays = [f for f in newest.rglob("state/**/d/*") if f.stat().st_size > 1000]  # Orbax keeps them twice
    assert arrays
    for file in arrays:
        file.write_bytes(file.read_bytes()[:50])
    again = jaxfed("train", config, "--out", out, "--resume")
    assert again.returncode == 0, again.stderr
    assert f"checkpoint {newest.name} is damaged" in again.stderr
    assert "Traceback" not in again.stderr
    assert "Event loop" not in again.stderr
    checks(out, finished)


def test_on_another_number_of_devices_it_resumes_too(config, tmp_path):
    out = tmp_path / "n"
    process = start("train", config, "--out", out)
    wait_for(lambda: any(f.name.isdigit() for f in (out / "checkpoints").glob("*")), process)
    process.send_signal(signal.SIGTERM)
    process.wait()
    assert process.returncode == 128 + signal.SIGTERM  # it did not end by itself
    env = child_environment()
    env["XLA_FLAGS"] += " --xla_force_host_platform_device_count=2"
    args = ["train", str(config), "--out", str(out), "--resume", "--run.devices", "2"]
    done = subprocess.run([sys.executable, "-m", "jaxfed", *args], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert "resuming" in done.stderr
    assert json.loads((out / "summary.json").read_text())["rounds"] == 12


def test_evaluate_says_what_the_summary_says(finished):
    out, _ = finished
    got = json.loads(jaxfed("evaluate", out, "--json").stdout)
    summary = json.loads((out / "summary.json").read_text())
    assert got == {name: summary[name] for name in got}
    assert "test/full/hr@10" in got
    assert "test/full" in jaxfed("evaluate", out).stdout


def test_recommend(finished):
    out, _ = finished
    lines = jaxfed("recommend", out, "--user", 7, "-k", 3).stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["1", "2", "3"]
    scores = [float(line.split()[1]) for line in lines]
    assert scores == sorted(scores, reverse=True)
    done = jaxfed("recommend", out, "--user", 7, "-k", 1000)
    notes = done.stderr.splitlines()
    assert notes[0].split() == ["rank", "score", "item"]
    left, listed = int(notes[-2].split()[0]), len(done.stdout.splitlines())
    assert notes[-2].startswith(f"{left} of 50 items were left out: this user had them")
    assert left + listed == 50
    assert notes[-1] == f"-k is 1,000: there are no more than {listed} other items"


def test_data_describes(tmp_path):
    told = jaxfed("data", "synthetic", "--users", 100, "--items", 80).stdout
    assert told.startswith("100 users x ")
    assert "popularity" in told
    path = tmp_path / "mine.csv"
    path.write_text("user,item,time\n" + "".join(f"{u},{i},{i}\n" for u in range(5) for i in range(4)) + "9,1,1\n")
    told = jaxfed("data", path).stdout
    assert told.startswith("5 users x 4 items, 20 interactions")
    assert "1 users with fewer than 3 interactions left out" in told


def test_a_file_of_ones_own_from_end_to_end(config, tmp_path, wrong):
    path = tmp_path / "mine.csv"
    rows = (f"{u},{(u * 7 + i * i) % 40},{i},{'xy'[u % 2]}\n" for u in range(30) for i in range(8))
    path.write_text("member,thing,when,shop\n" + "".join(rows) + "99,1,1,x\n")
    columns = ["--data.user", "member", "--data.item", "thing", "--data.time", "when", "--data.clients", "shop"]
    args = ["--data.path", path, *columns, "--cohort.size", "2", "--rounds", "4"]
    done = jaxfed("train", config, "--out", tmp_path / "f", *args)
    assert done.returncode == 0, done.stderr
    assert "data: columns: user is member, item is thing, time is when, no rating (every row counts 1)" in done.stderr
    assert jaxfed("recommend", tmp_path / "f", "--user", "3").returncode == 0
    assert 'user "99" was left out: fewer than 3 interactions' in wrong("recommend", tmp_path / "f", "--user", "99")


# --- what goes wrong: one line, exit code 2, nothing overwritten ----------------------------------------


@pytest.fixture
def wrong(config, tmp_path, monkeypatch, capsys):
    """Runs the program in this process and returns its one line."""

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["jaxfed", *map(str, args)])
        monkeypatch.setattr(main, "set_up_process", lambda: None)
        before = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
        with pytest.raises(SystemExit) as stop:
            main.main()
        assert stop.value.code == 2
        assert before == {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
        error = capsys.readouterr().err
        lines = [line for line in error.splitlines() if not line.startswith("data: ")]
        assert len(lines) == 1, error
        return lines[0]

    return call


@pytest.fixture
def here(monkeypatch, capsys):
    """Runs the program in this process; (exit code, what it said)."""

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["jaxfed", *map(str, args)])
        monkeypatch.setattr(main, "set_up_process", lambda: None)
        code = 0
        try:
            main.main()
        except SystemExit as stop:
            code = stop.code
        return code, capsys.readouterr().err

    return call


TRAIN_ERRORS = [
    (["--model.dmi", "3"], 'unknown option --model.dmi; did you mean "--model.dim"?'),
    (["--model.name", "mff"], 'did you mean "mf"?'),
    (["--cohort.size", "61"], "cohort.size 61 is larger than the population of 60 clients"),
    (["--work.batch-size", "0"], "work.batch_size is 0: it must be at least 1"),
    (["--work.negatives", "-1"], "work.negatives is -1: it must be a whole number from 0"),
    (["--model.loss", "bpr", "--work.negatives", "0"], "set work.negatives to 1 or more"),
    (["--model.loss", "x"], "Expected one of ('bce', 'bpr', 'squared')"),
    (["--channel.0.by", "x"], "Expected one of ('examples', 'activity', 'uniform')"),
    (["--data.protocol", "loo"], "Expected one of ('loo-clean', 'ratio-clean', 'compat-pfedrec', "),
    (["--data.clients", "town"], "the data have no such column"),
    (["--data.name", "csv", "--data.path", "none.csv"], "none.csv: no such file"),
    (["--data.clients", "device", "--data.devices", "0"], "data.devices is 0: a user has at least 1"),
    (["--data.merge", "devices"], "set data.clients to the column that tells the devices of a user apart"),
    (["--data.merge", "devices", "--data.clients", "device"], "leave data.merge out"),
    (["--data.merge", "devices", "--data.clients", "town"], "clients by 'town': the data have no such column"),
    (["--data.clients", "device", "--data.malicious", "0.1"], "data.malicious: the malicious are known by the numbers"),
    (["--data.clients", "device", "--data.protocol", "compat-pfedrec"], "compat-pfedrec has one client a user"),
    (["--data.clients", "device", "--work.name", "scaffold"], "keeps more on a client than the private part"),
    (["--data.merge", "domains", "--data.clients", "town", "--data.cold", "0.1"], "folded in from one catalogue"),
    (["--data.merge", "domains", "--data.clients", "town"], "clients by 'town': the data have no such column"),
    (["--server.edges", "61"], "edge 60 has no clients"),
    (["--server.edges", "2", "--server.edge-rounds", "0"], "server.edge_rounds is 0"),
    (["--server.edges", "2", "--channel.0.name", "median"], "at an edge stand means, clips and codes"),
    (["--data.cold", "1"], "data.cold is 1.0: a share of the clients, from 0 to below 1"),
    (["--data.cold", "0.001"], "of 60 clients that leaves nobody on one side"),
    (["--data.cold", "0.1", "--data.malicious", "0.1"], "choose one of both"),
    (["--data.cold", "0.1", "--model.loss", "bpr"], "no way from a history to the private part of a new client"),
    (["--data.cold", "0.1", "--work.name", "clustered", "--channel.0.name", "cluster_mean"], "new clients have none"),
    (["--evaluation.select", "val/full/ndcg"], 'no metric "val/full/ndcg"; did you mean "val/full/ndcg@'),
    (["--run.devices", "99"], "99 devices asked for"),
    (["--cohort.dropout", "1"], "a probability"),
    (["--cohort.size", "-1"], "cohort.size is -1: it must be a whole number from 0"),
    (["--model.dim", "0"], "model.dim is 0: it must be a whole number from 1 to 65,536"),
    (["--model.dim", str((1 << 63) - 1)], "it must be a whole number from 1 to 65,536"),
    (["--model.name", "metamf", "--model.code", str(1 << 40)], "it must be a whole number from 1 to 65,536"),
    (["--work.name", "clustered", "--work.clusters", str(1 << 31)], "it must be a whole number from 0 to 65,536"),
    (["--work.epochs", str((1 << 63) - 1)], "lower work.epochs, work.negatives or cohort.size"),
    (["--work.negatives", str((1 << 63) - 1)], "lower work.epochs, work.negatives or cohort.size"),
    (["--work.negatives", "100000000"], "lower work.epochs, work.negatives or cohort.size"),
    (["--data.users", str(1 << 62)], "users, items and rank must lie below 2^31"),
    (["--model.dim", "-1"], "model.dim is -1: it must be a whole number from 1 to 65,536"),
    (["--model.name", "neumf", "--model.hidden", "0"], "model.hidden is 0"),
    (["--seed", str(1 << 63)], "it must be a whole number from 0 to 2^63 - 1"),
    (["--work.optimizer.learning-rate", "nan"], "it must be a finite number"),
    (["--channel.0.name", "at_client", "--channel.0.transform", "x"], "invalid choice 'x'"),
]


@pytest.mark.parametrize(("args", "words"), TRAIN_ERRORS, ids=[" ".join(args) for args, _ in TRAIN_ERRORS])
def test_train_refuses_in_one_line_and_leaves_no_folder(wrong, config, tmp_path, args, words):
    assert words in wrong("train", config, "--out", tmp_path / "w", *args)
    assert not (tmp_path / "w").exists()


def test_a_run_that_is_there(wrong, config, finished):
    assert "already holds a run: pass --resume" in wrong("train", config, "--out", finished[0])


def test_a_config_that_differs_from_the_one_resumed(wrong, config, finished):
    line = wrong("train", config, "--out", finished[0], "--resume", "--model.dim", "5", "--cohort.size", "13")
    assert "cohort.size: 20 -> 13; model.dim: 4 -> 5" in line


def test_other_data_than_the_run_was_on(wrong, tmp_path, config):
    path = tmp_path / "mine.csv"
    rows = [f"{u},{(u * 7 + i * i) % 40},0\n" for u in range(30) for i in range(8)]
    path.write_text("user,item,time\n" + "".join(rows))
    args = ["train", config, "--out", tmp_path / "o", "--data.name", "csv", "--data.path", path, "--rounds", "400"]
    process = start(*args)
    wait_for(lambda: any(f.name.isdigit() for f in (tmp_path / "o" / "checkpoints").glob("*")), process)
    process.send_signal(signal.SIGTERM)
    process.wait()
    path.write_text("user,item,time\n" + "".join(rows[::-1]))
    assert "on the same rows in another order" in wrong(*args, "--resume")


def test_a_cohort_that_the_device_cannot_hold(wrong, config, tmp_path, monkeypatch):
    from jaxfed.config import memory, round_stages

    monkeypatch.setattr(memory, "device_memory", lambda: 5_000)
    monkeypatch.setattr(round_stages, "largest_block_bytes", lambda *args, **options: 1_000)
    line = wrong("train", config, "--out", tmp_path / "w", "--run.area", "4", "--run.chunk", "50")
    assert "set run.chunk to 2" in line  # beside three blocks that are worked on
    monkeypatch.setattr(
        round_stages, "largest_block_bytes", lambda shapes, *args, **options: 1_000 * shapes.steps_per_block
    )
    line = wrong("train", config, "--out", tmp_path / "w", "--run.area", "16")
    assert "set run.area to 1" in line
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes."), "out of memory: lower run.chunk"),
        (
            MemoryError("Unable to allocate 7.28 TiB"),
            "out of memory (Unable to allocate 7.28 TiB): the data or the model",
        ),
        (MemoryError(), "out of memory: the data or the model are too large for it"),
    ],
)
def test_out_of_memory_is_one_line(here, config, tmp_path, monkeypatch, error, words):
    from jaxfed.config.config_files import read_config
    from jaxfed.training.runs import shared_runner

    def fail(*_):
        raise error

    monkeypatch.setattr("jaxfed.training.session.compile_programs", fail)
    code, told = here("train", config, "--out", tmp_path / "new")
    assert code == 2
    assert told.splitlines()[-1].startswith(f"jaxfed: {words}")
    asked = override_config(read_config(config), ["--run.out", str(tmp_path / "other")])
    assert shared_runner()(asked) == ({}, str(error) or "out of memory")  # nor is it the end of a sweep


def test_places_where_no_run_can_be(wrong, config, tmp_path):
    (tmp_path / "file").write_text("")
    assert "contains files that are not from a run" in wrong("train", config, "--out", tmp_path / "file")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.txt").write_text("mine")
    assert "contains files that are not from a run" in wrong("train", config, "--out", tmp_path / "notes")
    assert "Not a directory" in wrong("train", config, "--out", tmp_path / "file" / "below")
    assert "a name has '['" in wrong("train", config, "--out", tmp_path / "[1]")
    assert "File name too long" in wrong("train", config, "--out", tmp_path / ("x" * 300))


SLOW_IMPORT = "import pathlib, time\npathlib.Path('imported').touch()\ntime.sleep(60)\n"


def test_interrupted_while_it_is_imported(config, tmp_path):
    """The first second of a command, in which a traceback of 25 lines was the answer."""
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax" / "__init__.py").write_text(SLOW_IMPORT)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(main.__file__).parents[2])])}
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    words = [sys.executable, "-m", "jaxfed", "train", str(config)]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=env, cwd=tmp_path, preexec_fn=heard)
    wait_for((tmp_path / "imported").exists, process)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert (process.returncode, told) == (130, "jaxfed: interrupted\n")


def test_interrupted_before_the_first_round(config, tmp_path):
    process = start("train", config, "--out", tmp_path / "i")
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert told.splitlines()[-1].startswith(("jaxfed: interrupted", "stopped after round"))
    assert "Traceback" not in told


FILE = "user,item,time\n" + "".join(f"{u},{(u * 7 + i * i) % 40},{i}\n" for u in range(30) for i in range(8))


def test_a_run_whose_data_changed_is_not_called_damaged(wrong, here, config, tmp_path):
    path, out = tmp_path / "mine.csv", tmp_path / "o"
    path.write_text(FILE)
    assert here("train", config, "--out", out, "--data.path", path, "--rounds", 4)[0] == 0
    path.write_text("\n".join(line for line in FILE.splitlines() if not line.startswith("29,")))  # one user fewer
    for words in (["evaluate", out], ["recommend", out, "--user", 1]):
        line = wrong(*words)
        assert "differ from those of the run" in line
        assert "damaged" not in line


def test_a_run_without_an_evaluation_has_no_best_model(wrong, here, config, tmp_path, monkeypatch):
    from jaxfed.training import session

    def stop(*args, **kw):
        raise SystemExit(130)

    monkeypatch.setattr(session, "evaluate_session", stop)
    assert here("train", config, "--out", tmp_path / "o", "--run.checkpoint-every", 1)[0] == 130
    assert "has no evaluation yet (it stopped after round 3)" in wrong("evaluate", tmp_path / "o")


def test_a_run_that_diverges_is_no_success(wrong, here, config, tmp_path):
    """Ranks of what is not a number are ranks: no such model is chosen, and there are no figures of it."""
    out = tmp_path / "d"
    words = ["--server.name", "sgd", "--server.learning-rate", "1e39", "--out", out]
    code, told = here("train", config, *words)
    assert code == 2
    assert "the run diverged" in told.splitlines()[-1]
    assert not (out / "summary.json").exists()
    for line in (out / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert "diverged" in wrong("evaluate", out)


def test_what_kind_of_file_it_is(wrong, here, config, tmp_path):
    (tmp_path / "A.CSV").write_text(FILE)
    (tmp_path / "a.txt").write_text(FILE)
    line = wrong("train", config, "--out", tmp_path / "o", "--data.path", tmp_path / "a.txt")
    assert "from its ending: pass, for example, --data.name csv" in line
    assert "--data.name csv" in line
    assert "cannot tell the kind of" in wrong("data", tmp_path / "a.txt")
    more = ["--rounds", "1", "--evaluation.every", "1", "--run.checkpoint-every", "1"]
    assert here("train", config, "--out", tmp_path / "o", "--data.path", tmp_path / "A.CSV", *more)[0] == 0
    assert 'name = "csv"' in (tmp_path / "o" / "config.toml").read_text()


def test_data_of_files_of_every_ending(tmp_path, monkeypatch, capsys):
    def described(*words):
        monkeypatch.setattr(sys, "argv", ["jaxfed", "data", *map(str, words)])
        monkeypatch.setattr(main, "set_up_process", lambda: None)
        main.main()
        return re.sub(r"(?<=a configuration for these data, ).*", "...", capsys.readouterr().out)

    dotted, columns = "\n".join(FILE.splitlines()[1:]).replace(",", "::"), ("--data.columns", "user", "item", "time")
    (tmp_path / "ratings.dat.gz").write_bytes(gzip.compress(dotted.encode()))
    (tmp_path / "LOG.CSV").write_text(FILE)
    (tmp_path / "log.tsv.gz").write_bytes(gzip.compress(FILE.replace(",", "\t").encode()))
    (tmp_path / "log.txt").write_text(FILE)
    (tmp_path / "c.toml").write_text(f'[data]\nname = "csv"\npath = "{tmp_path}/log.txt"\n', "utf-8-sig")
    told = {
        described(tmp_path / "LOG.CSV"),
        described(tmp_path / "log.tsv.gz"),
        described(tmp_path / "log.txt", "--name", "csv"),
        described(tmp_path / "ratings.dat.gz", "--data.delimiter", "::", *columns),
        described(tmp_path / "c.toml"),
    }
    assert len(told) == 1
    assert told.pop().startswith("30 users x ")
    assert "no time (rows keep the order of the file)" in described(tmp_path / "LOG.CSV", "--time", "none")


ESCAPE = "\x1b]0;pwned\x07\x1b[2J\x9b31m\u202e"


def hostile(text):
    """Whether a text would steer a terminal."""
    return any(each in text for each in "\x1b\x07\x9b\u202e\r")


def test_no_file_steers_the_terminal(here, config, tmp_path, capsys, monkeypatch):
    """Titles, ids, columns and keys of other people's files once set the window's title and cleared the screen."""
    (tmp_path / "mine.csv").write_text(FILE)
    (tmp_path / "titles.csv").write_text("item,title\n" + "".join(f'{i},"t{ESCAPE}\r{i}"\n' for i in range(40)))
    named = ["--data.path", tmp_path / "mine.csv", "--data.titles", tmp_path / "titles.csv", "--rounds", 1]
    out = tmp_path / ":smile:"
    more = ["--evaluation.every", "1", "--run.checkpoint-every", "1"]
    said = []

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["jaxfed", *map(str, words)])
        with contextlib.suppress(SystemExit):
            main.main()
        said.extend(capsys.readouterr())
        return said[-2] + said[-1]

    assert here("train", config, "--out", out, *named, *more)[0] == 0
    told = call("recommend", out, "--user", 1, "-k", 3)
    assert told.count("t\\x1b]0;pwned\\x07\\x1b[2J\\x9b31m\\u202e\\r") == 3
    assert told.count("\n") == 5  # with a line above, and one below
    assert ":smile:" in call("evaluate", out)
    (tmp_path / "evil.csv").write_text(FILE.replace("user", f"u{ESCAPE}", 1))
    assert "u\\x1b]0" in call("data", tmp_path / "evil.csv")
    (tmp_path / "evil.toml").write_text('["a\\u001b[2J"]\n')
    assert 'unknown key "a\\x1b[2J"' in call("train", tmp_path / "evil.toml")
    (tmp_path / "evil.toml").write_text('[data]\nname = "csv"\npath = "a\\u001b[2J"\n')
    assert "a\\x1b[2J: no such file" in call("train", tmp_path / "evil.toml")
    assert "a\\x1b[2J" in call("train", tmp_path / "evil.toml", "--help")
    assert "pwned" in call("train", f"a{ESCAPE}")
    grid = ["--grid", "model.dim=3", "--grid", f"data.user={ESCAPE},x{ESCAPE}", "--out", tmp_path / "sweep"]
    call("sweep", config, "--data.path", tmp_path / "mine.csv", *grid)
    summary = json.loads((out / "summary.json").read_text())
    (out / "summary.json").write_text(json.dumps(summary | {"server_sees": ESCAPE, f"test{ESCAPE}/hr@10": 1.0}))
    assert "pwned" in call("train", out / "config.toml", "--resume")
    assert not hostile("".join(said))


def test_what_is_printable():
    from jaxfed.core.excerpt import printable

    text = "Amélie - 千と千尋 [bold]"
    assert printable(text) == text
    for each in [*range(32), *range(127, 160), 0x061C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A)]:
        assert printable(f"a{chr(each)}b").startswith("a\\")
    assert printable("\udcff").encode() == b"\\udcff"


def test_small_mistakes(wrong, config):
    assert 'did you mean "--resume"' in wrong("train", config, "--resum")
    told = wrong("train", config, "--work.optimizer.item.learning-rate", "x")
    assert "--work.optimizer.item.learning-rate" in told
    assert "NoneType" not in told
    rest = ["--epsilon", 8, "--delta", 1e-5, "--population", 943, "--rounds", 60]
    assert "pass --cohort" in wrong("privacy", "calibrate", *rest)


def test_the_other_commands(wrong, finished, tmp_path):
    assert "no run here" in wrong("evaluate", tmp_path)
    assert "unknown option --modle" in wrong("evaluate", finished[0], "--modle")
    assert 'no user "nobody"' in wrong("recommend", finished[0], "--user", "nobody")
    assert "must be at least 1" in wrong("recommend", finished[0], "--user", "1", "-k", "0")
    assert 'no data set "ml-10k"; did you mean "ml-100k"?' in wrong("data", "ml-10k")
    assert 'no data set "films": give one of ml-100k, synthetic, shape, csv' in wrong("data", "films")
    assert "no such file, and no configuration of that name" in wrong("train", tmp_path / "x.toml")
    (tmp_path / "empty.csv").write_text("user,item\n")
    assert "the table has no rows" in wrong("data", tmp_path / "empty.csv")


def test_profile_is_a_run_option(config, monkeypatch):
    from jaxfed.training import loop

    for args, rounds in (([], 0), (["--profile"], 5), (["--run.profile", "7"], 7), (["--profile", "--seed", "1"], 5)):
        seen = []
        monkeypatch.setattr(
            loop, "train_run", lambda config, resume, **more: seen.append(config) or {"rounds": 1, "best_round": 1}
        )
        monkeypatch.setattr(sys, "argv", ["jaxfed", "train", str(config), *args])
        main.main()
        assert seen[0].run.profile == rounds
        assert seen[0].run.checkpoint_every == 3


def test_help(config):
    told = jaxfed("--help").stdout
    assert all(command in told for command in ("train", "evaluate", "recommend", "data"))
    assert "--resume" in jaxfed("train", "--help").stdout
    assert "--work.optimizer.item.learning-rate" in jaxfed("train", config, "--rounds", "3", "--help").stdout
