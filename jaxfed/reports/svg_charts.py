"""Charts as SVG inside of a page: without scripts, in colours that the page's style sets."""

from collections.abc import Iterator

from jaxfed.core.excerpt import shorten
from jaxfed.reports.charts import Axis, Chart, describe_chart, format_tick, make_axis
from jaxfed.reports.markup import escape_text

WIDTH, HEIGHT = 640, 320
LEFT, RIGHT, TOP, BOTTOM = 70, 14, 12, 46  # margins
COLOURS = 8  # that the style of the page has; series beyond share them, with other marks
WORD = 14  # characters of a word at an axis
BAR = 26  # of a bar and the space around it
DASHES = ("", "7 4", "2 3", "9 3 2 3")
MARKS = (  # around (0, 0)
    "M-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0 -7 0Z",
    "M-3.2 -3.2H3.2V3.2H-3.2Z",
    "M0 -4.2L4 3.2H-4Z",
    "M0 -4.6L4.2 0L0 4.6L-4.2 0Z",
)


def draw_chart(chart: Chart, number: int) -> str:
    """A chart as an SVG element, with its title and a description for those who do not see it.

    Args:
        chart: what is drawn; its series have points.
        number: of the chart on its page.
    """
    height = TOP + BOTTOM + BAR * len(chart.categories) if chart.kind == "bars" else HEIGHT
    body = draw_bars(chart, height) if chart.kind == "bars" else draw_points(chart)
    title, text = f"chart-{number}-title", f"chart-{number}-text"
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-labelledby="{title} {text}">'
        f'<title id="{title}">{escape_text(chart.title)}</title>'
        f'<desc id="{text}">{escape_text(describe_chart(chart))}</desc>{"".join(body)}</svg>'
    )


def draw_points(chart: Chart) -> Iterator[str]:
    """The axes, and the lines or points of each series."""
    every = [point for each in chart.series for point in each.points]
    across = make_axis((x for x, _ in every), log=chart.log_x)
    if chart.categories:
        across = Axis(-0.5, len(chart.categories) - 0.5, [float(place) for place in range(len(chart.categories))])
    up = make_axis(y for _, y in every)
    yield from draw_axes(chart, across, up)
    for number, each in enumerate(chart.series):
        places = [place_point(across, up, *point) for point in each.points]
        colour, mark = f"series-{number % COLOURS}", MARKS[number % len(MARKS)]
        if chart.kind == "lines" and len(places) > 1:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            dash = DASHES[number // COLOURS % len(DASHES)] or DASHES[number % len(DASHES)]
            yield f'<polyline class="line {colour}" stroke-dasharray="{dash or "none"}" points="{path}"/>'
        for (x, y), point in zip(places, each.points, strict=True):
            told = f"{each.label} ({format_tick(point[0])}; {format_tick(point[1])})".strip()
            shape = f'<path class="mark {colour}" transform="translate({x:.1f} {y:.1f})" d="{mark}">'
            yield f"{shape}<title>{escape_text(told)}</title></path>"


def place_point(across: Axis, up: Axis, x: float, y: float) -> tuple[float, float]:
    """Where a point is drawn."""
    right, bottom = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    return LEFT + right * across.place(x), TOP + bottom * (1 - up.place(y))


def draw_axes(chart: Chart, across: Axis, up: Axis) -> Iterator[str]:
    """The grid, its numbers, and the words at both axes."""
    low, end = HEIGHT - BOTTOM, WIDTH - RIGHT
    for value in up.ticks:
        y = place_point(across, up, across.low, value)[1]
        yield f'<path class="grid" d="M{LEFT} {y:.1f}H{end}"/>'
        yield f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{format_tick(value)}</text>'
    for value in across.ticks:
        x = place_point(across, up, value, up.low)[0]
        text = escape_text(shorten(chart.categories[int(value)], WORD)) if chart.categories else format_tick(value)
        yield f'<path class="grid" d="M{x:.1f} {TOP}V{low}"/>'
        yield f'<text class="tick" x="{x:.1f}" y="{low + 18}" text-anchor="middle">{text}</text>'
    middle = (LEFT + end) / 2
    yield f'<text class="label" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape_text(chart.x_label)}</text>'
    where = f'transform="translate(14 {(TOP + low) / 2}) rotate(-90)"'
    yield f'<text class="label" {where} text-anchor="middle">{escape_text(chart.y_label)}</text>'


def draw_bars(chart: Chart, height: int) -> Iterator[str]:
    """A bar for each category, from left to right the numbers of each series."""
    ends = [0.0] * len(chart.categories)
    for each in chart.series:
        for place, value in each.points:
            ends[int(place)] += value
    across, width = make_axis(ends, from_zero=True), WIDTH - LEFT - RIGHT
    for value in across.ticks:
        x = LEFT + width * across.place(value)
        yield f'<path class="grid" d="M{x:.1f} {TOP}V{height - BOTTOM}"/>'
        where = f'x="{x:.1f}" y="{height - BOTTOM + 18}"'
        yield f'<text class="tick" {where} text-anchor="middle">{format_tick(value)}</text>'
    for line in range(len(chart.categories)):
        y = TOP + BAR * (line + 0.65)
        yield f'<text class="tick" x="{LEFT - 8}" y="{y:.1f}" text-anchor="end">{line + 1}</text>'
    begins = [0.0] * len(chart.categories)
    for number, each in enumerate(chart.series):
        for place, value in each.points:
            x, y = LEFT + width * across.place(begins[int(place)]), TOP + BAR * place + 3
            begins[int(place)] += value
            told = f"{chart.categories[int(place)]}, {each.label}: {format_tick(value)}"
            size = f'width="{width * value / (across.high - across.low):.1f}" height="{BAR - 6}"'
            bar = f'<rect class="bar series-{number % COLOURS}" x="{x:.1f}" y="{y:.1f}" {size}>'
            yield f"{bar}<title>{escape_text(told)}</title></rect>"
    middle = LEFT + width / 2
    yield f'<text class="label" x="{middle}" y="{height - 6}" text-anchor="middle">{escape_text(chart.y_label)}</text>'


def draw_legend(chart: Chart) -> str:
    """The series by their marks, as a list; a chart of one series without a name has none."""
    if len(chart.series) == 1 and not chart.series[0].label:
        return ""
    lines = []
    for number, each in enumerate(chart.series):
        mark = "M-5 -5H5V5H-5Z" if chart.kind == "bars" else MARKS[number % len(MARKS)]
        shape = f'<path class="mark series-{number % COLOURS}" transform="translate(8 8)" d="{mark}"/>'
        key = f'<svg class="key" viewBox="0 0 16 16" aria-hidden="true">{shape}</svg>'
        lines.append(f"<li>{key}{escape_text(each.label)}</li>")
    return f'<ul class="legend">{"".join(lines)}</ul>'
