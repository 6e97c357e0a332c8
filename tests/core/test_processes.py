"""Several processes that are one run: who reads what, and real processes on gloo."""

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing, suppress
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxfed.core.model import SequenceFormat
from jaxfed.core.processes import find_disagreement, receive_processes
from jaxfed.data.batching import Batching
from jaxfed.data.blocks import make_block_shapes
from jaxfed.data.device_cohorts import make_drawer
from jaxfed.data.device_data import keep_own_rows
from jaxfed.data.packing import empty_cohort, pack_cohort
from jaxfed.data.population import Labels, ProcessShare, Times
from jaxfed.data.preparation import prepare_population
from jaxfed.data.ragged import NegativeIndex, Ragged
from jaxfed.data.sources.synthetic import synthetic_data
from jaxfed.evaluation.split import make_eval_batches, make_eval_split
from jaxfed.training.best_model import open_best_model
from tests.laws.cover import parametrize_cover
from tests.small import SMALL, child_environment

POPULATION = prepare_population(synthetic_data(60, 50, mean_length=10))[1]
SILOS = prepare_population(synthetic_data(60, 50, mean_length=10), clients="silo", silos=11)[1]


# --- each reads its own clients' data ----------------------------------------


def only(population, share):
    """The population as a process may know it: all lengths, but garbage for the data of other processes' clients."""
    mine = share.owner(population.client_of, population.num_clients) == share.rank
    random = np.random.default_rng(0)

    def spoiled(part):
        own = np.repeat(mine, part.counts)
        return Ragged(
            np.where(own, part.values, random.integers(0, 50, len(own))).astype(part.values.dtype), part.start
        )

    parts = {name: spoiled(getattr(population, name)) for name in ("train", "excluded", "valid", "test")}
    own = np.repeat(mine, population.excluded.counts)
    gaps = np.where(own, population.negative_index.gaps, random.integers(-9, 9999, len(own)))
    return population._replace(**parts, negative_index=NegativeIndex(gaps, None))


def note_held_rows(noted, rank, is_held):
    """In place of the union over processes: keeps what one of them holds."""
    noted[rank] = is_held
    return is_held


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("population", [POPULATION, SILOS], ids=["users", "silos"])
def test_a_process_packs_from_its_own_clients_data_alone(population, size):
    batching, devices = Batching(8, 3), 2 * size
    ids = np.random.default_rng(1).permutation(population.num_clients)[:9]
    args = batching, ids, np.ones(9, bool)
    there = np.zeros((size, population.num_items + 1), bool)

    def packed(source, rank, union):
        shapes = make_block_shapes(population, batching, 9, devices, 16, share=ProcessShare(rank, size))
        return pack_cohort(source, args[0], shapes, *args[1:], 0, 3, union)

    for rank in range(size):
        packed(only(population, ProcessShare(rank, size)), rank, partial(note_held_rows, there, rank))
    parts = [packed(only(population, ProcessShare(r, size)), r, lambda _: there.any(0)) for r in range(size)]
    honest = [packed(population, r, lambda _: there.any(0)) for r in range(size)]
    jax.tree.map(np.testing.assert_array_equal, parts, honest)
    shapes = [[block.data.rows.shape for block in part.blocks] for part in parts]
    assert all(each == shapes[0] for each in shapes)  # or programs would not match
    assert all((part.rows == parts[0].rows).all() for part in parts)
    slots = np.concatenate([block.slots for part in parts for block in part.blocks])
    assert sorted(slots[slots < 9].tolist()) == list(range(9))
    empty = empty_cohort(
        population, batching, make_block_shapes(population, batching, 9, devices, 16, share=ProcessShare(1, size))
    )
    assert {block.data.rows.shape for block in empty.blocks} >= set(shapes[0])


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("population", [POPULATION, SILOS], ids=["users", "silos"])
@pytest.mark.parametrize("part", ["val", "test"])
def test_a_process_examines_its_own_clients_and_all_are_asked_once(population, size, part):
    shares = [ProcessShare(rank, size) for rank in range(size)]
    budget = 400 * size
    asked = [list(make_eval_batches(make_eval_split(only(population, s), part, 0, 0, size, s, budget))) for s in shares]
    honest = [list(make_eval_batches(make_eval_split(population, part, 0, 0, size, s, budget))) for s in shares]
    jax.tree.map(np.testing.assert_array_equal, asked, honest)
    assert len(asked[0]) > 1
    for mine in asked[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_equal(a.shape, b.shape), mine, asked[0])
    who = np.concatenate([group[0].client for mine in asked for group in mine])
    assert sorted(who[who < population.num_clients].tolist()) == list(range(population.num_clients))


