"""The tables of a comparison of runs as heads and lines of text: for the terminal, and for a page."""

import math
from typing import Any, NamedTuple

from jaxfed.core.excerpt import printable
from jaxfed.reports.run_comparison import FACTS, RunComparison, describe_bootstrap
from jaxfed.training.records import LEAKY_NOTE, figure_digits

MEGA = 1e6


class TextTable(NamedTuple):
    """A table of text."""

    title: str
    heads: list[str]
    lines: list[list[str]]
    labels: int = 1  # the first columns, which are words


def format_run_figure(name: str, value: Any) -> str:
    """A figure of a run for a table: MB for bytes, "none" for an epsilon that there is not."""
    if value is None:
        return "none" if name == "epsilon" else ""
    if not isinstance(value, int | float):
        return str(value)
    if name.startswith("bytes_"):
        return f"{value / MEGA:,.3f}"
    return f"{value:,.4g}" if name == "epsilon" else f"{value:,.{figure_digits(name)}f}"


def head_text(name: str) -> str:
    """The head of a figure's column."""
    words = {
        "bytes_up_total": "MB up, all clients",
        "bytes_down_total": "MB down, all clients",
        "bytes_up_per_client": "MB up of an update",
        "server_sees": "server sees",
        "best_round": "best round",
    }
    return words.get(name, name.replace("/", " "))


def runs_table(comparison: RunComparison) -> TextTable:
    """The figures of each run on held-out items, its traffic, its epsilon and its time."""
    facts = [*FACTS]
    facts += [
        name for name in ("protocol", "history", "server_sees") if any(name in r.summary for r in comparison.records)
    ]
    names = [*comparison.metrics, *facts]
    lines = [
        [printable(each.label), *(printable(format_run_figure(name, each.summary.get(name))) for name in names)]
        for each in comparison.records
    ]
    leaky = f" ({LEAKY_NOTE})" if any(each.leaky for each in comparison.records) else ""
    return TextTable(f"Figures of the best round by validation{leaky}", ["run", *map(head_text, names)], lines)


def differences_table(comparison: RunComparison) -> TextTable:
    """What differs between the configurations: a line for each key, a column for each run."""
    heads = ["key", *(printable(each.label) for each in comparison.records)]
    lines = [[key, *map(printable, values)] for key, values in comparison.differences.items()]
    return TextTable("What differs between the configurations", heads, lines, len(heads))


def paired_table(comparison: RunComparison) -> TextTable:
    """The paired differences from the first run."""
    several = len({each.run for each in comparison.paired}) > 1
    leaky = {each.folder: each.label for each in comparison.records}
    heads = ["run", "figure", "users", "difference", "95 % interval", "p", *(["p (Holm)"] if several else [])]
    lines = []
    for run, metric, users, (mean, low, high, p), p_holm in comparison.paired:
        digits = figure_digits(metric)
        line = [printable(leaky[run]), metric, f"{users:,}", f"{mean:+.{digits}f}"]
        line += [f"[{low:+.{digits}f}, {high:+.{digits}f}]", format_probability(p)]
        lines.append([*line, *([format_probability(p_holm)] if several else [])])
    return TextTable(printable(describe_bootstrap(comparison)), heads, lines, 2)


def format_probability(p: float) -> str:
    """A probability with the digits that 10,000 resamples can tell."""
    return f"{p:.4f}" if math.isfinite(p) else ""
