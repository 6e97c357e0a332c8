"""`jaxfed sweep`: every combination of some values is a run, in this process, and goes on where it was."""

import argparse
from pathlib import Path
from typing import Any


def options(command: Any) -> None:
    """Adds the command; `command(name, help, ...)` makes a parser."""
    sweep = command(
        "sweep",
        "Train every combination of some values, and compare.",
        "Any key of the configuration can be given as --section.key value, for all runs. Runs that are finished are "
        "read, not run again, and the table keeps those of earlier values of the same keys. FOLDER/results.json, "
        "results.md and figure.png tell what came of them.",
    )
    sweep.add_argument("config", metavar="CONFIG.toml")
    sweep.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="section.key=value,value",
        help="values to try; several times for several keys, the first of which is the figure's axis",
    )
    sweep.add_argument("--seeds", type=int, nargs="+", default=[], metavar="SEED", help="with each of these")
    sweep.add_argument("--out", metavar="FOLDER", help="where the runs live (runs/sweep/CONFIG)")


def sweep(args: argparse.Namespace, overrides: list[str]) -> None:
    """jaxfed sweep"""
    from jaxfed import sweep as sweeping
    from jaxfed.cli import overridden
    from jaxfed.config import read
    from jaxfed.log import say
    from jaxfed.runs import together

    table, grid = read(args.config), sweeping.parse(args.grid)
    out, keys = Path(args.out or f"runs/sweep/{Path(args.config).stem}"), list(grid)
    todo = sweeping.points(overridden, table, grid, args.seeds, overrides, out)
    rows = sweeping.kept(out, todo, keys)
    for row in sweeping.swept(todo, together(), say):
        rows.append(row)
        every = sweeping.write(out, rows, keys)  # after each, so that a sweep which is stopped has its table
    sweeping.show(every, keys, f"{out}: {len(rows)} runs, * the best by validation")
    if not sweeping.best(every):
        raise ValueError(f"no run worked: {every[0]['problem']}")
    drawn = bool(keys) and sweeping.draw(every, keys, out / "figure.png", say)
    print(f"{out}/results.json, results.md{', figure.png' if drawn else ''}")
