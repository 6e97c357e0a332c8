"""jaxfed bench"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def add_bench_options(command: Callable[..., argparse.ArgumentParser]) -> None:
    """The options of `bench`."""
    bench = command("bench", "Time rounds end to end, beside what one would write by hand.")
    bench.add_argument("workloads", nargs="*", metavar="W1 W1s W1f W2 ... W6", help="which (all)")
    bench.add_argument("--rounds", type=int, default=20, help="of each, at least")
    bench.add_argument(
        "--budget", type=float, default=100.0, help="seconds for a baseline that is slow: fewer rounds then"
    )
    bench.add_argument("--json", metavar="FILE", help="write the figures there, too")
    bench.add_argument("--from", dest="kept", metavar="FILE", help="measure nothing: report the figures kept there")
    bench.add_argument("--compare", metavar="FILE", help="a report of ratios to the figures kept there, too")
    bench.add_argument("--alone", help=argparse.SUPPRESS)  # one method in this process, for its peak memory


def bench_command(args: argparse.Namespace) -> None:
    """jaxfed bench"""
    from jaxfed.bench import workloads as measuring
    from jaxfed.bench.comparison import check_common, print_comparison, read_figures
    from jaxfed.bench.promises import print_report
    from jaxfed.config.schema import suggest

    for name in args.workloads:
        if name not in measuring.WORKLOADS:
            raise ValueError(f'no workload "{name}"{suggest(name, measuring.WORKLOADS)}')
    if args.rounds < 1:
        raise ValueError(f"--rounds is {args.rounds}: it must be at least 1")
    if args.alone:
        print(json.dumps(measuring.run_alone(args.workloads[0], args.alone)))
        return
    if args.kept and args.json:
        raise ValueError("--json keeps what is measured, and --from measures nothing: leave one of them out")
    kept = read_figures(args.kept, args.workloads) if args.kept else None
    other = read_figures(args.compare) if args.compare else None
    if other is not None:
        check_common(args.compare, other, list(kept or args.workloads or measuring.WORKLOADS))
    figures = measure_workloads(args) if kept is None else kept
    print_report(figures)
    if other is not None:
        print_comparison(args.compare, figures, other)


def measure_workloads(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The figures of the workloads that are asked for, or of all that can run here; `--json` has them after each."""
    from jaxfed.bench import workloads as measuring
    from jaxfed.training.log import log
    from jaxfed.training.run_dir import write_file

    figures = {}
    for name in args.workloads or measuring.WORKLOADS:
        try:
            figures[name] = measuring.bench_workload(name, args.rounds, args.budget, log)
        except ValueError as error:
            if args.workloads:
                raise
            log(f"{error}: left out")  # W5 needs an extra, and a file that is fetched
            continue
        if args.json:
            write_file(Path(args.json), json.dumps(figures, indent=1) + "\n")
    return figures