FULL = pytest.mark.full
DRAWN = {
    "items": Batching(8, 3),
    "pairs": Batching(8, 3, pairwise=True),
    "histories": Batching(4, 9, sequence=SequenceFormat(12)),
}


@parametrize_cover(population={"users": POPULATION, "silos": SILOS}, name=[*DRAWN])
def test_a_process_draws_on_its_device_from_its_own_clients_data_alone(population, name):
    """And its clients train on what they would if there were one process."""
    size, batching = 2, DRAWN[name]
    ids = np.append(np.random.default_rng(1).permutation(population.num_clients)[:9], population.num_clients)
    held = np.zeros((size, population.num_items + 1), bool)

    def draw(source, rank, union, size=size):
        shapes = make_block_shapes(population, batching, 10, 4, 16, share=ProcessShare(rank, size))
        drawer = make_drawer(source, batching, shapes)
        return jax.device_get(drawer.draw(ids, ids < population.num_clients, 0, 3, union)), drawer

    for rank in range(size):
        draw(only(population, ProcessShare(rank, size)), rank, partial(note_held_rows, held, rank))
    parts, drawers = zip(
        *(draw(only(population, ProcessShare(r, size)), r, lambda _: held.any(0)) for r in range(size)), strict=True
    )
    shapes = [[block.data.rows.shape for block in part.blocks] for part in parts]
    assert all(each == shapes[0] for each in shapes)  # or programs would not match
    assert sum(len(each.train_data().items) for each in drawers) == len(population.train.values)
    whole, _ = draw(population, 0, None, 1)
    for part in parts:
        np.testing.assert_array_equal(part.rows, whole.rows)
    lanes = {}
    for at, cohort in enumerate((*parts, whole)):
        for block in cohort.blocks:
            for lane, slot in enumerate(block.slots.tolist()):
                if slot < len(ids):
                    assert (at < size, slot) not in lanes
                    lanes[at < size, slot] = jax.tree.map(lambda x, lane=lane: x[lane], block._replace(slots=()))
    for slot in np.flatnonzero(ids < population.num_clients):
        one, other = lanes[True, slot], lanes[False, slot]
        assert one.data.live.sum() == other.data.live.sum()
        for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True):  # their blocks may be of other kinds
            common = tuple(slice(min(n, m)) for n, m in zip(a.shape, b.shape, strict=True))
            np.testing.assert_array_equal(a[common], b[common])


@pytest.mark.parametrize("name", DRAWN)
@pytest.mark.parametrize("several", [False, True], ids=["users", "silos"])
def test_a_process_without_clients_draws_empty_blocks(name, several):
    data = synthetic_data(60 if several else 3, 50, mean_length=10)
    population = prepare_population(data, **({"clients": "silo", "silos": 3} if several else {}))[1]
    shapes = make_block_shapes(population, DRAWN[name], 3, 4, 16, share=ProcessShare(3, 4))
    assert not (shapes.share.owner(np.arange(3), 3) == 3).any()
    cohort = make_drawer(population, DRAWN[name], shapes).draw(np.arange(3), np.ones(3, bool), 0, 0)
    assert not any(np.asarray(block.data.live).any() for block in cohort.blocks)


