"""Charts as data: what is drawn, for the page (`svg_charts`) and for files (`figure_files`)."""

import math
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

Kind = Literal["lines", "points", "bars"]
TICKS = 5  # about so many at an axis
DECADE = 10.0  # values that span so much or more can have a logarithmic axis


class Series(NamedTuple):
    """Some points under one name."""

    label: str
    points: list[tuple[float, float]]


class Chart(NamedTuple):
    """What is drawn.

    kind: lines: points of a series are joined; points: they are not; bars: a stack of bars for each category, whose
    number is x.
    """

    name: str  # of its file
    title: str
    x_label: str
    y_label: str
    series: list[Series]
    kind: Kind = "lines"
    categories: tuple[str, ...] = ()
    log_x: bool = False


class Axis(NamedTuple):
    """From where to where an axis goes, and the numbers that are written at it."""

    low: float
    high: float
    ticks: list[float]
    log: bool = False

    def place(self, value: float) -> float:
        """Where a value stands: 0 at the lower end, 1 at the upper one."""
        low, high, value = (map(math.log10, (self.low, self.high, value))) if self.log else (self.low, self.high, value)
        return (value - low) / (high - low)


def make_axis(values: Iterable[float], from_zero: bool = False, log: bool = False) -> Axis:
    """An axis on which all of some values can be seen.

    Args:
        values: finite numbers; above zero where the axis is logarithmic.
        from_zero: whether it begins at zero.
        log: whether it is logarithmic.
    """
    found = [*values, *([0.0] if from_zero else [])] or [0.0]
    low, high = min(found), max(found)
    if log:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        last += first == last
        return Axis(10.0**first, 10.0**last, [10.0**power for power in range(first, last + 1)], True)
    if low == high:
        low, high = low - (abs(low) or 1) * (not from_zero) / 2, high + (abs(high) or 1) / 2
    rough = (high - low) / TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return Axis(first * step, last * step, [number * step for number in range(first, last + 1)])


def format_tick(value: float) -> str:
    """A number at an axis."""
    return f"{value:,.6g}" if abs(value) < 1e6 else f"{value:.3g}"


def keep_finite(points: Iterable[tuple[float | None, float | None]]) -> list[tuple[float, float]]:
    """The points that can be drawn: both of their numbers are finite."""
    return [(x, y) for x, y in points if x is not None and y is not None and math.isfinite(x) and math.isfinite(y)]


def has_decade(values: Sequence[float]) -> bool:
    """Whether values are above zero and the largest is ten times the smallest or more."""
    return bool(values) and min(values) > 0 and max(values) / min(values) >= DECADE


def describe_chart(chart: Chart) -> str:
    """A chart in words, for those who do not see it: its axes, and the first and last value of each series."""
    if chart.kind == "bars":
        totals = [
            sum(y for each in chart.series for x, y in each.points if x == place)
            for place in range(len(chart.categories))
        ]
        each = [f"{name}: {format_tick(total)} in all" for name, total in zip(chart.categories, totals, strict=True)]
    elif chart.kind == "points":
        each = [f"{one.label or 'all'}: {len(one.points)} points" for one in chart.series]
    else:
        each = [
            f"{one.label}: {format_tick(one.points[0][1])} at {format_tick(one.points[0][0])}, "
            f"{format_tick(one.points[-1][1])} at {format_tick(one.points[-1][0])}"
            for one in chart.series
        ]
    return f"{chart.y_label} by {chart.x_label}. {'; '.join(each)}."
