"""Runs that go on: from where, under which configuration, on which files; and what is refused without a trace."""

import errno
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import tomli_w

from jaxfed.cli import main
from jaxfed.config import build
from jaxfed.config.config_files import read_config
from jaxfed.config.registry import REGISTRY
from jaxfed.config.schema import config_to_table, make_config
from jaxfed.training import checkpoint
from jaxfed.training import loop as module
from jaxfed.training import session as session_module
from jaxfed.training.log import MetricsWriter, terminal
from jaxfed.training.resume import describe_run, reads_rounds
from jaxfed.training.rounds import Progress
from jaxfed.training.run_dir import lock_folder, read_summary
from tests.small import TABLE

ASSEMBLE, EXPERIMENTS = build.build_from_config, {}


def assembled(config, data):
    """The pieces of a run, once for all runs that differ in rounds, folders and names of files."""
    about = describe_run(config, data.digest)
    key = json.dumps(about | {"config": about["config"] | {"rounds": 0}})
    if key not in EXPERIMENTS:
        EXPERIMENTS[key] = ASSEMBLE(config, data)
    return EXPERIMENTS[key]


train = partial(module.train_run, assemble=assembled)


def made(out, **changes):
    return make_config({**TABLE, **changes, "run": {"out": str(out)}})


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A finished run of four rounds, to be copied."""
    out = tmp_path_factory.mktemp("original") / "run"
    train(made(out))
    return out


@pytest.fixture
def finished(original, tmp_path):
    """A copy of it, which lies elsewhere than it was run."""
    return Path(shutil.copytree(original, tmp_path / "run"))


@pytest.fixture
def stopped(finished):
    """The same before its end: the row of the test is not written, and there is no summary."""
    (finished / "summary.json").unlink()
    record, _ = checkpoint.read_record(finished / "checkpoints", 4)
    os.truncate(finished / "metrics.jsonl", record["standing"]["position"])
    return finished


@pytest.fixture
def program(monkeypatch, capsys):
    """Runs the program in this process; (exit code, its standard output, what it said)."""

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["jaxfed", *map(str, args)])
        monkeypatch.setattr(main, "set_up_process", lambda: None)
        monkeypatch.setattr(module, "train_run", train)
        monkeypatch.setattr(build, "build_from_config", assembled)
        code = 0
        try:
            main.main()
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return call


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def sha(folder):
    return json.loads((folder / "summary.json").read_text())["params_sha256"]


# --- more rounds ----------------------------------------


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """Eight rounds at once."""
    return train(made(tmp_path_factory.mktemp("eight") / "run", rounds=8))


def test_a_finished_run_goes_on_to_more_rounds_and_ends_where_these_would(finished, original, eight, program, capsys):
    code, _, told = program("train", finished / "config.toml", "--rounds", 8, "--resume")
    assert code == 0, told
    assert "after round 4, to round 8 instead of 4" in told
    summary = read_summary(finished)
    timed = {"compile_seconds", "client_updates_per_second", "peak_memory_mb", "extended"}
    same = [name for name in eight if not name.startswith("seconds") and name not in timed]
    assert {name: summary[name] for name in same} == {name: eight[name] for name in same}
    assert (summary["extended"], eight["extended"]) == ([4], [])
    assert [row["round"] for row in rows(finished)] == [2, 4, 6, 8, summary["best_round"]]
    assert (finished / "summary_4.json").read_bytes() == (original / "summary.json").read_bytes()
    assert read_config(finished / "config.toml")["rounds"] == 8
    assert train(made(finished, rounds=8), resume=True) == summary  # it is finished
    (finished / "summary.json").write_text("{")
    assert train(made(finished, rounds=8), resume=True)["params_sha256"] == eight["params_sha256"]
    assert (finished / "summary_4.json").read_bytes() == (original / "summary.json").read_bytes()


def test_stopped_on_its_way_to_more_rounds_it_goes_on_to_them(finished, eight, monkeypatch, capsys):
    """The summary of fewer rounds does not pass for its own."""
    judge = session_module.evaluate_session

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return judge(*args)

    monkeypatch.setattr(session_module, "evaluate_session", interrupted)
    with pytest.raises(SystemExit):
        train(made(finished, rounds=8), resume=True)
    monkeypatch.setattr(session_module, "evaluate_session", judge)
    assert not (finished / "summary.json").exists()
    with pytest.raises(ValueError, match=r"rounds cannot change from 8 to 4: 7 are done. Ask for more"):
        train(made(finished), resume=True)
    assert train(made(finished, rounds=8), resume=True)["params_sha256"] == eight["params_sha256"]
    assert rows(finished)[-1]["round"] == read_summary(finished)["best_round"]


@pytest.mark.parametrize("rounds", [1, 3])
def test_fewer_rounds_than_it_has_done(finished, rounds):
    before = files(finished)
    with pytest.raises(ValueError, match=f"rounds cannot change from 4 to {rounds}: 4 are done"):
        train(made(finished, rounds=rounds), resume=True)
    assert files(finished) == before


@pytest.mark.parametrize("shorter", [(1,), (3,), (1, 3), (5,)])
def test_a_longer_run_chooses_among_the_rounds_that_it_would_have_evaluated_at_once(tmp_path, shorter, capsys):
    """The evaluation at the end of a shorter run is off the schedule, and its model once stayed the best."""
    more = {"evaluation": {"every": 4}}
    at_once = train(made(tmp_path / "once", rounds=6, **more))
    out = tmp_path / "steps"
    for rounds in (*shorter, 6):
        summary = train(made(out, rounds=rounds, **more), resume=True)
    assert summary["extended"] == [*shorter]
    assert {name: summary[name] for name in ("best_round", "params_sha256", "val/full/ndcg@10")} == {
        name: at_once[name] for name in ("best_round", "params_sha256", "val/full/ndcg@10")
    }
    assert {row["round"] for row in rows(out)} >= {4, 6}


def test_a_best_round_that_was_off_the_schedule_is_undone(tmp_path, monkeypatch, capsys):
    """Whatever the figures are: the first evaluation is made the best of all."""
    judge = Progress.judge
    monkeypatch.setattr(Progress, "judge", lambda self, name, value: judge(self, name, -self.round))
    once = train(made(tmp_path / "once", rounds=6))
    steps = made(tmp_path / "steps", rounds=3)
    assert train(steps)["best_round"] == 2
    out = tmp_path / "first"
    assert train(made(out, rounds=1))["best_round"] == 1
    summary = train(made(out, rounds=6), resume=True)
    assert "the best round, 1, was evaluated only because the run ended there" in capsys.readouterr().err
    assert (summary["best_round"], once["best_round"]) == (2, 2)
    assert [row["round"] for row in rows(out)] == [2, 4, 6, 2]
    assert summary["extended"] == [1]
    assert (out / "summary_1.json").exists()


def checked(record=(), standing=(), **changes):
    """What is said of going on after four rounds of the configuration of `record` with one of `changes`."""
    from jaxfed.training.resume import check_config

    old = made("run", **dict(record))
    about = {"standing": {**vars(Progress(round=4)), **dict(standing)}} | describe_run(old, "")
    check_config(Path("run"), about, made("run", **{**dict(record), **changes}))


LINEAR = {"server": {"schedule": "linear"}}
CORRELATED = {"channel": [{"name": "mean"}, {"name": "clip"}, {"name": "correlated"}]}
PATIENT = {"evaluation": {"every": 2, "patience": 2}}


@pytest.mark.parametrize(
    ("record", "standing", "words"),
    [
        (LINEAR, {}, r'rounds cannot change from 4 to 8: server.schedule = "linear" depends on it'),
        (CORRELATED, {}, r'the channel "correlated" depends on it'),
        (PATIENT, {"finished": True, "stale": 2}, "evaluation.patience ended the run after round 4"),
    ],
)
def test_more_rounds_are_refused_where_the_first_ones_would_differ(record, standing, words):
    with pytest.raises(ValueError, match=words) as said:
        checked(record, standing, rounds=8)
    assert "\n" not in str(said.value)
    checked(record, standing)  # as many as before


def test_more_rounds_are_accepted_where_the_first_ones_stay_the_same():
    checked(rounds=8)
    checked(PATIENT, {"finished": True, "stale": 1}, rounds=8)
    checked(PATIENT, {"stale": 1}, rounds=8)
    # the second in a row without an improvement was after the last round alone, where a longer run has none
    checked({"evaluation": {"every": 3, "patience": 2}}, {"finished": True, "stale": 2, "best_round": 1}, rounds=8)
    checked({"server": {"warmup": 2}}, rounds=8)


def test_all_that_is_made_for_a_number_of_rounds_is_known():
    import inspect

    asks = {name for section in REGISTRY.values() for name, function in section.items()
            if "rounds" in inspect.signature(function).parameters}  # fmt: skip
    assert asks == {"correlated"}
    assert reads_rounds(made("run", **CORRELATED))


# --- under another configuration, and elsewhere ----------------------------------------


def edited(folder, old, new):
    text = (folder / "config.toml").read_text()
    assert old in text
    (folder / "config.toml").write_text(text.replace(old, new))


@pytest.mark.parametrize("state", ["finished", "stopped"])
def test_a_configuration_edited_by_hand_is_noticed(state, request, program):
    """The line that a stopped run prints once compared the file with itself."""
    folder = request.getfixturevalue(state)
    edited(folder, "learning_rate = 0.1", "learning_rate = 0.2")
    before = files(folder)
    wanted = "was run with another configuration (work.optimizer.learning_rate: 0.1 -> 0.2)"
    for words in (
        ["train", folder / "config.toml", "--resume"],
        ["evaluate", folder],
        ["recommend", folder, "--user=1"],
    ):
        code, _, told = program(*words)
        said = [line for line in told.splitlines() if line.startswith("jaxfed: ")]
        assert (code, len(said)) == (2, 1), told
        assert wanted in said[0]
    assert files(folder) == before


@pytest.mark.parametrize("state", ["finished", "stopped"])
def test_more_rounds_are_those_asked_for_on_the_command_line(state, request, original, eight, program):
    """A bare --resume once trained a short run on to the 400 rounds of its configuration."""
    folder = request.getfixturevalue(state)
    edited(folder, "rounds = 4", "rounds = 8")
    code, printed, told = program("train", folder / "config.toml", "--resume")
    assert code == 0, told
    assert "is a run of 4 rounds, the configuration says 8: it stays at 4; pass --rounds N" in told
    assert (read_summary(folder)["extended"], sha(folder)) == ([], sha(original))
    assert sha(original) in printed
    code, _, told = program("train", folder / "config.toml", "--resume", "--rounds", 8)
    assert code == 0, told
    assert (read_summary(folder)["extended"], sha(folder)) == ([4], eight["params_sha256"])


def test_a_moved_run_goes_on_where_it_lies(stopped, original, program):
    assert read_config(stopped / "config.toml")["run"]["out"] == str(original)
    before = files(original)
    code, out, told = program("train", stopped / "config.toml", "--resume")
    assert code == 0, told
    assert str(stopped) in out
    assert (stopped / "summary.json").exists()
    assert read_config(stopped / "config.toml")["run"]["out"] == str(stopped)
    assert files(original) == before


def test_the_configuration_in_a_runs_folder_starts_an_equal_run_in_another_folder(finished, program, tmp_path):
    before = files(finished)
    assert program("train", finished / "config.toml", "--out", tmp_path / "other")[0] == 0
    assert sha(tmp_path / "other") == sha(finished)
    assert "already holds a run: pass --resume" in program("train", finished / "config.toml")[2]
    assert files(finished) == before


DATA = "user,item,time\n" + "".join(f"{u},{(u * 7 + i * i) % 40},{i}\n" for u in range(30) for i in range(6))


def test_files_are_found_from_elsewhere_and_after_a_move(tmp_path, monkeypatch, program):
    """Beside the configuration where they are not in the working directory; by the run's own copy from anywhere."""
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    for folder in (project, elsewhere):
        folder.mkdir()
    (project / "mine.csv").write_text(DATA)
    table = {**TABLE, "rounds": 1, "data": {"name": "csv", "path": "mine.csv"}, "cohort": {"size": 8}}
    (project / "mine.toml").write_text(tomli_w.dumps(table))
    monkeypatch.chdir(elsewhere)
    assert program("train", project / "mine.toml", "--out", "run")[0] == 0
    assert read_config("run/config.toml")["data"]["path"] == str(project / "mine.csv")
    shutil.move("run", tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    assert program("evaluate", "moved")[0] == 0
    assert program("train", "project/mine.toml", "--out", "moved", "--resume")[0] == 0  # the same file
    (elsewhere / "mine.csv").write_text(DATA.replace("\n7,", "\n99,"))
    monkeypatch.chdir(elsewhere)
    assert read_config(project / "mine.toml")["data"]["path"] == "mine.csv"  # the one in the working directory
    assert "data.path: " in program("train", project / "mine.toml", "--out", tmp_path / "moved", "--resume")[2]


def test_data_that_were_moved_are_named_in_the_run_and_known_by_their_content(tmp_path, program):
    (tmp_path / "mine.csv").write_text(DATA)
    table = {**TABLE, "rounds": 1, "data": {"name": "csv", "path": str(tmp_path / "mine.csv")}, "cohort": {"size": 8}}
    out = tmp_path / "run"
    train(make_config({**table, "run": {"out": str(out)}}))
    (tmp_path / "mine.csv").rename(tmp_path / "yours.csv")
    edited(out, "mine.csv", "yours.csv")
    assert program("evaluate", out)[0] == 0
    assert program("train", out / "config.toml", "--rounds", 2, "--resume")[0] == 0
    (tmp_path / "yours.csv").write_text(DATA.replace("\n7,", "\n99,"))
    assert "was run on other data" in program("train", out / "config.toml", "--rounds", 3, "--resume")[2]


def test_other_times_of_clients_under_the_same_name(tmp_path):
    from jaxfed.training.resume import check_record

    times = tmp_path / "times.csv"
    times.write_text("client,download,compute,upload\n")
    config = made("run", clock={"name": "trace", "path": str(times)})
    record = {"standing": vars(Progress(round=4))} | describe_run(config, "same")
    check_record(Path("run"), record, config, "same")
    times.write_text("client,download,compute,upload\n1,2,3,4\n")
    with pytest.raises(ValueError, match="on other times of its clients"):
        check_record(Path("run"), record, config, "same")


# --- files that are damaged or gone ----------------------------------------


@pytest.mark.parametrize("damage", ["null", "[]", "{}", '"x"', "{", '{"rounds": 4}', '{"rounds": "4"}', b"\xff"])
def test_a_damaged_summary_is_said_and_made_anew(finished, original, program, damage):
    whole = json.loads((original / "summary.json").read_text())
    (finished / "summary.json").write_bytes(damage if isinstance(damage, bytes) else damage.encode())
    assert "summary.json is damaged" in program("privacy", "spent", finished)[2]
    if damage in ("null", "{"):  # the others go the same way
        code, out, told = program("train", finished / "config.toml", "--resume")
        assert (code, told.count("summary.json is damaged")) == (0, 1), told
        assert whole["params_sha256"] in out
        assert rows(finished) == rows(original)


def test_figures_of_a_summary_that_are_none(finished):
    path = finished / "summary.json"
    whole = json.loads(path.read_text())
    for name, value in (("val/full/ndcg@10", "x"), ("best_round", None), ("params_sha256", 3), ("epsilon", "x")):
        path.write_text(json.dumps(whole | {name: value}))
        with pytest.raises(ValueError, match=f"damaged: .*{name}"):
            read_summary(finished)
    path.write_text(json.dumps({name: value for name, value in whole.items() if name != "val/full/ndcg@10"}))
    train(made(finished), resume=True)  # what a sweep compares by
    assert read_summary(finished)["val/full/ndcg@10"] == whole["val/full/ndcg@10"]


def test_rows_that_are_gone_are_said_and_never_made_of_zeros(stopped, original, capsys):
    os.truncate(stopped / "metrics.jsonl", (stopped / "metrics.jsonl").stat().st_size - 700)
    train(made(stopped), resume=True)
    assert "bytes of earlier rows: they are lost" in capsys.readouterr().err
    assert rows(stopped) == [rows(original)[0], rows(original)[-1]]


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (b'{"a": 1}\n{"b": 2}\n', 18),
        (b'{"a": 1}\n{"b": 2} ', 9),
        (b'{"a": 1}\n{"b"', 9),
        (b'{"a"', 0),
        (b"", 0),
        (None, 0),
    ],
)
@pytest.mark.parametrize("position", [18, 1 << 62])
def test_a_journal_is_cut_to_its_last_whole_row(tmp_path, capsys, text, left, position):
    if text is not None:
        (tmp_path / "metrics.jsonl").write_bytes(text)
    journal = MetricsWriter(tmp_path, position)
    assert journal.position() == left
    journal.close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == (text or b"")[:left]
    assert ("are lost" in capsys.readouterr().err) == (left < position)


