"""One page of some runs: tables and charts, with nothing beside it."""

from collections.abc import Iterable, Sequence

from jaxfed import __version__
from jaxfed.reports.charts import Chart, format_tick
from jaxfed.reports.comparison_tables import TextTable, differences_table, paired_table, runs_table
from jaxfed.reports.markup import escape_text, page_html, table_html
from jaxfed.reports.run_charts import make_run_charts
from jaxfed.reports.run_comparison import RunComparison
from jaxfed.reports.svg_charts import draw_chart, draw_legend

STAGE_NOTE = (
    "Left out are sample, pack and transfer of the next cohort, which pass while devices compute; wait is what of them "
    "the rounds waited for."
)


def run_page(comparison: RunComparison, title: str) -> str:
    """The page of a comparison, or of one run.

    Args:
        comparison: of the runs.
        title: of the page.

    Returns:
        HTML.
    """
    records = comparison.records
    sections = [("Runs", text_table(runs_table(comparison)) + note_unfinished(comparison))]
    if len(records) > 1:
        sections.append(("Differences user by user", paired_html(comparison)))
        same = "" if comparison.differences else "<p>Nothing but where they are stored.</p>"
        sections.append(("Configurations", same or text_table(differences_table(comparison))))
    sections += draw_sections(make_run_charts(records, comparison.metrics))
    return page_html(title, sections, lead_html(len(records), "run"))


def lead_html(count: int, what: str) -> str:
    """The line below the title."""
    return f"<p>{count} {what}{'s' * (count > 1)}. Made by jaxfed {__version__}.</p>"


def text_table(table: TextTable) -> str:
    """A table of text as HTML."""
    return table_html(table.title, table.heads, table.lines, table.labels)


def note_unfinished(comparison: RunComparison) -> str:
    """Which runs have not ended."""
    names = [each.folder for each in comparison.records if not each.summary]
    return f"<p>Not finished, and without a test: {escape_text(', '.join(names))}.</p>" if names else ""


def paired_html(comparison: RunComparison) -> str:
    """The table of paired differences, and what is not in it."""
    table = text_table(paired_table(comparison)) if comparison.paired else ""
    notes = "".join(f"<li>{escape_text(note)}</li>" for note in comparison.notes)
    return table + (f"<ul>{notes}</ul>" if notes else "")


def draw_sections(charts: dict[str, list[Chart]]) -> list[tuple[str, str]]:
    """(heading, HTML) of charts by their headings."""
    numbers = iter(range(sum(map(len, charts.values()))))
    made = []
    for heading, some in charts.items():
        body = "".join(chart_html(each, next(numbers)) for each in some)
        note = f"<p>{STAGE_NOTE}</p>" * any(each.name == "stages" for each in some)
        made.append((heading, note + body))
    return made


def chart_html(chart: Chart, number: int) -> str:
    """A chart with its caption, its legend, and its numbers as a table."""
    table = text_table(chart_table(chart))
    numbers = f"<details><summary>Numbers: {escape_text(chart.title)}</summary>{table}</details>"
    names = "".join(f"<li>{escape_text(each)}</li>" for each in chart.categories)
    bars = f'<ul class="legend">{names}</ul>' if names else ""
    drawing = draw_chart(chart, number) + bars + draw_legend(chart)
    return f"<figure><figcaption>{escape_text(chart.title)}</figcaption>{drawing}{numbers}</figure>"


def chart_table(chart: Chart) -> TextTable:
    """The numbers of a chart: a line for each place on its axis, a column for each series."""
    heads = [chart.x_label, *(each.label or chart.y_label for each in chart.series)]
    if chart.kind == "points":
        lines = [[place_name(chart, x), format_tick(y)] for each in chart.series for x, y in sorted(each.points)]
        return TextTable(chart.title, [chart.x_label, chart.y_label], lines, 0)
    columns = [dict(each.points) for each in chart.series]
    places = sorted({x for each in columns for x in each})
    lines = [[place_name(chart, x), *(format_cells(each.get(x) for each in columns))] for x in places]
    return TextTable(chart.title, heads, lines)


def place_name(chart: Chart, x: float) -> str:
    """What a place on the axis is called."""
    return chart.categories[int(x)] if chart.categories else format_tick(x)


def format_cells(values: Iterable[float | None]) -> Sequence[str]:
    """Numbers as text, nothing where there is none."""
    return ["" if value is None else f"{value:.4g}" for value in values]
