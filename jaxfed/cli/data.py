"""jaxfed data"""

import argparse
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxfed.cli import init
from jaxfed.cli.cache import ACTIONS, cache_command
from jaxfed.core.excerpt import shorten

TEXT = """What a data set is like.

Options of the loader: --path FILE, --user COLUMN, ... --json prints a description, from which data of the same shape
are made by: jaxfed data shape --description FILE.json. It holds no ids and no rows, and a length in it is a mean over
ten users."""


def add_data_options(command: Callable[..., argparse.ArgumentParser]) -> None:
    """The options of `data`."""
    data = command(
        "data",
        "Fetch a data set and describe it.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    data.description = TEXT
    data.add_argument("name", metavar="NAME|FILE|CONFIG.toml", nargs="?")
    data.add_argument("--json", action="store_true", help="print a description as one JSON object, and nothing else")
    data.add_argument("--write", metavar="FILE", help="write the rows to a new file that ends in .csv or .parquet")
    data.add_argument(
        "--cache",
        nargs="?",
        const="list",
        metavar="|".join(ACTIONS),
        help="list what is kept on disk (prepared data, fetched data, compiled programs), or clear it: --cache clear, "
        "or of one kind --cache clear prepared, fetched or programs",
    )


def data_command(args: argparse.Namespace, overrides: list[str]) -> None:
    """jaxfed data"""
    if args.cache:
        if overrides:
            what = "unknown option" if overrides[0].startswith("-") else "name one kind, not more:"
            raise ValueError(f"--cache {args.cache}: {what} {shorten(overrides[0])}")
        cache_command(args.cache, args.name)
        return
    if args.name is None:
        raise ValueError("jaxfed data: name a data set, a file or a configuration, or pass --cache")
    from jaxfed.config.build import load_data, read_source_data
    from jaxfed.config.overrides import expand_option, override_config
    from jaxfed.config.suggestions import is_suggested_for, suggest_config
    from jaxfed.core.excerpt import printable
    from jaxfed.data.data_text import describe_data
    from jaxfed.data.shape_description import describe
    from jaxfed.data.writing import write_rows
    from jaxfed.training.log import log, to_json

    table, words = data_words(args.name, overrides)
    is_file, file = not table, shlex.join([args.name, *overrides])
    section = override_config(table, words).data
    if args.write:
        source = read_source_data(section)
        write_rows(source, args.write)
        log(f"{args.write} is written: {len(source.interactions.user):,} rows")
    if args.json:
        print(to_json(describe(read_source_data(section))))
    if args.json or args.write:
        return
    clients = load_data(section)
    lines = describe_data(clients).split("\n")
    if is_suggested_for(section):
        writes = f"which jaxfed init {file} writes" if is_file else "jaxfed init FILE writes one for a file"
        lines += ["", f"a configuration for these data, {writes}:"]
        asked = {word.partition("=")[0] for word in map(expand_option, overrides)}
        lines += suggestion_lines([each for each in suggest_config(clients) if f"--{each.key}" not in asked])
    for line in lines:
        print(printable(line))


def suggestion_lines(suggestions: list[Any]) -> list[str]:
    """A line for each suggested value, its reason to the right."""
    values = [f"{each.key} = {init.toml_value(each.value)}" for each in suggestions]
    width = max(map(len, values))
    return [f"  {value:<{width}}  {each.reason}" for value, each in zip(values, suggestions, strict=True)]


def data_words(name: str, overrides: list[str]) -> tuple[dict[str, Any], list[str]]:
    """(the table, the options) of the data that a name, a file or a configuration stands for. Raises ValueError."""
    from jaxfed.config.config_files import built_in_configs, read_config
    from jaxfed.config.overrides import expand_option
    from jaxfed.config.plugins import import_entry_points
    from jaxfed.config.registry import REGISTRY
    from jaxfed.config.schema import suggest
    from jaxfed.data.sources.tables import file_kind

    import_entry_points()  # they may have data
    own = [*map(expand_option, overrides)]
    if name.lower().endswith(".toml") or name in built_in_configs() or (Path(name) / "config.toml").is_file():
        whole = read_config(name)
        return {"data": whole.get("data", {}), "run": whole.get("run", {})}, own  # which says what to import
    if name in REGISTRY["data"]:
        return {"data": {"name": name}}, own
    if file_kind(name) or Path(name).expanduser().exists():
        return {}, [f"--data.path={name}", *own]
    names, ends = ", ".join(REGISTRY["data"]), ".csv, .tsv, .parquet or .inter (.gz may follow)"
    near = suggest(name, REGISTRY["data"])
    meant = near if "did you mean" in near else f": give one of {names}, or a file that ends in {ends}"
    raise ValueError(f'no data set "{shorten(name)}"{meant}')