def test_a_journal_that_was_cut_stands_where_it_was_cut(tmp_path):
    """A checkpoint before the next row once held the length from before the cut."""
    (tmp_path / "metrics.jsonl").write_text('{"round": 1}\n{"round": 2}\n')
    journal = MetricsWriter(tmp_path, 13)
    assert journal.position() == 13
    journal.log_row({"round": 2, "x": 0.5, "y": float("nan")})
    journal.close()
    assert rows(tmp_path) == [{"round": 1}, {"round": 2, "x": 0.5, "y": None}]


def test_checkpoints_that_are_gone_are_said(stopped, original, capsys):
    shutil.rmtree(stopped / "checkpoints")
    train(made(stopped), resume=True)
    assert f"{stopped} has no checkpoint: it starts at round 0 again" in capsys.readouterr().err
    assert sha(stopped) == sha(original)
    shutil.rmtree(stopped / "checkpoints")
    before = files(stopped)
    with pytest.raises(ValueError, match="is finished and has no checkpoint any more to go on from"):
        train(made(stopped, rounds=8), resume=True)
    shutil.rmtree(stopped / "checkpoints")
    (stopped / "checkpoints").write_text("mine")
    with pytest.raises(ValueError, match="is a file, checkpoints belong there"):
        train(made(stopped, rounds=8), resume=True)
    assert files(stopped) == before | {stopped / "checkpoints": b"mine"}


