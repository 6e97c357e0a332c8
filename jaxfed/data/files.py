"""Loaders for files of one's own: csv, tsv, parquet and RecBole's .inter, in the order of their rows."""

import difflib
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from jaxfed.data.interactions import Dataset, Interactions, numbered

# what a column may be called where the user does not say
NAMES = {
    "user": ("user_id", "user", "userid", "uid", "visitorid", "customer_id"),
    "item": ("item_id", "item", "itemid", "iid", "movie_id", "movieid", "product_id", "track_id", "book_id"),
    "rating": ("rating", "ratings", "score", "stars", "label"),
    "time": ("timestamp", "time", "datetime", "date", "ts", "unixreviewtime"),
    "title": ("title", "movie_title", "name", "item_name"),
}
DELIMITERS = {"csv": ",", "tsv": "\t", "inter": "\t", "item": "\t"}


def read_table(path: Path, kind: str, delimiter: str = "", columns: tuple[str, ...] = ()) -> pa.Table:
    """A file as columns. `columns` names those of a file without a header; .inter headers lose their `:type`.

    Raises ValueError when the file is not there, is empty or cannot be read.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        if kind == "parquet":
            table = pyarrow.parquet.read_table(path)
        else:
            delimiter = delimiter or DELIMITERS[kind]
            source: Path | io.BytesIO = path
            if len(delimiter) > 1:  # MovieLens' `::`
                source, delimiter = io.BytesIO(path.read_bytes().replace(delimiter.encode(), b"\x1f")), "\x1f"
            table = pyarrow.csv.read_csv(
                source,
                pyarrow.csv.ReadOptions(column_names=list(columns) or None),
                pyarrow.csv.ParseOptions(delimiter=delimiter, quote_char=False if kind == "inter" else '"'),
                pyarrow.csv.ConvertOptions(strings_can_be_null=True, null_values=["", "NaN", "nan", "NULL", "null"]),
            )
    except (pa.ArrowInvalid, pa.ArrowKeyError, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as {kind}: {str(error).splitlines()[0]}") from error
    if table.num_rows == 0:
        raise ValueError(f"{path}: the file is empty, it has no rows")
    return table.rename_columns([name.split(":")[0].strip() for name in table.column_names])


def column_called(table: pa.Table, role: str, name: str, path: Path, needed: bool = True) -> str:
    """The column that plays a role: `name`, or where that is empty the first of the usual names."""
    known = {column.lower(): column for column in reversed(table.column_names)}
    if name:
        if name in table.column_names:
            return name
        near = difflib.get_close_matches(name, table.column_names, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{path}: no column {name!r} for {role} among {', '.join(table.column_names)}{hint}")
    found = [known[usual] for usual in NAMES[role] if usual in known]
    if not found and needed:
        columns = ", ".join(table.column_names)
        alone = " (one column only: is data.delimiter right?)" if len(table.column_names) == 1 else ""
        raise ValueError(f"{path}: which column is the {role}? Set data.{role} to one of {columns}{alone}")
    return found[0] if found else ""


def refuse(bad: np.ndarray, path: Path, column: str, what: str) -> None:
    """Raises ValueError with the first row (counted from 1, without the header) where `bad`."""
    if bad.any():
        raise ValueError(f"{path}: column {column!r} has {what} in row {int(bad.argmax()) + 1:,}")


def ids(table: pa.Table, column: str, path: Path) -> np.ndarray:
    """A column of ids as integers or strings; no id may be missing, NaN or negative."""
    values = table[column]
    refuse(np.asarray(values.is_null()), path, column, "no value (NaN or empty)")
    if pa.types.is_floating(values.type):
        array = np.asarray(values)
        refuse(np.isnan(array), path, column, "NaN")
        refuse(array != np.floor(array), path, column, "an id that is no whole number")
        values = pc.cast(values, pa.int64())
    if pa.types.is_integer(values.type):
        array = np.asarray(values)
        refuse(array < 0, path, column, "a negative id")
        return array
    return np.asarray(pc.cast(values, pa.string())).astype(str)


def floats(table: pa.Table, column: str, path: Path) -> np.ndarray:
    """A column of finite numbers."""
    values = table[column]
    if not (pa.types.is_integer(values.type) or pa.types.is_floating(values.type)):
        raise ValueError(f"{path}: column {column!r} holds {values.type}, not numbers")
    array = np.asarray(pc.cast(values, pa.float64()).fill_null(float("nan")))
    refuse(~np.isfinite(array), path, column, "NaN, an infinity or no value")
    return array


def times(table: pa.Table, column: str, path: Path) -> np.ndarray:
    """A column of times as whole numbers that keep its order: numbers as they are, dates in microseconds."""
    values = table[column]
    if pa.types.is_temporal(values.type):
        refuse(np.asarray(values.is_null()), path, column, "no value")
        return np.asarray(pc.cast(pc.cast(values, pa.timestamp("us"), safe=False), pa.int64()))
    if pa.types.is_integer(values.type):
        refuse(np.asarray(values.is_null()), path, column, "no value")
        return np.asarray(pc.cast(values, pa.int64()))
    array = floats(table, column, path)
    return (array if (array == np.floor(array)).all() else array * 1e6).astype(np.int64)


def titles_of(path: str, items: np.ndarray) -> np.ndarray | None:
    """Titles [items] from a file with an item and a title column; an item without one keeps its id."""
    place = Path(path)
    kind = place.suffix.lstrip(".")
    table = read_table(place, kind if kind in (*DELIMITERS, "parquet") else "csv")
    item = column_called(table, "item", "", place)
    title = np.asarray(pc.cast(table[column_called(table, "title", "", place)], pa.string()).fill_null(""))
    if "release_year" in table.column_names:
        year = np.asarray(pc.cast(table["release_year"], pa.string()).fill_null(""))
        title = np.array([f"{t} ({y})" if y else t for t, y in zip(title, year, strict=True)])
    by_id = dict(zip(ids(table, item, place).astype(str).tolist(), title.tolist(), strict=True))
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
    keep: str = "",
) -> Dataset:
    """Reads interactions in the order of the file.

    user, item, rating, time: columns; empty: the first with a usual name. Rating and time may be missing: then a row
    counts 1, and time is the row's number. titles: a file with item ids and titles. keep: a column to keep for clients.
    Raises ValueError for a missing column, a NaN, a negative id or an empty file.
    """
    if not path:
        raise ValueError(f"data.path is empty: name the {kind} file to read")
    place = Path(path).expanduser()
    table = read_table(place, kind, delimiter, columns)
    wanted = {"user": user, "item": item, "rating": rating, "time": time}
    found = {role: column_called(table, role, name, place, role in ("user", "item")) for role, name in wanted.items()}
    user_number, users = numbered(ids(table, found["user"], place))
    item_number, items = numbered(ids(table, found["item"], place))
    rows = table.num_rows
    notes: tuple[str, ...] = ()
    ratings = floats(table, found["rating"], place) if found["rating"] else np.ones(rows)
    if found["time"]:
        clock = times(table, found["time"], place)
    else:
        clock, notes = np.arange(rows), (f"{place.name} has no time column: the order of its rows is taken for time",)
    extra = {keep: np.asarray(pc.cast(table[keep], pa.string()).fill_null(""))} if keep in table.column_names else {}
    beside = place.with_suffix(".item")
    titles = titles or (str(beside) if kind == "inter" and beside.is_file() else "")
    return Dataset(
        Interactions(user_number, item_number, ratings.astype(np.float32), clock.astype(np.int64)),
        users,
        items,
        titles_of(titles, items) if titles else None,
        extra,
        notes,
    )
