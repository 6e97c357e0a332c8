"""What `import jaxfed` offers."""

import ast
import doctest
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import jaxfed

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
    "Edges",
    "Evaluation",
    "Experiment",
    "Logger",
    "Mean",
    "Mechanism",
    "Method",
    "Model",
    "Parametrization",
    "Privacy",
    "Run",
    "SUM",
    "Sampler",
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
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert (failed, tried > 0) == (0, True)
