"""From the table of a TOML file to a `Config`, strictly: types and choices come from the signatures of the registry.

Sections are the places of the pipeline. `name` picks a function from the registry, the other keys are its arguments.
"""

import dataclasses
import difflib
import math
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from jaxfed.config.options import argument_type, section_arguments
from jaxfed.config.plugins import import_plugins
from jaxfed.config.registry import ALIASES, REGISTRY
from jaxfed.config.settings import (
    NOISE,
    Config,
    Evaluation,
    GroupRates,
    Privacy,
    Run,
    Section,
    Start,
    check_size_is_public,
    with_patience,
)
from jaxfed.config.untuned import with_rule
from jaxfed.core.excerpt import excerpt, shorten, shorten_list
from jaxfed.data.sources.tables import file_kind

LARGEST_SIZE = 1 << 16  # of a whole number in [model]: sizes of arrays, whose products must be sizes, too
LARGEST = {"clusters": LARGEST_SIZE, "groups": LARGEST_SIZE, "fraction_bits": 32}
# keys of [model] that are sizes of arrays: at least 1
SIZES = ("dim", "hidden", "code", "rank", "window")
AT_LEAST_ONE = ("rounds", "evaluation.every", "evaluation.draws", "run.keep", "run.checkpoint_every")
LINKS = ({"name": "per_row_mean"},)  # where a configuration has no [[channel]]
GROUPS = ("item", "user")  # of parameters that an optimiser may have rates of their own for
NAMED = {
    "data": "ml-100k",
    "model": "mf",
    "algorithm": "custom",
    "work": "local_steps",
    "server": "sgd",
    "cohort": "uniform",
    "clock": "none",
    "parametrization": "identity",
}


def suggest(word: str, words: typing.Iterable[str]) -> str:
    """`; did you mean "x"?` for the nearest of some words, or what there is."""
    words = list(words)
    found = difflib.get_close_matches(word, words, 1)
    return f'; did you mean "{shorten(found[0])}"?' if found else f"; there are {shorten_list(words)}"


def argument_types(section: str, name: str) -> dict[str, Any]:
    """{key: type} of what a section may hold for a name of its registry."""
    named: Any = Literal
    kinds = {"name": named[tuple(REGISTRY[section])]}
    for key, default in section_arguments(section, name).items():
        kinds[key] = argument_type(section, name, key, default)
    parts: dict[str, dict[str, Any]] = {
        "work": {"optimizer": Section},
        "optimizer": dict.fromkeys(GROUPS, GroupRates),
    }
    return kinds | parts.get(section, {})


def build_section(section: str, table: Any, where: str) -> Section:
    """A section from its TOML table, with the defaults of what the table leaves out.

    Args:
        section: of the registry: "model", "channel", "optimizer", ...
        table: {key: value}.
        where: the section in the configuration, for messages.

    Returns:
        The section.

    Raises:
        ValueError: one line that says what is wrong.
    """
    table = expect_table(table, where)
    name = table.get("name", NAMED.get(section, "adam"))
    if not isinstance(name, str):
        raise ValueError(f"{where}.name: a name in quotes, not {excerpt(name)}")
    name = ALIASES.get((section, name), name)
    if name not in REGISTRY[section]:
        raise ValueError(f'{where}.name: no {section} "{shorten(name)}"{suggest(name, REGISTRY[section])}')
    own = ({"optimizer": {}} if section == "work" else {}) | {key: table[key] for key in table if key != "name"}
    given = coerce_table(argument_types(section, name), own, where)
    defaults = section_arguments(section, name)
    if section == "optimizer":
        defaults |= dict.fromkeys(GROUPS, GroupRates())
    return Section(name, tuple((defaults | given).items()))


def expect_table(value: Any, where: str) -> dict[str, Any]:
    """`value`, if it is a table."""
    if not isinstance(value, dict):
        raise ValueError(f"{where}: a section [{where}] with keys, not {excerpt(value)}")
    return value


