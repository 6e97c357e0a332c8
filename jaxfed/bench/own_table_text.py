"""The table of a file of one's own, in the terminal and as Markdown."""

import math
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from jaxfed.bench.row_tests import BASELINES, LEVEL
from jaxfed.core.excerpt import printable
from jaxfed.training.terminal_table import print_table

WIDE = 200  # columns of a table that no terminal shows
MARKS = {"best": "*", "equal": "=", "": ""}
SMALLEST = 0.0001  # p that is told


def format_number(value: float, sign: str = "") -> str:
    """`.1234`: four digits after the point, without the zero before it. sign: "+" for one before positive numbers."""
    return f"{value:{sign}.4f}".replace("0.", ".", 1)


def format_figure(row: dict[str, Any], name: str, sign: str = "") -> str:
    """`.1234 ± .0056`, a figure with its standard error over users; nothing where there is none."""
    if row.get(name) is None:
        return ""
    error = row.get(f"{name}_se", math.nan)
    return format_number(row[name], sign) + ("" if math.isnan(error) else f" ± {format_number(error)}")


def format_p(p: float) -> str:
    """`.0123`, or `<.0001`; nothing where there was no test."""
    if math.isnan(p):
        return ""
    return f"<{format_number(SMALLEST)}" if p < SMALLEST else format_number(p)


def row_words(row: dict[str, Any]) -> str:
    """What a row is called, with LEAKY and QUICK."""
    marks = ["LEAKY"] * bool(row["leaky"]) + ["QUICK"] * bool(row.get("quick"))
    return f"{row['name']}: {' '.join(marks)}" if marks else row["name"]


def describe_sample(rows: Sequence[dict[str, Any]]) -> str:
    """What `sampled` figures are called: the number of negatives, where it is one for all."""
    known = {str(row.get("negatives", "")).partition(" ")[0] for row in rows}
    return known.pop() if len(known) == 1 and all(each.isdecimal() for each in known) else "sampled"


def figure_cells(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The figures of rows: heads, then a line a row."""
    sample = describe_sample(rows)
    heads = ["", "method", "HR@10, full", "NDCG@10, full", f"HR@10, {sample}", f"NDCG@10, {sample}"]
    made = [[*heads, "best round", "MB up", "MB down", "seconds", "seeds"]]
    for row in rows:
        figures = [
            format_figure(row, f"test/{part}/{metric}@10") for part in ("full", "sampled") for metric in ("hr", "ndcg")
        ]
        sizes = [f"{row[key] / 1e6:,.2f}" for key in ("bytes_up", "bytes_down")]
        facts = [f"{row['best_round']:.0f}", *sizes, f"{row['seconds']:,.1f}", str(row["seeds"])]
        made.append([MARKS[row["place"]], row_words(row), *figures, *facts])
    return made


def difference_cells(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """How rows differ from the baselines that are among them: heads, then a line a row; nothing where they are not."""
    bases = [base for base in BASELINES if any(f"minus {base}" in row for row in rows)]
    if not bases:
        return []
    made = [["", "method", *(head for base in bases for head in (f"minus {base}", f"p, {base}"))]]
    for row in rows:
        cells = [
            (format_figure(row, f"minus {base}", "+"), format_p(row.get(f"minus {base}_p_holm", math.nan)))
            for base in bases
        ]
        made.append([MARKS[row["place"]], row_words(row), *(cell for pair in cells for cell in pair)])
    return made


def list_table_notes(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What the numbers of the table are, a sentence or two a line."""
    users = {row["users"] for row in rows}
    many = f"{min(users):,}" if len(users) == 1 else f"{min(users):,} to {max(users):,}"
    whole = max(row["all_users"] for row in rows)
    many += f" of {whole:,}" if max(users) < whole else ""  # evaluation.clients, and users without a test row
    protocols = ", ".join(dict.fromkeys(row["protocol"] for row in rows))
    negatives = ", ".join(dict.fromkeys(row["negatives"] for row in rows if row.get("negatives")))
    made = [f"{many} users; protocol {protocols}" + (f"; negatives: {negatives}." if negatives else ".")]
    made.append(
        "A test sees a user's train items, not the validation item, unless the name of a method says otherwise."
    )
    made.append("±: the standard error over users. Of several seeds it is that of each user's mean.")
    made.append("MB: of one client up to the best round. Seconds: of all rounds, without compiling and evaluating.")
    if len(rows) > 1:
        made.append(
            "Differences are of NDCG@10, full, user by user. p: of a paired t-test over users, with Holm's correction "
            "in each column."
        )
        made.append(
            "The best NDCG@10, full, is marked *, and methods that do not differ from it by such a t-test "
            f"(p ≥ {LEVEL:g}) are marked =."
        )
    return made


def own_table_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The tables and what their numbers are, as Markdown."""
    parts = []
    for cells in filter(None, (figure_cells(rows), difference_cells(rows))):
        heads, *lines = [[cell.replace("|", "\\|") for cell in line] for line in cells]
        rule = "|---|---" + "|---:" * (len(heads) - 2) + "|"
        parts.append("\n".join([f"| {' | '.join(heads)} |", rule, *(f"| {' | '.join(line)} |" for line in lines)]))
    return "\n\n".join([*parts, "\n".join(f"* {line}" for line in list_table_notes(rows))]) + "\n"


def print_own_table(rows: Sequence[dict[str, Any]], title: str) -> None:
    """The same in the terminal."""
    out = Console(highlight=False, markup=False, emoji=False)
    if not out.is_terminal:
        out.width = WIDE
    titles = (title, "NDCG@10, full: differences")
    for words, cells in zip(titles, (figure_cells(rows), difference_cells(rows)), strict=True):
        if cells:
            heads, *lines = [[printable(cell) for cell in line] for line in cells]
            print_table(out, printable(words), heads, lines, 2)
    for line in list_table_notes(rows):
        out.print(printable(line))
