"""`jaxfed init`: a configuration to start from, which says what each of its keys does."""

import argparse
import dataclasses
import inspect
import shlex
import textwrap
import typing
from pathlib import Path
from typing import Any

import docstring_parser
import tomli_w

WIDTH = 110  # columns of the file
EMPTY = ("channel", "download")  # lists of links, which are no keys where they hold none
TOP = """A configuration of jaxfed. A line with a # before its key holds the default; take the # away to change it.
  jaxfed data {name}     what the data are like
  jaxfed train {name}    train, evaluate, and leave a run in {out}"""


def add_init_options(command: Any) -> None:
    """Adds the command; `command(name, help, ...)` makes a parser."""
    init = command(
        "init",
        "Write a configuration to start from, which says what each of its keys does.",
        "Without a name: the defaults, on MovieLens-100K. For a file: what jaxfed data FILE suggests, and options of "
        "the loader as for jaxfed data (--user COLUMN, --delimiter ';', ...).",
    )
    init.add_argument(
        "source",
        nargs="?",
        default="",
        metavar="NAME|FILE",
        help="a configuration that comes with jaxfed (e.g. ml100k_fedavg), or a file of your own data",
    )
    init.add_argument(
        "--model", default="", metavar="NAME", help="for a file: transitions, ease or mf; left out: what suits the data"
    )
    init.add_argument(
        "--out", metavar="CONFIG.toml", help="where it is written (NAME.toml; without a name config.toml)"
    )


def init_command(args: argparse.Namespace, overrides: list[str]) -> None:
    """jaxfed init"""
    from jaxfed.config.schema import make_config
    from jaxfed.training.run_dir import write_file

    place = Path(args.out or f"{Path(args.source).stem or 'config'}.toml")
    if place.exists():
        raise ValueError(f"{place} is there already: pass another --out")
    if not place.parent.is_dir():
        raise ValueError(f"--out {place}: the folder {place.parent} does not exist: create it first")
    table, reasons = starting_table(args.source, overrides, args.model)
    table["run"] = table.get("run", {}) | {"out": f"runs/{place.stem}"}
    text = starter_text(table, str(place), reasons)
    make_config(table)  # before anything is written
    write_file(place, text)
    print(f"{place} is written; now: jaxfed train {shlex.quote(str(place))}")


def starting_table(source: str, options: list[str], model: str = "") -> tuple[dict[str, Any], dict[str, str]]:
    """(the table of what to start from, why keys of it have their values); a file of data is read with options of the
    loader, which are in the table. model: of a file's configuration; "": what suits the data.

    Raises ValueError for a name that is nothing, and for a file that cannot be read.
    """
    from jaxfed.config.config_files import built_in_configs, read_config
    from jaxfed.data.sources.tables import file_kind

    place = Path(source).expanduser()
    if source and (file_kind(source) or (place.exists() and not source.lower().endswith(".toml"))):
        if not place.exists():
            raise ValueError(f"{source}: no such file")
        return file_table(source, options, model)
    if model:
        raise ValueError("--model goes with a file of data: jaxfed init FILE --model NAME")
    if options:
        raise ValueError(
            f"{options[0]}: options of the loader go with a file of data: jaxfed init FILE {options[0]} ..."
        )
    if source and "." not in source and not place.exists() and source not in built_in_configs():
        raise ValueError(
            f"no configuration {source!r} comes with jaxfed: name a file of data, or one of "
            f"{', '.join(built_in_configs())}"
        )
    return (read_config(source) if source else {}), {}


def file_table(path: str, options: list[str], model: str) -> tuple[dict[str, Any], dict[str, str]]:
    """(the configuration of a file that can be read: what the options say, then what its data suggest; the reasons)."""
    from jaxfed.config.suggestions import read_file, suggest_table
    from jaxfed.training.log import log

    file = read_file(path, options)
    for note in file.clients.source.notes:
        log(f"data: {note}")
    return suggest_table(file, model)


def starter_text(table: dict[str, Any], name: str, reasons: dict[str, str] | None = None) -> str:
    """The text of a configuration's file, `name` with its folder: what the table says, and every other key with its
    default as a comment below what it does. reasons: {key: why it has its value}."""
    from jaxfed.config.overrides import with_described_types
    from jaxfed.config.schema import make_config
    from jaxfed.config.untuned import with_rule

    table = with_rule(table)  # names are written out, and a named optimiser has no rates by rule
    config = make_config(table)
    lines = [f"# {line}".rstrip() for line in TOP.format(name=shlex.quote(name), out=config.run.out).splitlines()]
    return "\n".join([*lines, "", *section_lines(with_described_types(config), table, "", reasons or {})]) + "\n"


def section_lines(
    value: Any, given: dict[str, Any], where: str, reasons: dict[str, str], around: Any = None
) -> list[str]:
    """The lines of a part of a configuration: its own keys, then the parts in it. given: what the table says of it;
    reasons: {key: why it has its value}; around: the part that it is in, which says what holds for a key without a
    value, or is silent, and false does."""
    own, nested = [], []
    texts = docstring_parser.parse(inspect.cleandoc(type(value).__doc__ or ""))
    hints = typing.get_type_hints(type(value))
    descriptions = {each.arg_name: each.description or "" for each in texts.params}
    for key in (field.name for field in dataclasses.fields(value)):
        entry, path = getattr(value, key), f"{where}.{key}".lstrip(".")
        if dataclasses.is_dataclass(entry):
            nested += ["", f"[{path}]", *section_lines(entry, given.get(key, {}), path, reasons, value)]
        elif entry and isinstance(entry, tuple) and dataclasses.is_dataclass(entry[0]):
            for link, link_table in zip(entry, given.get(key) or [{}] * len(entry), strict=True):
                nested += ["", f"[[{path}]]", *section_lines(link, link_table, path, reasons)]
        elif key not in EMPTY or key in given:
            mark = "" if key in given or key == "name" or not where else "# "
            words = typing.get_args(hints[key]) if typing.get_origin(hints[key]) is typing.Literal else ()
            own += comment_lines(
                descriptions.get(key, "") + (f" One of {', '.join(filter(None, words))}." if words else "")
            )
            own += comment_lines(f"Here: {reasons[path]}." if path in reasons else "")
            own.append(f"{mark}{key} = {toml_value(getattr(around, key, False) if entry is None else entry)}")
    return [*comment_lines(texts.short_description or "" if where else ""), *own, *nested]


def comment_lines(text: str) -> list[str]:
    """A text as comments, which begin further in than a key that is one."""
    return textwrap.wrap(" ".join(text.split()), WIDTH, initial_indent="#   ", subsequent_indent="#   ")


def toml_value(value: Any) -> str:
    """A value as TOML, on one line."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    return tomli_w.dumps({"key": value}).strip().removeprefix("key = ")