def test_a_flipped_bit_in_the_newest_record(stopped, original, capsys):
    """The run goes back to the checkpoint before, or to none, and ends where it would have."""
    path = stopped / "checkpoints" / "4" / "meta" / "metadata"
    path.write_text(path.read_text().replace('"round": 4', '"round": 5'))
    with pytest.raises(ValueError, match="none of the checkpoints .* does not match its SHA-256"):
        train(made(stopped), resume=True)  # it is the only one


# --- who may write, and where there is no room ----------------------------------------


def test_a_second_process_is_refused_and_changes_nothing(stopped):
    before = files(stopped)
    other = make_config({**TABLE, "run": {"out": str(stopped), "keep": 9, "checkpoint_every": 1}})
    with lock_folder(stopped), pytest.raises(ValueError, match="another process is running here"):
        train(other, resume=True)
    assert files(stopped) == before


def test_a_run_that_another_process_began_meanwhile(original, tmp_path, monkeypatch):
    """Both saw an empty folder; the first has ended before the second comes to the lock."""
    load = module.load_data

    def slow(section):
        shutil.copytree(original, tmp_path / "run")
        return load(section)

    with pytest.raises(ValueError, match="already holds a run: pass --resume"):
        train(made(tmp_path / "run"), load=slow)
    assert sha(tmp_path / "run") == sha(original)


