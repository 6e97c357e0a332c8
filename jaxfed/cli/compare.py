"""`jaxfed compare RUN RUN ...`: finished runs in one table, with a paired bootstrap over users against the first."""

import argparse
from collections.abc import Callable


def add_compare_options(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds the command; `command(name, help, ...)` makes a parser."""
    compare = command(
        "compare",
        "Compare finished runs: configurations, figures, and differences user by user.",
        "Each run is compared with the first by a paired bootstrap over users. Their figures user by user are kept in "
        "RUN/users.npz.",
    )
    compare.add_argument("runs", nargs="+", metavar="RUN", help="folders of finished runs")
    compare.add_argument("--part", choices=("val", "test"), default="test")
    compare.add_argument(
        "--metric", action="append", default=[], metavar="NAME", help="a figure, such as test/full/mrr; several times"
    )
    compare.add_argument("--json", action="store_true", help="print JSON instead of tables")


def check_runs(runs: list[str]) -> None:
    """Raises ValueError for a folder that is named twice."""
    if twice := [each for each in runs if runs.count(each) > 1]:
        raise ValueError(f"{twice[0]} is named twice: name each run once")


def compare_command(args: argparse.Namespace) -> None:
    """jaxfed compare"""
    from rich.console import Console

    from jaxfed.core.excerpt import printable
    from jaxfed.reports.comparison_tables import differences_table, paired_table, runs_table
    from jaxfed.reports.run_comparison import compare_runs, tabulate_comparison
    from jaxfed.reports.run_records import choose_metrics, read_run_record, require_summaries
    from jaxfed.training.log import log, to_json
    from jaxfed.training.sweep_results import WIDE
    from jaxfed.training.terminal_table import print_table

    check_runs(args.runs)
    if len(args.runs) < 2:
        raise ValueError("compare: name two runs or more; jaxfed evaluate RUN is for one")
    records = [read_run_record(each) for each in args.runs]
    require_summaries(records)
    found = compare_runs(records, args.part, choose_metrics(records, args.part, args.metric), say=log)
    if args.json:
        print(to_json(tabulate_comparison(found), 1))
        return
    out = Console(highlight=False, markup=False, emoji=False)
    out.width = out.width if out.is_terminal else WIDE
    for table in (differences_table(found), runs_table(found), paired_table(found)):
        if table.lines:
            print_table(out, table.title, table.heads, table.lines, table.labels)
    for note in found.notes:
        out.print(printable(note), soft_wrap=True)
