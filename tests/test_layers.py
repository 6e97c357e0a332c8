"""The arrows of the architecture, read off the imports.

types < tree < rows < channel < channels/*          rows < work < works/*
{channel, work} < placement-using federate < algorithms < experiment < train < cli
types < tree < {models, data, cohort, metrics < evaluate};  channels, works, models and data do not know each other
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "jaxfed"

# what a module (or every module of a package) may import of jaxfed
MAY = {
    "types": set(),
    "malice": set(),
    "excerpt": set(),
    "tree": {"types"},
    "rows": {"types", "tree"},
    "channel": {"types", "tree", "rows"},
    "channels": {"types", "tree", "rows", "channel", "channels", "cohort", "malice"},
    "wire": {"types", "tree", "rows", "channel"},
    "inference": {"types", "rows", "channels"},
    "work": {"types", "tree", "rows"},
    "works": {"types", "tree", "rows", "work", "works"},
    "server_optimizers": set(),
    "placement": {"types", "tree", "rows"},
    "memory": {"types", "rows"},
    "download": {"types", "tree", "rows", "channel"},
    "state": {"types", "tree", "rows", "channel", "work", "placement", "memory"},
    "client_side": {"types", "tree", "rows", "channel", "state"},
    "server_side": {"types", "tree", "rows", "channel", "state"},
    "federate": {"types", "channel", "work", "placement", "memory", "state", "client_side", "server_side"},
    "merge": {"types", "federate"},
    "hierarchy": {"types", "tree", "rows", "channel", "work", "works", "federate"},
    "algorithms": {"types", "channel", "channels", "work", "works", "federate"},
    "models": {"types", "tree", "rows", "models"},
    "data": {"types", "tree", "work", "malice", "excerpt", "data"},  # `work` for the shape of its batches
    "cohort": {"types"},
    "clock": {"excerpt", "data"},
    "arrivals": {"clock", "cohort"},
    "metrics": {"types"},
    "renyi": set(),
    "sensitivity": {"types", "rows", "channel"},
    "privacy_loss": set(),
    "privacy": {"types", "renyi", "privacy_loss", "channel", "sensitivity"},
    "evaluate": {"types", "tree", "rows", "channel", "data", "memory", "metrics", "models", "placement"},
    "processes": set(),
    "masks": set(),
    "messages": set(),
    "secagg": {"masks", "messages"},
    "homomorphic": {"messages"},
    "checkpoint": {"types", "tree"},
    "registry": {
        *("types", "rows", "channel", "channels", "works", "server_optimizers", "models", "data"),
        *("cohort", "clock", "arrivals"),
    },
    "docstrings": {"registry"},
    "config": {"excerpt", "registry", "docstrings", "data"},
    "log": set(),
}
CORE = (
    "types",
    "malice",
    "tree",
    "rows",
    "channel",
    "channels",
    "work",
    "works",
    "server_optimizers",
    "placement",
    "memory",
    "download",
    "state",
    "client_side",
    "server_side",
    "federate",
    "merge",
    "hierarchy",
    "algorithms",
    "models",
    "privacy_loss",
    "privacy",
    "inference",
)
SHELL = {"open", "print", "input"}
CLOCKS = {"time", "datetime", "random", "os", "sys", "logging", "pathlib", "subprocess"}


def modules():
    return sorted(ROOT.rglob("*.py"))


def part(path):
    """The module of the top level, or the package, a file belongs to."""
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


def imports(path):
    """{top-level module or package of jaxfed} and {other modules} that a file imports, wherever it does."""
    ours, others = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            names = [f"jaxfed.{a.name}" for a in node.names] if node.module == "jaxfed" else [node.module]
        for name in names:
            parts = name.split(".")
            if parts[0] == "jaxfed":
                ours.add(parts[1])
            else:
                others.add(parts[0])
    return ours, others


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows(path):
    name = part(path)
    if name in MAY:
        extra = imports(path)[0] - MAY[name]
        assert not extra, f"{name} must not import {sorted(extra)}"


@pytest.mark.parametrize("path", [p for p in modules() if part(p) in CORE], ids=lambda p: str(p.relative_to(ROOT)))
def test_the_core_is_pure(path):
    """No clock, no file, no print, no global randomness below the shell."""
    assert not imports(path)[1] & CLOCKS
    calls = [
        n.func.id
        for n in ast.walk(ast.parse(path.read_text()))
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
    ]
    assert not SHELL & set(calls)


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_guides(path):
    """Shallow inheritance; nothing called utils."""
    assert path.stem not in ("utils", "helpers", "common", "misc")
    known = {"NamedTuple", "nn.Module", "tfds.core.GeneratorBasedBuilder"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef):
            assert {ast.unparse(base) for base in node.bases} <= known, f"{path}: {node.name}"


def test_every_module_has_a_place():
    tops = {part(path) for path in modules()} - {"__init__", "__main__"}
    shell = {"experiment", "rounds", "stages", "folder", "train", "runs", "bench", "baselines", "cli", "cli_privacy"}
    shell |= {
        "sweep",
        "cli_sweep",
        "sections",
        "limits",
        "recommend",
        "table",
        "cli_init",
        "reproduce",
        "cli_reproduce",
        "launch",
        "probe",
        "resume",
    }
    assert tops == MAY.keys() | shell
