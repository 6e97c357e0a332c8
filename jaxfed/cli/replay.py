"""`jaxfed replay CONFIG`: the data in time order; each interaction is predicted before clients learn from it."""

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxfed.cli.report import check_overwriting, write_report
from jaxfed.core.excerpt import shorten

UNITS = {"h": 3600, "d": 86_400, "w": 7 * 86_400}
SHARE = 10  # of the rounds of the first part, how many times fewer come after a window


def add_replay_options(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds the command; `command(name, help, ...)` makes a parser."""
    replay = command(
        "replay",
        "Train in time order: each interaction is predicted before it is learnt.",
        "Any key of the configuration can be given as --section.key value; `rounds` is that of the first part, and of "
        "a model that is trained anew. Beside the model that goes on with every window stand one that is trained once, "
        "on the first part, one that is trained anew, and popularity so far. Durations are whole numbers with h, d or "
        "w.",
    )
    replay.add_argument("config", metavar="CONFIG.toml")
    replay.add_argument("--first", default="4w", metavar="TIME", help="the first part, which is only learnt (4w)")
    replay.add_argument("--window", default="1w", metavar="TIME", help="how often models learn what has arrived (1w)")
    replay.add_argument("--update-rounds", type=int, metavar="N", help="rounds after each window (a tenth of `rounds`)")
    replay.add_argument(
        "--retrain-every", type=int, default=1, metavar="N", help="windows between models trained anew; 0: none (1)"
    )
    replay.add_argument("--at", type=int, nargs="+", default=[10], metavar="K", help="the k of HR@k and NDCG@k (10)")
    replay.add_argument("--json", action="store_true", help="print JSON instead of a table")
    replay.add_argument("-o", "--output", metavar="FILE", help="write a page with curves over time, too")
    replay.add_argument("--force", action="store_true", help="overwrite a page that jaxfed did not write")


def parse_duration(option: str, text: str) -> int:
    """A duration in seconds, of 12h, 7d or 2w. Raises ValueError for what is none."""
    found = re.fullmatch(r"(\d{1,6})([hdw])", text)
    if not found or not int(found[1]):
        raise ValueError(f"{option} {shorten(text)}: a whole number from 1 with h, d or w, such as 12h, 7d or 2w")
    return int(found[1]) * UNITS[found[2]]


def replay_command(args: argparse.Namespace, overrides: list[str]) -> None:
    """jaxfed replay"""
    from jaxfed.config.build import read_source_data
    from jaxfed.config.config_files import read_config
    from jaxfed.config.overrides import override_config
    from jaxfed.reports.replay_page import replay_page
    from jaxfed.training.log import log, to_json
    from jaxfed.training.replay import ReplayOptions, check_replay, replay_data

    config = override_config(read_config(args.config), overrides)
    updates = max(config.rounds // SHARE, 1) if args.update_rounds is None else args.update_rounds
    if min(updates, args.retrain_every) < 0 or min(args.at) < 1:
        raise ValueError("--update-rounds and --retrain-every must be at least 0, --at at least 1")
    first, window = (parse_duration(f"--{name}", getattr(args, name)) for name in ("first", "window"))
    options = ReplayOptions(first, window, updates, args.retrain_every, tuple(dict.fromkeys(args.at)))
    check_replay(config)
    if args.output:
        check_overwriting([Path(args.output)], args.force)
    data = read_source_data(config.data)
    for note in data.notes:
        log(f"data: {note}")
    found = replay_data(config, data, options, log)
    if args.json:
        print(to_json(found, 1))
    else:
        print_replay(found)
    if args.output:
        write_report(Path(args.output), replay_page(found, f"Replay of {args.config}"))


def print_replay(found: dict[str, Any]) -> None:
    """The windows in the terminal, and below them the means over all interactions."""
    from rich.console import Console

    from jaxfed.reports.replay_page import replay_table
    from jaxfed.training.sweep_results import WIDE
    from jaxfed.training.terminal_table import print_table

    table, out = replay_table(found), Console(highlight=False, markup=False, emoji=False)
    out.width = out.width if out.is_terminal else WIDE
    print_table(out, table.title, table.heads, table.lines)
