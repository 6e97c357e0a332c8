"""Loaders for files of one's own: csv, tsv, parquet and RecBole's .inter, in the order of their rows."""

import contextlib
import difflib
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from jaxfed.data.features import SIDES, Features, encoded
from jaxfed.data.interactions import Dataset, Interactions, numbered

# what a column may be called where the user does not say, in small letters and without blanks, - and _
NAMES = {
    "user": ("userid", "user", "uid", "visitorid", "customerid", "customer", "reviewerid", "memberid"),
    "item": (
        "itemid",
        "item",
        "iid",
        "movieid",
        "productid",
        "product",
        "trackid",
        "artistid",
        "bookid",
        "asin",
        "isbn",
    ),
    "rating": ("rating", "ratings", "score", "stars", "overall", "label"),
    "time": ("timestamp", "time", "datetime", "date", "ts", "unixreviewtime"),
    "title": ("title", "movietitle", "name", "itemname"),
}
RECBOLE = ("inter", "item", "user")
DELIMITERS = {"csv": ",", "tsv": "\t", **dict.fromkeys(RECBOLE, "\t")}


def read_table(path: Path, kind: str, delimiter: str = "", columns: tuple[str, ...] = ()) -> pa.Table:
    """A file as columns. `columns` names those of a file without a header; .inter headers lose their `:type`.

    Columns of text files come as words. Raises ValueError when the file is not there, is empty or cannot be read.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        table = pyarrow.parquet.read_table(path) if kind == "parquet" else read_text(path, kind, delimiter, columns)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as {kind}: {str(error).splitlines()[0]}") from error
    if table.num_rows == 0:
        raise ValueError(f"{path}: the file is empty, it has no rows")
    names = [name.split(":")[0].strip() for name in table.column_names]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"{path}: the columns {', '.join(sorted(twice))} occur more than once")
    return table.rename_columns(names)


def read_text(path: Path, kind: str, delimiter: str, columns: tuple[str, ...]) -> pa.Table:
    """A csv, tsv, inter or item file, every column as words."""
    delimiter = delimiter or DELIMITERS[kind]
    data = path.read_bytes() if len(delimiter.encode()) > 1 else b""
    if data:  # MovieLens' `::`
        data, delimiter = data.replace(delimiter.encode(), b"\x1f"), "\x1f"

    def source():
        return io.BytesIO(data) if data else path

    named = pyarrow.csv.ReadOptions(column_names=list(columns) or None)
    parse = pyarrow.csv.ParseOptions(delimiter=delimiter, quote_char=False if kind in RECBOLE else '"')
    names = pyarrow.csv.open_csv(source(), named, parse).schema.names
    words = pyarrow.csv.ConvertOptions(
        column_types=dict.fromkeys(names, pa.string()),
        strings_can_be_null=True,
        null_values=["", "NaN", "nan", "NULL", "null"],
    )
    return pyarrow.csv.read_csv(source(), named, parse, words)


def number(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Words as numbers where all of them are; anything else as it is."""
    if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
        return values
    for kind in (pa.int64(), pa.float64()):
        with contextlib.suppress(pa.ArrowException):
            return pc.cast(values, kind)
    return values


