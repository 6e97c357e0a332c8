"""Several seeds as one program: each is the run of that seed alone; runs that stop, end early and go on."""

import json
import signal
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfed.cli import main
from jaxfed.training import joint_rounds, loop
from jaxfed.training.joint_rounds import JointRuns, merge_plans, run_joint_rounds
from jaxfed.training.looped_rounds import plan_rounds, run_looped_rounds
from jaxfed.training.rounds import initial_arrays, make_run_keys
from jaxfed.training.run_dir import lock_folder
from tests.core.test_lowering import lowered
from tests.training.test_looped_rounds import CASES, make_parts

SEEDS = (3, 0, 11)


ALONE = ("fedavg", "drop-outs", "late clients", "private", "clients keep a control variate")


@pytest.mark.parametrize("case", ALONE)
def test_each_seed_is_its_run_alone(case):
    """Up to rounding. The cohorts of seeds fill different numbers of blocks, and some of these are empty."""
    parts = make_parts(**CASES[case])
    states = [initial_arrays(parts, seed)["state"] for seed in SEEDS]
    keys = [make_run_keys(seed).rounds for seed in SEEDS]
    plans = [plan_rounds(parts, seed, 0, 4).rounds.blocks_per_kind for seed in SEEDS]
    assert any((plans[0] != other).any() for other in plans[1:])
    programs = list(run_joint_rounds(JointRuns(parts, SEEDS, keys, {}), states, range(6), (4,)))
    assert [[len(rounds) for rounds in each] for each in programs] == [[4] * 3, [2] * 3]
    for index, seed in enumerate(SEEDS):
        alone = list(run_looped_rounds(parts, initial_arrays(parts, seed)["state"], seed, range(6), keys[index], (4,)))
        together = [done for program in programs for done in program[index]]
        chex.assert_trees_all_close(
            jax.device_get(together[-1].state), jax.device_get(alone[-1].state), atol=1e-5, rtol=1e-4
        )
        for one, other in zip(together, alone, strict=True):
            assert one.ready.cohort.ids.tolist() == other.ready.cohort.ids.tolist()
            assert (one.ready.rows, one.ready.bytes_down) == (other.ready.rows, other.ready.bytes_down)
            for name in other.info:
                np.testing.assert_allclose(one.info[name], other.info[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_a_program_of_several_runs_lowers():
    parts = make_parts()
    states = [jax.eval_shape(lambda: initial_arrays(parts, 0))["state"]] * 2
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, *x.shape), x.dtype), states[0])
    plan = plan_rounds(parts, 0, 0, 2)
    keys = jnp.stack([make_run_keys(seed).rounds for seed in (0, 1)])
    planned, program = merge_plans([plan.rounds] * 2), parts.loop.joint_program
    both = jax.jit(lambda *args: program(plan.room, *args))
    rates = {"work.optimizer.learning_rate": jnp.array([0.1, 0.5])}
    for numbers in ({}, rates):
        lowered(both, state, parts.drawer.train_data(), planned, jnp.int32(2), keys, numbers)


# --- as a user runs it ------------------------------------------------------------------------------------


@pytest.fixture
def sweep(monkeypatch, tmp_path):
    """A sweep over three seeds in this process; returns the summaries."""

    def call(out, *more, together=True, rounds=8, seeds=SEEDS):
        words = "--rounds", rounds, "--evaluation.every", 2, "--cohort.size", 24, "--run.rounds-per-program", 5
        words = *words, "--data.mean-length", 10, "--work.batch-size", 256  # few lengths, and so few programs
        words = *words, "--work.draw-on", "device", *["--together"] * together, *more
        command = ["jaxfed", "sweep", "synthetic_1k", "--seeds", *seeds, "--out", tmp_path / out, *words]
        monkeypatch.setattr(sys, "argv", [str(each) for each in command])
        monkeypatch.setattr(main, "set_up_process", lambda: None)
        main.main()
        return [read_summary(tmp_path / out, seed) for seed in seeds]

    return call


def read_summary(folder, seed):
    return json.loads((folder / f"seed_{seed}" / "summary.json").read_text())


