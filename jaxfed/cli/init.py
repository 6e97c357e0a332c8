"""`jaxfed init`: a configuration to start from, which says what each of its keys does."""

import argparse
import dataclasses
import inspect
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
        "Without a name: the defaults, on MovieLens-100K.",
    )
    init.add_argument(
        "source",
        nargs="?",
        default="",
        metavar="NAME|FILE",
        help="a configuration that comes with jaxfed (e.g. ml100k_fedavg), or a file of your own data",
    )
    init.add_argument(
        "--out", metavar="CONFIG.toml", help="where it is written (NAME.toml; without a name config.toml)"
    )


def init_command(args: argparse.Namespace) -> None:
    """jaxfed init"""
    from jaxfed.config.schema import make_config
    from jaxfed.training.run_dir import write_file

    table = starting_table(args.source)
    place = Path(args.out or f"{Path(args.source).stem or 'config'}.toml")
    table["run"] = table.get("run", {}) | {"out": f"runs/{place.stem}"}
    if place.exists():
        raise ValueError(f"{place} is there already: pass another --out")
    if not place.parent.is_dir():
        raise ValueError(f"--out {place}: the folder {place.parent} does not exist: create it first")
    text = starter_text(table, str(place))
    make_config(table)  # before anything is written
    write_file(place, text)
    print(f"{place} is written; now: jaxfed train {place}")


def starting_table(source: str) -> dict[str, Any]:
    """The table of what to start from. Raises ValueError for a name that is nothing."""
    from jaxfed.config.overrides import infer_loader
    from jaxfed.config.schema import read_config

    if source and Path(source).exists() and not source.lower().endswith(".toml"):
        kinds = infer_loader({}, [f"--data.path={source}"], "rename it to end in .csv, .tsv, .parquet or .inter")
        return {"data": {"name": kinds[0].partition("=")[2], "path": source}}
    return read_config(source) if source else {}


def starter_text(table: dict[str, Any], name: str) -> str:
    """The text of a configuration's file, `name` with its folder: what the table says, and every other key with its
    default as a comment below what it does."""
    from jaxfed.config.schema import make_config

    config = make_config(table)
    lines = [f"# {line}".rstrip() for line in TOP.format(name=name, out=config.run.out).splitlines()]
    return "\n".join([*lines, "", *section_lines(config, table, "")]) + "\n"


def section_lines(value: Any, given: dict[str, Any], where: str, around: Any = None) -> list[str]:
    """The lines of a part of a configuration: its own keys, then the parts in it. given: what the table says of it;
    around: the part that it is in, which says what holds for a key without a value."""
    own, inside = [], []
    texts = docstring_parser.parse(inspect.cleandoc(type(value).__doc__ or ""))
    hints = typing.get_type_hints(type(value))
    does = {each.arg_name: each.description or "" for each in texts.params}
    for key in (field.name for field in dataclasses.fields(value)):
        held, path = getattr(value, key), f"{where}.{key}".lstrip(".")
        if dataclasses.is_dataclass(held):
            inside += ["", f"[{path}]", *section_lines(held, given.get(key, {}), path, value)]
        elif held and isinstance(held, tuple) and dataclasses.is_dataclass(held[0]):
            for link, said in zip(held, given.get(key) or [{}] * len(held), strict=True):
                inside += ["", f"[[{path}]]", *section_lines(link, said, path)]
        elif key not in EMPTY or key in given:
            mark = "" if key in given or key == "name" or not where else "# "
            words = typing.get_args(hints[key]) if typing.get_origin(hints[key]) is typing.Literal else ()
            own += comment_lines(does.get(key, "") + (f" One of {', '.join(filter(None, words))}." if words else ""))
            own.append(f"{mark}{key} = {toml_value(getattr(around, key) if held is None else held)}")
    return [*comment_lines(texts.short_description or "" if where else ""), *own, *inside]


def comment_lines(text: str) -> list[str]:
    """A text as comments, which begin further in than a key that is one."""
    return textwrap.wrap(" ".join(text.split()), WIDTH, initial_indent="#   ", subsequent_indent="#   ")


def toml_value(value: Any) -> str:
    """A value as TOML, on one line."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    return tomli_w.dumps({"key": value}).strip().removeprefix("key = ")
