"""Runs that differ in hyper-parameters of their optimisers as one program: each is the run that it would be alone."""

import json
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfed.cli import main
from jaxfed.config.build import build_from_config, load_data
from jaxfed.config.config_files import read_config
from jaxfed.config.hyperparameters import find_different_hyperparameters, list_hyperparameters, set_hyperparameters
from jaxfed.config.overrides import override_config
from jaxfed.config.schema import make_config
from jaxfed.training import loop, runs
from jaxfed.training.joint_rounds import JointRuns, find_fixed_hyperparameters, run_joint_rounds, stack_inputs
from jaxfed.training.looped_rounds import run_looped_rounds
from jaxfed.training.rounds import initial_arrays, make_run_keys
from tests.training.test_looped_rounds import HISTORIES, TABLE

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))
RATES = {"name": "sgd", "learning_rate": 0.5}


def optimize(**values):
    """Tables whose clients have such an optimiser."""
    return {"work": TABLE["work"] | {"optimizer": RATES | values}}


def serve(**server):
    return {"server": {"name": "sgd"} | server}


CASES = {
    "rates": [optimize(learning_rate=rate) for rate in (0.5, 0.1, 0.0)],
    "decay or none": [optimize(weight_decay=decay) for decay in (0.0, 0.01)],
    "rates of groups": [
        optimize(item={"learning_rate": item, "weight_decay": 0.02}, user={"learning_rate": user})
        for item, user in ((0.5, 0.5), (2.0, 0.1), (0.5, 0.2))
    ],
    "per example": [optimize(item={"learning_rate": rate, "per_example": True}) for rate in (0.01, 0.03)],
    "adam": [optimize(name="adam", learning_rate=0.01 * n, b1=1 - 0.1 * n, eps=1e-3 * n) for n in (1, 2)],
    "server's rate": [serve(learning_rate=rate) for rate in (1.0, 0.3)],
    "fedadam's rate": [serve(name="fedadam", learning_rate=rate) for rate in (0.01, 0.03)],
    "schedule": [serve(learning_rate=rate, schedule="cosine", warmup=2) for rate in (1.0, 0.3)],
    "both, and a control variate": [
        {"algorithm": {"name": "scaffold"}, **optimize(learning_rate=rate), **serve(learning_rate=1 - rate)}
        for rate in (0.2, 0.5)
    ],
    "histories": [
        {"model": HISTORIES, "work": TABLE["work"] | {"negatives": 20, "optimizer": {"name": "adam"} | rate}}
        for rate in ({"learning_rate": 0.01}, {"learning_rate": 0.003})
    ],
    "tables of 16 bits": [
        {"model": TABLE["model"] | {"table_dtype": "bfloat16"}, **optimize(learning_rate=rate)} for rate in (0.5, 0.1)
    ],
}


def build(tables):
    config = make_config(TABLE | {"rounds": 6} | tables)
    return config, build_from_config(config, load_data(config.data))


@pytest.mark.parametrize("case", CASES)
def test_each_is_its_run_alone(case):
    """Up to rounding, with the same seed or another one, and their states have the same types."""
    configs, parts = zip(*map(build, CASES[case]), strict=True)
    values, seeds = find_different_hyperparameters(configs), [*range(len(parts) - 1), 0]
    assert values
    assert find_fixed_hyperparameters(parts[0], values) == []
    keys = [make_run_keys(seed).rounds for seed in seeds]

    def start(index):
        return initial_arrays(parts[index], seeds[index])["state"]

    joint = JointRuns(parts[0], seeds, keys, values)
    programs = list(run_joint_rounds(joint, [*map(start, range(len(parts)))], range(6), (4,)))
    rounding = 3e-2 if "16" in case else 1e-4
    for index, seed in enumerate(seeds):
        alone = [*run_looped_rounds(parts[index], start(index), seed, range(6), keys[index], (4,))]
        together = [done for program in programs for done in program[index]]
        states = [jax.device_get(each[-1].state) for each in (together, alone)]
        chex.assert_trees_all_equal_shapes_and_dtypes(*states)
        as_float = [jax.tree.map(lambda x: np.asarray(x, np.float32), each.shared.params) for each in states]
        chex.assert_trees_all_close(*as_float, atol=rounding / 10, rtol=rounding)
        for one, other in zip(together, alone, strict=True):
            np.testing.assert_allclose(one.info["train/loss"], other.info["train/loss"], rtol=rounding, atol=1e-6)
    ends = [program[-1].state.shared.params for program in programs[-1]]
    moved = zip(*map(jax.tree.leaves, ends[:2]), strict=True)
    assert max(float(jnp.abs(a - b).max()) for a, b in moved) > 1e-3, "the values matter"


