"""Text files with a delimiter as tables of words. Quotes are read by the kind of file: csv has those of RFC 4180, files
with tabs and RecBole's have none."""

import codecs
import csv
import io
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv

from jaxfed.core.excerpt import excerpt, shorten

RECBOLE = ("inter", "item", "user")  # kinds whose headers say `name:type`
DELIMITERS = {"csv": ",", "tsv": "\t", **dict.fromkeys(RECBOLE, "\t")}
QUOTE = '"'
SPARE = (b"\x1f", b"\x1e", b"\x1d", b"\x1c", b"\x01")  # what stands for a delimiter of several bytes
BLOCK = 1 << 24  # bytes that are parsed at a time; no row can be longer
MOST_COLUMNS = 10_000
USUAL = ("::", ";", "\t", "|", ",")  # delimiters that a file may have instead of the one it is read with
DECIMAL_COMMA = re.compile(r"(?<![\d,])\d+,\d+(?![\d,])")
COMMAS = 10_000  # bytes in which a decimal comma is looked for
FIELDS = re.compile(r"CSV parse error: (?:Row #(\d+): )?Expected (\d+) columns, got (\d+)")  # as pyarrow says it


class FileFormat(NamedTuple):
    """How a file is written. Whatever is left empty follows from its kind, and the kind from its ending."""

    kind: str = ""
    delimiter: str = ""  # \t is a tab
    encoding: str = ""  # empty: utf-8
    columns: tuple[str, ...] = ()  # the names of the columns of a text file that has no header
    decimal: str = "."  # the decimal separator of numbers in a text file


def read_text(buffer: pa.Buffer, path: Path, form: FileFormat, options: str) -> pa.Table:
    """A table of words from the bytes of a text file; a word is empty where there is nothing.

    Args:
        buffer: what is in the file.
        path: its name, for messages.
        form: how it is written; its kind is known.
        options: how the options that say so begin, for messages; "": there are none.

    Raises:
        ValueError: what is there cannot be read so.
    """
    buffer = decode_to_utf8(buffer, path, form.encoding, options)
    if buffer[:3].to_pybytes() == codecs.BOM_UTF8:
        buffer = buffer[3:]
    if not buffer.size:
        raise ValueError(f"{path}: the file is empty, it has no rows")
    delimiter = form.delimiter.replace("\\t", "\t") or DELIMITERS[form.kind]
    if {*delimiter} & {*'"\r\n'}:
        raise ValueError(
            f"{options}delimiter is {excerpt(delimiter)}: a delimiter must not contain a quote or a line end"
        )
    check_delimiter(buffer[:BLOCK].to_pybytes(), path, delimiter, form, options)
    quoted = form.kind == "csv" and len(delimiter.encode()) == 1 and delimiter != "\t"
    if len(delimiter.encode()) > 1:  # MovieLens' `::`
        buffer, delimiter = replace_delimiter(buffer, delimiter.encode())
    data = np.frombuffer(buffer, np.uint8)
    check_header(data[:BLOCK], path, delimiter, quoted)
    try:
        if quoted and not well_quoted(data, delimiter):
            return parse_with_csv(buffer, path, form, delimiter, options)
        return parse_with_arrow(buffer, path, form, delimiter, quoted, options)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        check_utf8(buffer, path, options)
        if "straddling" in str(error):
            raise ValueError(f"{path}: a row is longer than {BLOCK >> 20} MB: is this a text file?") from None
        if "Empty CSV" in str(error):
            raise ValueError(f"{path}: the file is empty, it has no rows") from None
        raise


def check_delimiter(start: bytes, path: Path, delimiter: str, form: FileFormat, options: str) -> None:
    """Raises ValueError where the first line is one field, and another delimiter is in it."""
    first, _, rest = start.partition(b"\n")
    other = next((each for each in USUAL if each.encode() in first), "")
    if delimiter.encode() in first or not other:
        return
    written = "\\t" if other == "\t" else other
    hint = f"pass {options}delimiter '{written}'" if options else f"write {delimiter!r} between fields"
    comma = form.decimal == "." and DECIMAL_COMMA.search(rest[:COMMAS].decode("utf-8", "replace"))
    hint += " and --data.decimal ," if options and other != "," and comma else ""
    raise ValueError(f"{path}: no {delimiter!r} in its first line, but '{written}' is there: {hint}")


def decode_to_utf8(buffer: pa.Buffer, path: Path, encoding: str, options: str) -> pa.Buffer:
    """Text as UTF-8. Raises ValueError where it is not in the encoding."""
    if not encoding and buffer[:2].to_pybytes() in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raise ValueError(f"{path}: begins as UTF-16 does: {encoding_hint(options, 'utf-16')}")
    try:
        if codecs.lookup(encoding or "utf-8").name == "utf-8":
            return buffer
        return own_buffer(buffer.to_pybytes().decode(encoding).encode())
    except (LookupError, TypeError):
        raise ValueError(f"{options}encoding: no encoding {excerpt(encoding)}: take utf-8, latin-1, ...") from None
    except UnicodeError as error:
        raise ValueError(f"{path}: not {encoding}: {shorten(str(error))}") from None


def own_buffer(text: bytes) -> pa.Buffer:
    """Bytes that are Arrow's own, see `tables.read_content`."""
    buffer = pa.allocate_buffer(len(text))
    if text:
        np.frombuffer(buffer, np.uint8)[:] = np.frombuffer(text, np.uint8)
    return buffer


