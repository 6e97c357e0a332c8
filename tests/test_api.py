"""What `import jaxfed` offers."""

import ast
import doctest
import importlib
import inspect
import re
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import docstring_parser
import pytest

import jaxfed
from jaxfed.config.registry import REGISTRY

ROOT = Path(__file__).parents[1]
EXAMPLES = [path for path in sorted((ROOT / "jaxfed").rglob("*.py")) if ">>> " in path.read_text()]

PUBLIC = [
    "Aggregator",
    "Algorithm",
    "Batches",
    "Batching",
    "Broadcast",
    "Channel",
    "Claims",
    "ClientOutput",
    "ClientWork",
    "Cohort",
    "Config",
    "Edges",
    "Evaluation",
    "Experiment",
    "Logger",
    "Mean",
    "Mechanism",
    "MeshAxes",
    "Method",
    "Model",
    "Parametrization",
    "Partition",
    "Privacy",
    "Run",
    "SUM",
    "Sampler",
    "Section",
    "State",
    "Table",
    "algorithms",
    "at_client",
    "at_server",
    "chain",
    "channels",
    "data",
    "federate",
    "from_config",
    "from_module",
    "gather_then",
    "link",
    "load_run",
    "local_sgd",
    "models",
    "register",
    "sampling",
    "train_seeds",
]


def test_the_public_names_are_these_and_are_there():
    assert sorted(jaxfed.__all__) == sorted(["__version__", *PUBLIC])
    assert sorted(dir(jaxfed)) == sorted(jaxfed.__all__)
    for name in PUBLIC:
        value = getattr(jaxfed, name)
        assert value.__doc__, name
        assert getattr(jaxfed, name) is value


@pytest.mark.parametrize("name", ["algorithms", "channels", "data", "models", "sampling"])
def test_a_subpackage_offers_what_it_says(name):
    package = getattr(jaxfed, name)
    assert sorted(package.__all__) == list(package.__all__)
    for each in package.__all__:
        assert getattr(package, each).__doc__, each


def test_editors_know_every_public_name():
    """Type checkers do not run `__getattr__`: the imports for them name the same things."""
    tree = ast.parse((ROOT / "jaxfed" / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    known = {alias.asname for node in block.body for alias in node.names}
    assert known == {*PUBLIC}


def test_another_name_is_an_attribute_error():
    assert not hasattr(jaxfed, "nothing_of_the_kind")


def test_the_import_alone_is_light():
    code = "import sys, jaxfed; sys.exit(str([m for m in ('jax', 'numpy', 'pyarrow') if m in sys.modules] or '') or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_of_docstrings_run(path):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    before = {section: dict(functions) for section, functions in REGISTRY.items()}  # examples may register others
    failed, tried = doctest.testmod(importlib.import_module(name))
    for section, functions in before.items():
        for added in REGISTRY[section].keys() - functions.keys():
            del REGISTRY[section][added]
    assert (failed, tried > 0) == (0, True)


PACKAGES = ["algorithms", "channels", "data", "models", "sampling"]
MADE_ELSEWHERE = {"Algorithm", "Clients", "Cohort", "State"}  # no program makes one by hand
NOT_OF_THE_USER = {
    "chain",
    "link",
    "local_steps",
    "num_rows",
}  # helpers whose ValueError no argument of their callers can cause
# what no paper is behind
OWN = {
    "channels.clip_per_row",
    "channels.densify",
    "channels.difference",
    "channels.zero_out",
    "models.freeze_leaves",
    "models.from_module",
    "models.low_rank_tables",
    "models.merge_rows",
    "models.popularity",
    "algorithms.Rates",
    "algorithms.central",
    "algorithms.closed_form",
    "algorithms.group_rates",
}


def public_values():
    """{name: function or class} of all that is public, the subpackages' among it."""
    places = {"": jaxfed} | {f"{name}.": getattr(jaxfed, name) for name in PACKAGES}
    named = {place + name: getattr(module, name) for place, module in places.items() for name in module.__all__}
    return {name: value for name, value in named.items() if inspect.isfunction(value) or inspect.isclass(value)}


VALUES = public_values()
FUNCTIONS = [name for name, value in VALUES.items() if inspect.isfunction(value)]


def raises_value_error(function):
    """Whether the body of a function has a `raise ValueError`."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    raised = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise)]
    return any(isinstance(each, ast.Call) and getattr(each.func, "id", "") == "ValueError" for each in raised)


def called_functions(function):
    """The functions that a function calls by their names."""
    own = inspect.unwrap(function)
    tree = ast.parse(textwrap.dedent(inspect.getsource(own)))
    names = {getattr(node.func, "id", "") for node in ast.walk(tree) if isinstance(node, ast.Call)}
    return [own.__globals__[name] for name in names - NOT_OF_THE_USER if inspect.isfunction(own.__globals__.get(name))]


@pytest.mark.parametrize("name", VALUES)
def test_docstrings_explain_each_argument(name):
    value = VALUES[name]
    explained = {each.arg_name: each.description for each in docstring_parser.parse(inspect.getdoc(value)).params}
    if not getattr(value, "_is_protocol", False):  # which has methods alone
        assert [*explained] == [*inspect.signature(value).parameters]
    assert all(explained.values())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstrings_say_what_is_returned_and_raised(name):
    said = docstring_parser.parse(inspect.getdoc(VALUES[name]))
    assert said.returns
    assert said.returns.description
    if any(map(raises_value_error, [VALUES[name], *called_functions(VALUES[name])])):
        assert [each.type_name for each in said.raises] == ["ValueError"]


@pytest.mark.parametrize("name", [name for name in VALUES if name not in MADE_ELSEWHERE | {"data.Clients"}])
def test_docstrings_have_an_example(name):
    """It runs, too: see `test_examples_of_docstrings_run`."""
    example = inspect.getdoc(VALUES[name]).partition("\nExample:\n")[2]
    assert doctest.DocTestParser().get_examples(example)


@pytest.mark.parametrize("name", [name for name in VALUES if name.startswith(("algorithms.", "channels.", "models."))])
def test_docstrings_name_their_source(name):
    """Authors and year, or the name is in the list of what has none."""
    assert bool(re.search(r"[A-Z]\w+.{0,20}\s(19|20)\d\d", inspect.getdoc(VALUES[name]), re.DOTALL)) != (name in OWN)


def test_the_version_is_said_alike_everywhere():
    package = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    citation = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    newest = re.findall(r"^## \[(\d[^]]*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0]
    assert citation
    assert jaxfed.__version__ == package == citation[1] == newest
