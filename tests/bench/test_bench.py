"""The benchmark measures what it says: the same round, by every method; what it tells is complete."""

import json
import shutil

import jax
import numpy as np
import pytest

from jaxfed.bench import runners, workloads
from jaxfed.bench.promises import check_targets
from jaxfed.bench.workloads import METHODS, WORKLOADS, Workload, make_bench_experiment, measure_in_turn
from jaxfed.cli import main
from jaxfed.training.rounds import PreparedRound, RoundResult
from jaxfed.training.timing import peak_megabytes

SMALL = Workload(items=90, users=60, cohort=9)
MILLISECONDS = {"ours_ms", "sequential_ms", "dense_vmap_ms", "limit_ms"}
COLUMNS = MILLISECONDS | {"clients_per_second", "compile_seconds", "peak_memory_mb"}


@pytest.fixture(scope="module")
def experiment():
    return make_bench_experiment(SMALL)


@pytest.mark.parametrize("method", ["sequential", "dense_vmap", "limit"])
def test_every_method_runs_the_same_round(experiment, method, monkeypatch):
    """Float32 sums in another order: 2e-6 of parameters of size one, which move by 0.007."""
    if method == "limit" and not shutil.which("cc"):
        pytest.skip("no C compiler")
    monkeypatch.setattr(runners, "TOGETHER", 1)
    one, other = METHODS["ours"](experiment), METHODS[method](experiment)
    before = jax.tree.map(np.array, one.params())
    one.go(0), other.go(0)
    moved = max(float(np.abs(before[name] - one.params()[name]).max()) for name in before)
    assert moved > 0.005
    for name, value in one.params().items():
        np.testing.assert_allclose(np.asarray(other.params()[name]), np.asarray(value), atol=2e-6, err_msg=name)


def test_rounds_drawn_on_the_device_train_on_as_much(experiment, monkeypatch):
    monkeypatch.setattr(runners, "TOGETHER", 1)
    one, other = METHODS["ours"](experiment), METHODS["device_draws"](experiment)
    before = jax.tree.map(np.array, one.params())
    one.go(0), other.go(0)
    moves = [np.abs(each.params()["user"] - before["user"]).mean() for each in (one, other)]
    assert 0.5 < moves[0] / moves[1] < 2, "nine clients, whose negatives are others"
    assert np.abs(one.params()["item"] - other.params()["item"]).max() > 1e-4, "of other negatives"


def test_a_program_of_many_rounds_runs_those_that_are_drawn_on_the_device(experiment, monkeypatch):
    monkeypatch.setattr(runners, "TOGETHER", 3)
    one, other = METHODS["device_draws"](experiment), METHODS["device_loop"](experiment)
    before = jax.tree.map(np.array, one.params())
    one.go(0), other.go(0)
    assert np.abs(one.params()["item"] - before["item"]).max() > 1e-3
    for name, value in one.params().items():
        np.testing.assert_allclose(np.asarray(other.params()[name]), np.asarray(value), atol=1e-5, err_msg=name)
    assert len(other.host_seconds) == 1, "the host is asked once"


def test_a_workload_that_cannot_run_leaves_the_others(tmp_path, monkeypatch, capsys):
    """Of all of them; one that is asked for by name is an error."""

    def bench(name, *args):
        if name == "W5":
            raise ValueError("W5 ours: no package")
        return dict.fromkeys(COLUMNS, 1.0)

    monkeypatch.setattr(workloads, "bench_workload", bench)
    monkeypatch.setattr(main, "set_up_process", lambda: None)
    monkeypatch.setattr("sys.argv", ["jaxfed", "bench", "--json", str(tmp_path / "b.json")])
    main.main()
    assert [*json.loads((tmp_path / "b.json").read_text())] == [name for name in WORKLOADS if name != "W5"]
    assert "W5 ours: no package: left out" in "".join(capsys.readouterr())
    monkeypatch.setattr("sys.argv", ["jaxfed", "bench", "W5"])
    with pytest.raises(SystemExit) as error:
        main.main()
    assert error.value.code == 2


def test_host_work_is_drawing_packing_and_transfer(experiment, monkeypatch):
    """And no wait for it, and none for devices."""
    stages = {"sample": 1.0, "pack": 2.0, "transfer": 4.0, "wait": 8.0, "compute": 16.0}

    def run(parts, state, seed, start, stop):
        ready = PreparedRound(None, 0, 0, 0, 0, None, stages)
        return (RoundResult(state, {}, ready) for _ in range(start, stop))

    monkeypatch.setattr(runners, "run_rounds", run)
    monkeypatch.setattr(runners, "compile_programs", lambda *args: 0.0)
    runner = METHODS["ours"](experiment)
    runner.go(0)
    assert runner.host_seconds == [7.0] * runner.rounds