def check_same(one, other):
    """Two runs of a seed, up to rounding."""
    for name in ("rounds", "best_round", "bytes_up_total", "bytes_down_total", "clients/refused_total"):
        assert one[name] == other[name], name
    assert one["test/full/mrr"] == pytest.approx(other["test/full/mrr"], rel=1e-3)


def test_a_sweep_over_seeds_together_is_that_of_runs_alone(sweep, capsys):
    together = sweep("together")
    assert "compiling 3 seeds as one program" in "".join(capsys.readouterr())
    for one, other in zip(together, sweep("alone", together=False), strict=True):
        check_same(one, other)
        assert 0 < one["seconds"] < 600
    assert len({one["params_sha256"] for one in together}) == 3


def test_seeds_that_are_stopped_together_go_on_together(sweep, monkeypatch):
    """A signal in the middle: all stop after the same round, and come to the same bits as without it."""
    whole, starting = sweep("whole"), loop.launch_joint_rounds

    def stop_soon(sessions, stopped):
        for each in (left := starting(sessions, stopped)):
            yield from [stop_at_three(each, stopped)] if each is left[1] else [each]

    def stop_at_three(rounds, stopped):
        for number, done in enumerate(rounds):
            if number == 3:
                stopped.append(signal.SIGINT)
            yield done

    monkeypatch.setattr(loop, "launch_joint_rounds", lambda *args: list(stop_soon(*args)))
    with pytest.raises(SystemExit) as ended:
        sweep("stopped")
    assert ended.value.code == 128 + signal.SIGINT
    monkeypatch.setattr(loop, "launch_joint_rounds", starting)
    assert [each["params_sha256"] for each in sweep("stopped")] == [each["params_sha256"] for each in whole]


@pytest.mark.full
def test_seeds_of_which_one_is_finished_go_on_without_it(sweep, tmp_path):
    whole = sweep("whole")
    first = sweep("parts", seeds=SEEDS[:2])
    rest = sweep("parts")
    assert rest[:2] == first
    for one, other in zip(rest, whole, strict=True):
        check_same(one, other)


@pytest.mark.full
def test_seeds_go_on_beside_those_that_have_done_equally_many_rounds(sweep, monkeypatch):
    """The first seed dies alone after round 4; then the others begin together, beside nobody of round 4."""
    whole, saving, launching, sizes = sweep("whole", together=False), loop.make_checkpoint, loop.launch_joint_rounds, []

    def die(session, described):
        if session.progress.round > 4:
            raise KeyboardInterrupt
        return saving(session, described)

    def launch(sessions, stopped):
        sizes.append([(each.seed, each.progress.round) for each in sessions])
        return launching(sessions, stopped)

    every_two = "--run.checkpoint-every", 2
    with monkeypatch.context() as patched:
        patched.setattr(loop, "make_checkpoint", die)
        with pytest.raises(KeyboardInterrupt):
            sweep("parts", *every_two, together=False)
    monkeypatch.setattr(loop, "launch_joint_rounds", launch)
    found = sweep("parts", *every_two)
    assert sizes == [[(SEEDS[1], 0), (SEEDS[2], 0)]]
    for one, other in zip(found, whole, strict=True):
        check_same(one, other)


@pytest.mark.full
def test_runs_that_share_a_program_are_never_a_program_apart(sweep, monkeypatch):
    """A kill finds all of them at the same checkpoint, or at neighbouring ones."""
    saving, saved = loop.make_checkpoint, []
    monkeypatch.setattr(loop, "make_checkpoint", lambda session, *a: (saved.append(session), saving(session, *a))[1])
    sweep("apart", "--evaluation.every", 8, "--run.checkpoint-every", 2)
    seeds = [session.seed for session in saved]
    assert seeds == [*SEEDS] * 4


