"""Interactions of one's own as a data set: from files (csv, tsv, parquet, RecBole's .inter) and from tables in memory,
in the order of their rows."""

import re
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np

from jaxfed.core.excerpt import excerpt, shorten_list
from jaxfed.core.recipe import named
from jaxfed.data.domains import DOMAIN, join_domains, list_domains
from jaxfed.data.features import SIDES
from jaxfed.data.given_parts import join_parts
from jaxfed.data.interactions import Dataset, Interactions
from jaxfed.data.sources.beside import read_features, read_titles
from jaxfed.data.sources.columns import is_text_type, read_floats, read_ids, read_times, refuse_row
from jaxfed.data.sources.file_options import ColumnChoice, FileOptions
from jaxfed.data.sources.negatives_file import read_negatives_file, read_negatives_table
from jaxfed.data.sources.parts import check_part_options, check_same_ratings, read_part_column, roles_of_part
from jaxfed.data.sources.roles import (
    NONE,
    OPTIONAL,
    describe_columns,
    find_column,
    find_columns,
    find_unread_times,
    option_name,
)
from jaxfed.data.sources.tables import Source, companions, read_source, table_source
from jaxfed.data.sources.text import FileFormat
from jaxfed.data.splits import PART, TEST, TRAIN, VALID

NO_COLUMN = ("user", "silo", "device")  # kinds of clients that need no column of their own
TIME_OF_DAY = re.compile(r"\s*\d{1,2}:\d{2}")
LARGEST = np.finfo(np.float32).max


def check_domain_options(file: FileOptions) -> None:
    """Raises ValueError for options that several files of interactions do not take."""
    if isinstance(file.domains, str):
        raise ValueError(f"data.domains is {excerpt(file.domains)}: give a list of files")
    for key in ("valid", "test", "negatives", "titles", "user_features", "item_features"):
        if getattr(file, key):
            raise ValueError(f"data.{key}: with data.domains it is not read, leave one of the two out")
    if file.keep not in ("", DOMAIN, *NO_COLUMN):
        raise ValueError(
            f"data.clients is {excerpt(file.keep)}: with data.domains choose one of {', '.join((*NO_COLUMN, DOMAIN))}"
        )


def read_companions(
    place: Path | None, named: dict[str, str], forms: dict[str, FileFormat], decimal: str
) -> tuple[dict[str, Source], dict[str, Source]]:
    """(files found beside the interactions at `place`, by side; files of titles and features, by role).

    named: files that a user gives, by role; they come before those that are found.
    """
    paths = companions(place) if place else {}
    found = {side: read_source(file, FileFormat(decimal=decimal)) for side, file in paths.items()}
    used = {"titles": found.get("item"), "user_features": found.get("user"), "item_features": found.get("item")}
    given = {
        role: read_source(Path(file).expanduser(), forms[role], f"--data.{role.replace('_', '-')}-")
        for role, file in named.items()
        if file
    }
    return found, {role: each for role, each in used.items() if each} | given


@wraps(FileOptions, assigned=(), updated=())  # whose fields are the arguments, for who asks for the signature
def read_interactions(*args: Any, **options: Any) -> Dataset:
    """Reads interactions in the order of the file.

    Args:
        args: Fields of `FileOptions` in their order: the path, then the kind.
        options: Fields of `FileOptions` by name.

    Returns:
        The data set. Its notes say which columns were taken.

    Raises:
        ValueError: a file cannot be read, a column is missing, or a value cannot be: one line that names it.
    """
    file = FileOptions(*args, **options)
    if not file.path:
        raise ValueError(f"data.path is empty: name the {file.kind} file to read")
    if file.decimal not in (".", ","):
        raise ValueError(f"data.decimal is {excerpt(file.decimal)}: a point or a comma")
    check_part_options(file.part, bool(file.valid), bool(file.test))
    if file.domains:
        check_domain_options(file)
        each = file._replace(domains=(), keep="")
        named = list_domains([file.path, *file.domains])
        return join_domains({name: read_interactions(*each._replace(path=path)) for name, path in named.items()})
    place = Path(file.path).expanduser()
    form = FileFormat(file.kind, file.delimiter, file.encoding, file.columns, file.decimal)
    paths = {TRAIN: file.path, VALID: file.valid, TEST: file.test}
    sources = {part: read_source(Path(path).expanduser(), form, "--data.") for part, path in paths.items() if path}
    forms = {role: file.format_beside(role) for role in file.beside}
    found, beside = read_companions(place if file.kind == "inter" else None, file.beside, forms, file.decimal)
    clock = file.time_of_day, file.time_format
    columns = ColumnChoice(file.columns_of_roles, clock, file.keep, file.part)
    data = make_dataset(sources, columns, beside, titles_required=bool(file.titles))
    if file.negatives:
        negatives = read_negatives_file(Path(file.negatives).expanduser(), form, file.user, file.item)
        data = data._replace(negatives=negatives)
    read = [Path(each.name).name for each in found.values() if any(each is one for one in beside.values())]
    note = f"{' and '.join(read)} beside {place.name} {'were' if len(read) > 1 else 'was'} found and read"
    return data._replace(notes=(*data.notes, note)) if read else data


