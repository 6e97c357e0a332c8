"""A table's columns as ids, numbers and times. Each names the first value that cannot be, with its row (counted from 1,
without the header)."""

import contextlib
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jaxfed.core.excerpt import excerpt, shorten
from jaxfed.data.interactions import whole_numbers
from jaxfed.data.sources.dates import arrow_ticks, join_day_and_time, parse_dates, parse_dates_of_form
from jaxfed.data.sources.tables import Source
from jaxfed.data.stages import log_stage

MISSING = pa.array(["", "NaN", "nan", "NULL", "null"], pa.large_string())  # what stands for no value
NO_ID = ("null", "nan", "na", "n/a", "none")  # ids that stand for no value, in small or capital letters
NUMBER = r"^[+-]?(\d+{point}?\d*|{point}\d+)([eE][+-]?\d+)?$"
HEX = ("0x", "0X")
LONGEST = 1_000  # characters of an id: arrays of words have the longest one's room for each
EXACT = 1 << 53  # up to which floats hold every whole number


class IdColumn(NamedTuple):
    """A column of ids."""

    number: np.ndarray  # int32 [n]: of each row, its place among `names`
    names: np.ndarray  # str [k]: the ids, sorted: whole numbers as numbers

    @property
    def words(self) -> np.ndarray:
        """str [n]: the id of each row."""
        return self.names[self.number]


def refuse_row(
    bad: np.ndarray, source: Source, column: str, what: str, hint: str = "", values: pa.ChunkedArray | None = None
) -> None:
    """Raises ValueError with the first row where `bad` [n]. A {} in `what` stands for the value there, of `values` or
    of the column."""
    if bad.any():
        row = int(bad.argmax())
        value = (source.table[column] if values is None else values)[row].as_py() if "{}" in what else ""
        what = what.replace("{}", excerpt(value))
        raise ValueError(f"{source.name}: column {excerpt(column)} has {what} in row {row + 1:,}{hint}")


def is_text_type(kind: pa.DataType) -> bool:
    """Whether a type of Arrow is that of words."""
    types = pa.types
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind) or types.is_binary(kind)


def is_number_type(kind: pa.DataType) -> bool:
    """Whether a type of Arrow is one of numbers."""
    types = pa.types
    return types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind) or types.is_boolean(kind)


def trimmed(source: Source, column: str) -> pa.ChunkedArray:
    """A column with its words trimmed of blanks; null where there is no value. Categories are what they stand for."""
    values = source.table[column]
    if pa.types.is_dictionary(values.type):
        values = pc.cast(values, values.type.value_type)
    if not is_text_type(values.type):
        return values
    try:
        values = pc.utf8_trim_whitespace(pc.cast(values, pa.large_string()))
    except pa.ArrowException:
        raise ValueError(f"{source.name}: column {excerpt(column)} holds {values.type} that is no text") from None
    missing = pc.is_in(values, MISSING)
    return pc.if_else(missing, pa.scalar(None, pa.large_string()), values) if pc.any(missing).as_py() else values


def numbers_of_text(source: Source, column: str, kind: pa.DataType) -> pa.ChunkedArray | None:
    """A column of words as numbers of a type; None where one is none, is missing or has blanks around it, or there are
    no words: what most columns are, is read once."""
    values = source.table[column]
    plain = (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)) and not values.null_count
    return parse_numbers(values, source.decimal, kind) if plain else None


def read_words(source: Source, column: str, role: str) -> pa.ChunkedArray:
    """A column as words, whole numbers of any type without a point. Raises ValueError for what has no words."""
    values = trimmed(source, column)
    if pa.types.is_floating(values.type):
        array = np.asarray(values)
        values = pa.chunked_array([pa.array(array, from_pandas=True)])  # in which what is no number is missing
        number = array[~np.isnan(array)]
        if (number == np.floor(number)).all() and (np.abs(number) < EXACT).all():
            values = pc.cast(values, pa.int64())
    try:
        return pc.cast(values, pa.large_string())
    except pa.ArrowException:
        problem = f"{source.name}: column {excerpt(column)} holds {shorten(str(values.type))}"
        raise ValueError(f"{problem}, which cannot be {role}") from None


