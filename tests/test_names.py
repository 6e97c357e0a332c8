"""Measures of names and of lengths: a function is a verb phrase or a noun of the field, and one name means one thing.

A name that fails here is better said otherwise, or has a word that tests/glossary.toml lacks: then it is added, once.
"""

import ast
import tomllib
from collections import defaultdict
from pathlib import Path

import pytest

from jaxfed.config.registry import REGISTRY

ROOT = Path(__file__).parent.parent / "jaxfed"
ONE_WORD, LONG, LONGER = 0.25, 0.04, 40  # share of names of one word; share of functions longer than so many lines
LONGEST, LONGEST_FILE = 60, 300  # lines of a function and of a file
TOO_LONG_FILES: set[str] = set()  # what is left to shorten; nothing is added to it
SAME = {"main"}  # may be defined twice: what an entry point calls

GLOSSARY = tomllib.loads((Path(__file__).parent / "glossary.toml").read_text())
VERBS, OPENINGS, NOUNS, TERMS = ({*GLOSSARY[key].split()} for key in ("verbs", "openings", "nouns", "terms"))
JOINTS = {"of", "by", "at", "over", "through", "to", "from", "and", "per", "since", "within"}  # end a phrase's head


def definitions():
    """(file, definition) of every public function and class that a module defines."""
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                yield str(path.relative_to(ROOT)), node


def functions():
    return [(path, node) for path, node in definitions() if isinstance(node, ast.FunctionDef)]


def lengths():
    """(lines, file, name) of every function and method of a module, the longest first."""
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            for each in node.body if isinstance(node, ast.ClassDef) else [node]:
                if isinstance(each, ast.FunctionDef):
                    found.append((each.end_lineno - each.lineno + 1, str(path.relative_to(ROOT)), each.name))
    return sorted(found, reverse=True)


def registered():
    return {name.replace("-", "_") for section in REGISTRY.values() for name in section}


def test_few_names_are_one_word():
    names = [node.name for _, node in functions()]
    short = [name for name in names if "_" not in name]
    assert len(short) <= ONE_WORD * len(names), sorted(short)


def test_no_public_name_is_defined_twice():
    where = defaultdict(set)
    for path, node in definitions():
        where[node.name].add(path)
    assert not {name: sorted(paths) for name, paths in where.items() if len(paths) > 1 and name not in SAME}


def test_every_class_is_a_noun():
    assert not [node.name for _, node in definitions() if isinstance(node, ast.ClassDef) and not node.name[0].isupper()]


def is_well_named(name):
    """Whether a name is a verb phrase, a question, a phrase whose head is a noun of the glossary, or a term."""
    words = name.split("_")
    if words[0] in VERBS | OPENINGS or name in TERMS or name in registered():
        return True
    joints = [i for i, word in enumerate(words) if word in JOINTS and i]
    return any(words[i - 1] in NOUNS for i in [*joints, len(words)])


def test_functions_are_verb_phrases_or_nouns_of_the_field():
    odd = [(path, node.name) for path, node in functions() if not is_well_named(node.name)]
    assert not odd, f"say what they do or give ({odd}), or add a word to tests/glossary.toml"


def test_no_function_is_too_long():
    assert not [each for each in lengths() if each[0] > LONGEST]


def test_few_functions_are_long():
    every = lengths()
    assert sum(each[0] > LONGER for each in every) <= LONG * len(every)


def test_no_file_is_too_long():
    """But for those of a list, from which goes what no longer is."""
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in ROOT.rglob("*.py")}
    assert {path for path, count in lines.items() if count > LONGEST_FILE} == TOO_LONG_FILES


@pytest.mark.parametrize(
    ("name", "well"),
    [("read_table", True), ("is_table", True), ("table_rows_of", True), ("fedavg", True), ("mine", False)],
)
def test_what_is_well_named(name, well):
    assert is_well_named(name) == well


def test_what_make_test_leaves_out_is_there():
    """A test that has another name now would be run whole."""
    folder = Path(__file__).parent
    for file, tests in tomllib.loads((folder / "main_cases.toml").read_text()).items():
        text = (folder / file).read_text()
        assert not [name for name in tests if f"def {name}(" not in text], file


def test_main_cases_lists_tests_that_exist():
    """Otherwise a renamed test would run all its slow cases in `make test`."""
    here = Path(__file__).parent
    for file, cases in tomllib.loads((here / "main_cases.toml").read_text()).items():
        tree = ast.parse((here / file).read_text())
        assert cases.keys() <= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, file