@named("data", "table")
def from_arrow(
    interactions: Any,
    user: str = "",
    item: str = "",
    rating: str = "",
    time: str = "",
    titles: Any = None,
    user_features: Any = None,
    item_features: Any = None,
    keep: str = "",
    time_of_day: str = "",
    time_format: str = "",
    part: str = "",
    valid: Any = None,
    test: Any = None,
    negatives: Any = None,
) -> Dataset:
    """A data set from a table in memory, a row for each interaction, in the order of its rows.

    Tables are whatever has Arrow's `__arrow_c_stream__` (a DataFrame of pandas or polars, a relation of duckdb, a
    pyarrow.Table), or a dict of NumPy arrays.

    Args:
        interactions: A table, a row for each interaction.
        user: The column of users. Empty: found by usual names (user_id, user, ...).
        item: The column of items. Empty: found by usual names.
        rating: The column of ratings. Empty: found by usual names. `none`: every row counts 1.
        time: The column of times. Empty: found by usual names. `none`: the order of the rows counts as time.
        titles: A table with item ids and titles, or None.
        user_features: A table with user ids and any other columns, or None.
        item_features: A table with item ids and any other columns, or None.
        keep: A column to keep, for clients that are its values.
        time_of_day: The column with the time of day, if `time` holds only dates.
        time_format: How dates that are words are written, if not as ISO dates, in words of strptime.
        part: The column with the part of each row: train, valid or test. Empty: `partition` splits the rows.
        valid: A table of the validation rows, or None. `interactions` then has the train rows.
        test: A table of the test rows, or None. `interactions` then has the train rows.
        negatives: A table with a user and an item a row, that held-out items are ranked among, or None: they are drawn.

    Returns:
        The data set that a file with the same content gives.

    Raises:
        ValueError: a column is missing, or a value is not valid: one line that names it.

    Example:
        >>> import jaxfed as jf, pyarrow as pa
        >>> jf.data.from_arrow(pa.table({"user": [1, 1, 1], "item": [7, 8, 9]})).items.tolist()
        ['7', '8', '9']
    """
    tables = {"titles": titles, "user_features": user_features, "item_features": item_features}
    beside = {role: table_source(table, role) for role, table in tables.items() if table is not None}
    rows = {"interactions": interactions, "valid": valid, "test": test}
    check_part_options(part, valid is not None, test is not None)
    sources = {number: table_source(rows[key], key) for number, key in enumerate(rows) if rows[key] is not None}
    columns = ColumnChoice((user, item, rating, time), (time_of_day, time_format), keep, part)
    data = make_dataset(sources, columns, beside, titles_required=titles is not None)
    if negatives is not None:
        data = data._replace(negatives=read_negatives_table(table_source(negatives, "negatives"), user, item))
    return data


def read_ratings(source: Source, column: str) -> np.ndarray:
    """A column of ratings as float64 [n]. Raises ValueError for one that is no number, or too large for float32."""
    none = option_name(source, "rating", NONE)
    ratings = read_floats(source, column, hint=f"; name another column, or pass {none}")
    hint = f", which is too large for a 32-bit float: rescale the ratings, or pass {none}"
    refuse_row(np.abs(ratings) > LARGEST, source, column, "{}", hint)
    return ratings


def check_kept_column(source: Source, keep: str) -> None:
    """Raises ValueError where clients are to be the values of a column that is not there."""
    if keep and keep not in (*source.columns, *NO_COLUMN):
        raise ValueError(
            f"{source.name}: clients by {excerpt(keep)}: no such column; choose one of {', '.join(NO_COLUMN)}, or a "
            f"column: {shorten_list(source.columns)}"
        )