def coerce_table(kinds: dict[str, Any], table: dict[str, Any], where: str) -> dict[str, Any]:
    """The values of a table as the types of its keys. Raises ValueError for a key that is none and for another type."""
    made = {}
    for key, value in table.items():
        path = f"{where}.{key}".lstrip(".")
        if key not in kinds:
            raise ValueError(f'unknown key "{shorten(path)}"{suggest(key, kinds)}')
        made[key] = coerce_value(kinds[key], value, path)
    return made


def fill_dataclass(kind: type, table: Any, where: str) -> Any:
    """A dataclass from a table. Raises ValueError, see `coerce_table`."""
    return kind(**coerce_table(typing.get_type_hints(kind), expect_table(table, where), where))


def coerce_value(kind: Any, value: Any, where: str) -> Any:
    """`value` as `kind`; whole numbers serve as floats, lists as tuples."""
    options = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        if value not in options:
            raise ValueError(f"{where}: {excerpt(value)} is none of {', '.join(map(repr, options))}")
        return value
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where}: {excerpt(value)} is no list: put it in brackets, [{excerpt(value)}]")
        return tuple(coerce_value(options[0], each, where) for each in value)
    if kind is Section:  # the only one that lies in another
        return build_section("optimizer", value, where)
    if dataclasses.is_dataclass(kind):
        if isinstance(value, typing.cast(type, kind)):  # of a program
            return value
        return fill_dataclass(typing.cast(type, kind), value, where)
    if value is None and type(None) in options:  # of a program; TOML has no word for it
        return None
    kinds = tuple(option for option in options or (kind,) if isinstance(option, type) and option is not type(None))
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        wanted = " or ".join(map(describe_type, kinds))
        raise ValueError(f"{where}: {excerpt(value)} is not {wanted}{suggest_plain(value, kinds)}")
    return value


def describe_type(kind: type) -> str:
    """What a value of a type is called."""
    known = {int: "a whole number", float: "a number", bool: "true or false", str: "text in quotes"}
    return known.get(kind, kind.__name__)


def suggest_plain(value: Any, kinds: tuple[type, ...]) -> str:
    """What to do about a number or a truth value in quotes; "": it is something else."""
    plain = value.strip() if isinstance(value, str) else ""
    number = r"[+-]?\d+" if int in kinds and float not in kinds else r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?"
    fits = ({int, float} & {*kinds} and re.fullmatch(number, plain)) or (bool in kinds and plain in ("true", "false"))
    return f": write {plain} without quotes" if fits else ""


def check_numbers(table: Any) -> None:
    """Raises ValueError for a number that no key can be: not finite, a negative whole number, one that is too large."""
    for name, value in iterate_leaves(table):
        key = name.rpartition(".")[2]
        most = LARGEST_SIZE if name.startswith("model.") else LARGEST.get(key, (1 << 63) - 1)
        largest = "2^63 - 1" if most == (1 << 63) - 1 else f"{most:,}"
        if name in AT_LEAST_ONE and value < 1:
            raise ValueError(f"{name} is {value}: it must be at least 1")
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, float) and not math.isfinite(each):
                raise ValueError(f"{name} is {each}: it must be a finite number")
            least = 1 if name.startswith("model.") and key in SIZES else 0
            if isinstance(each, int) and not least <= each <= most and key != "learning_rate":
                raise ValueError(f"{name} is {each}: it must be a whole number from {least} to {largest}")


def build_links(value: Any, where: str) -> tuple[Section, ...]:
    """The sections of a list of links. Raises ValueError for what is none."""
    if not isinstance(value, list):
        raise ValueError(f"{where}: a list of links, each [[{where}]] with a name")
    made = []
    for number, link in enumerate(value):
        if "name" not in expect_table(link, where):
            raise ValueError(f"{where}.{number}: a link needs a name{suggest('', REGISTRY['channel'])}")
        made.append(build_section("channel", link, f"{where}.{number}"))
    return tuple(made)


