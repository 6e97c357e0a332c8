"""Words of a command line that change a configuration: `--section.key value`, `--section.name NAME`."""

import contextlib
import io
import re
from collections.abc import Sequence
from dataclasses import field, fields, make_dataclass
from itertools import pairwise
from typing import Annotated, Any, get_type_hints

from jaxfed.config.docstrings import section_docstring
from jaxfed.config.options import section_arguments
from jaxfed.config.plugins import import_plugins
from jaxfed.config.registry import ALIASES, REGISTRY
from jaxfed.config.schema import (
    LINKS,
    NAMED,
    argument_types,
    config_to_table,
    expect_table,
    infer_kind,
    iterate_leaves,
    make_config,
    suggest,
)
from jaxfed.config.settings import Config, Evaluation, Section
from jaxfed.core.excerpt import printable, shorten, shorten_list
from jaxfed.data.sources.tables import file_kind

WHOLE = """What a run is made of.

Args:
    seed: Random seed of the run.
    rounds: Number of training rounds.
"""


KINDS_OF_NUMBERS = {"invalid literal for int": "whole number", "could not convert string to float": "number"}
NO_NUMBER = rf"Error parsing --(\S+): ({'|'.join(KINDS_OF_NUMBERS)}).*'(.*)'$"  # what the parser says of other words


def infer_loader(table: dict[str, Any], args: list[str]) -> list[str]:
    """`--data.name=KIND` where `--data.path FILE` says what kind of file the data are, and no name does.

    A file with an ending of its own is csv where a delimiter is given. Raises ValueError where nothing tells the kind.
    """
    given = {word.partition("=")[0]: word.partition("=")[2] or after for word, after in pairwise([*args, ""])}
    if "--data.path" not in given or "--data.name" in given:
        return []
    section, path = expect_table(table.get("data", {}), "data"), given["--data.path"]
    delimiter = given.get("--data.delimiter", section.get("delimiter", ""))
    kind = infer_kind(path, str(delimiter), "pass, for example, --data.name csv", kind_in_table(section))
    return [f"--data.name={kind}"] if kind != section.get("name") else []


def expand_option(word: str) -> str:
    """An option of the loader as the whole program has it: `--user` is `--data.user`."""
    return re.sub(r"^--(?!data\.)", "--data.", word)


def kind_in_table(section: dict[str, Any]) -> str:
    """The kind that a [data] section says, or that the ending of its path does; "": neither."""
    return str(section.get("name", "")) or file_kind(str(section.get("path", "")))


def apply_names(table: dict[str, Any], args: list[str]) -> list[str]:
    """Takes `--section.name NAME` out of the arguments and into the table, whose other keys stay where they still fit.

    A name decides which keys there are, so it must be known before the rest is parsed. A list of links grows by the
    name of the one after its last.
    """
    args = [*infer_loader(table, args), *args]
    rest, i, none = [], 0, {"channel": list(LINKS), "download": []}
    while i < len(args):
        key, equals, value = args[i].partition("=")
        place = re.fullmatch(r"--((?:evaluation\.)?channel\.\d+|download\.\d+|work\.optimizer|[a-z]+)\.name", key)
        if not place or (not equals and i + 1 == len(args)):
            rest.append(args[i])
            i += 1
            continue
        value, i = (value, i + 1) if equals else (args[i + 1], i + 2)
        *outer, last = place[1].split(".")
        listed = {"channel", "download"} & {*outer}
        section = "channel" if listed else last
        parent: Any = table
        for step in outer:
            parent = expect_table(parent, place[1]).setdefault(step, none.get(step, {}))
        value = ALIASES.get((section, value), value)
        if section not in REGISTRY or value not in REGISTRY[section]:
            raise ValueError(
                f'{place[1]}.name: no {section} "{shorten(value)}"{suggest(value, REGISTRY.get(section, NAMED))}'
            )
        if isinstance(parent, list) and int(last) > len(parent):
            raise ValueError(f"{place[1]}: the configuration has {len(parent)} links: the next is number {len(parent)}")
        if isinstance(parent, list) and int(last) == len(parent):
            parent.append({})  # one more
        if place[1] in none:
            raise ValueError(f"{place[1]} is a list, and what is in it has numbers: pass --{place[1]}.0.name {value}")
        if not isinstance(parent, list):
            expect_table(parent, place[1])
        old = expect_table(parent[int(last)] if isinstance(parent, list) else parent.get(last, {}), place[1])
        fits = {*section_arguments(section, value), *(("optimizer",) if section == "work" else ("item", "user"))}
        new = {k: v for k, v in old.items() if k in fits} | {"name": value}
        parent[int(last) if isinstance(parent, list) else last] = new
    return rest