def check_utf8(buffer: pa.Buffer, path: Path, options: str) -> None:
    """Raises ValueError for the first byte that is not UTF-8, with its line."""
    text = buffer.to_pybytes()
    try:
        text.decode()
    except UnicodeDecodeError as error:
        line, byte = text.count(b"\n", 0, error.start) + 1, text[error.start]
        hint = encoding_hint(options, "latin-1")
        raise ValueError(f"{path}: byte 0x{byte:02x} in line {line:,} is not UTF-8: {hint}") from None


def encoding_hint(options: str, encoding: str) -> str:
    """What to do about a file in another encoding."""
    return f"pass {options}encoding {encoding}, or whatever it is in" if options else "save it as UTF-8"


def replace_delimiter(buffer: pa.Buffer, delimiter: bytes) -> tuple[pa.Buffer, str]:
    """(text with one byte in place of a delimiter of several, that byte)."""
    text = buffer.to_pybytes()
    spare = next((byte for byte in SPARE if byte not in text), SPARE[0])
    return own_buffer(text.replace(delimiter, spare)), spare.decode()


def check_width(columns: int, name: str | Path) -> None:
    """Raises ValueError for more columns than are read."""
    if columns > MOST_COLUMNS:
        raise ValueError(f"{name}: {columns:,} columns, at most {MOST_COLUMNS:,} are read: leave some out")


def check_header(start: np.ndarray, path: Path, delimiter: str, quoted: bool) -> None:
    """Raises ValueError where a text begins with a row of too many fields, before any of them is read."""
    line = start[: int((start == ord("\n")).argmax()) or len(start)]
    outside = np.cumsum(line == ord(QUOTE)) % 2 == 0 if quoted else True
    check_width(int(((line == ord(delimiter)) & outside).sum()) + 1, path)


def well_quoted(data: np.ndarray, delimiter: str) -> bool:
    """Whether every quoted field begins and ends where a field does, and quotes are nowhere else.

    Of all quotes every other one opens a field, or goes on with it where a quote is doubled. Given anything else a
    fast parser takes what is between two unrelated quotes, rows and all, for one field, and says nothing.
    """
    is_bound, num_quotes = np.zeros(256, bool), 0
    is_bound[np.frombuffer(f"{delimiter}\r\n{QUOTE}".encode(), np.uint8)] = True
    for low in range(0, len(data), BLOCK):
        at = low + np.flatnonzero(data[low : low + BLOCK] == ord(QUOTE))
        opens = (num_quotes + np.arange(len(at))) % 2 == 0
        beside = np.where(opens, at - 1, at + 1)
        beside = beside[(beside >= 0) & (beside < len(data))]
        if not is_bound[data[beside]].all():
            return False
        num_quotes += len(at)
    return num_quotes % 2 == 0


def parse_with_arrow(
    buffer: pa.Buffer, path: Path, form: FileFormat, delimiter: str, quoted: bool, options: str
) -> pa.Table:
    """Text whose quotes are as they should be, by pyarrow."""
    quotes = {"quote_char": QUOTE if quoted else False, "newlines_in_values": quoted}
    names = list(form.columns) or [f"f{i}" for i in range(MOST_COLUMNS)]  # as pyarrow calls them: the header is a row
    named: dict = {"column_names": names} if form.columns else {"autogenerate_column_names": True}
    words = pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()))

    def read(threads):
        reading = pyarrow.csv.ReadOptions(block_size=BLOCK, use_threads=threads, **named)
        parsing = pyarrow.csv.ParseOptions(delimiter=delimiter, **quotes)
        return pyarrow.csv.read_csv(pa.BufferReader(buffer), reading, parsing, words)

    try:
        table = read(threads=True)
    except pa.ArrowInvalid as error:
        if not FIELDS.search(str(error)):
            raise
        try:
            table = read(threads=False)  # which counts rows
        except pa.ArrowInvalid as counted:
            found = FIELDS.search(str(counted))
            row, expected, fields = (int(each or 0) for each in found.groups()) if found else (0, 0, 0)
            check_fields(row - (not form.columns), fields, expected, path, form, options)
            raise
    return table if form.columns else table[1:].rename_columns([column[0].as_py() for column in table.columns])


def parse_with_csv(buffer: pa.Buffer, path: Path, form: FileFormat, delimiter: str, options: str) -> pa.Table:
    """Text with quotes inside of fields that are not quoted, or blanks before a quote, by Python's csv.

    Raises ValueError for a quoted field that does not end at its second quote, with its row.
    """
    text = io.StringIO(buffer.to_pybytes().decode(), newline="")
    rows: list[list[str]] = []
    try:
        rows += (row for row in csv.reader(text, delimiter=delimiter, strict=True, skipinitialspace=True) if row)
    except csv.Error as error:
        number = len(rows) + bool(form.columns)
        raise ValueError(
            f'{path}: the quotes in row {number:,} are not those of csv ({error}): write "" for a quote in a quoted '
            "field, or read a file with tabs and without quotes as tsv"
        ) from None
    head = list(form.columns) or rows.pop(0)
    for number, row in enumerate(rows, 1):
        check_fields(number, len(row), len(head), path, form, options)
    columns = zip(*rows, strict=True) if rows else [()] * len(head)
    return pa.Table.from_arrays([pa.array(column, pa.string()) for column in columns], head)


def check_fields(row: int, fields: int, expected: int, path: Path, form: FileFormat, options: str) -> None:
    """Raises ValueError for a row with more or fewer fields than the header."""
    if fields != expected:
        raise ValueError(
            f"{path}: cannot be read as {form.kind}: row {row:,} has {fields:,} fields, the header has {expected:,}: "
            "check the delimiter and the quotes in that row"
            if not form.columns
            else f"{path}: row {row:,} has {fields:,} fields, {options}columns names {expected:,}: name all columns"
        )
