"""What other tables say of the users and items of some interactions: titles, and features of any kind."""

import re

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jaxfed.core.excerpt import excerpt, shorten, shorten_list
from jaxfed.data.features import PARTS, Features, encode_features
from jaxfed.data.sources.columns import (
    LONGEST,
    is_number_type,
    is_text_type,
    parse_numbers,
    read_floats,
    read_ids,
    read_words,
    refuse_row,
    trimmed,
)
from jaxfed.data.sources.roles import find_column, single_column_hint
from jaxfed.data.sources.tables import Source

TITLE = 200  # characters of a title that are kept
CELL = 10_000  # characters of a cell of words
WIDEST = 4_096  # numbers of a cell
TOKENS = {"token": "", "token_seq": r"\s+"}  # what parts the words of a cell by RecBole's types


def id_column(source: Source, side: str, name: str) -> str:
    """The column of ids: what the interactions call it, or a usual name. Raises ValueError where there is none."""
    column = name if name in source.columns else find_column(source, side, "")
    if not column:
        hint = f"rename the column of {side} ids to {side}_id, or to its name in the interactions"
        raise ValueError(
            f"{source.name}: no column of {side} ids among {shorten_list(source.columns)}: "
            f"{hint}{single_column_hint(source)}"
        )
    return column


def match_rows(source: Source, column: str, ids: np.ndarray, side: str) -> np.ndarray:
    """int64 [n]: the row of each of the `ids` [n], -1 where there is none.

    Raises ValueError where an id comes twice, or none of them is known.
    """
    found = read_ids(source, column)
    first = np.unique(found.number, return_index=True)[1]
    again = np.ones(len(found.number), bool)
    again[first] = False
    refuse_row(again, source, column, "{}, an id that came before,")
    row = dict(zip(found.names.tolist(), first.tolist(), strict=True))
    rows = np.array([row.get(each, -1) for each in ids.tolist()], np.int64)
    if (rows < 0).all():
        found_ids, known_ids = shorten_list(found.names[:3].tolist(), 3), shorten_list(ids[:3].tolist(), 3)
        one = "an item" if side == "item" else "a user"
        raise ValueError(
            f"{source.name}: no id in column {excerpt(column)} matches {one} of the interactions (here: {found_ids}; "
            f"in the interactions: {known_ids}): check that both write ids the same way"
        )
    return rows


def read_features(source: Source, ids: np.ndarray, side: str, name: str = "") -> Features | None:
    """What a table says of users or items.

    Args:
        source: a table with a column of ids and any others. Words are sets, numbers are cut to buckets, but for what
            RecBole's types say: a `token` is one word whatever is in it, a `float_seq` is a column for each place. A
            title is no feature of an item, it names it.
        ids: of the users or items [n].
        side: `user` or `item`.
        name: what the interactions call the column of ids.

    Returns:
        The features of each of the n; None where there is no other column.

    Raises:
        ValueError: there is no column of ids, an id comes twice, or a column holds neither words nor numbers.
    """
    column = id_column(source, side, name)
    rows = match_rows(source, column, ids, side)
    title = find_column(source, "title", "") if side == "item" else ""
    columns: dict[str, np.ndarray] = {}
    parts: dict[str, str] = {}
    for each in source.columns:
        if each not in (column, title):
            found, parted = feature_columns(source, each)
            missing = {name: np.nan if values.dtype.kind == "f" else "" for name, values in found.items()}
            columns |= {name: np.where(rows < 0, missing[name], values[rows]) for name, values in found.items()}
            parts |= dict.fromkeys(found, parted)
    return encode_features(columns, parts)


