"""Tables from files (csv, tsv, parquet and RecBole's kinds, gzipped or not) and from memory, with what is known of
them."""

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet

from jaxfed.core.excerpt import shorten, shorten_list
from jaxfed.data.sources.text import DELIMITERS, RECBOLE, FileFormat, check_width, read_text
from jaxfed.data.stages import log_stage

KINDS = (*DELIMITERS, "parquet")
TYPES = ("token", "token_seq", "float", "float_seq")  # what a RecBole header says of a column, behind a colon
PATHS = (
    "path",
    "titles",
    "user_features",
    "item_features",
    "folder",
    "valid",
    "test",
    "negatives",
    "description",
    "domains",
)  # keys of a [data] section that name files
BY_ENDING = FileFormat()
GZIP = b"\x1f\x8b"


class Source(NamedTuple):
    """A table, and what messages about it say."""

    table: pa.Table
    name: str  # of the file
    types: dict[str, str] = {}  # RecBole's type of each column that has one
    decimal: str = "."  # the decimal separator of numbers that are words
    options: str = ""  # how the options that say what is in it begin, as `--data.titles-`; "": there are none
    text: bool = True  # a file with a delimiter, whose header may be missing

    @property
    def columns(self) -> list[str]:
        """The names of the columns."""
        return self.table.column_names


def file_kind(path: str | Path) -> str:
    """The kind of a file by its ending, in small or capital letters and with or without .gz; "": the ending says none.

    A folder of files that end in .parquet is parquet.
    """
    place = Path(path).expanduser()
    kind = place.name.lower().removesuffix(".gz").rpartition(".")[2]
    if kind in KINDS and "." in place.name:
        return kind
    return "parquet" if any(place.glob("*.parquet")) else ""


def companions(path: Path) -> dict[str, Path]:
    """RecBole's .user and .item beside an .inter file: {kind: file}, of those that there are."""
    if file_kind(path) != "inter" or not path.parent.is_dir():
        return {}
    stem = path.name[: path.name.lower().rindex(".inter")]
    beside = {each.name: each for each in sorted(path.parent.iterdir()) if each.name.startswith(f"{stem}.")}
    ends = {name[len(stem) :].lower().removesuffix(".gz"): name for name in reversed(beside) if beside[name].is_file()}
    return {kind: beside[ends[f".{kind}"]] for kind in ("user", "item") if f".{kind}" in ends}


def read_source(path: Path, form: FileFormat = BY_ENDING, options: str = "") -> Source:
    """A file as a table whose header has no blanks around its names. Columns of text files are words.

    Args:
        path: a file, or a folder of parquet parts, which are read in the order of their names.
        form: how it is written.
        options: how the options begin that say so, see `Source`.

    Raises:
        ValueError: the file is not there, is empty or cannot be read; one line that says why.
    """
    if not (path.is_file() or path.is_dir()):
        raise ValueError(f"{path}: no such file")
    kind = form.kind or file_kind(path) or "csv"
    in_parts = path.is_dir() and any(path.glob("*.parquet"))
    if in_parts and kind != "parquet":
        raise ValueError(f"{path}: a folder; only parquet files may come in parts")
    if path.is_dir() and not in_parts:
        contents = shorten_list(sorted(each.name for each in path.iterdir()), 5) or "nothing"
        raise ValueError(f"{path}: a folder must hold parquet parts (*.parquet); it has {contents}: name one file")
    try:
        with log_stage(f"reading {path.name}"):
            if kind == "parquet":
                table = pyarrow.parquet.read_table(path if path.is_dir() else pa.BufferReader(read_content(path)))
            else:
                table = read_text(read_content(path), path, form._replace(kind=kind), options)
    except (pa.ArrowException, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}: cannot be read as {kind}: {shorten(reason)}") from error
    names, types = [name.strip() for name in table.column_names], {}
    if kind in RECBOLE and not form.columns:
        parts = [name.rpartition(":") for name in names]
        names = [part[0].strip() if part[2] in TYPES else "".join(part) for part in parts]
        types = {name: part[2] for name, part in zip(names, parts, strict=True) if part[2] in TYPES}
    return check_columns(Source(table, str(path), types, form.decimal, options, kind != "parquet"), names)


def table_source(data: Any, name: str) -> Source:
    """A table in memory: whatever has Arrow's `__arrow_c_stream__` (a DataFrame of pandas or polars, a relation of
    duckdb, a pyarrow.Table), or a dict of columns, such as NumPy arrays.

    Raises ValueError for what is none, or has no rows.
    """
    if not (isinstance(data, dict) or hasattr(data, "__arrow_c_stream__") or hasattr(data, "__arrow_c_array__")):
        raise ValueError(f"{name}: {type(data).__name__} is no table: it has no __arrow_c_stream__ and is no dict")
    try:
        table = pa.table({str(key): column for key, column in data.items()} if isinstance(data, dict) else data)
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise ValueError(f"{name}: cannot be read as a table: {shorten(str(error).splitlines()[0])}") from error
    return check_columns(Source(table, name, text=False), [column.strip() for column in table.column_names])


def check_columns(source: Source, names: list[str]) -> Source:
    """The same with these names of columns. Raises ValueError where it has no rows, or names cannot be."""
    if source.table.num_rows == 0:
        raise ValueError(f"{source.name}: the table has no rows")
    check_width(len(names), source.name)
    if repeated := sorted(name for name, count in Counter(names).items() if count > 1):
        raise ValueError(f"{source.name}: the columns {shorten_list(repeated)} occur more than once: rename them")
    return source._replace(table=source.table.rename_columns(names))


def read_content(path: Path) -> pa.Buffer:
    """The bytes of a file, unpacked if they are gzipped, whatever the file is called.

    They are Arrow's own: a thread of its that still holds Python's bytes when the interpreter ends aborts the program.
    """
    with open(path, "rb") as file:
        start = file.read(2)
    if start == GZIP:
        with pa.input_stream(str(path), compression="gzip") as packed:
            return packed.read_buffer()
    if not start:
        return pa.allocate_buffer(0)
    with pa.memory_map(str(path)) as mapped:
        return mapped.read_buffer()
