"""A data set as a file."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from jaxfed.core.excerpt import shorten
from jaxfed.data.interactions import Dataset, whole_numbers
from jaxfed.data.sources.tables import file_kind


def write_rows(data: Dataset, path: str) -> None:
    """Writes the rows of a data set in their order: its users, items, ratings and times, as far as it has any.

    Raises ValueError for a file that is there already, and for one that ends neither in .csv nor in .parquet.
    """
    place = Path(path).expanduser()
    if file_kind(path) not in ("csv", "parquet") or path.lower().endswith(".gz"):
        raise ValueError(f"{shorten(path)}: rows are written to a file that ends in .csv or .parquet")
    if place.exists():
        raise ValueError(f"{shorten(path)} is there already: pass another name")
    if not place.parent.is_dir():
        raise ValueError(f"{shorten(path)}: the folder {shorten(place.parent)} does not exist: create it first")
    user, item, rating, time = data.interactions
    columns = {"user": make_id_column(data.users, user), "item": make_id_column(data.items, item)}
    if (rating != 1).any():
        columns["rating"] = pa.array(rating)
    if data.has_times:
        columns["time"] = pa.array(time)
    table = pa.table(columns)
    if file_kind(path) == "parquet":
        pyarrow.parquet.write_table(table, place)
    else:
        pyarrow.csv.write_csv(table, place)


def make_id_column(ids: np.ndarray, number: np.ndarray) -> pa.Array:
    """The ids [n] of rows, as numbers where all of them are."""
    whole = whole_numbers(ids)
    return pa.array(ids if whole is None else whole).take(pa.array(number))
