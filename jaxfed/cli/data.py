"""jaxfed data"""

import argparse
from collections.abc import Callable
from pathlib import Path

from jaxfed.cli import init
from jaxfed.cli.cache import ACTIONS, cache_command
from jaxfed.core.excerpt import shorten


def add_data_options(command: Callable[..., argparse.ArgumentParser]) -> None:
    """The options of `data`."""
    data = command(
        "data", "Fetch a data set and describe it.", "Options of the loader: --path FILE, --user COLUMN, ..."
    )
    data.add_argument("name", metavar="NAME|FILE|CONFIG.toml", nargs="?")
    data.add_argument(
        "--cache",
        nargs="?",
        const="list",
        choices=ACTIONS,
        help="list what is kept on disk (prepared data, fetched data, compiled programs), or clear it: --cache clear, "
        "or of one kind --cache clear prepared, fetched or programs",
    )


def data_command(args: argparse.Namespace, overrides: list[str]) -> None:
    """jaxfed data"""
    if args.cache:
        if overrides:
            raise ValueError(f"--cache {args.cache}: unknown option {overrides[0]}")
        cache_command(args.cache, args.name)
        return
    if args.name is None:
        raise ValueError("jaxfed data: name a data set, a file or a configuration, or pass --cache")
    from jaxfed.config.build import load_data
    from jaxfed.config.config_files import built_in_configs, read_config
    from jaxfed.config.overrides import override_config
    from jaxfed.config.plugins import import_entry_points
    from jaxfed.config.registry import REGISTRY
    from jaxfed.core.excerpt import printable
    from jaxfed.data.describe import describe_data as text
    from jaxfed.data.sources.tables import file_kind

    name, table = args.name, {}
    import_entry_points()  # they may have data
    own = [*map(init.expand_option, overrides)]
    if name.lower().endswith(".toml") or name in built_in_configs() or (Path(name) / "config.toml").is_file():
        whole = read_config(name)
        table = {"data": whole.get("data", {}), "run": whole.get("run", {})}  # which says what to import
    elif name in REGISTRY["data"]:
        table = {"data": {"name": name}}
    elif file_kind(name) or Path(name).expanduser().exists():
        own = [f"--data.path={name}", *own]
    else:
        names, ends = ", ".join(REGISTRY["data"]), ".csv, .tsv, .parquet or .inter (.gz may follow)"
        raise ValueError(f'no data set "{shorten(name)}": give one of {names}, or a file that ends in {ends}')
    for line in text(load_data(override_config(table, own).data)).split("\n"):
        print(printable(line))