def build_evaluation(table: Any, noisy: bool) -> Evaluation:
    """The [evaluation] section from its table; noisy: whether a link of the channel adds noise."""
    own = dict(expect_table(table, "evaluation"))
    links = build_links(own.pop("channel", []), "evaluation.channel")
    made = dataclasses.replace(fill_dataclass(Evaluation, own, "evaluation"), channel=links)
    return with_patience(made, noisy)


def infer_kind(path: str, delimiter: str, mend: str, otherwise: str = "") -> str:
    """The name of a [data] section for a file: by its ending; for another ending `otherwise`, and csv where a delimiter
    is given.

    Raises ValueError, with what to do (`mend`), where nothing tells.
    """
    kinds = [name for name in REGISTRY["data"] if "path" in section_arguments("data", name)]
    otherwise = otherwise if otherwise in kinds else ""
    folder = "parquet" if Path(path).expanduser().is_dir() else ""  # of parts; the reader says what is wrong
    kind = file_kind(path) or folder or otherwise or ("csv" if delimiter else "")
    if kind not in kinds:
        raise ValueError(f"cannot tell the kind of {shorten(path)} from its ending: {mend}")
    return kind


def with_data_name(section: Any) -> Any:
    """A [data] section that names no kind but a path, with the kind. Raises ValueError where nothing tells it."""
    if not isinstance(section, dict) or "name" in section or not isinstance(section.get("path"), str):
        return section
    mend = 'say it with name = "csv" in [data]'
    return {"name": infer_kind(section["path"], str(section.get("delimiter", "")), mend), **section}


def make_config(table: dict[str, Any]) -> Config:
    """A whole configuration from the table of a TOML document.

    Args:
        table: {key or section: value}; what it leaves out has its default.

    Returns:
        The configuration.

    Raises:
        ValueError: one line that says what is wrong.

    Example:
        >>> make_config({"model": {"name": "mf", "dim": 8}}).model.dim
        8
    """
    import_plugins(table)
    table = table | ({"data": with_data_name(table["data"])} if "data" in table else {})
    known = [each.name for each in dataclasses.fields(Config)]
    for key in table:
        if key not in known:
            raise ValueError(f'unknown key "{shorten(key)}"{suggest(key, known)}')
    table = with_rule(table)
    channel = build_links(table.get("channel", list(LINKS)), "channel")
    download = build_links(table.get("download", []), "download")
    noisy = any(each.name in NOISE for each in channel)
    evaluation = build_evaluation(table.get("evaluation", {}), noisy)
    sections: dict[str, Any] = {key: build_section(key, table.get(key, {}), key) for key in NAMED}
    config = Config(
        seed=coerce_value(int, table.get("seed", 0), "seed"),
        rounds=coerce_value(int, table.get("rounds", 100), "rounds"),
        **sections,
        channel=channel,
        download=download,
        privacy=fill_dataclass(Privacy, table.get("privacy", {}), "privacy"),
        evaluation=evaluation,
        start=fill_dataclass(Start, table.get("start", {}), "start"),
        run=fill_dataclass(Run, table.get("run", {}), "run"),
    )
    if noisy:
        check_size_is_public(dict(config.cohort.arguments))
    check_numbers(config_to_table(config))
    return config


def config_to_table(config: Any) -> dict[str, Any]:
    """A configuration, or a part of one, as a TOML table, every default spelled out."""

    def plain(value):
        if isinstance(value, Section):
            value = {"name": value.name, **dict(value.arguments)}
        elif dataclasses.is_dataclass(value):
            value = {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
        if isinstance(value, dict):
            inner = {key: plain(each) for key, each in value.items()}
            return {key: each for key, each in inner.items() if each is not None and each != {}}
        return [plain(each) for each in value] if isinstance(value, tuple) else value

    return plain(config)


def iterate_leaves(table: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything in a table."""
    items = table.items() if isinstance(table, dict) else enumerate(table)
    for key, value in items:
        if isinstance(value, dict) or (isinstance(value, list) and value and isinstance(value[0], dict)):
            yield from iterate_leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
