"""`jaxfed sweep`: every combination of some values is a run, or those that Optuna proposes; it goes on where it was."""

import argparse
import copy
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from jaxfed.core.excerpt import shorten


def add_sweep_options(command: Any) -> None:
    """Adds the command; `command(name, help, ...)` makes a parser."""
    sweep = command(
        "sweep",
        "Train every combination of some values, and compare.",
        "Any key of the configuration can be given as --section.key value, for all runs. Runs that are finished are "
        "read, not run again, and the table keeps those of earlier values of the same keys. FOLDER/results.json, "
        "results.md and figure.png tell what came of them. With --trials N, values can be ranges, low:high or "
        "low:high:log, and Optuna proposes N combinations by what validation says of those before.",
    )
    sweep.add_argument("config", metavar="CONFIG.toml")
    sweep.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="section.key=value,value",
        help="values to try; several times for several keys, the first of which is the figure's axis",
    )
    sweep.add_argument("--trials", type=int, default=0, metavar="N", help="propose N combinations (Optuna)")
    sweep.add_argument("--search-seed", type=int, default=0, metavar="SEED", help="of the proposals (0)")
    sweep.add_argument("--seeds", nargs="+", default=[], metavar="SEED", help="with each of these")
    sweep.add_argument(
        "--together",
        action="store_true",
        help="all seeds, and all combinations that differ in hyper-parameters of the optimisers alone, as one program; "
        'needs work.draw_on = "device" and run.rounds_per_program',
    )
    sweep.add_argument("--central", action="store_true", help="all runs in one place, see `jaxfed train --help`")
    sweep.add_argument("--out", metavar="FOLDER", help="where the runs live (runs/sweep/CONFIG)")


def parse_seeds(words: list[str]) -> list[int]:
    """Seeds with blanks or commas between them. Raises ValueError for what is none."""
    parts = [part for word in words for part in word.split(",") if part]
    if bad := [part for part in parts if not part.isdecimal()]:
        raise ValueError(f"--seeds: {shorten(bad[0])} is no whole number")
    return [int(part) for part in parts]


def check_separators(overrides: list[str]) -> None:
    """Raises ValueError for values of --grid that are not behind a comma."""
    for before, word in pairwise(["", *overrides]):
        if not word.startswith("--") and (not before or (before.startswith("--") and "=" in before)):
            raise ValueError(f"{shorten(word)} is no option: values of --grid have commas between them, as in key=1,2")


def sweep_command(args: argparse.Namespace, overrides: list[str]) -> None:
    """jaxfed sweep"""
    from jaxfed.config.central_twin import with_central
    from jaxfed.config.config_files import read_config
    from jaxfed.training import sweep as sweeping
    from jaxfed.training import sweep_results
    from jaxfed.training.log import log
    from jaxfed.training.search import parse_ranges

    if args.grid:
        check_separators(overrides)
    args.seeds = parse_seeds(args.seeds)
    table, grid = read_config(args.config), sweeping.parse_grid(args.grid)
    table, suffix = (with_central(table), "_central") if args.central else (table, "")
    out, keys = Path(args.out or f"runs/sweep/{Path(args.config).stem}{suffix}"), list(grid)
    searched = parse_ranges(grid, args.trials)
    rows, steps = (plan_search if searched else plan_grid)(args, table, grid, overrides, out)
    every: list[dict[str, Any]] = []
    for made in steps:
        rows = sweeping.replace_rows(rows, made, keys)
        every = sweep_results.write_results(out, rows, keys)  # each time: a sweep that is stopped has its table
    sweep_results.print_results(every, keys, f"{out}: {len(rows)} runs, * the best by validation")
    if not sweep_results.best_row(every):
        raise ValueError(f"no run worked: {every[0]['problem']}")
    drawn = bool(keys) and not searched and sweep_results.draw_figure(every, keys, out / "figure.png", log)
    print(f"{out}/results.json, results.md{', figure.png' if drawn else ''}")
    if searched:
        log(f"a page of the trials: jaxfed report {out}")


def plan_grid(
    args: argparse.Namespace, table: dict[str, Any], grid: dict[str, list[str]], overrides: list[str], out: Path
) -> tuple[list[dict[str, Any]], Iterator[list[dict[str, Any]]]]:
    """(the rows of before, the rows of each run of a grid while it is run). Raises ValueError."""
    from jaxfed.config.overrides import override_config
    from jaxfed.training import sweep as sweeping
    from jaxfed.training.log import log
    from jaxfed.training.runs import make_joint_runner, shared_runner

    todo = sweeping.sweep_points(override_config, table, grid, args.seeds, overrides, out)
    again = partial(sweeping.make_point, override_config, table, overrides, out)
    before = sweeping.earlier_rows(out, todo, list(grid), again)
    runner = make_joint_runner([each.config for each in todo if each.config]) if args.together else shared_runner()
    runs = ([row] for row in sweeping.run_sweep(todo, runner, log, before))
    return sweeping.kept_rows(before, todo, list(grid)), runs


def plan_search(
    args: argparse.Namespace, table: dict[str, Any], grid: dict[str, list[str]], overrides: list[str], out: Path
) -> tuple[list[dict[str, Any]], Iterator[list[dict[str, Any]]]]:
    """(the rows of before, the rows of each trial of a search while it is run). Raises ValueError."""
    from jaxfed.config.overrides import override_config
    from jaxfed.training import search as searching
    from jaxfed.training import sweep as sweeping
    from jaxfed.training.log import log
    from jaxfed.training.runs import shared_runner

    if args.together:
        raise ValueError("--together goes with a grid: leave --trials or --together out")
    if "evaluation.select" in grid:
        raise ValueError("--trials: all are chosen by one figure: leave --grid evaluation.select out")
    sweeping.check_grid(grid, args.seeds, overrides)
    select = override_config(copy.deepcopy(table), overrides).evaluation.select
    search = searching.Search(searching.parse_ranges(grid, args.trials), args.trials, args.search_seed, select)
    again = partial(sweeping.make_point, override_config, table, overrides, out)
    searching.check_ranges(search, again)
    before = sweeping.earlier_rows(out, [], list(grid), again)

    def points(choice):
        return [again(choice, seed) for seed in args.seeds or (None,)]

    searching.import_optuna()
    return before, searching.run_search(search, out, points, shared_runner(), log, before)
