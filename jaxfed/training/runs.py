"""Many runs: each in a process of its own, or one after the other in this one, which share what they can."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import tomli_w

from jaxfed.config.build import RunParts, load_data
from jaxfed.config.config_files import set_draw_place
from jaxfed.config.hyperparameters import find_different_hyperparameters, list_hyperparameters, set_hyperparameters
from jaxfed.config.schema import config_to_table
from jaxfed.data.clients import Clients
from jaxfed.training.best_model import build_run
from jaxfed.training.joint_rounds import find_fixed_hyperparameters
from jaxfed.training.log import log
from jaxfed.training.loop import OpenRun, finish_run, open_run_folder, prepare_run, train_run, train_with_checkpoints
from jaxfed.training.resume import finished_summary, read_draw_place
from jaxfed.training.run_dir import disk_full_errors, read_summary


def train_in_process(table: dict[str, Any], folder: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The summary of `jaxfed train` of a configuration's table in `folder`/run, which goes on where it was.

    Exits with the code of a run that fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "asked.toml").write_text(tomli_w.dumps(table))
    words = ["train", str(folder / "asked.toml"), "--out", str(folder / "run"), "--resume"]
    rounds = [f"--rounds={table['rounds']}"] if "rounds" in table else []  # more than before are more
    words += [*rounds, *overrides]
    done = subprocess.run([sys.executable, "-m", "jaxfed", *words], stdout=subprocess.DEVNULL)
    if done.returncode:
        sys.exit(done.returncode)
    return read_summary(folder / "run")


def cache_last(make: Callable[..., Any], key: Callable[..., Any]) -> Callable[..., Any]:
    """`make`, which gives what it gave the last time where `key` of its arguments is the same."""
    kept: dict[str, Any] = {}

    def again(*args):
        name = json.dumps(key(*args), sort_keys=True)
        if name not in kept:
            kept.clear()  # before the next is made: never two of them in memory
            kept[name] = make(*args)
        return kept[name]

    return again


def make_cached_loader() -> Callable[[Any], Clients]:
    """`load_data`, which keeps what it loaded the last time."""
    return cache_last(load_data, config_to_table)


def leave_out_seed_and_folder(config: Any) -> dict[str, Any]:
    """The table of a configuration without seed and folder."""
    table = config_to_table(config)
    return table | {"seed": 0, "run": table["run"] | {"out": ""}}


def make_cached_builder() -> Callable[[Any, Clients], RunParts]:
    """`build_run`, which keeps the last pieces for runs that differ in seed and folder alone."""
    return cache_last(build_run, lambda config, data: leave_out_seed_and_folder(config) | {"digest": data.digest})


def run_or_explain(run: Callable[[], Any]) -> tuple[Any, str]:
    """(what a run gives, ""), or ({}, why not) where it cannot be, so that one of many does not lose the others."""
    try:
        return run(), ""
    except (ValueError, MemoryError, RuntimeError) as error:  # the last of memory alone
        if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        lines = str(error).splitlines()[:1] or ["out of memory"]
        return {}, " ".join(lines[0].split())


def shared_runner(load: Callable[[Any], Clients] | None = None) -> Callable[[Any], tuple[dict[str, Any], str]]:
    """run(config) -> (summary, ""), as `jaxfed train --resume`, for many runs in this process; or ({}, why not).

    A run on the same data as the one before does not read them again; one that also differs in nothing but seed and
    folder uses the same compiled programs. load: reads data; None: `make_cached_loader`.
    """
    read, build = load or make_cached_loader(), make_cached_builder()
    return lambda config: run_or_explain(lambda: train_run(config, True, read, build))


def describe_shared_program(config: Any) -> dict[str, Any]:
    """The table of a configuration without what runs of one program may differ in: seed, folder, and the values of the
    hyper-parameters of optimisers."""
    same = dict.fromkeys(list_hyperparameters(config), 0.5)
    return leave_out_seed_and_folder(set_hyperparameters(config, same))


def make_joint_runner(configs: Sequence[Any]) -> Callable[[Any], tuple[dict[str, Any], str]]:
    """As `shared_runner`, for these configurations: with the first of those that differ in nothing but seed, folder and
    hyper-parameters of optimisers, all of them run, their rounds as one program."""
    check_together(configs)
    read, build = make_cached_loader(), make_cached_builder()
    done: dict[str, tuple[dict[str, Any], str]] = {}

    def run(config: Any) -> tuple[dict[str, Any], str]:
        if config.run.out not in done:
            same = [each for each in configs if describe_shared_program(each) == describe_shared_program(config)]
            outcomes, problem = run_or_explain(partial(train_joint_runs, same, read, build))
            done.update(outcomes or {each.run.out: ({}, problem) for each in same})
        return done[config.run.out]

    return run


def check_together(configs: Sequence[Any]) -> None:
    """Raises ValueError where runs cannot train in one program of many rounds."""
    for config in configs:
        if config.run.rounds_per_program < 2 or config.work.draw_on == "host":
            raise ValueError(
                '--together trains runs in programs of many rounds: set work.draw_on = "device" and '
                "run.rounds_per_program to 2 or more, such as 20"
            )
        if config.run.profile:
            raise ValueError("run.profile: rounds of several runs are not traced: leave --together out")


def train_joint_runs(
    configs: Sequence[Any], load: Callable[[Any], Clients], assemble: Callable[[Any, Clients], RunParts]
) -> dict[str, tuple[dict[str, Any], str]]:
    """Trains runs that differ only in seed, folder and hyper-parameters of optimisers, their rounds as one program.

    Runs that are finished are read. Those that have done equally many rounds share a program, if they have the same
    `find_fixed_hyperparameters`. A run that cannot be opened, or that comes to nothing, does not stop the others; an
    error in their program ends all that share it.

    Args:
        configs: the configurations of the runs.
        load, assemble: see `train_run`.

    Returns:
        {folder: (summary, ""), or ({}, why there is none)}.

    Raises:
        ValueError: the options do not go together: one line that says what to do.
        SystemExit: see `train_run`.
    """
    outcomes: dict[str, tuple[Any, str]] = {}
    with ExitStack() as held:
        build = with_one_drawer(assemble)
        for config in configs:
            outcomes[config.run.out] = run_or_explain(partial(read_or_open, config, load, build, held))
        runs: list[OpenRun] = [each for each, _ in outcomes.values() if isinstance(each, OpenRun)]
        for together in divide_runs(runs):
            outcomes |= train_and_finish(together)
    return outcomes


def with_one_drawer(assemble: Callable[[Any, Clients], RunParts]) -> Callable[[Any, Clients], RunParts]:
    """`assemble`, for runs that train on the same batches: these lie on the device once."""
    kept: list[Any] = []

    def build(config, data):
        parts = assemble(config, data)
        kept.append(parts.drawer)
        return parts._replace(drawer=kept[0])

    return build


def divide_runs(runs: Sequence[OpenRun]) -> list[list[OpenRun]]:
    """Those runs that share a program, see `train_joint_runs`."""
    if not runs:
        return []
    values = find_different_hyperparameters([run.session.settings for run in runs])
    fixed = find_fixed_hyperparameters(runs[0].session.parts, values)
    if fixed:
        log(f"a program for each value of {', '.join(fixed)}: they cannot differ within one")
    groups: dict[tuple, list[OpenRun]] = {}
    for index, run in enumerate(runs):
        groups.setdefault((count_rounds(run), *(values[key][index] for key in fixed)), []).append(run)
    return [groups[key] for key in sorted(groups)]


def count_rounds(run: OpenRun) -> int:
    """How many rounds a run has done; -1: it has ended, and only lacks its summary."""
    progress = run.session.progress
    return -1 if progress.finished else progress.round


def train_and_finish(runs: Sequence[OpenRun]) -> dict[str, tuple[dict[str, Any], str]]:
    """{folder: (summary, ""), or ({}, why there is none)} of runs that have done equally many rounds, or have ended."""
    folders = [run.session.settings.run.out for run in runs]

    def train():
        with disk_full_errors(Path(folders[0])):
            train_with_checkpoints(runs)

    def finish(folder, run):
        with disk_full_errors(Path(folder)):
            return finish_run(run)

    problem = "" if count_rounds(runs[0]) < 0 else run_or_explain(train)[1]
    return {
        folder: ({}, problem) if problem else run_or_explain(partial(finish, folder, run))
        for folder, run in zip(folders, runs, strict=True)
    }


def read_or_open(
    config: Any, load: Callable[[Any], Clients], assemble: Callable[[Any, Clients], RunParts], held: ExitStack
) -> dict[str, Any] | OpenRun:
    """The summary of a run that is finished; else the run, open until `held` is closed. Raises ValueError, see
    `train_run`."""
    config = set_draw_place(config, read_draw_place(Path(config.run.out)))
    if done := finished_summary(Path(config.run.out), config, True):
        return json.loads(done)
    return held.enter_context(open_run_folder(config, *prepare_run(config, load(config.data), assemble), True))
