"""What the arguments of the registry's functions do, from their docstrings: for the command line and for people."""

import inspect
import re
from collections.abc import Callable
from functools import partial

import docstring_parser

from jaxfed.config.options import SOURCES, section_arguments
from jaxfed.config.registry import REGISTRY

NOUNS = {
    "data": "data set, or kind of file",
    "model": "model",
    "algorithm": "federated method",
    "work": "kind of local training",
    "optimizer": "clients' optimiser",
    "channel": "link",
    "server": "server's optimiser",
    "cohort": "way to choose the clients of a round",
    "clock": "clock",
    "parametrization": "way in which the server holds the tables",
}


FLAGS = {"optimizer": "work.optimizer", "channel": "channel.N"}  # on the command line, where it is not the section


def parse_docstring(function: Callable) -> tuple[str, dict[str, str]]:
    """(what a function is, {argument: what it does}) by its docstring."""
    own = function.func if isinstance(function, partial) else function
    text = inspect.getdoc(own) or ""

    def plain(text):  # without links and marks of reStructuredText
        return " ".join(re.sub(r"\[([^]]+)\]\([^)]+\)|:\w+:", r"\1", text or "").replace("`", "").split())

    what = re.split(r"(?<=[^.][^.]\.) (?=[A-Z])", plain(text.partition("\n\n")[0]))[0]  # the first sentence
    options = inspect.getdoc(inspect.unwrap(own)) or ""  # of a function that takes the fields of a type
    return what, {
        each.arg_name: plain(each.description)
        for docstring in (options, text)
        for each in docstring_parser.parse(docstring).params
    }


def section_docstring(section: str, name: str) -> str:
    """The docstring of a section for this name: what its function is, and what each argument does."""
    what, texts = parse_docstring(REGISTRY[section][name])
    for source in SOURCES.get(section, ()):
        texts |= parse_docstring(source)[1]
    flag = f"--{FLAGS.get(section, section)}.name NAME --help"
    which = f"Name of the {NOUNS[section]}. The keys below belong to this name; {flag} lists those of another."
    known = {"name": which, **{key: texts[key] for key in section_arguments(section, name) if texts.get(key)}}
    return "\n".join([f"{name}: {what}", "", "Args:", *(f"    {key}: {text}" for key, text in known.items())])