def distinct_words(source: Source, column: str) -> tuple[np.ndarray, pa.ChunkedArray]:
    """(int [n]: of each row, its place among the words; [k]: the words of a column of ids, null for no value).

    What is the same in the column is looked at once. Words may come twice, as `7` and `7.0` of numbers with a point do.
    """
    values = source.table[column]
    if pa.types.is_dictionary(values.type):
        values = pc.cast(values, values.type.value_type)
    try:
        coded = pc.dictionary_encode(values, null_encoding="encode").unify_dictionaries()
    except pa.ArrowException:  # types that it does not take, which may have words
        coded = pc.dictionary_encode(read_words(source, column, "ids"), null_encoding="encode").unify_dictionaries()
    number = np.concatenate([np.asarray(chunk.indices) for chunk in coded.chunks])
    distinct = source._replace(table=pa.table({column: coded.chunk(0).dictionary}))
    return number, read_words(distinct, column, "ids")


def read_ids(source: Source, column: str) -> IdColumn:
    """A column of ids: words as they are written, which sort as numbers where all of them are whole numbers that 64
    bits hold, written as numbers are: 007, 7 and 7.0 are three.

    Raises ValueError where one is missing or one of `NO_ID`, is -1 among numbers, or longer than `LONGEST`.
    """
    with log_stage(f"numbering the ids of column {shorten(column)}"):
        number, words = distinct_words(source, column)

    def refuse(bad, what, hint=""):
        if bad.any():
            row = int(bad[number].argmax())
            what = what.replace("{}", excerpt(words[number[row]].as_py()))
            raise ValueError(f"{source.name}: column {excerpt(column)} has {what} in row {row + 1:,}{hint}")

    refuse(np.asarray(words.is_null()), "no value (NaN or empty)")
    absent = np.asarray(pc.is_in(pc.utf8_lower(words), pa.array(NO_ID, pa.large_string())))
    refuse(absent, "{}, which stands for no value,", ": remove these rows or give them real ids")
    refuse(np.asarray(pc.utf8_length(words)) > LONGEST, f"an id of over {LONGEST:,} characters")
    refuse(np.asarray(pc.match_substring(words, "\0")), "an id with a NUL character", ": remove it")
    names = np.array(words.to_pylist())
    whole = whole_numbers(names)
    if whole is not None:
        hint = ", which usually means a missing value: remove these rows or give them real ids"
        refuse(whole == -1, "the id -1", hint)
    kept, place = np.unique(names if whole is None else whole, return_inverse=True)
    return IdColumn(place.astype(np.int32)[number], kept.astype(names.dtype))


def parse_numbers(values: pa.ChunkedArray, decimal: str, kind: pa.DataType) -> pa.ChunkedArray | None:
    """Words as numbers of a type; None where one is none."""
    if decimal != ".":
        if pc.any(pc.match_substring(values, ".")).as_py():
            return None
        values = pc.replace_substring(values, decimal, ".")
    if pa.types.is_integer(kind) and any(pc.any(pc.starts_with(values, hexadecimal)).as_py() for hexadecimal in HEX):
        return None  # numbers to Arrow, words to us
    with contextlib.suppress(pa.ArrowException):
        return pc.cast(values, kind)
    return None


def find_non_numbers(values: pa.ChunkedArray, decimal: str) -> np.ndarray:
    """bool [n]: the words that are no numbers; a missing one is none of them."""
    written = pc.match_substring_regex(values, NUMBER.replace("{point}", f"[{decimal}]"))
    return ~np.asarray(written.fill_null(True))


def read_floats(source: Source, column: str, gaps: bool = False, hint: str = "") -> np.ndarray:
    """A column of finite numbers as float64 [n]; gaps: some may be missing, and are NaN.

    Raises ValueError for a value that is none, followed by the hint what to do.
    """
    found = numbers_of_text(source, column, pa.float64())
    values = trimmed(source, column) if found is None else found
    if is_text_type(values.type):
        found = parse_numbers(values, source.decimal, pa.float64())
        if found is None:
            bad = find_non_numbers(values, source.decimal)
            comma = source.options and source.decimal == "." and "," in values[int(bad.argmax())].as_py()
            comma_hint = "; if that is a decimal comma, pass --data.decimal ," if comma else hint
            refuse_row(bad, source, column, "{}, which is no number,", comma_hint)
        values = found
    if values is None or not is_number_type(values.type):
        content = "words" if values is None else shorten(str(values.type))
        raise ValueError(f"{source.name}: column {excerpt(column)} holds {content}, not numbers{hint}")
    values = pc.cast(values, pa.uint8()) if pa.types.is_boolean(values.type) else values
    array = np.asarray(pc.cast(values, pa.float64(), safe=False).fill_null(np.nan))
    refuse_row(np.isinf(array) if gaps else ~np.isfinite(array), source, column, "NaN, an infinity or no value", hint)
    return array


