"""jaxfed bench"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path


def add_bench_options(command: Callable[..., argparse.ArgumentParser]) -> None:
    """The options of `bench`."""
    bench = command("bench", "Time rounds end to end, beside what one would write by hand.")
    bench.add_argument("workloads", nargs="*", metavar="W1 W1s W2 ... W6", help="which (all)")
    bench.add_argument("--rounds", type=int, default=20, help="of each, at least")
    bench.add_argument(
        "--budget", type=float, default=100.0, help="seconds for a baseline that is slow: fewer rounds then"
    )
    bench.add_argument("--json", metavar="FILE", help="write the figures there, too")
    bench.add_argument("--alone", help=argparse.SUPPRESS)  # one method in this process, for its peak memory


def bench_command(args: argparse.Namespace) -> None:
    """jaxfed bench"""
    from jaxfed.bench import workloads as measuring
    from jaxfed.bench.promises import print_report
    from jaxfed.config.schema import suggest
    from jaxfed.training.log import log
    from jaxfed.training.run_dir import write_file

    for name in args.workloads:
        if name not in measuring.WORKLOADS:
            raise ValueError(f'no workload "{name}"{suggest(name, measuring.WORKLOADS)}')
    if args.rounds < 1:
        raise ValueError(f"--rounds is {args.rounds}: it must be at least 1")
    if args.alone:
        print(json.dumps(measuring.run_alone(args.workloads[0], args.alone)))
        return
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
    print_report(figures)
