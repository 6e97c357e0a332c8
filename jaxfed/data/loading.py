"""Data sets by name, and from arrays and data frames in memory."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jaxfed.core.excerpt import shorten
from jaxfed.core.recipe import named
from jaxfed.data.interactions import Dataset
from jaxfed.data.sources.files import from_arrow, read_interactions
from jaxfed.data.sources.movielens import ml_100k
from jaxfed.data.sources.shaped import shaped_data
from jaxfed.data.sources.synthetic import synthetic_data
from jaxfed.data.sources.tables import file_kind

NAMED: dict[str, Callable[..., Dataset]] = {
    "ml-100k": ml_100k,
    "synthetic": synthetic_data,
    "shape": shaped_data,
}


def load(name: str, **options: Any) -> Dataset:
    """A data set by name.

    Args:
        name: "ml-100k", which is fetched once; "synthetic", a function of a seed; or "shape", a function of a
            description and a seed.
        options: Arguments of the data set: `folder` of ml-100k; `users`, `items`, `mean_length`, `seed`, ... of
            synthetic; `description` and `seed` of shape.

    Returns:
        The data set.

    Raises:
        ValueError: there is no data set of that name, or an option is out of its range.

    Example:
        >>> import jaxfed as jf
        >>> data = jf.data.load("synthetic", users=50, items=40)
        >>> len(data.users)
        50
    """
    if name not in NAMED:
        raise ValueError(
            f"no data set {shorten(name)!r}: choose one of {', '.join(NAMED)}, or read a file with jaxfed.data.read"
        )
    return NAMED[name](**options)


def from_description(description: dict[str, Any] | str, seed: int = 0) -> Dataset:
    """Interactions of people that do not exist, of the shape that a description gives.

    Args:
        description: What `jaxfed.data.describe` gives; the path of a JSON file that holds it (`jaxfed data --json`
            prints it); or the name of a shape that comes with jaxfed: dense-films, very-sparse-shop, sparse-shop,
            check-ins or small.
        seed: Random seed of the data.

    Returns:
        The data set, a function of the description and the seed.

    Raises:
        ValueError: this is no description, or it cannot be: one line that names the key.

    Example:
        >>> import jaxfed as jf
        >>> shape = {"users": 90, "items": 40, "rows": 600, "lengths": [[0, 3], [0.5, 6], [1, 15]]}
        >>> len(jf.data.from_description(shape | {"popularity": [[4, 0.4], [40, 1]]}).interactions.user)
        600
    """
    return shaped_data(json.dumps(description) if isinstance(description, dict) else description, seed)


@named("data", "read")
def read(
    path: str,
    kind: str = "",
    user: str = "",
    item: str = "",
    rating: str = "",
    time: str = "",
    keep: str = "",
    **options: Any,
) -> Dataset:
    """A data set from a file, in the order of its rows.

    Args:
        path: The file of interactions: csv, tsv, parquet (or a folder of parts) or RecBole's .inter, gzipped or not.
        kind: csv, tsv, parquet or inter. Empty: as the file's ending says.
        user: The column of users. Empty: found by usual names (user_id, user, ...).
        item: The column of items. Empty: found by usual names (item_id, movie_id, ...).
        rating: The column of ratings. Empty: found by usual names. `none`: every row counts 1.
        time: The column of times, numbers or ISO dates. Empty: found by usual names. `none`: the order of the rows
            counts as time.
        keep: A column to keep, for clients that are its values.
        options: Further fields of `jaxfed.data.sources.files.FileOptions`: `delimiter`, `columns`, `titles`,
            `user_features`, `item_features`, `time_format`, `encoding`, ...; `test` and `valid`, files of held-out
            rows, or `part`, a column that says which rows are; `negatives`, a file of what these are ranked among;
            `domains`, more files, each a domain of its own that shares users with the others.

    Returns:
        The data set. Its notes say which columns were taken.

    Raises:
        ValueError: the file cannot be read, a column is missing, or a value is not valid: one line that names it.

    Example:
        >>> import jaxfed as jf, pathlib, tempfile
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "clicks.csv"
        >>> _ = file.write_text("user,item,time\\n1,a,1\\n1,b,2\\n1,c,3\\n")
        >>> len(jf.data.read(str(file)).items)
        3
    """
    kind = kind or file_kind(path) or ("parquet" if Path(path).expanduser().is_dir() else "")
    if not kind:
        raise ValueError(f'cannot tell the kind of {shorten(path)} from its ending: pass, for example, kind="csv"')
    return read_interactions(path=path, kind=kind, user=user, item=item, rating=rating, time=time, keep=keep, **options)


def from_arrays(users: Any, items: Any, ratings: Any = None, times: Any = None, parts: Any = None) -> Dataset:
    """A data set from arrays, a row for each interaction.

    Args:
        users: [n]: Ids of users, numbers or words.
        items: [n]: Ids of items.
        ratings: [n]: Ratings. None: every row counts 1.
        times: [n]: Seconds, or dates of NumPy or as words. None: the order of the rows counts as time.
        parts: [n]: The part of each row: train, valid or test. None: `partition` splits the rows.

    Returns:
        The data set.

    Raises:
        ValueError: the arrays differ in length, an id is missing, or a value is not valid: one line that names the row.

    Example:
        >>> import jaxfed as jf
        >>> data = jf.data.from_arrays([1, 1, 1, 2], ["a", "b", "c", "a"])
        >>> data.items.tolist()
        ['a', 'b', 'c']
    """
    columns = {"user": users, "item": items, "rating": ratings, "time": times, "part": parts}
    given = {name: np.asarray(values) for name, values in columns.items() if values is not None}
    if any(values.ndim != 1 for values in given.values()) or len({len(values) for values in given.values()}) > 1:
        shapes = ", ".join(f"{name} {values.shape}" for name, values in given.items())
        raise ValueError(f"from_arrays: arrays must be flat and of one length: {shapes}")
    roles = {name: name if name in given else "none" for name in ("rating", "time")}
    return from_arrow(given, **roles, part="part" if parts is not None else "")


def from_pandas(
    frame: Any, user: str = "", item: str = "", rating: str = "", time: str = "", **options: Any
) -> Dataset:
    """A data set from a DataFrame of pandas, a row for each interaction, in the order of its rows. Its index is not
    read.

    Args:
        frame: The DataFrame. Columns of the dtype object are taken for what they hold.
        user: The column of users. Empty: found by usual names (user_id, user, ...).
        item: The column of items. Empty: found by usual names.
        rating: The column of ratings. Empty: found by usual names. `none`: every row counts 1.
        time: The column of times. Empty: found by usual names. `none`: the order of the rows counts as time.
        options: Further arguments of `from_arrow`: `titles`, `user_features`, `item_features`, `keep`, `part`, `valid`,
            `test`, `negatives`, ...

    Returns:
        The data set that a file with the same content gives.

    Raises:
        ValueError: this is no DataFrame, a column is missing, or a value is NaN or not valid: one line that names it.

    Example:
        >>> import jaxfed as jf, pandas as pd
        >>> frame = pd.DataFrame({"user_id": [1, 1, 1], "item_id": [7, 8, 9], "when": [3, 1, 2]})
        >>> jf.data.from_pandas(frame, time="when").items.tolist()
        ['7', '8', '9']
    """
    if not hasattr(frame, "columns") or not hasattr(frame, "index"):
        raise ValueError(f"from_pandas: a DataFrame of pandas, not {type(frame).__name__}: see jaxfed.data.from_arrow")
    return from_arrow(frame, user=user, item=item, rating=rating, time=time, **options)
