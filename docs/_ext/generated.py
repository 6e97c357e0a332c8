"""Pages that are made at every build, from the code: docs/reference/generated/.

* a page for each folder of the package, with the docstrings of its modules;
* the keys of a configuration, from the registry;
* the figures of a run's files, from `jaxfed.training.records`.
"""

import dataclasses
import inspect
import pkgutil
import typing
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jaxfed
from jaxfed.config.docstrings import parse_docstring
from jaxfed.config.options import SOURCES, argument_type, section_arguments
from jaxfed.config.registry import REGISTRY
from jaxfed.config.settings import Evaluation, GroupRates, Privacy, Run, Start
from jaxfed.training.records import FIGURES

FOLDER = Path(__file__).parents[1] / "reference" / "generated"
HEADS = {  # the line of a section in a file, where it is not [section]
    "optimizer": "[work.optimizer]",
    "channel": "[[channel]]",
}
FIXED = {
    "work.optimizer.item": GroupRates,
    "privacy": Privacy,
    "evaluation": Evaluation,
    "start": Start,
    "run": Run,
}


def list_modules() -> dict[str, list[str]]:
    """{folder of the package: its modules}; those of the package itself are under its own name."""
    found: dict[str, list[str]] = {}
    for each in pkgutil.walk_packages(jaxfed.__path__, "jaxfed."):
        if not each.ispkg and not each.name.endswith("__main__"):
            parts = each.name.split(".")
            found.setdefault(".".join(parts[:2]) if len(parts) > 2 else "jaxfed", []).append(each.name)
    return found


def module_page(folder: str, modules: list[str]) -> str:
    """The page of a folder."""
    parts = [f"# {folder}\n"]
    for name in [folder, *modules]:
        head = f"\n## {name.rpartition('.')[2]}\n" if name != folder else ""
        own = "   :no-members:\n" if name == folder else ""  # a package's names are those of its modules
        parts.append(f"{head}\n```{{eval-rst}}\n.. automodule:: {name}\n{own}```\n")
    return "".join(parts)


def public_page() -> str:
    """What `import jaxfed` offers: its subpackages, and the docstrings of its classes and functions."""
    found = {name: getattr(jaxfed, name) for name in getattr(jaxfed, "__all__", ()) if not name.startswith("_")}
    if not found:
        return ""
    packages = [name for name, value in found.items() if inspect.ismodule(value)]
    lines = ["# The public names\n\n`import jaxfed as jf` offers these.\n"]
    lines += [f"* `jf.{name}`: [](./{name}.md)" for name in packages]
    for name, value in found.items():
        if name not in packages:
            kind = "autoclass" if inspect.isclass(value) else "autofunction" if callable(value) else "autodata"
            lines.append(f"\n```{{eval-rst}}\n.. {kind}:: jaxfed.{name}\n   :no-index:\n```")
    return "\n".join(lines) + "\n"


def escape_cell(text: str) -> str:
    """Text as it may stand in a cell of a table."""
    return text.replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;").replace("[", "\\[").replace("$", "\\$")


def key_table(rows: list[tuple[str, Any, tuple[str, ...], str]]) -> str:
    """A table of (key, default, what it may be, what it does)."""
    lines = ["| key | default | meaning |", "|---|---|---|"]
    for key, default, choices, text in rows:
        value = list(default) if isinstance(default, tuple) else default
        shown = "" if value is None else f"`{str(value).lower() if isinstance(value, bool) else repr(value)}`"
        more = f" One of {', '.join(f'`{each!r}`' for each in choices)}." if choices else ""
        lines.append(f"| `{key}` | {shown} | {escape_cell(text)}{more} |")
    return "\n".join(lines) + "\n"


def registry_rows(section: str, name: str, shared: bool) -> Iterator[tuple[str, Any, tuple[str, ...], str]]:
    """The keys of one name; shared: those that every name of the section has, and only them."""
    own = REGISTRY[section][name]
    function = own.func if isinstance(own, partial) else own
    parameters = inspect.signature(function).parameters
    texts = parse_docstring(function)[1]
    for source in SOURCES.get(section, ()):
        texts |= parse_docstring(source)[1]
    for key, default in section_arguments(section, name).items():
        if shared != (key in parameters) or (shared and key not in parameters):
            kind = argument_type(section, name, key, default)
            words = typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ()
            yield key, default, words, texts.get(key, "")


def same_functions(section: str) -> list[list[str]]:
    """The names of a section; those of one function together."""
    found: dict[Any, list[str]] = {}
    for name, function in REGISTRY[section].items():
        found.setdefault(function.func if isinstance(function, partial) else function, []).append(name)
    return list(found.values())


def section_part(section: str) -> str:
    """The part of a section whose `name` picks from the registry."""
    head = HEADS.get(section, f"[{section}]")
    parts = [f"\n## {head}\n"]
    first = next(iter(REGISTRY[section]))
    if common := list(registry_rows(section, first, True)):
        parts.append(f"\nKeys that every name has:\n\n{key_table(common)}")
    for names in same_functions(section):
        what = parse_docstring(REGISTRY[section][names[0]])[0]
        parts.append(f"\n### {section}: {', '.join(names)}\n\n{escape_cell(what)}\n")
        if rows := list(registry_rows(section, names[0], False)):
            parts.append("\n" + key_table(rows))
    return "".join(parts)


def fixed_part(where: str, kind: type) -> str:
    """The part of a section that is a dataclass of its own."""
    what, texts = parse_docstring(kind)
    rows = [(each.name, each.default, (), texts.get(each.name, "")) for each in dataclasses.fields(kind)]
    return f"\n## [{where}]\n\n{escape_cell(what)}\n\n{key_table(rows)}"


def configuration_page() -> str:
    """All keys of a configuration."""
    head = """# Keys of a configuration

A configuration is one TOML file. `name` picks a function; the other keys of a section are its arguments. Any key can be
given on the command line, too: `--section.key value`, and `--channel.0.key value` for the first link.
`jaxfed train CONFIG --help` prints the keys of one configuration.

Beside the sections there are `seed` (the random seed of the run, 0) and `rounds` (number of training rounds, 100).
`[[download]]` and `[[evaluation.channel]]` take the links of `[[channel]]`.
"""
    parts = [head, *(section_part(section) for section in REGISTRY)]
    return "".join([*parts, *(fixed_part(where, kind) for where, kind in FIXED.items())])


def figures_page() -> str:
    """All figures of a run's files."""
    lines = ["| figure | unit | better | meaning |", "|---|---|---|---|"]
    for name, each in FIGURES.items():
        lines.append(f"| `{name}` | {each.unit} | {each.better} | {escape_cell(each.meaning)} |")
    head = """# Figures of a run

What the rows of `RUN/metrics.jsonl`, `RUN/summary.json`, TensorBoard and sweeps hold. A star stands for anything. Links
and methods may write figures of their own beside these.

"""
    return head + "\n".join(lines) + "\n"


def write_pages(app: Any) -> None:
    """Writes all pages; a file whose text is the same is left alone, so that Sphinx does not read it again."""
    pages = {name.removeprefix("jaxfed."): module_page(name, modules) for name, modules in list_modules().items()}
    pages |= {"configuration": configuration_page(), "figures": figures_page()}
    pages["public"] = public_page()
    FOLDER.mkdir(exist_ok=True)
    for old in FOLDER.glob("*.md"):
        if not pages.get(old.stem):
            old.unlink()
    for name, text in pages.items():
        path = FOLDER / f"{name}.md"
        if text and (not path.exists() or path.read_text() != text):
            path.write_text(text)


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("builder-inited", write_pages)
    return {"parallel_read_safe": True}
