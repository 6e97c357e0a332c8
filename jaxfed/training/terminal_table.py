"""Tables in a terminal, whose figures are never cut."""

from collections.abc import Sequence

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

ROOM = 10_000  # as wide as any table: to measure how wide one would like to be


def make_table(heads: Sequence[str], lines: Sequence[Sequence[str]], labels: int, title: str = "") -> Table:
    """A table whose first `labels` columns are left aligned and may be folded; so may words elsewhere."""
    table = Table(title=title or None, title_justify="left")
    for place, head in enumerate(heads):
        figures = place >= labels and not any(" " in line[place] for line in lines if "±" not in line[place])
        table.add_column(head, justify="right" if figures else "left", no_wrap=figures, overflow="fold")
    for line in lines:
        table.add_row(*line)
    return table


def print_table(
    out: Console, title: str, heads: Sequence[str], lines: Sequence[Sequence[str]], labels: int = 1
) -> None:
    """Prints lines under heads. Where not all columns fit beside each other, several tables stand below each other, and
    each begins with the first `labels` columns."""

    def some(places):
        return [[line[place] for place in places] for line in lines]

    def fits(places):
        table = make_table([heads[place] for place in places], some(places), labels)
        return Measurement.get(out, out.options.update(max_width=ROOM), table).maximum <= out.width

    parts: list[list[int]] = [[*range(labels)]]
    for place in range(labels, len(heads)):
        if len(parts[-1]) > labels and not fits([*parts[-1], place]):
            parts.append([*range(labels)])
        parts[-1].append(place)
    for number, places in enumerate(parts):
        out.print(make_table([heads[place] for place in places], some(places), labels, "" if number else title))