def test_a_process_keeps_rows_labels_times_and_features_of_its_own_users_alone():
    rows = len(SILOS.train.values)
    numbers, times = np.arange(rows, dtype=np.float32), Times(np.arange(rows, dtype=np.int32), *[np.zeros(0)] * 2)
    population = SILOS._replace(labels=Labels("rating", numbers, numbers, numbers), times=times)
    kept = [keep_own_rows(population, ProcessShare(rank, 2)) for rank in (0, 1)]
    for of in (
        lambda p: p.train.values,
        lambda p: p.excluded.values,
        lambda p: p.labels.train,
        lambda p: p.times.train,
    ):
        np.testing.assert_array_equal(np.concatenate([of(each) for each in kept]), of(population))
    for user, owner in enumerate(ProcessShare(0, 2).owner(population.client_of, population.num_clients)):
        own, other = kept[owner], kept[1 - owner]
        assert own.train.of(user).tolist() == population.train.of(user).tolist()
        assert not len(other.train.of(user))
        assert (own.user_features.numbers[user] == population.user_features.numbers[user]).all()
        assert (other.user_features.numbers[user] == len(population.user_features.names)).all()


def test_more_processes_than_clients_asked():
    asked = make_eval_split(POPULATION, "val", most=2, devices=4, share=ProcessShare(3, 4))
    assert len(asked.who) in (0, 1)
    assert all(
        make_eval_split(POPULATION, "val", most=2, devices=4, share=ProcessShare(r, 4)).chunks == asked.chunks
        for r in range(4)
    )
    assert (
        sum(
            len(
                list(make_eval_batches(make_eval_split(POPULATION, "val", most=2, devices=4, share=ProcessShare(r, 4))))
            )
            for r in range(4)
        )
        == 4
    )


def test_what_processes_say_of_each_other():
    assert find_disagreement("thing", ["=a", "=a"]) == ""
    assert find_disagreement("thing", ["=a", "!no such file"]) == "process 1: no such file"
    line = find_disagreement("configuration", ["=seed = 0\ndim = 4", "=seed = 0\ndim = 4", "=seed = 0\ndim = 5"])
    assert line.startswith("process 2 has another configuration than process 0 (dim = 5 instead of dim = 4)")


# --- real processes ----------------------------------------

HALF = SMALL.replace("size = 20", "size = 20\ndropout = 0.1").replace("every = 4", "every = 6")
HEARTBEAT = 3


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "small.toml"
    path.write_text(HALF)
    return path


def command(processes, *words, devices=1):
    if processes == 1:
        return [sys.executable, "-m", "jaxfed", *map(str, words)]
    layout = ["--processes", processes, "--local-devices", devices, "--heartbeat", HEARTBEAT]
    return list(map(str, [sys.executable, "-m", "jaxfed", "launch", *layout, "--", *words]))


def start(words, at=None, **more):
    env = child_environment(**more)
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, cwd=at)


def run(words, code=0, seconds=240, **more):
    """(standard output, standard error) of a command that is to end with this code."""
    process = start(words, **more)
    try:
        out, told = process.communicate(timeout=seconds)
    finally:
        process.terminate()
    assert process.returncode == code, told
    return out, told


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def after_one_round(config, folder, processes, devices=1, more=()):
    """(parameters, first row of the metrics)."""
    out, told = run(command(processes, "train", config, "--out", folder, "--rounds", 1, *more, devices=devices))
    assert "hr@10" in out
    assert told.count("round     1") == 1  # one process speaks
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2  # and one writes
    row = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    return jax.tree.map(np.asarray, open_best_model(str(folder))[2]), row


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory):
    return after_one_round(config, tmp_path_factory.mktemp("one") / "a", 1)


@pytest.mark.parametrize(
    ("processes", "devices", "draw_on"),
    [(2, 2, "host"), (2, 2, "device"), pytest.param(4, 1, "host", marks=pytest.mark.full)],
)
@pytest.mark.long
def test_after_one_round_they_have_what_one_process_has(config, alone, tmp_path, processes, devices, draw_on):
    more = "--work.draw-on", draw_on
    params, row = after_one_round(config, tmp_path / "r", processes, devices, more)
    want, wanted = alone if draw_on == "host" else after_one_round(config, tmp_path / "one", 1, 1, more)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(want))
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(want), strict=True):
        assert np.abs(a - b).max() <= 1e-6 * largest
    whole = [name for name, value in wanted.items() if isinstance(value, int) or name.startswith(("clients/", "rows/"))]
    assert {"rows/sent", "clients/reported", "bytes_up_total", "bytes_down_total"} <= set(whole)
    assert {name: row[name] for name in whole} == {name: wanted[name] for name in whole}
    figures = [name for name in wanted if name.startswith(("val/", "train/"))]
    assert {n: row[n] for n in figures} == pytest.approx({n: wanted[n] for n in figures}, abs=1e-6)