FIXED = {
    "momentum": ([optimize(momentum=momentum) for momentum in (0.0, 0.9)], ["work.optimizer.momentum"]),
    "the server's moments": (
        [serve(name="fedadam", b1=b1, learning_rate=b1) for b1 in (0.1, 0.9)],
        ["server.b1"],
    ),
}


@pytest.mark.parametrize("case", FIXED)
def test_values_on_which_code_branches_are_found(case):
    tables, want = FIXED[case]
    configs, parts = zip(*map(build, tables), strict=True)
    assert find_fixed_hyperparameters(parts[0], find_different_hyperparameters(configs)) == want


def test_traced_values_are_as_weak_as_python_numbers():
    """So tables of 16 bits stay what they are, whatever a program multiplies them by."""
    state, key = initial_arrays(build({})[1], 0)["state"], make_run_keys(0).rounds
    runs = JointRuns(None, [0, 0], [key, key], {"server.learning_rate": [0.5, 0.1]})
    (values,) = stack_inputs(runs, [state, state])[2].values()
    seen = jax.eval_shape(jax.vmap(lambda x: x * jnp.ones(3, jnp.bfloat16)), values)
    assert (seen.dtype, seen.shape) == (jnp.bfloat16, (2, 3))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_values_are_put_where_they_were_read(path):
    config = override_config(read_config(path), [])
    values = list_hyperparameters(config)
    assert set_hyperparameters(config, values) == config
    for key in values:
        changed = set_hyperparameters(config, {key: 0.123})
        assert find_different_hyperparameters([config, changed]) == {key: [values[key], 0.123]}


# --- as a user runs it ------------------------------------------------------------------------------------


@pytest.fixture
def sweep(monkeypatch, tmp_path):
    """A sweep over a grid in this process; returns the rows of its table."""

    def call(out, *words, together=True):
        more = "--rounds", 4, "--evaluation.every", 2, "--cohort.size", 24, "--run.rounds-per-program", 5
        more = *more, "--data.mean-length", 10, "--work.batch-size", 256, "--work.draw-on", "device"
        command = [
            "jaxfed",
            "sweep",
            "synthetic_1k",
            "--out",
            tmp_path / out,
            *more,
            *["--together"] * together,
            *words,
        ]
        monkeypatch.setattr(sys, "argv", [str(each) for each in command])
        monkeypatch.setattr(main, "set_up_process", lambda: None)
        main.main()
        return json.loads((tmp_path / out / "results.json").read_text())

    return call


def test_a_grid_of_rates_and_seeds_is_one_program(sweep, monkeypatch, capsys):
    """And another one for each value of what decides what is computed."""
    launching, launched = loop.launch_joint_rounds, []

    def launch(sessions, stopped):
        launched.append(len(sessions))
        return launching(sessions, stopped)

    monkeypatch.setattr(loop, "launch_joint_rounds", launch)
    grid = "--grid", "work.optimizer.item.learning-rate=10,30", "--grid", "work.optimizer.momentum=0,0.5"
    grid = *grid, "--seeds", 0, 1, "--work.epochs", 2
    together = sweep("together", *grid)
    told = "".join(capsys.readouterr())
    assert launched == [4, 4]
    assert "a program for each value of work.optimizer.momentum: they cannot differ within one" in told
    assert "compiling 4 runs as one program" in told
    assert "seed 1  optimizer.item.learning_rate=30  round     4" in told
    for one, other in zip(together, sweep("alone", *grid, together=False), strict=True):
        assert one["seed"] == other["seed"]
        assert one["problem"] == other["problem"] == ""
        assert one["test/full/ndcg@10"] == pytest.approx(other["test/full/ndcg@10"], rel=0.02)
    assert len({row["selected"] for row in together}) == 8


def test_what_clients_train_on_is_on_the_device_once(sweep, monkeypatch):
    drawers, training = [], runs.train_with_checkpoints
    monkeypatch.setattr(
        runs,
        "train_with_checkpoints",
        lambda some: (drawers.extend(x.session.parts.drawer for x in some), training(some)),
    )
    sweep("once", "--grid", "work.optimizer.learning-rate=0.1,0.5,1.0")
    assert len(drawers) == 3
    assert len({id(each) for each in drawers}) == 1