def test_a_folder_of_which_a_start_was_all_is_a_new_one(tmp_path):
    """A kill between the lock and the first file, or a disk without room for it."""
    (tmp_path / "run").mkdir()
    for name in (".lock", "config.toml.partial"):
        (tmp_path / "run" / name).write_text("")
    assert train(made(tmp_path / "run", rounds=1))["rounds"] == 1


def test_what_clients_keep_to_themselves_is_for_nobody_else(original):
    assert original.stat().st_mode & 0o777 == 0o700


def test_a_full_disk_is_one_line_and_nothing_is_lost(tmp_path, original, program, monkeypatch):
    """The system takes files of 4 kB, no larger ones, from the second checkpoint on."""
    save, limits = checkpoint.save_checkpoint, resource.getrlimit(resource.RLIMIT_FSIZE)

    def no_room(checkpoints, step, *rest):
        if step > 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        save(checkpoints, step, *rest)

    (tmp_path / "small.toml").write_text(tomli_w.dumps({**TABLE, "run": {"checkpoint_every": 1}}))
    out = tmp_path / "run"
    monkeypatch.setattr(checkpoint, "save_checkpoint", no_room)
    try:
        code, _, told = program("train", tmp_path / "small.toml", "--out", out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2
    again = f"free some space, then run: jaxfed train {out}/config.toml --resume"
    assert told.splitlines()[-1] == f"jaxfed: disk full ({os.strerror(errno.EFBIG)}): {again}"
    assert "Traceback" not in told
    monkeypatch.setattr(checkpoint, "save_checkpoint", save)
    assert program("train", out / "config.toml", "--resume")[0] == 0
    assert sha(out) == sha(original)


def test_no_room_for_the_first_file(tmp_path, monkeypatch, program):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    (tmp_path / "small.toml").write_text(tomli_w.dumps(TABLE))
    code, _, told = program("train", tmp_path / "small.toml", "--out", tmp_path / "run")
    said = told.splitlines()[-1]
    assert (code, said) == (2, "jaxfed: disk full (No space left on device): free some space, then start again")
    monkeypatch.undo()
    assert train(made(tmp_path / "run", rounds=1))["rounds"] == 1


# --- what is no success, and where it may run ----------------------------------------


def test_a_run_in_which_nobody_reports(tmp_path, program):
    table = {**TABLE, "cohort": {"name": "everyone", "dropout": 0.999999}}
    (tmp_path / "small.toml").write_text(tomli_w.dumps(table))
    code, _, told = program("train", tmp_path / "small.toml", "--out", tmp_path / "run")
    assert code == 2
    assert "no client ever reported an update: of 160 clients asked, 160 dropped out" in told.splitlines()[-1]
    assert not (tmp_path / "run" / "summary.json").exists()
    assert [row["train/loss"] for row in rows(tmp_path / "run")] == [None, None]
    assert [row["clients/reported"] for row in rows(tmp_path / "run")] == [0, 0]


def test_in_a_thread_it_leaves_signals_alone(tmp_path, original):
    """Notebooks and searches for hyperparameters run it in threads of their own."""
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    done = []
    thread = threading.Thread(target=lambda: done.append(train(made(tmp_path / "run"))))
    thread.start()
    thread.join()
    assert done[0]["params_sha256"] == sha(original)
    assert before == [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_terminal_that_is_closed_stops_a_run_as_others_do(tmp_path, monkeypatch, capsys, number):
    judge = session_module.evaluate_session

    def gone(*args):
        os.kill(os.getpid(), number)
        if number == signal.SIGHUP:  # shells send it again
            os.kill(os.getpid(), number)
        return judge(*args)

    monkeypatch.setattr(session_module, "evaluate_session", gone)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whatever started the tests may have it ignored
    try:
        with pytest.raises(SystemExit) as stop:
            train(made(tmp_path / "run", rounds=40))
    finally:
        terminal().quiet = False
        signal.signal(signal.SIGHUP, before)
    assert stop.value.code == 128 + number
    assert checkpoint.checkpoint_steps(tmp_path / "run" / "checkpoints")[0] == 3
    assert ("finishing this round" in capsys.readouterr().err) == (number != signal.SIGHUP)  # there is nobody to tell


def test_nohup_is_respected(monkeypatch):
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with module.catch_signals(print, []):
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, old)


def test_a_configuration_is_the_same_in_another_process(original):
    config = make_config(read_config(original / "config.toml"))
    code = "import pickle, sys; c = pickle.load(sys.stdin.buffer)\n"
    code += "from jaxfed.config.config_files import read_config; from jaxfed.config.schema import make_config\n"
    code += f"assert c == make_config(read_config({str(original / 'config.toml')!r})) != make_config({{}})\n"
    code += "sys.stdout.buffer.write(pickle.dumps((c, c.work, c.channel, c.evaluation, c.run)))"
    done = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(config), capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    back, *parts = pickle.loads(done.stdout)
    assert back == config
    assert parts == [config.work, config.channel, config.evaluation, config.run]
    assert (hash(back), config_to_table(back)) == (hash(config), config_to_table(config))
