"""Many runs: each in a process of its own, or one after the other in this one, which share what they can."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import tomli_w

from jaxfed.config.build import RunParts, load_data
from jaxfed.config.schema import config_to_table
from jaxfed.data.clients import Clients
from jaxfed.training.best_model import build_run
from jaxfed.training.loop import train_run, train_seed_runs
from jaxfed.training.run_dir import read_summary


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


def make_seeds_runner(configs: Sequence[Any]) -> Callable[[Any], tuple[dict[str, Any], str]]:
    """As `shared_runner`, for these configurations: with the first of those that differ in nothing but seed and folder,
    all of them run, their rounds as one program."""
    read, build = make_cached_loader(), make_cached_builder()
    done: dict[str, tuple[dict[str, Any], str]] = {}

    def run(config: Any) -> tuple[dict[str, Any], str]:
        if config.run.out not in done:
            same = [each for each in configs if leave_out_seed_and_folder(each) == leave_out_seed_and_folder(config)]
            found, problem = run_or_explain(partial(train_seed_runs, same, read, build))
            results = [({}, problem)] * len(same) if problem else [(summary, "") for summary in found]
            done.update(zip((each.run.out for each in same), results, strict=True))
        return done[config.run.out]

    return run