def take_imports(table: dict[str, Any], args: list[str]) -> tuple[dict[str, Any], list[str]]:
    """(the table with the modules of `--run.imports MODULE ...`, the other arguments): they must be imported before any
    name is looked up."""
    found: list[str] = []
    rest: list[str] = []
    flag, inside = "--run.imports", False
    for word in args:
        if word == flag or word.startswith(f"{flag}="):
            inside, found = True, [*found, *word.partition("=")[2:]] if "=" in word else found
        elif inside and not word.startswith("-"):
            found.append(word)
        else:
            inside, rest = False, [*rest, word]
    if len(rest) == len(args):
        return table, args
    return table | {"run": expect_table(table.get("run", {}), "run") | {"imports": found}}, rest


def take_omissions(table: dict[str, Any], args: list[str]) -> tuple[dict[str, Any], list[str]]:
    """(the table without what `--channel none`, `--download none` or `--work.name none` leaves out, the other
    arguments)."""
    options = ("--channel", "--download", "--work.name")
    args = [part for word in args for part in (word.split("=") if word.removesuffix("=none") in options else [word])]
    for option in options:
        found = [place for place, pair in enumerate(pairwise(args)) if pair == (option, "none")]
        args = [word for place, word in enumerate(args) if not {place, place - 1} & {*found}]
        if found and option == "--work.name":
            work = expect_table(table.get("work", {}), "work")
            table = table | {"work": {key: value for key, value in work.items() if key != "name"}}
        elif found:
            table = table | {option.removeprefix("--"): []}
    return table, args


def with_described_types(part: Any, section: str = "") -> Any:
    """A part of a configuration as a dataclass made for it, in which each section has the fields, types and docstring
    of what it names: what tyro makes options of, and `jaxfed init` comments.

    section: of the registry, where the part is a `Section`.
    """
    if isinstance(part, Section):
        values, kinds = {"name": part.name, **dict(part.arguments)}, argument_types(section, part.name)
        text = section_docstring(section, part.name)
    else:
        values, kinds = {each.name: getattr(part, each.name) for each in fields(part)}, get_type_hints(type(part))
        text = WHOLE if isinstance(part, Config) else type(part).__doc__ or ""
    made: list[tuple[str, Any, Any]] = []
    for key, value in values.items():
        kind = kinds.get(key)
        if kind == tuple[Section, ...]:
            value = tuple(with_described_types(link, "channel") for link in value)
            kind = tuple_type(tuple(map(type, value)))
        elif isinstance(value, Section | Evaluation):
            value = with_described_types(value, key)
            kind = type(value)
        made.append((key, kind, field(default=value)))
    name = section.title() or type(part).__name__
    return make_dataclass(name, made, frozen=True, namespace={"__doc__": text})()


def tuple_type(kinds: tuple[type, ...]) -> Any:
    """The type of a tuple of these. One of none is no option of the command line, as it has no value to be given."""
    if kinds:
        return tuple[kinds]  # type: ignore[valid-type]
    import tyro  # takes long to import

    return Annotated[tuple[()], tyro.conf.Suppress]