def read_times(source: Source, column: str, of_day: str = "", hint: str = "", form: str = "") -> np.ndarray:
    """A column of times as int64 [n] in their order: whole numbers as they are, dates as microseconds (nanoseconds
    where there are any), fractions as ranks.

    of_day: a second column, with the times of day, where the first has dates alone. form: how dates are written, in
    words of strptime; "": as ISO. Raises ValueError for a value that is none, followed by the hint what to do.
    """
    whole = None if of_day or form else numbers_of_text(source, column, pa.int64())
    if whole is not None:
        return np.asarray(whole)
    values = trimmed(source, column)
    day = time = values
    if of_day:
        day, time = read_words(source, column, "dates"), read_words(source, of_day, "times of day")
        refuse_row(np.asarray(time.is_null()), source, of_day, "no value", hint)
        values = join_day_and_time(day, time, " " if form else "T")
    refuse_row(np.asarray(values.is_null()), source, column, "no value", hint)
    if form:
        found, bad = parse_dates_of_form(pc.cast(values, pa.large_string()), form)
        refuse_row(bad, source, column, f"{{}}, which is no time of the form {form},", "", values)
        return found
    if is_text_type(values.type):
        kinds = pa.int64(), pa.decimal128(38, 9), pa.float64()
        numbers = (parse_numbers(values, source.decimal, kind) for kind in kinds)
        values = next((each for each in numbers if each is not None), values)
    if not is_text_type(values.type):
        return integer_times(values, source, column, hint)
    if of_day:
        refuse_row(parse_dates(day)[1], source, column, "{}, which is no date (YYYY-MM-DD),", hint, day)
        bad = parse_dates(values)[1]
        refuse_row(bad, source, of_day, "{}, which is no time of day (HH:MM[:SS]),", hint, time)
    return date_times(values, source, column, hint)


def date_times(values: pa.ChunkedArray, source: Source, column: str, hint: str) -> np.ndarray:
    """Times that are words, ISO dates, as int64 [n]."""
    found, bad, zoned = parse_dates(values)
    odd = find_non_numbers(values, source.decimal) if bad.any() else bad
    if bad.any() and not (bad & odd).any():
        first, other = ("a number", "a date") if bad[0] else ("a date", "a number")
        form_hint = f", but row 1 has {first}, {excerpt(values[0].as_py())}: write all times in one form"
        refuse_row(bad != bad[0], source, column, f"{{}}, {other},", form_hint, values)
    bad = bad & odd  # neither a date nor a number
    refuse_row(bad, source, column, "{}, which is no time (a number, or YYYY-MM-DD[ HH:MM:SS[.SSS][Z]]),", hint, values)
    refuse_mixed_zones(zoned, source, column, values)
    return found


def refuse_mixed_zones(zoned: np.ndarray, source: Source, column: str, values: pa.ChunkedArray) -> None:
    """Raises ValueError where some times have a time zone, bool [n], and others none."""
    zone, first = ("without", "one") if zoned[0] else ("with", "none")
    hint = f", but row 1 has {first}: write all times with a zone, or all without"
    refuse_row(zoned != zoned[0], source, column, f"{{}}, a time {zone} a time zone,", hint, values)


def integer_times(values: pa.ChunkedArray, source: Source, column: str, hint: str) -> np.ndarray:
    """Times that are no words as int64 [n]."""
    kind = values.type
    try:
        if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
            return arrow_ticks(values)
        if pa.types.is_temporal(kind):
            narrow = kind in (pa.time32("s"), pa.time32("ms"))
            return np.asarray(pc.cast(pc.cast(values, pa.int32()) if narrow else values, pa.int64()))
        if pa.types.is_integer(kind):
            return np.asarray(pc.cast(values, pa.int64()))
    except pa.ArrowException:
        raise ValueError(f"{source.name}: column {excerpt(column)} holds {kind} beyond 64 bits{hint}") from None
    if not (pa.types.is_floating(kind) or pa.types.is_decimal(kind)):
        raise ValueError(
            f"{source.name}: column {excerpt(column)} holds {shorten(str(kind))}, which cannot be times{hint}"
        )
    array = np.asarray(pc.cast(values, pa.float64(), safe=False))
    refuse_row(~np.isfinite(array), source, column, "NaN, an infinity or no value", hint)
    if (array == np.floor(array)).all() and np.abs(array).max() < 2**62:
        with contextlib.suppress(pa.ArrowException):
            return np.asarray(pc.cast(values, pa.int64()))
    return np.asarray(pc.rank(values, tiebreaker="dense")).astype(np.int64) - 1
