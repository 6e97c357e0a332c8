"""Descriptions of data: how many users, items and rows, how long histories are, how popular items. No data."""

import difflib
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxfed.core.excerpt import excerpt, shorten
from jaxfed.data.room import check_room
from jaxfed.data.sources.example_shapes import SHAPES

AROUND = 10  # users whose mean length stands for a quantile: no number is one person's
APART = 2.0  # how far lengths may be from adding up to the rows
LARGEST = 1 << 31
ROW_BYTES, ID_BYTES = 90, 60  # bytes of a row, and of a user or an item, while data are made (measured)


class Shape(NamedTuple):
    """What data are like, without the data.

    Args:
        users: Number of users.
        items: Number of items, each with at least one row.
        rows: Number of interactions, no two of the same user and item.
        lengths: (level, length) pairs: quantiles of the number of rows of a user, from level 0 to level 1. Each length
            is a mean over the ten users next to its level.
        popularity: (items, share) pairs: the share of all rows that the so many most popular items have. The last pair
            is (all items, 1).
        order: The probability that an item is a successor of the one before it. 0: no order.
        groups: Number of groups of taste.
        loyalty: The probability that an item that is no successor is of the user's own group. 0: no groups.
        times: Whether rows have times that say what came first.
        ties: Share of the rows with the same time as the user's row before.
    """

    users: int
    items: int
    rows: int
    lengths: tuple[tuple[float, float], ...]
    popularity: tuple[tuple[int, float], ...]
    order: float = 0.0
    groups: int = 1
    loyalty: float = 0.0
    times: bool = True
    ties: float = 0.0


DERIVED = "derived"  # a key for what follows from the others, which is not read
LEVELS = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 0.9999)
HEAD = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))  # of the most popular items
SHARES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)  # of the items


def quantiles_of_lengths(length: np.ndarray) -> tuple[tuple[float, float], ...]:
    """The `lengths` of a `Shape` of the users' numbers of rows [users]. Levels whose ten users would be some of the
    first or of the last ten are left out."""
    total = np.concatenate([[0], np.cumsum(np.sort(length))])
    size = min(AROUND, len(length))
    pairs = []
    margin = 1.5 * size / len(length)
    for level in [0, *(each for each in LEVELS if margin <= each <= 1 - margin), 1]:
        low = int(np.clip(round(level * len(length) - size / 2), 0, len(length) - size))
        pairs.append((level, round(float(total[low + size] - total[low]) / size, 2)))
    return tuple(pairs)


def shares_of_items(count: np.ndarray) -> tuple[tuple[int, float], ...]:
    """The `popularity` of a `Shape` of the items' numbers of rows [items]."""
    items = len(count)
    share = np.cumsum(np.sort(count)[::-1]) / count.sum()
    points = {*(each for each in HEAD if each < SHARES[0] * items), *(max(1, round(x * items)) for x in SHARES), items}
    return tuple((point, round(float(share[point - 1]), 7)) for point in sorted(points))


def history_lengths(shape: Shape) -> np.ndarray:
    """int64 [users], ascending: lengths with the quantiles of a shape, whose sum is its rows."""
    values = interpolate_lengths(shape)
    return round_to_total(scale_to_total(values, values[0], shape.items, shape.rows), shape.rows)


def interpolate_lengths(shape: Shape) -> np.ndarray:
    """float64 [users], ascending: between two quantiles the logarithm of a length is a line over the log odds of the
    level."""
    at = (np.arange(shape.users) + 0.5) / shape.users
    margin = min(AROUND / shape.users, 0.49)  # the first and the last ten have the length that stands for them
    level, length = np.array(shape.lengths).T
    inside = (level > margin) & (level < 1 - margin)
    level = np.concatenate([[margin], level[inside], [1 - margin]])
    length = np.concatenate([length[:1], length[inside], length[-1:]])
    return np.exp(np.interp(log_odds(at), log_odds(level), np.log(length)))


