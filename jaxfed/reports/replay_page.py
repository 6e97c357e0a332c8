"""A replay as a table and as a page: what each method predicted over time."""

from collections.abc import Sequence
from typing import Any

from jaxfed.reports.charts import Chart, Series, keep_finite
from jaxfed.reports.comparison_tables import TextTable
from jaxfed.reports.markup import page_html
from jaxfed.reports.run_page import draw_sections, text_table

TITLE = "Each interaction predicted before it is learnt"


def list_figures(found: dict[str, Any]) -> list[str]:
    """The figures of a replay over all interactions, such as online/hr@10."""
    return [name for name in found["overall"] if "/" in name and "/known/" not in name]


def replay_table(found: dict[str, Any]) -> TextTable:
    """A line for each window, then the means over all interactions, and over those of users known before their window.

    Args:
        found: what `summarize_replay` gives.
    """
    overall, figures = found["overall"], list_figures(found)
    heads = ["from day", "interactions", "new users", "new items", *(name.replace("/", " ") for name in figures)]
    lines = []
    for row in [*found["windows"], overall]:
        line = [f"{row['day']:,.1f}" if "day" in row else "all", f"{row['interactions']:,}"]
        line += [f"{row[name]:.1%}" for name in ("new_users", "new_items")]
        lines.append([*line, *(f"{row[name]:.4f}" for name in figures)])
    known = [f"{overall[name.replace('/', '/known/')]:.4f}" for name in figures]
    lines.append(["all, of users known before", f"{overall['known']:,}", "", "", *known])
    return TextTable(TITLE, heads, lines)


def make_replay_charts(found: dict[str, Any]) -> dict[str, list[Chart]]:
    """{heading: a chart for each figure over time, one of all interactions and one of known users}."""
    figures = list_figures(found)
    kinds = list(dict.fromkeys(name.rpartition("/")[2] for name in figures))
    methods = list(dict.fromkeys(name.partition("/")[0] for name in figures))
    return {
        heading: [over_time_chart(found, methods, f"{among}{kind}", kind, heading) for kind in kinds]
        for heading, among in (("All interactions", ""), ("Interactions of users known before", "known/"))
    }


def over_time_chart(found: dict[str, Any], methods: Sequence[str], figure: str, kind: str, heading: str) -> Chart:
    """A figure of each method by the day on which a window begins."""
    series = [
        Series(method, keep_finite((row["day"], row[f"{method}/{figure}"]) for row in found["windows"]))
        for method in methods
    ]
    name = figure.replace("/", "_").replace("@", "_at_")
    return Chart(name, f"{kind} over time: {heading.lower()}", "day", kind, [each for each in series if each.points])


def replay_page(found: dict[str, Any], title: str) -> str:
    """The page of a replay.

    Args:
        found: what `summarize_replay` gives.
        title: of the page.

    Returns:
        HTML.
    """
    charts = {heading: [each for each in some if each.series] for heading, some in make_replay_charts(found).items()}
    sections = draw_sections({heading: some for heading, some in charts.items() if some})
    return page_html(title, [*sections, ("Windows", text_table(replay_table(found)))])
