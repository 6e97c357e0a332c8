"""One page of a sweep: its table, its trials in their order, and what each parameter did to the figure."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxfed.reports.charts import Chart, Series, has_decade
from jaxfed.reports.markup import page_html, table_html
from jaxfed.reports.run_page import draw_sections, lead_html
from jaxfed.reports.run_records import has_number
from jaxfed.training.records import LEAKY_NOTE, lower_is_better
from jaxfed.training.sweep import read_rows
from jaxfed.training.sweep_results import average_seeds, table_cells

RESULTS = "results.json"


def is_sweep(folder: str) -> bool:
    """Whether a folder is that of a sweep, and of no run."""
    path = Path(folder)
    return (path / RESULTS).is_file() and not (path / "config.toml").exists()


def read_sweep(folder: str) -> tuple[list[dict[str, Any]], list[str]]:
    """(the rows of a sweep, means over their seeds; its keys). Raises ValueError where they are damaged, or no run
    worked."""
    path = Path(folder) / RESULTS
    rows = read_rows(path)
    keys = [key for key in dict.fromkeys(key for row in rows for key in row) if "." in key and "/" not in key]
    for row in rows:
        whole = all(key in row for key in keys) and isinstance(row.get("problem"), str)
        if not whole or not (row["problem"] or (has_number(row, "selected") and isinstance(row.get("select"), str))):
            raise ValueError(f"{path} is no table of a sweep, or damaged: run the same jaxfed sweep again")
    if all(row["problem"] for row in rows):
        raise ValueError(f"{folder}: no run of this sweep worked, or there is none yet")
    return average_seeds(rows, keys), keys


def make_sweep_charts(every: Sequence[dict[str, Any]], keys: Sequence[str]) -> dict[str, list[Chart]]:
    """{heading: its charts}: the figure of validation in the order of the runs, and by each key.

    Args:
        every: a row for each combination, see `average_seeds`.
        keys: of the sweep.
    """
    good = [each for each in every if each["seeds"]]
    select, leaky = good[0]["select"], " LEAKY" * any(each.get("leaky") for each in good)
    better: Callable[..., float] = min if lower_is_better(select) else max
    values = [(float(number), each["selected"]) for number, each in enumerate(every, 1) if each["seeds"]]
    best = [(number, better(value for _, value in values[: place + 1])) for place, (number, _) in enumerate(values)]
    figure = f"{select}{leaky}"
    order = Chart("trials", f"{figure} in the order of the runs", "combination", figure, [Series("best so far", best)])
    order = order._replace(series=[*order.series, Series("each", values)])
    return {"In their order": [order], "By parameter": [key_chart(good, key, figure) for key in keys]}


def key_chart(good: Sequence[dict[str, Any]], key: str, figure: str) -> Chart:
    """The figure of validation by the values of a key; words stand beside each other."""
    name = f"by_{key.replace('.', '_')}"
    title = f"{figure} by {key}"
    if all(has_number(each, key) for each in good):
        points = [(float(each[key]), each["selected"]) for each in good]
        log_x = has_decade([x for x, _ in points])
        return Chart(name, title, key, figure, [Series("", points)], "points", log_x=log_x)
    words = tuple(dict.fromkeys(str(each[key]) for each in good))
    points = [(float(words.index(str(each[key]))), each["selected"]) for each in good]
    return Chart(name, title, key, figure, [Series("", points)], "points", words)


def sweep_page(every: Sequence[dict[str, Any]], keys: Sequence[str], title: str) -> str:
    """The page of a sweep.

    Args:
        every: a row for each combination.
        keys: of the sweep.
        title: of the page.

    Returns:
        HTML.
    """
    heads, *lines = table_cells(every, keys)
    leaky = f" ({LEAKY_NOTE})" if any(each.get("leaky") for each in every) else ""
    text = f"Mean and standard deviation over seeds; * the best by validation{leaky}"
    sections = [("Combinations", table_html(text, heads, lines, len(keys) + 1) + spread_note(every))]
    return page_html(
        title, sections + draw_sections(make_sweep_charts(every, keys)), lead_html(len(every), "combination")
    )


def spread_note(every: Sequence[dict[str, Any]]) -> str:
    """How far seeds are apart, which is what a difference between combinations is to be held against."""
    spread = [each["selected_sd"] for each in every if "selected_sd" in each]
    if not spread:
        return "<p>One seed each: a difference that is as small as that between seeds means nothing.</p>"
    return f"<p>Median standard deviation over seeds of the figure of validation: {statistics.median(spread):.4f}.</p>"
