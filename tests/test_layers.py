"""The arrows of the architecture, read off the imports: which folder may import which, and no circle of files."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "jaxfed"

# what the files of a folder may import of jaxfed, beside each other
MAY: dict[str, set[str]] = {
    "core": set(),
    "secagg": set(),
    "channels": {"core"},
    "models": {"core"},
    "privacy": {"core"},
    "algorithms": {"core", "channels"},
    "attacks": {"core", "channels"},
    "data": {"core"},
    "sampling": {"core", "data"},
    "evaluation": {"core", "data", "models"},
    "config": {"core", "channels", "models", "privacy", "algorithms", "attacks", "data", "sampling", "evaluation"},
}
MAY["training"] = MAY["config"] | {"config"}
MAY["deployment"] = MAY["training"] | {"training", "export", "secagg"}
MAY["bench"] = MAY["training"] | {"training"}
MAY["export"] = MAY["training"] | {"training"}
MAY["reports"] = MAY["training"] | {"training"}
MAY["serving"] = {"core", "export"}  # it runs exports, not runs
MAY["cli"] = MAY["bench"] | {"bench", "deployment", "export", "reports", "serving"}
PURE = ("core", "secagg", "channels", "models", "algorithms", "attacks", "privacy", "evaluation")
FILES_OF_THE_SHELL = {"core/processes.py", "privacy/renyi.py"}  # the environment; the log of a library, kept quiet
TOP = {"__init__.py", "__main__.py"}
SHELL = {"open", "print", "input"}
CLOCKS = {"time", "datetime", "random", "os", "sys", "logging", "pathlib", "subprocess"}


def modules():
    return sorted(ROOT.rglob("*.py"))


def name_of(path):
    return str(path.relative_to(ROOT))


def imports(path, everywhere=True):
    """(modules of jaxfed, other packages) that a file imports; not everywhere: when it is imported itself."""
    ours, others = set(), set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree) if everywhere else tree.body:
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{each.name}" for each in node.names]
        for name in names:
            if name.split(".")[0] == "jaxfed":
                ours.add(name)
            else:
                others.add(name.split(".")[0])
    return ours, others


def file_of(module):
    """The file of jaxfed that `module`, or a name in it, is of; None: the package itself."""
    parts = module.split(".")[1:]
    while parts:
        for path in (ROOT.joinpath(*parts).with_suffix(".py"), ROOT.joinpath(*parts, "__init__.py")):
            if path.exists():
                return path
        parts = parts[:-1]
    return None


@pytest.mark.parametrize("path", [each for each in modules() if name_of(each) not in TOP], ids=name_of)
def test_arrows(path):
    folder = path.relative_to(ROOT).parts[0]
    wanted = {each.split(".")[1] for each in imports(path)[0]} - {folder, "__version__", "__main__"}
    assert not wanted - MAY[folder], f"{name_of(path)} must not import of {sorted(wanted - MAY[folder])}"


def test_every_folder_has_a_place():
    assert {each.name for each in ROOT.iterdir() if (each / "__init__.py").exists()} == MAY.keys()
    assert {each.name for each in ROOT.glob("*.py")} == TOP


def test_no_circle_of_files():
    left = {
        each: {file_of(name) for name in imports(each)[0]} - {each, None, ROOT / "__init__.py"} for each in modules()
    }
    while free := [each for each, wanted in left.items() if not wanted & left.keys()]:
        for each in free:
            del left[each]
    circle = {name_of(each): sorted(name_of(other) for other in wanted & left.keys()) for each, wanted in left.items()}
    assert not circle


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_the_core_is_pure(path):
    """No clock, no file, no print, no global randomness below the shell."""
    if path.relative_to(ROOT).parts[0] not in PURE or name_of(path) in FILES_OF_THE_SHELL:
        return
    assert not imports(path)[1] & CLOCKS
    calls = [
        node.func.id
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    ]
    assert not SHELL & set(calls)


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_guides(path):
    """Shallow inheritance; nothing called utils."""
    assert path.stem not in ("utils", "helpers", "common", "misc")
    known = {
        "NamedTuple",
        "Protocol",
        "Enum",
        "IntEnum",
        "logging.Handler",
        "nn.Module",
        "tfds.core.GeneratorBasedBuilder",
        "BaseModel",  # of pydantic: the body of a request
        "ValueError",
    }
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef):
            assert {ast.unparse(base) for base in node.bases} <= known, f"{path}: {node.name}"