@pytest.fixture(scope="module")
def undisturbed(config, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "a"
    run(command(2, "train", config, "--out", out))
    return summary(out)


def checkpoint_of(folder, process, seconds=120):
    """Waits until the run has a checkpoint."""
    end = time.time() + seconds
    while not any(f.name.isdigit() for f in (folder / "checkpoints").glob("*")):
        assert time.time() < end
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def pid_of(launcher, rank):
    """The process of this rank that a launcher started."""
    for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
        if f"JAX_PROCESS_ID={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            return int(pid)
    raise AssertionError("no such process")


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")
@pytest.mark.long
def test_one_killed_ends_all_and_the_run_resumes(config, undisturbed, tmp_path):
    out = tmp_path / "k"
    launcher = start(command(2, "train", config, "--out", out))
    checkpoint_of(out, launcher)
    os.kill(pid_of(launcher, 1), signal.SIGKILL)
    begin = time.time()
    _, told = launcher.communicate(timeout=120)
    assert time.time() - begin < HEARTBEAT + 10
    assert launcher.returncode == 128 + signal.SIGKILL
    last = told.splitlines()[-1]
    assert last.startswith(
        "launch: process 1 of 2 was ended by SIGKILL, and with it the run; go on with: jaxfed launch "
    )
    assert last.endswith(f"--processes 2 --local-devices 1 -- train {config} --out {out} --resume")
    assert not (out / "summary.json").exists()

    shutil.copytree(out, tmp_path / "one")  # and on another number of processes
    _, told = run(command(2, "train", config, "--out", out, "--resume"))
    assert "resuming" in told
    assert summary(out)["params_sha256"] == undisturbed["params_sha256"]
    _, told = run(command(1, "train", config, "--out", tmp_path / "one", "--resume"))
    assert "resuming" in told
    assert summary(tmp_path / "one")["rounds"] == 12


@pytest.mark.full
@pytest.mark.long
def test_stopped_all_leave_with_a_checkpoint(config, tmp_path):
    out = tmp_path / "s"
    words = "train", config, "--out", out, "--rounds", 300
    launcher = start(command(2, *words))
    checkpoint_of(out, launcher)
    launcher.send_signal(signal.SIGINT)
    _, told = launcher.communicate(timeout=120)
    assert launcher.returncode == 128 + signal.SIGINT, told
    stopped = int(told.split("stopped after round ")[1].split(";")[0])
    assert (out / "checkpoints" / str(stopped)).is_dir()
    assert told.count("go on with: jaxfed train") == 1
    assert "Traceback" not in told
    assert told.splitlines()[-1].endswith(f"--processes 2 --local-devices 1 -- {shlex.join(map(str, words))} --resume")


# --- what goes wrong ----------------------------------------


def one_of(rank, size, *words, port, **more):
    """One process of several, without a launcher."""
    who = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(size), "JAX_PROCESS_ID": str(rank)}
    return start([sys.executable, "-m", "jaxfed", *map(str, words)], JAXFED_HEARTBEAT=str(HEARTBEAT), **who, **more)


def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


