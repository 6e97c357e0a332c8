"""Charts as PNG and SVG files, by matplotlib (the extra `plots`)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxfed.reports.charts import Chart, format_tick
from jaxfed.reports.markup import GENERATOR

KINDS = (".png", ".svg")
MARKERS, SIZE = "osD^vPX*", (8, 4.5)


def import_pyplot() -> Any:
    """matplotlib.pyplot, which draws into files. Raises ValueError where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError('--figures: matplotlib is missing: pip install "jaxfed[plots]"') from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save_figures(charts: Sequence[Chart], folder: Path) -> list[Path]:
    """Writes each chart as NAME.png and NAME.svg.

    Args:
        charts: their names are different.
        folder: where to write; it is made where it is not there.

    Returns:
        The files.

    Raises:
        ValueError: matplotlib is missing.
    """
    pyplot = import_pyplot()
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with pyplot.rc_context({"svg.hashsalt": GENERATOR, "text.parse_math": False}):  # the same file each time
        for chart in charts:
            figure = draw_figure_of(pyplot, chart)
            for path in list_figure_files(chart, folder):
                mark = {"Software": GENERATOR} if path.suffix == ".png" else {"Creator": GENERATOR, "Date": None}
                figure.savefig(path, dpi=150, metadata=mark)
                written.append(path)
            pyplot.close(figure)
    return written


def list_figure_files(chart: Chart, folder: Path) -> list[Path]:
    """The files of a chart."""
    return [folder / f"{chart.name}{kind}" for kind in KINDS]


def draw_figure_of(pyplot: Any, chart: Chart) -> Any:
    """A chart as a figure of matplotlib."""
    figure, axes = pyplot.subplots(figsize=SIZE, layout="constrained")
    if chart.kind == "bars":
        begins = [0.0] * len(chart.categories)
        for each in chart.series:
            places = [int(x) for x, _ in each.points]
            widths = [value for _, value in each.points]
            axes.barh(places, widths, left=[begins[place] for place in places], label=each.label)
            for place, width in zip(places, widths, strict=True):
                begins[place] += width
        axes.set_yticks(range(len(chart.categories)), chart.categories)
        axes.invert_yaxis()
        axes.set_xlabel(chart.y_label)
    else:
        for number, each in enumerate(chart.series):
            line = "-" if chart.kind == "lines" else ""
            style = {"marker": MARKERS[number % len(MARKERS)], "markersize": 4, "linestyle": line}
            axes.plot(*zip(*each.points, strict=True), label=each.label, **style)
        axes.set(xlabel=chart.x_label, ylabel=chart.y_label)
        if chart.categories:
            axes.set_xticks(range(len(chart.categories)), chart.categories)
        if chart.log_x:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(lambda value, place: format_tick(value))
    axes.set_title(chart.title)
    axes.grid(True, alpha=0.3)
    if len(chart.series) > 1 or chart.series[0].label:
        axes.legend(fontsize=8)
    return figure
