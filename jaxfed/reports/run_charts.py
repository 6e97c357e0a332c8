"""The charts of a page of runs: learning curves, activity deciles, traffic and epsilon against quality, stage times."""

from collections.abc import Sequence
from typing import Any

from jaxfed.reports.charts import Chart, Series, has_decade, keep_finite
from jaxfed.reports.run_records import RunRecord

MEGA = 1e6
LOSS = "train/loss"
DECILES = range(1, 11)
BESIDE = ("sample", "pack", "transfer")  # stages that pass in a thread while devices compute


def make_run_charts(records: Sequence[RunRecord], metrics: Sequence[str]) -> dict[str, list[Chart]]:
    """{heading: its charts}, without those that no run has points for.

    Args:
        records: the runs.
        metrics: figures of held-out items, of which those that are known by decile are drawn.
    """
    select = records[0].config.evaluation.select
    found = {
        "Learning curves": [
            row_chart(records, "learning_curve", "round", select),
            row_chart(records, "training_loss", "round", LOSS),
        ],
        "Quality by activity of the clients": [decile_chart(records, name) for name in metrics if "/full/" in name],
        "Traffic and privacy against quality": [
            row_chart(records, "traffic", "traffic so far, MB up and down", select),
            row_chart(records, "epsilon", "epsilon so far", select),
        ],
        "Where the time went": [stage_chart(records)],
    }
    some = {
        heading: [each for each in charts if any(one.points for one in each.series)]
        for heading, charts in found.items()
    }
    return {heading: charts for heading, charts in some.items() if charts}


def row_chart(records: Sequence[RunRecord], name: str, across: str, figure: str) -> Chart:
    """A figure of the rows of metrics.jsonl against rounds, traffic or epsilon."""
    series = [
        Series(each.label, keep_finite((x_value(row, across), row.get(figure)) for row in each.rows))
        for each in records
    ]
    series = [each for each in series if each.points]
    log_x = across != "round" and has_decade([x for each in series for x, _ in each.points])
    return Chart(name, f"{figure} by {across}", across, figure, series, log_x=log_x)


def x_value(row: dict[str, Any], across: str) -> float | None:
    """Where a row stands: its round, its traffic in MB, or its epsilon."""
    if across.startswith("traffic"):
        return None if "bytes_up_total" not in row else (row["bytes_up_total"] + row.get("bytes_down_total", 0)) / MEGA
    return row.get(across.split(" ")[0])


def decile_chart(records: Sequence[RunRecord], metric: str) -> Chart:
    """A figure of the test by decile of activity."""
    series = [
        Series(each.label, keep_finite((float(n), each.summary.get(f"{metric}/decile_{n}")) for n in DECILES))
        for each in records
    ]
    name = f"deciles_{metric.rpartition('/')[2].replace('@', '_at_')}"
    across = "decile of activity (1: the least active clients, 10: the most)"
    return Chart(name, f"{metric} by decile of activity", across, metric, [each for each in series if each.points])


def stage_chart(records: Sequence[RunRecord]) -> Chart:
    """The seconds of each stage of each run, side by side, without those that pass beside others."""
    last = [each.summary or each.rows[-1] for each in records]
    stages = ["compile_seconds", *dict.fromkeys(name for each in last for name in each if name.startswith("seconds/"))]
    series = [
        Series(stage_name(stage), keep_finite((float(n), each.get(stage)) for n, each in enumerate(last)))
        for stage in stages
        if stage_name(stage) not in BESIDE
    ]
    names = tuple(f"{number}: {each.label}" for number, each in enumerate(records, 1))
    drawn = [each for each in series if any(value for _, value in each.points)]
    return Chart("stages", "seconds by stage", "run", "seconds", drawn, "bars", names)


def stage_name(figure: str) -> str:
    """The stage that a figure has the seconds of."""
    return figure.removeprefix("seconds/").removesuffix("_seconds")