WAITED = ["1 of 2 processes came to 127.0.0.1:", "the coordinator at 127.0.0.1:"]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.long
def test_one_that_waits_in_vain_says_so(config, tmp_path, rank):
    words = "train", config, "--out", tmp_path / "w"
    process = one_of(rank, 2, *words, port=port(), JAXFED_START_TIMEOUT="1")
    _, told = process.communicate(timeout=60)
    assert process.returncode == 2
    assert len(told.splitlines()) == 1
    assert told.startswith("jaxfed: " + WAITED[rank])
    assert "within 1 s" in told
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("one", "other", "words"),
    [
        ([], ["--model.dim", "5"], "process 1 has another configuration than process 0 (dim = 5 instead of dim = 4)"),
        pytest.param(*[["--run.devices", "3"]] * 2, "3 devices asked for: several processes use all 2", marks=FULL),
        pytest.param([], ["--model.dmi", "5"], "process 1: unknown option --model.dmi", marks=FULL),
    ],
)
@pytest.mark.long
def test_processes_refuse_together(config, tmp_path, one, other, words):
    at = port()
    both = [
        one_of(i, 2, "train", config, "--out", tmp_path / "w", *more, port=at) for i, more in enumerate((one, other))
    ]
    told = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [2, 2]
    said = [[line for line in each.splitlines() if not line.startswith("data: ")] for each in told]
    assert [len(lines) for lines in said] == [1, 0]
    assert said[0][0].startswith("jaxfed: ")
    assert words in said[0][0]
    assert not (tmp_path / "w").exists()


@pytest.mark.full
@pytest.mark.long
def test_processes_with_other_data_refuse_together(config, tmp_path):
    """One path, and on each machine something else behind it."""
    at, both = port(), []
    rows = [f"{u},{(u * 7 + i * i) % 40},0\n" for u in range(30) for i in range(8)]
    for rank, order in enumerate((1, -1)):
        (tmp_path / str(rank)).mkdir()
        (tmp_path / str(rank) / "mine.csv").write_text("user,item,time\n" + "".join(rows[::order]))
        words = "train", config, "--out", tmp_path / "w", "--data.path", "mine.csv"
        both.append(one_of(rank, 2, *words, port=at, at=tmp_path / str(rank)))
    told = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [2, 2]
    assert "process 1 has another data set than process 0" in told[0]
    assert not told[1]
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_COORDINATOR_ADDRESS is set: it must be host:port"),
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES is 'two': it must be a whole number"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}, "a JAX_PROCESS_ID below that"),
        (
            {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0", "JAX_COORDINATOR_ADDRESS": "127.0.0.1:99999"},
            "it must be host:port",
        ),
        (
            {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0", "JAX_COORDINATOR_BIND_ADDRESS": "127.0.0.1:0"},
            "JAX_COORDINATOR_BIND_ADDRESS must be host:port",
        ),
    ],
)
def test_an_environment_that_says_half(monkeypatch, more, words):
    from jaxfed.core.processes import join_processes

    for name, value in {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1", **more}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=words):
        join_processes()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have one loopback address")
def test_process_0_listens_at_the_address_given_alone():
    """It believes whoever comes, so nobody comes from elsewhere."""
    guests, at = {}, port()
    waiting = threading.Thread(
        target=receive_processes, args=(f"127.0.0.1:{at}", guests, {b"one"}, time.monotonic() + 20)
    )
    waiting.start()
    with closing(reached(at)) as line:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", at), 5)
        line.sendall(b"one")
        waiting.join()
    assert guests.keys() == {b"one"}


def reached(at):
    """A connection to process 0, once it is there."""
    while True:
        with suppress(ConnectionRefusedError):
            return socket.create_connection(("127.0.0.1", at), 5)


def test_programs_wait_for_each_other_where_they_could_wait_for_ever(monkeypatch):
    """Two in flight came to their collectives in another order in each process; or on the forced devices of a CPU, one
    to its collective while the other held the last thread."""
    from jaxfed.core import placement

    def program(x):
        return x

    waited = []
    cases = [(1, 1, "cpu", False), (1, 8, "gpu", False), (1, 8, "cpu", True), (2, 2, "gpu", False), (2, 4, "gpu", True)]
    for processes, devices, platform, waits in cases:
        monkeypatch.setattr(placement.jax, "process_count", lambda n=processes: n)
        monkeypatch.setattr(placement.jax, "default_backend", lambda name=platform: name)
        monkeypatch.setattr(placement.jax, "block_until_ready", lambda x: waited.append(x) or x)
        assert (placement.one_in_flight(program, devices) is not program) == waits
        assert placement.one_in_flight(program, devices)(devices) == devices
    assert waited == [8, 4]
