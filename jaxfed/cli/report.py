"""`jaxfed report RUN ... -o report.html`: a page of runs, with nothing beside it; and its figures as files."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxfed.cli.compare import check_runs

MARKED = 4096  # bytes of a file among which jaxfed says that it wrote it


def add_report_options(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds the command; `command(name, help, ...)` makes a parser."""
    report = command(
        "report",
        "Write a page of runs: curves, deciles, traffic, times, configurations, and differences user by user.",
        "The page is one file that needs no network and no scripts. Of several runs, each is compared with the first.",
    )
    report.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs, or that of a sweep")
    report.add_argument("-o", "--output", default="report.html", metavar="FILE", help="the page (report.html)")
    report.add_argument("--title", default="", help="of the page")
    report.add_argument("--figures", metavar="DIR", help="write each figure as PNG and SVG there, too (matplotlib)")
    report.add_argument("--force", action="store_true", help="overwrite files that jaxfed report did not write")


def report_command(args: argparse.Namespace) -> None:
    """jaxfed report"""
    from jaxfed.reports.figure_files import KINDS, import_pyplot, save_figures
    from jaxfed.reports.sweep_page import is_sweep

    check_runs(args.runs)
    swept = [each for each in args.runs if is_sweep(each)]
    if swept and len(args.runs) > 1:
        raise ValueError(f"{swept[0]} is a sweep: it has a page of its own, name it alone")
    if args.figures:
        import_pyplot()
    charts, make_page = (plan_sweep_page if swept else plan_run_page)(args)
    figures = [Path(args.figures) / f"{each.name}{kind}" for each in charts for kind in KINDS] if args.figures else []
    check_overwriting([Path(args.output), *figures], args.force)
    write_report(Path(args.output), make_page())
    print(args.output)
    if args.figures:
        print(f"{args.figures}: {len(save_figures(charts, Path(args.figures)))} files")


def plan_run_page(args: argparse.Namespace) -> tuple[list[Any], Callable[[], str]]:
    """(the charts of some runs, what makes their page). Raises ValueError where a run cannot be read."""
    from jaxfed.reports.run_charts import make_run_charts
    from jaxfed.reports.run_comparison import compare_runs
    from jaxfed.reports.run_page import run_page
    from jaxfed.reports.run_records import choose_metrics, read_run_record
    from jaxfed.training.log import log

    records = [read_run_record(each) for each in args.runs]
    metrics = choose_metrics(records, "test")
    charts = [each for some in make_run_charts(records, metrics).values() for each in some]
    title = args.title or choose_title(args.runs)
    return charts, lambda: run_page(compare_runs(records, "test", metrics, say=log), title)


def plan_sweep_page(args: argparse.Namespace) -> tuple[list[Any], Callable[[], str]]:
    """(the charts of a sweep, what makes its page). Raises ValueError where it cannot be read."""
    from jaxfed.reports.sweep_page import make_sweep_charts, read_sweep, sweep_page

    every, keys = read_sweep(args.runs[0])
    charts = [each for some in make_sweep_charts(every, keys).values() for each in some]
    return charts, lambda: sweep_page(every, keys, args.title or f"Sweep {args.runs[0]}")


def choose_title(runs: Sequence[str]) -> str:
    """The title of a page where nobody says one."""
    return f"Run {runs[0]}" if len(runs) == 1 else f"{len(runs)} runs: {', '.join(Path(each).name for each in runs)}"


def check_overwriting(paths: Sequence[Path], force: bool) -> None:
    """Raises ValueError where a file that jaxfed did not write would be overwritten, before anything is computed."""
    for path in paths:
        if path.is_dir():
            raise ValueError(f"{path} is a folder: name a file, such as {path}/report.html")
        if path.exists() and not force and not is_own_file(path):
            raise ValueError(f"{path} is there, and jaxfed report did not write it: name another file, or pass --force")


def write_report(path: Path, page: str) -> None:
    """Writes a page, whole or not at all, and the folder that it is in."""
    from jaxfed.training.run_dir import write_file

    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, page)


def is_own_file(path: Path) -> bool:
    """Whether `jaxfed report` wrote a file."""
    from jaxfed.reports.markup import OWN_MARKS

    with open(path, "rb") as file:
        begin = file.read(MARKED)
    return any(mark in begin for mark in OWN_MARKS)
