"""Configurations as files: where they are, how they are read and written, and in what two of them differ."""

import dataclasses
import os
import tomllib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from jaxfed.config.schema import config_to_table, iterate_leaves, make_config, suggest
from jaxfed.config.settings import Config, replace_arguments
from jaxfed.core.excerpt import shorten, shorten_list
from jaxfed.data.sources.tables import PATHS as DATA_PATHS
from jaxfed.data.sources.tables import file_kind

PATHS = {  # keys that name a file or a folder, by their section
    "data": DATA_PATHS,
    "clock": ("path",),
    "parametrization": ("folder",),
    "model": ("folder",),
    "start": ("run",),
}


def built_in_folder() -> Path:
    """The folder of the configurations that come with the program: inside of the package, in a checkout beside it."""
    package = Path(__file__).parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def built_in_configs() -> dict[str, Path]:
    """The configurations that come with the program, by their names."""
    return {each.stem: each for each in sorted(built_in_folder().glob("*.toml"))}


def locate_config(path: str | Path) -> Path:
    """The file of a configuration, or the one in a run's folder; where there is none of that name, the one of that name
    that comes with the program.

    Raises ValueError where there is neither, or where there are data.
    """
    place = Path(path)
    if (place / "config.toml").is_file():
        return place / "config.toml"
    if place.exists() and file_kind(path):
        raise ValueError(
            f"{path} is data, not a configuration: `jaxfed init {path}` writes one, or pass CONFIG --data.path {path}"
        )
    if place.is_dir():
        raise ValueError(f"{path} is a folder, but not that of a run (no config.toml): name a configuration's file")
    if place.exists():
        return place
    name, there = place.name.removesuffix(".toml"), built_in_configs()
    if name in there and place.parent == Path():
        return there[name]
    raise ValueError(
        f"{path}: no such file, and no configuration of that name comes with jaxfed{suggest_names(name, there)}"
    )


def suggest_names(word: str, words: Iterable[str]) -> str:
    """As `suggest`; where several names begin with the word, all of these."""
    begin = [each for each in words if word and each.startswith(word)]
    found = f"; there are {shorten_list(begin, 40)}" if len(begin) > 1 else suggest(word, words)
    return found if begin or "did you mean" in found else "; begin with synthetic_1k or ml100k_fedavg"


def read_config(path: str | Path) -> dict[str, Any]:
    """The table of a configuration's file, or of the one in a run's folder. Raises ValueError where there is none.

    Relative paths in it are those of the working directory; one that is not there is looked for beside the file.
    """
    file = locate_config(path)
    try:
        table = tomllib.loads(file.read_text("utf-8-sig"))  # some editors begin a file with a byte order mark
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not TOML: {error}") from None

    def beside(text):
        there = os.path.join(file.parent, text)
        return there if not os.path.exists(os.path.expanduser(text)) and os.path.exists(there) else text

    return map_paths(table, beside)


def map_paths(table: dict[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """The table of a configuration, in which the `PATHS` that are given are changed."""
    made = dict(table)
    for section, keys in PATHS.items():
        if isinstance(made.get(section), dict):
            given = {key: made[section].get(key) for key in keys}
            made[section] = made[section] | {key: map_each_path(each, change) for key, each in given.items() if each}
    return made


def map_each_path(value: Any, change: Callable[[str], str]) -> Any:
    """A path, or each of a list of them, changed; any other value as it is."""
    if isinstance(value, list | tuple):
        return [map_each_path(each, change) for each in value]
    return change(value) if isinstance(value, str) and value else value


def absolute_path(path: str) -> str:
    """A path that means the same wherever it is read, if there is something."""
    there = os.path.expanduser(path)
    return os.path.abspath(there) if os.path.exists(there) else path


def config_to_toml(config: Config) -> str:
    """A configuration as TOML; `read` and `make_config` give it back."""
    return tomli_w.dumps(config_to_table(config))


def with_absolute_paths(config: Config) -> Config:
    """A configuration whose files are found from wherever it is read, and wherever its own file is moved."""
    return make_config(map_paths(config_to_table(config), absolute_path))


def flatten_config(config: Config, paths: bool = True) -> dict[str, Any]:
    """{dotted key: value} of all of a configuration outside of [run], and but for `rounds`.

    paths: names of files are there, too; else they are empty.
    """
    table = map_paths(config_to_table(config), absolute_path if paths else lambda path: "")
    return {key: value for key, value in iterate_leaves(table) if not key.startswith("run.") and key != "rounds"}


def set_draw_place(config: Config, place: str) -> Config:
    """`config` with the place where its rounds are drawn, if it leaves that open."""
    if config.work.draw_on != "auto":
        return config
    return dataclasses.replace(config, work=replace_arguments(config.work, draw_on=place))


def config_differences(old: Config, new: Config, paths: bool = True) -> list[str]:
    """`key: old -> new` of all that differs between two configurations outside of [run], and but for `rounds`.

    A place of draws that the new one leaves open ("auto") is that of the old one.

    paths: names of files count, too; false where what is in the files is compared instead.
    """
    new = set_draw_place(new, old.work.draw_on)
    a, b = flatten_config(old, paths), flatten_config(new, paths)
    different = [key for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]
    return [f"{key}: {shorten(a.get(key, 'unset'))} -> {shorten(b.get(key, 'unset'))}" for key in different]


def tabulate_differences(configs: Sequence[Config]) -> dict[str, list[str]]:
    """{key: its value in each configuration, in short} of all that is not the same in all of them, outside of [run]."""
    flat = [{"rounds": each.rounds} | flatten_config(each) for each in configs]
    keys = sorted({key for each in flat for key in each})
    found = {key: [each.get(key, "unset") for each in flat] for key in keys}
    return {key: [*map(shorten, each)] for key, each in found.items() if any(value != each[0] for value in each)}