@pytest.mark.full
def test_a_run_that_had_ended_is_not_trained_on(sweep, monkeypatch, tmp_path):
    """Patience had ended one after the round at which the others were killed, before any summary was written."""
    options = "--evaluation.patience", 1, "--work.optimizer.learning-rate", 40.0, "--run.checkpoint-every", 2
    whole = sweep("whole", *options, rounds=20)
    first = min(each["rounds"] for each in whole)
    assert first < max(each["rounds"] for each in whole)

    saving = loop.make_checkpoint

    def die(session, described):
        if session.progress.round > first:
            raise KeyboardInterrupt
        return saving(session, described)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "make_checkpoint", die)
        with pytest.raises(KeyboardInterrupt):
            sweep("killed", *options, rounds=20)
    assert not [*(tmp_path / "killed").rglob("summary.json")]
    for one, other in zip(sweep("killed", *options, rounds=20), whole, strict=True):
        assert one["rounds"] == other["rounds"]


def test_a_seed_that_comes_to_nothing_leaves_the_others(sweep, monkeypatch, tmp_path):
    """Its summary alone is missing, and the table says why."""
    checking = loop.check_outcome

    def diverge(folder, progress):
        if folder.name == f"seed_{SEEDS[0]}":
            raise ValueError("it diverged")
        checking(folder, progress)

    monkeypatch.setattr(loop, "check_outcome", diverge)
    with pytest.raises(FileNotFoundError):  # of the summary of the first seed
        sweep("some")
    assert [read_summary(tmp_path / "some", seed)["rounds"] for seed in SEEDS[1:]] == [8, 8]
    rows = json.loads((tmp_path / "some" / "results.json").read_text())
    assert [row["problem"] for row in rows] == ["it diverged", "", ""]


def test_a_locked_folder_leaves_the_others(sweep, tmp_path):
    folder = tmp_path / "some" / f"seed_{SEEDS[1]}"
    folder.mkdir(parents=True)
    with lock_folder(folder), pytest.raises(FileNotFoundError):
        sweep("some")
    assert [read_summary(tmp_path / "some", seed)["rounds"] for seed in (SEEDS[0], SEEDS[2])] == [8, 8]


def test_lines_of_the_log_say_whose_they_are(sweep, capsys):
    sweep("named", rounds=4)
    told = "".join(capsys.readouterr())
    for seed in SEEDS:
        assert f"seed {seed}  round     4" in told


@pytest.mark.full
def test_a_seed_that_loses_patience_leaves_the_others(sweep):
    options = "--evaluation.patience", 1, "--work.optimizer.learning-rate", 40.0
    together = sweep("together", *options, rounds=20)
    alone = sweep("alone", *options, together=False, rounds=20)
    assert len({each["rounds"] for each in together}) > 1
    for one, other in zip(together, alone, strict=True):
        assert one["rounds"] == other["rounds"]


def test_seeds_together_are_not_traced(sweep, capsys):
    with pytest.raises(SystemExit) as ended:
        sweep("none", "--run.profile", 2)
    assert ended.value.code == 2
    assert "leave --together out" in capsys.readouterr().err


def test_seeds_share_a_program_only_where_rounds_do(sweep, capsys):
    with pytest.raises(SystemExit) as ended:
        sweep("none", "--run.rounds-per-program", 1)
    assert ended.value.code == 2
    assert "run.rounds_per_program to 2 or more" in capsys.readouterr().err


def test_seconds_are_shared():
    """Whoever asks first waits for the program of all."""
    progress = [joint_rounds.Progress() for _ in range(2)]

    def programs():
        for number in range(2):
            yield [[f"{seed}{number}a", f"{seed}{number}b"] for seed in "xy"]

    first, second = joint_rounds.divide_results(programs(), progress)
    assert [*first] == ["x0a", "x0b", "x1a", "x1b"]
    assert progress[0].seconds == pytest.approx(-progress[1].seconds)
    assert progress[1].seconds > 0
    assert [*second] == ["y0a", "y0b", "y1a", "y1b"]
    progress = [joint_rounds.Progress() for _ in range(2)]
    early, late = joint_rounds.divide_results(programs(), progress)
    next(early)
    early.close()
    charged = progress[0].seconds
    assert [*late] == ["y0a", "y0b", "y1a", "y1b"]
    assert progress[0].seconds == charged