def log_odds(share: np.ndarray) -> np.ndarray:
    """float64: the logarithm of share / (1 - share)."""
    return np.log(share) - np.log1p(-share)


def make_item_counts(shape: Shape) -> np.ndarray:
    """int64 [items], descending but for rounding: rows of each item, with the popularity of a shape.

    Between two points of the curve popularity falls as a power of the rank.
    """
    rank = np.arange(shape.items) + 0.5
    point, share = np.array(shape.popularity).T
    point, share = np.append(0, point.astype(np.int64)), np.append(0, share)
    rows, wide = np.diff(share) * shape.rows, np.diff(point)
    middle = np.sqrt((point[:-1] + 0.5) * (point[1:] - 0.5))
    values = np.exp(np.interp(np.log(rank), np.log(middle), np.log(np.maximum(rows / wide, 1e-9))))
    values *= np.repeat(rows / np.add.reduceat(values, point[:-1]), wide)
    return round_to_total(scale_to_total(np.maximum(values, 1), 1, shape.users, shape.rows), shape.rows)


def scale_to_total(values: np.ndarray, least: float, most: float, total: float) -> np.ndarray:
    """The values, what they have above the `least` scaled so that they add up to `total`, none above `most`."""
    for _ in range(100):
        values = np.minimum(values, most)
        free = values < most
        rest, above = total - values[~free].sum() - least * free.sum(), (values[free] - least).sum()
        if above <= 0 or abs(rest / above - 1) < 1e-9:
            break
        values = np.where(free, least + (values - least) * max(rest / above, 0), values)
    return np.minimum(values, most)


def round_to_total(values: np.ndarray, total: int) -> np.ndarray:
    """int64: the values rounded up or down, so that the sum of the first n is that of the values, rounded."""
    ends = np.floor(np.cumsum(values) + 0.5).astype(np.int64)
    ends[-1] = total
    return np.diff(ends, prepend=0)


def read_shape(description: Any) -> Shape:
    """A shape from its description: a dict or its JSON, the path of a JSON file, or the name of a shape of
    `SHAPES`.

    Raises ValueError, in one line, where it is none.
    """
    if isinstance(description, dict):
        return parse_shape(description, "description")
    if not isinstance(description, str):
        raise ValueError(f"description: a path, a name or a dict, not {excerpt(description)}")
    if description.lstrip().startswith("{"):
        return parse_shape(parse_json(description, "description"), "description")
    place = Path(description).expanduser()
    if not place.is_file() and place.name in SHAPES:  # a name, which may have become a path where there is a folder
        return parse_shape(SHAPES[place.name], place.name)
    if not place.is_file():
        raise ValueError(
            f"no description {shorten(description)!r}: give a JSON file that jaxfed data --json printed, or one of "
            f"{', '.join(SHAPES)}"
        )
    where = shorten(description)
    return parse_shape(parse_json(place.read_bytes().decode("utf-8", "replace"), where), where)


def parse_json(text: str, where: str) -> Any:
    """The value of a JSON text. Raises ValueError, which begins with `where`, where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({shorten(error)}): make it with jaxfed data --json") from None


def parse_shape(table: Any, where: str) -> Shape:
    """A shape from a dict. Raises ValueError, which begins with `where` and names the key, for what is none."""
    if not isinstance(table, dict):
        raise ValueError(f"{where}: an object with keys, not {excerpt(table)}: make it with jaxfed data --json")
    table = {key: value for key, value in table.items() if key != DERIVED}
    for key in table:
        if key not in Shape._fields:
            near = difflib.get_close_matches(str(key), Shape._fields, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(Shape._fields)}"
            raise ValueError(f"{where}: unknown key {excerpt(key)}; {hint}")
    if missing := [key for key in Shape._fields if key not in (*table, *Shape._field_defaults)]:
        raise ValueError(f"{where}: the key {missing[0]!r} is missing: make the description with jaxfed data --json")
    shape = Shape(**{key: parse_value(key, value, where) for key, value in table.items()})
    check_sizes_of_shape(shape, where)
    check_curves(shape, where)
    return shape


def parse_value(key: str, value: Any, where: str) -> Any:
    """The value of a key of a description. Raises ValueError for another type and for what lies outside its range."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if key == "times":
        if not isinstance(value, bool):
            raise ValueError(f"{where}: times is {excerpt(value)}: it must be true or false")
        return value
    if key in ("lengths", "popularity"):
        return parse_pairs(key, value, where)
    if key in ("users", "items", "rows", "groups"):
        if not number or not 1 <= value < LARGEST or value != int(value):
            raise ValueError(f"{where}: {key} is {excerpt(value)}: it must be a whole number from 1 to 2^31 - 1")
        return int(value)
    if not number or not 0 <= value <= 1:
        raise ValueError(f"{where}: {key} is {excerpt(value)}: it must be a number from 0 to 1")
    return float(value)