def override_config(
    table: dict[str, Any], args: list[str], own: Sequence[str] = ("--out", "--resume", "--central", "--profile")
) -> Config:
    """A configuration from a TOML table and command-line overrides. Raises ValueError with one line.

    own: the command's own options, for who misspells them.
    """
    table, args = take_omissions(*take_imports(table, args))
    import_plugins(table)
    config = make_config(table if not args else (args := apply_names(table, args), table)[1])
    if not args:
        return config
    import tyro  # takes long to import

    if {"-h", "--help"} & set(args):
        more = (
            "Beside these: --out RUN, --resume, --central, --profile. Choosing another name changes which keys exist.\n"
            "With L links, numbered 0 to L-1, --channel.L.name NAME appends one; likewise --download.L.name and\n"
            "--evaluation.channel.L.name. --channel none and --download none leave all links out, --work.name none\n"
            "leaves out the work, for an --algorithm.name that has its own."
        )
        shown = with_described_types(make_config(printable_table(config_to_table(config))))
        tyro.cli(type(shown), default=shown, args=args, prog="jaxfed train CONFIG.toml", description=more)  # and exits
    lists = [key for key, value in iterate_leaves(config_to_table(config)) if isinstance(value, list)]
    args = split_lists(args, [f"--{key.replace('_', '-')}" for key in lists])
    known = [f"--{key.replace('_', '-')}" for key, _ in iterate_leaves(config_to_table(config))]
    known += own
    rates = ("learning-rate", "weight-decay", "per-example")
    groups = [f"--work.optimizer.{who}.{key}" for who in ("item", "user") for key in rates]
    positive = {re.sub(r"\.no-([^.]*)$", r".\1", word.split("=")[0].replace("_", "-")): word for word in args}
    for flag, word in positive.items():
        if flag.startswith("--") and flag not in known + groups:
            raise ValueError(f"unknown option {word.split('=')[0]}{suggest_option(flag, known + groups)}")
    output, options = io.StringIO(), with_described_types(config)
    try:
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
            changed = tyro.cli(type(options), default=options, args=args)
    except SystemExit:
        title, message, *_ = *re.split(r"\s*[-─]{20,}\s*", output.getvalue()), ""  # a box: sections between rules
        plain = " ".join((message or title).split()).split(" Got errors:")[0]  # which names the parser's own types
        plain = re.sub(NO_NUMBER, lambda m: f'{m[1]} is "{m[3]}": it must be a {KINDS_OF_NUMBERS[m[2]]}', plain)
        raise ValueError(re.sub(r"no type matching \S+ could be instantiated from", "not a value:", plain)) from None
    return make_config(config_to_table(changed))


def suggest_option(flag: str, known: list[str]) -> str:
    """What to do about an option that the configuration does not have: the names that it belongs to, or the nearest."""
    section, _, key = flag.removeprefix("--").replace("-", "_").partition(".")
    names = [name for name in REGISTRY.get(section, {}) if key in section_arguments(section, name)]
    owners = f"; it is a key of {section} {shorten_list(names)}: pass --{section}.name, too"
    if section == "channel":  # a list
        owners = f"; links have numbers: pass --channel.0.{key.replace('_', '-')}, or the number of another link"
    return owners if names else suggest(flag, known)


def split_lists(args: list[str], lists: list[str]) -> list[str]:
    """The arguments, where the one value of a list is taken apart at its commas: names of columns, or numbers.

    lists: the options whose values are lists.
    """
    out: list[str] = []
    for place, word in enumerate(args):
        flag, equals, value = word.partition("=")
        before = args[place - 1].replace("_", "-") if place else ""
        alone = before in lists and (place + 1 == len(args) or args[place + 1].startswith("--"))
        if flag.replace("_", "-") in lists and equals:
            out += [flag, *parse_list(flag, value)]
        else:
            out += parse_list(before, word) if alone else [word]
    return out


def parse_list(flag: str, value: str) -> list[str]:
    """A value at its commas, without brackets around them; as it is where it may be one word with a comma."""
    inner = re.fullmatch(r"\[(.+)\]", value.strip())
    parts = [part.strip() for part in (inner[1] if inner else value).split(",")]
    numbers = all(re.fullmatch(r"[+-]?[\d.]+([eE][+-]?\d+)?", part) for part in parts)
    several = len(parts) > 1 or inner
    return parts if several and all(parts) and (numbers or flag.endswith("columns")) else [value]


def printable_table(value: Any) -> Any:
    """A table whose words can be shown in a terminal."""
    if isinstance(value, dict):
        return {key: printable_table(each) for key, each in value.items()}
    if isinstance(value, list):
        return [printable_table(each) for each in value]
    return printable(value) if isinstance(value, str) else value