def find_roles(source: Source, roles: tuple[str, str, str, str], time_of_day: str) -> tuple[dict[str, str], str]:
    """(the column of each role, the column of the time of day or ""). Raises ValueError for one that is missing."""
    found = find_columns(source, dict(zip(("user", "item", *OPTIONAL), roles, strict=True)))
    day = find_column(source, "time of day", time_of_day) if time_of_day else ""
    if day and not found["time"]:
        raise ValueError(
            f"{source.name}: the column of dates is missing: pass {option_name(source, 'time')} beside {day!r}"
        )
    return found, day


def make_dataset(
    sources: dict[int, Source], columns: ColumnChoice, beside: dict[str, Source], titles_required: bool
) -> Dataset:
    """A data set from a table of interactions, or of a table for each part, and those `beside` it (`titles`,
    `user_features`, `item_features`).

    titles_required: whether titles were asked for. The rest as in `read_interactions`, which see.
    """
    read = {part: read_interaction_rows(source, columns, part != TRAIN) for part, source in sources.items()}
    data, found = read[TRAIN]
    if len(read) > 1:
        names = [source.name for source in sources.values()]
        check_same_ratings(names, [bool(roles["rating"]) for _, roles in read.values()])
        data = join_parts({part: rows for part, (rows, _) in read.items()})

    def known(side, names):
        table = beside.get(f"{side}_features")
        return read_features(table, names, side, found[side]) if table else None

    titles = beside.get("titles")
    return data._replace(
        titles=read_titles(titles, data.items, titles_required, found["item"]) if titles else None,
        user_features=known("user", data.users),
        item_features=known("item", data.items),
    )


def read_interaction_rows(source: Source, columns: ColumnChoice, held_out: bool) -> tuple[Dataset, dict[str, str]]:
    """(the interactions of a table, the column of each role). held_out: a table of validation or test rows alone."""
    roles, keep, (of_day, form) = columns.roles, columns.keep, columns.clock
    roles = roles_of_part(source, roles) if held_out else roles
    found, day = find_roles(source, roles, "" if held_out and roles[3] == NONE else of_day)
    users, items = (read_ids(source, found[side]) for side in SIDES)
    ratings, times = np.ones(len(users.number)), np.arange(len(users.number))
    if found["rating"]:
        ratings = read_ratings(source, found["rating"])
    if found["time"]:
        times = read_times(source, found["time"], day, time_hint(source, found["time"], day), form)
    check_kept_column(source, keep)
    notes = [describe_columns(found | ({"time of day": day} if day else {}))]
    if not found["time"] and roles[3] != NONE and (times_column := find_unread_times(source, {*found.values(), keep})):
        notes.append(
            f"the column {excerpt(times_column)} is not read, and looks like times: pass "
            f"{option_name(source, 'time', times_column)}"
        )
    if keep == "user" != found["user"] and keep in source.columns:
        notes.append(f"clients are users, as {found['user']} has them; the column called user is not read")
    kept = {keep: read_ids(source, keep).words} if keep in source.columns and keep != "user" else {}
    parts = {PART: read_part_column(source, columns.part)} if columns.part else {}
    return Dataset(
        Interactions(users.number, items.number, ratings.astype(np.float32), times.astype(np.int64, copy=False)),
        users.names,
        items.names,
        columns=kept | parts,
        notes=tuple(notes),
        ties_in_order=True,
        has_times=bool(found["time"]),
    ), found


def time_hint(source: Source, column: str, day: str) -> str:
    """What to do where a column of times holds something else.

    day: the column with the time of day, if there is one.
    """
    usual = {each.lower(): each for each in source.columns if each not in (column, day)}
    dates = next((usual[name] for name in ("date", "day", "datetime") if name in usual), "")
    first = source.table[column][0].as_py() if is_text_type(source.table[column].type) else ""
    if not day and dates and TIME_OF_DAY.match(str(first)):
        return f"; pass {option_name(source, 'time', dates)} and {option_name(source, 'time_of_day', column)}"
    return (
        f"; pass {option_name(source, 'time_format')} for dates such as 15.07.2017 13:57 (%d.%m.%Y %H:%M), name "
        f"another column, or pass {option_name(source, 'time', NONE)} (rows in their order, which changes the test "
        "items)"
    )