def parse_pairs(key: str, value: Any, where: str) -> tuple[tuple[Any, Any], ...]:
    """The pairs of a curve. Raises ValueError for what is none."""
    try:
        pairs = np.array(value, np.float64)
    except (TypeError, ValueError):
        pairs = np.zeros(0)
    if pairs.ndim != 2 or pairs.shape[1] != 2 or len(pairs) == 0 or not np.isfinite(pairs).all():
        raise ValueError(f"{where}: {key} is {excerpt(value)}: it must be a list of pairs of numbers")
    return tuple((a, b) for a, b in pairs.tolist())


def check_sizes_of_shape(shape: Shape, where: str) -> None:
    """Raises ValueError for numbers that do not go together."""
    users, items, rows = shape.users, shape.items, shape.rows
    if not max(users, items) <= rows <= users * items:
        raise ValueError(
            f"{where}: {rows:,} rows for {users:,} users and {items:,} items: every user and item has a row, and no "
            f"pair two, so there must be {max(users, items):,} to {users * items:,}"
        )
    if shape.groups > items:
        raise ValueError(f"{where}: {shape.groups:,} groups of {items:,} items: there must be an item for each group")
    check_room(ROW_BYTES * rows + ID_BYTES * (users + items), f"users, items and rows of {where}")


def check_curves(shape: Shape, where: str) -> None:
    """Raises ValueError for lengths and shares that cannot be."""
    level, length = np.array(shape.lengths).T
    if level[0] != 0 or level[-1] != 1 or (np.diff(level) <= 0).any() or (np.diff(length) < 0).any():
        raise ValueError(f"{where}: lengths: levels must rise from 0 to 1, and lengths must not fall")
    if length[0] < 1 or length[-1] > shape.items:
        raise ValueError(f"{where}: lengths: from {length[0]:g} to {length[-1]:g}: they must lie in 1 to {shape.items}")
    total = interpolate_lengths(shape).sum()
    if not shape.rows / APART <= total <= shape.rows * APART:
        raise ValueError(
            f"{where}: the lengths add up to {total:,.0f} rows, not to {shape.rows:,}: give the lengths of all users"
        )
    point, share = np.array(shape.popularity).T
    if (point < 1).any() or (np.diff(point) <= 0).any() or (np.diff(share) < 0).any() or (share <= 0).any():
        raise ValueError(f"{where}: popularity: items must rise from 1, and shares must lie above 0 and not fall")
    if (point != np.floor(point)).any():
        raise ValueError(f"{where}: popularity: {point[point != np.floor(point)][0]:g} items: numbers must be whole")
    if point[-1] != shape.items or share[-1] != 1:
        raise ValueError(f"{where}: popularity: the last pair must be [{shape.items}, 1]: all items have all rows")
    most = point * shape.users / shape.rows  # every user has them
    if (share > most * (1 + 1e-6) + 1e-6).any():
        first = (share > most).argmax()
        raise ValueError(
            f"{where}: popularity: {point[first]:,.0f} items cannot have {share[first]:.1%} of the rows: "
            f"{shape.users:,} users have each of them at most once, which makes {most[first]:.1%}"
        )