def feature_columns(source: Source, column: str) -> tuple[dict[str, np.ndarray], str]:
    """({name: floats or words [rows]} of one column, what parts the words of a cell)."""
    kind, values = source.types.get(column, ""), trimmed(source, column)
    if kind == "float_seq":
        return sequence_columns(source, column), ""
    if kind == "float" or (not kind and is_number_type(values.type) and not pa.types.is_boolean(values.type)):
        return {column: read_floats(source, column, gaps=True)}, ""
    if not kind and is_text_type(values.type) and parse_numbers(values, source.decimal, pa.float64()) is not None:
        return {column: read_floats(source, column, gaps=True)}, ""
    parts = TOKENS.get(kind, PARTS)
    cells = read_words(source, column, "features: neither words nor numbers").fill_null("")
    most = CELL if parts else LONGEST
    length = np.asarray(pc.utf8_length(cells))
    refuse_row(length > most, source, column, f"over {most:,} characters")
    if parts and (length > LONGEST).any():
        long = np.flatnonzero(length > LONGEST)
        bad = np.zeros(len(length), bool)
        bad[long] = [max(map(len, re.split(parts, cells[int(row)].as_py()))) > LONGEST for row in long]
        refuse_row(bad, source, column, f"a word of over {LONGEST:,} characters")
    return {column: np.asarray(cells)}, parts


def sequence_columns(source: Source, column: str) -> dict[str, np.ndarray]:
    """A `float_seq`: {name: floats [rows]}, a column for each place in it, NaN past the end of a shorter one."""
    lists = pc.utf8_split_whitespace(read_words(source, column, "numbers").fill_null("")).combine_chunks()
    filled = pc.list_flatten(lists)
    row = np.asarray(pc.list_parent_indices(lists))
    some = np.asarray(pc.not_equal(filled, ""))  # an empty cell is one empty word
    row, filled = row[some], filled.filter(pa.array(some))
    numbers = parse_numbers(filled, source.decimal, pa.float64())
    if numbers is None:
        each = (parse_numbers(filled[i : i + 1], source.decimal, pa.float64()) is None for i in range(len(filled)))
        bad = np.zeros(len(lists), bool)
        bad[row[next(i for i, wrong in enumerate(each) if wrong)]] = True
        refuse_row(bad, source, column, "{}, which are no numbers with blanks between,")
    count = np.bincount(row, minlength=len(lists))
    refuse_row(count > WIDEST, source, column, f"over {WIDEST:,} numbers")
    place = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
    table = np.full((max(int(count.max()), 1), len(lists)), np.nan)
    table[place, row] = np.asarray(numbers)
    return {f"{column}.{i}": values for i, values in enumerate(table)}


def read_titles(source: Source, items: np.ndarray, required: bool = True, name: str = "") -> np.ndarray | None:
    """What a table calls the items.

    Args:
        source: a table with a column of item ids and one of titles; a `release_year`, if there is one, is added.
        items: the ids [n].
        required: whether titles were asked for; if not, a table without any is no error.
        name: what the interactions call the column of items.

    Returns:
        A title for each of the n items, its id where the table has none; None without titles.

    Raises:
        ValueError: a column is missing, or no id is one of an item.
    """
    found = {"item": name if name in source.columns else find_column(source, "item", "")}
    found["title"] = find_column(source, "title", "")
    if not required and not found["title"]:
        return None
    if missing := [role for role in found if not found[role]]:
        raise ValueError(
            f"{source.name}: no column for {' and '.join(missing)} among {shorten_list(source.columns)}: "
            f"call them item_id and title{single_column_hint(source)}"
        )
    rows = match_rows(source, found["item"], items, "item")
    title = read_words(source, found["title"], "titles").fill_null("").to_pylist()
    year = (
        read_words(source, "release_year", "years").fill_null("").to_pylist()
        if "release_year" in source.columns
        else []
    )
    names = []
    for item, row in zip(items.tolist(), rows.tolist(), strict=True):
        text = title[row] if row >= 0 else ""
        text += f" ({year[row]})" if text and year and year[row] else ""
        names.append(shorten(text, TITLE) or item)
    return np.array(names)