def test_rounds_are_measured_in_turn_and_as_often_as_asked():
    calls = []

    def runner(name, rounds, seconds=0.0):
        return runners.Runner(lambda number: calls.append(name), rounds, 0.0, dict)

    times = measure_in_turn({"a": runner("a", 5), "b": runner("b", 1)}, 10, 100.0)
    assert {name: len(each) for name, each in times.items()} == {"a": 2, "b": 10}
    assert calls[-24:] == ["a", "a", "b", "b"] * 2 + ["b", "b"] * 8  # each turn after one that is not counted


def test_the_program_writes_its_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["jaxfed", "bench", "W1", "--rounds", "1", "--json", str(tmp_path / "b.json")])
    monkeypatch.setitem(WORKLOADS, "W1", SMALL._replace(baselines=True))
    monkeypatch.setattr(
        workloads, "measure_peak_memory", lambda name, method: {"peak_memory_mb": 1.0, "compile_seconds": 2.0}
    )
    monkeypatch.setattr(main, "set_up_process", lambda: None)
    main.main()
    row = json.loads((tmp_path / "b.json").read_text())["W1"]
    wanted = {"ours_ms", "sequential_ms", "dense_vmap_ms", "limit_ms", "clients_per_second", "compile_seconds"}
    costs = {"predicted_bytes_per_update", "measured_flops_per_update", "gigabytes_per_second", "gigaflops_per_second"}
    costs |= {"share_of_peak_bandwidth", "share_of_peak_flops"}
    assert wanted | costs | {"peak_memory_mb"} <= row.keys()
    assert 0 < row["host_ms"] < 1e4
    assert 0 < row["device_draws_host_ms"] < 1e4
    assert 0 < row["device_loop_host_ms"] < 1e4
    assert row["device_loop_ms"] > 0
    assert row["clients_per_second"] == pytest.approx(1e3 * 9 / row["ours_ms"], rel=1e-3)
    assert "W1: sequential / fastest" in capsys.readouterr().out


def test_a_promise_that_is_missed_says_so():
    """Of the fastest of what a user can choose."""
    ours = {"ours_ms": 20.0, "device_draws_ms": None, "device_loop_ms": 10.0}
    figures = {"W1": ours | {"sequential_ms": 20.0, "dense_vmap_ms": None, "limit_ms": 4.0}}
    assert [(what, value, holds) for what, value, _, holds in check_targets(figures)] == [
        ("W1: sequential / fastest", 2.0, False),
        ("W1: fastest / limit", 2.5, True),
    ]


def test_a_baseline_that_does_not_fit_is_left_out(monkeypatch):
    def memory(name, method):
        if method == "dense_vmap":
            raise ValueError("killed")
        return {"peak_memory_mb": 1.0, "compile_seconds": 2.0}

    monkeypatch.setattr(workloads, "measure_peak_memory", memory)
    monkeypatch.setitem(WORKLOADS, "W1", SMALL._replace(baselines=True))
    told = []
    row = workloads.bench_workload("W1", 1, say=told.append)
    assert row["dense_vmap_ms"] is None
    assert row["sequential_ms"] > 0
    assert "killed: left out" in told


def test_memory_is_that_of_a_process_of_its_own(monkeypatch):
    """And an error in it is one line."""
    ballast = np.ones(1 << 30, np.uint8)  # a gigabyte here is none of the other's
    told = workloads.measure_peak_memory("W1", "ours")
    assert told["peak_memory_mb"] < peak_megabytes() - 500
    assert ballast.all()
    assert 100 < told["peak_memory_mb"] < 5000
    with pytest.raises(ValueError, match="W9 ours: jaxfed: no workload"):
        workloads.measure_peak_memory("W9", "ours")


@pytest.mark.parametrize("model", ["mf", "sasrec"])
def test_a_loop_over_clients_runs_the_same_round(model, monkeypatch):
    """Float32 sums in another order: 2e-6 of parameters, which move by more than a hundredth of that."""
    monkeypatch.setattr(runners, "TOGETHER", 1)
    parts = make_bench_experiment(SMALL._replace(model=model))
    one, other = METHODS["ours"](parts), runners.client_loop_runner(parts)
    before = jax.tree.map(np.array, one.params())
    for number in range(2):
        one.go(number), other.go(number)
    assert other.params().keys() == before.keys()
    for name in before:
        assert float(np.abs(before[name] - one.params()[name]).max()) > 2e-4, name
        np.testing.assert_allclose(np.asarray(other.params()[name]), np.asarray(one.params()[name]), atol=2e-6)
