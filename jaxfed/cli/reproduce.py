"""`jaxfed reproduce`: the table of results, of MovieLens-100K or of a file of one's own."""

import argparse
from pathlib import Path
from typing import Any

from jaxfed.cli.sweep import parse_seeds

CHECKOUT = Path(__file__).parents[2]
TEXT = """Train every row of a table of results, and write what came of them.

--table ml100k is the table of the documentation; a checkout has it in docs/results/ml100k.md, and its rows in
configs/results/ml100k.json: both are written.
--table FILE is a table of your own file (loader options as for `jaxfed data`): popularity, item-kNN, EASE, EASE with
transitions, iALS and FedAvg of a matrix factorisation, whose hyper-parameters follow the data by the rules of `jaxfed
init`. Figures have their standard error over users, and differences from popularity, item-kNN and EASE a paired test.
--only names other rows of ml100k, too (but for those that leak): they keep the hyper-parameters of MovieLens-100K.
Runs are in runs/reproduce/TABLE, with table.md and results.json beside them, one after the other in this process;
finished ones are read, stopped ones go on. The table holds all rows with a run that is finished, and is written after
each."""


def add_reproduce_options(command: Any) -> None:
    """Adds the command; `command(name, help, ...)` makes a parser."""
    form = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    reproduce = command(
        "reproduce", "Train every row of a table of results: of MovieLens-100K, or of your own data.", **form
    )
    reproduce.description = TEXT
    reproduce.add_argument("--table", required=True, metavar="ml100k|FILE", help="ml100k, or a file of interactions")
    reproduce.add_argument(
        "--quick", action="store_true", help="a few rounds and one seed, in folders of its own: to see that it works"
    )
    reproduce.add_argument("--seeds", nargs="+", metavar="SEED", help="run those of a row's seeds only")
    reproduce.add_argument("--only", nargs="+", default=[], metavar="NAME", help="run these rows only")
    reproduce.add_argument("--out", metavar="FOLDER", help="folder of the runs (runs/reproduce/TABLE)")
    is_checkout = (CHECKOUT / "pyproject.toml").is_file()
    files = ("configs/results/ml100k.json", "docs/results/ml100k.md")
    results, page = (str(CHECKOUT / name) if is_checkout else None for name in files)
    reproduce.add_argument("--results", metavar="FILE", default=results, help="the JSON of ml100k")
    reproduce.add_argument("--page", metavar="FILE", default=page, help="the page where the table of ml100k goes")


def reproduce_command(args: argparse.Namespace, words: list[str]) -> None:
    """jaxfed reproduce"""
    from jaxfed.bench.own_table import reproduce_own_table
    from jaxfed.bench.reproduce import reproduce_table

    args.seeds = parse_seeds(args.seeds) if args.seeds else args.seeds
    (reproduce_table if args.table == "ml100k" else reproduce_own_table)(args, words)