def column_called(table: pa.Table, role: str, name: str, path: Path) -> str:
    """The column that plays a role: `name`, or where that is empty the first of the usual names, or none."""
    if name:
        if name in table.column_names:
            return name
        near = difflib.get_close_matches(name, table.column_names, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{path}: no column {name!r} for {role} among {', '.join(table.column_names)}{hint}")
    known = {re.sub(r"[\s_-]", "", column.lower()): column for column in reversed(table.column_names)}
    return next((known[usual] for usual in NAMES[role] if usual in known), "")


def found_all(table: pa.Table, found: dict[str, str], roles: tuple[str, ...], path: Path) -> None:
    """Raises ValueError when a role has no column, naming all that have none."""
    missing = [role for role in roles if not found[role]]
    if missing:
        ask = " and ".join(f"--data.{role}" for role in missing)
        alone = "; one column only: is --data.delimiter right?" if len(table.column_names) == 1 else ""
        columns = ", ".join(table.column_names)
        raise ValueError(f"{path}: which column is the {' and the '.join(missing)}? Pass {ask}, of {columns}{alone}")


def refuse(bad: np.ndarray, path: Path, column: str, what: str) -> None:
    """Raises ValueError with the first row (counted from 1, without the header) where `bad`."""
    if bad.any():
        raise ValueError(f"{path}: column {column!r} has {what} in row {int(bad.argmax()) + 1:,}")


def ids(table: pa.Table, column: str, path: Path) -> np.ndarray:
    """A column of ids as integers or words; no id may be missing, NaN or negative."""
    values = table[column]
    refuse(np.asarray(values.is_null()), path, column, "no value (NaN or empty)")
    try:
        words = np.asarray(pc.cast(values, pa.string())).astype(str)
    except pa.ArrowException:
        raise ValueError(f"{path}: column {column!r} holds {values.type}, which cannot be ids") from None
    values = number(values)
    if pa.types.is_floating(values.type):
        array = np.asarray(values)
        refuse(np.isnan(array), path, column, "NaN")
        refuse(array != np.floor(array), path, column, "an id that is no whole number")
        refuse(array < 0, path, column, "a negative id")
        plain = pc.match_substring_regex(pc.cast(table[column], pa.string()), r"^\d+(\.0+)?$")
        return array.astype(np.int64) if pc.all(plain).as_py() else words
    if pa.types.is_integer(values.type):
        refuse(np.asarray(pc.less(values, 0)), path, column, "a negative id")
    return words


def floats(table: pa.Table, column: str, path: Path) -> np.ndarray:
    """A column of finite numbers."""
    values = number(table[column])
    if not (pa.types.is_integer(values.type) or pa.types.is_floating(values.type)):
        raise ValueError(f"{path}: column {column!r} holds {values.type}, not numbers")
    array = np.asarray(pc.cast(values, pa.float64(), safe=False).fill_null(float("nan")))
    refuse(~np.isfinite(array), path, column, "NaN, an infinity or no value")
    return array


def times(table: pa.Table, column: str, path: Path) -> np.ndarray:
    """A column of times as whole numbers in their order: whole numbers and dates as they are, fractions as ranks."""
    values = number(table[column])
    refuse(np.asarray(values.is_null()), path, column, "no value")
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        values = dates(values, path, column)
    try:
        if pa.types.is_date(values.type):
            values = pc.cast(values, pa.timestamp("s"))
        if pa.types.is_temporal(values.type) or pa.types.is_integer(values.type):
            narrow = values.type in (pa.date32(), pa.time32("s"), pa.time32("ms"))
            values = pc.cast(values, pa.int32()) if narrow else values
            return np.asarray(pc.cast(values, pa.int64()))
    except pa.ArrowException:
        raise ValueError(f"{path}: column {column!r} holds {values.type}, which cannot be times") from None
    array = floats(table, column, path)
    whole = (array == np.floor(array)).all() and np.abs(array).max() < 2**62
    return array.astype(np.int64) if whole else np.unique(array, return_inverse=True)[1].astype(np.int64)


def dates(values: pa.ChunkedArray, path: Path, column: str) -> pa.ChunkedArray:
    """Words as dates, with or without a zone."""
    for kind in (pa.timestamp("us"), pa.timestamp("us", "UTC")):
        with contextlib.suppress(pa.ArrowException):
            return pc.cast(values, kind)
    raise ValueError(
        f"{path}: column {column!r} holds words like {values[0].as_py()!r} that are no times: "
        "give numbers, or ISO dates (YYYY-MM-DD[ HH:MM:SS[Z]], with a zone in all rows or in none)"
    )


def table_beside(path: str) -> tuple[pa.Table, Path]:
    """(a file beside the interactions, of a kind that its ending says, where it lies)."""
    place = Path(path).expanduser()
    kind = place.suffix.lstrip(".")
    return read_table(place, kind if kind in (*DELIMITERS, "parquet") else "csv"), place


def features_of(path: str, known: np.ndarray, side: str, column: str = "") -> Features | None:
    """What a file says of the users or items `known` [n]: an id column (`column`, or a usual name) and any others, but
    for titles, which name items. None: it has no others.

    Raises ValueError when there is no id column, an id comes twice, or a column holds neither words nor numbers.
    """
    table, place = table_beside(path)
    column = column if column in table.column_names else column_called(table, side, "", place)
    if not column:
        have = ", ".join(table.column_names)
        raise ValueError(f"{place}: no column of {side} ids among {have}: call it {side}_id, or as in the interactions")
    names, title = ids(table, column, place).astype(str), column_called(table, "title", "", place)
    order = np.argsort(names, kind="stable")
    again = np.zeros(len(names), bool)
    again[order[1:]] = names[order[1:]] == names[order[:-1]]
    refuse(again, place, column, "an id that came before")
    at = order[np.minimum(np.searchsorted(names, known, sorter=order), len(names) - 1)]
    there = names[at] == known
    if not there.any():
        raise ValueError(f"{place}: none of the ids in {column!r} is one of a {side} of the interactions")
    others = [each for each in table.column_names if each not in (column, title if side == "item" else "")]
    return encoded({each: np.where(there, *described(table, each, place, at)) for each in others})


def described(table: pa.Table, column: str, path: Path, at: np.ndarray) -> tuple[np.ndarray, Any]:
    """(the rows `at` of a column as floats or words, what stands for a missing one)."""
    values = number(table[column])
    if pa.types.is_integer(values.type) or pa.types.is_floating(values.type):
        return np.asarray(pc.cast(values, pa.float64(), safe=False).fill_null(np.nan))[at], np.nan
    try:
        return np.asarray(pc.cast(values, pa.string()).fill_null("")).astype(str)[at], ""
    except pa.ArrowException:
        raise ValueError(f"{path}: column {column!r} holds {values.type}, neither words nor numbers") from None


def titles_of(path: str, items: np.ndarray, asked: bool = True, name: str = "") -> np.ndarray | None:
    """Titles [items] from a file with an item and a title column; an item without one keeps its id. None: the file has
    no titles and was not `asked` for them. name: what the interactions call the column of items."""
    table, place = table_beside(path)
    there = name if name in table.column_names else ""
    found = {"item": column_called(table, "item", there, place), "title": column_called(table, "title", "", place)}
    if not asked and not found["title"]:
        return None
    if missing := [role for role in found if not found[role]]:
        columns = ", ".join(table.column_names)
        raise ValueError(f"{place}: no column for {' and '.join(missing)} among {columns}: call them item_id and title")
    title = np.asarray(pc.cast(table[found["title"]], pa.string()).fill_null(""))
    if "release_year" in table.column_names:
        year = np.asarray(pc.cast(table["release_year"], pa.string()).fill_null(""))
        title = np.array([f"{t} ({y})" if y else t for t, y in zip(title, year, strict=True)])
    by_id = dict(zip(ids(table, found["item"], place).astype(str).tolist(), title.tolist(), strict=True))
    return np.array([by_id.get(each) or each for each in items.tolist()])


def read_interactions(
    path: str = "",
    kind: str = "csv",
    user: str = "",
    item: str = "",
    rating: str = "",
    time: str = "",
    delimiter: str = "",
    columns: tuple[str, ...] = (),
    titles: str = "",
    user_features: str = "",
    item_features: str = "",
    keep: str = "",
) -> Dataset:
    """Reads interactions in the order of the file.

    Rating and time may be missing: then a row counts 1, and time is the row's number. RecBole's .item and .user beside
    an .inter are found. Raises ValueError for a missing column, a NaN, a negative id or an empty file.

    Args:
        path: The file to read.
        kind: What kind of file it is: csv, tsv, parquet or inter.
        user: The column of users. Left out, as for the other columns: the first with a usual name.
        item: The column of items.
        rating: The column of ratings.
        time: The column of times: numbers or ISO dates.
        delimiter: What stands between the fields of a text file. Left out: what its kind says.
        columns: The names of the columns of a text file without a header.
        titles: A file with item ids and titles.
        user_features: A file with user ids and any other columns, see `features_of`.
        item_features: A file with item ids and any other columns.
        keep: A column to keep for clients.
    """
    if not path:
        raise ValueError(f"data.path is empty: name the {kind} file to read")
    place = Path(path).expanduser()
    table = read_table(place, kind, delimiter, columns)
    wanted = {"user": user, "item": item, "rating": rating, "time": time}
    found = {role: column_called(table, role, name, place) for role, name in wanted.items()}
    found_all(table, found, ("user", "item"), place)
    user_number, users = numbered(ids(table, found["user"], place))
    item_number, items = numbered(ids(table, found["item"], place))
    rows = table.num_rows
    notes: tuple[str, ...] = ()
    ratings = floats(table, found["rating"], place) if found["rating"] else np.ones(rows)
    if found["time"]:
        clock = times(table, found["time"], place)
    else:
        clock, notes = np.arange(rows), (f"{place.name} has no time column: the order of its rows is taken for time",)
    extra = {keep: ids(table, keep, place).astype(str)} if keep in table.column_names else {}
    beside = {role: place.with_suffix(f".{role}") for role in SIDES}
    there = {role: str(file) if kind == "inter" and file.is_file() else "" for role, file in beside.items()}
    names, user_features = titles or there["item"], user_features or there["user"]
    item_features = item_features or there["item"]
    return Dataset(
        Interactions(user_number, item_number, ratings.astype(np.float32), clock.astype(np.int64)),
        users,
        items,
        titles_of(names, items, bool(titles), found["item"]) if names else None,
        extra,
        notes,
        features_of(user_features, users, "user", found["user"]) if user_features else None,
        features_of(item_features, items, "item", found["item"]) if item_features else None,
    )
