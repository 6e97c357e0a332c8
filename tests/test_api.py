"""What `import jaxfed` offers."""

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
    "Broadcast",
    "Channel",
    "Claims",
    "ClientOutput",
    "ClientWork",
    "Cohort",
    "Mean",
    "Mechanism",
    "Method",
    "Model",
    "Population",
    "SUM",
    "Sampler",
    "State",
    "Table",
    "at_client",
    "at_server",
    "chain",
    "client_round",
    "federate",
    "from_arrow",
    "from_module",
    "gather_then",
    "link",
    "local_sgd",
    "open_message",
    "server_model",
    "server_round",
]


def test_the_public_names_are_these_and_are_there():
    assert sorted(jaxfed.__all__) == sorted(["__version__", *PUBLIC])
    assert sorted(dir(jaxfed)) == sorted(jaxfed.__all__)
    for name in PUBLIC:
        value = getattr(jaxfed, name)
        assert value.__doc__, name
        assert getattr(jaxfed, name) is value


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
