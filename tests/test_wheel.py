"""The wheel works without the checkout that it was built from."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this checkout."""
    into = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(into)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    return next(into.glob("*.whl"))


def test_what_is_in_the_wheel(wheel):
    with zipfile.ZipFile(wheel) as inside:
        names = set(inside.namelist())
        known = {name for name in names if name.startswith("jaxfed/configs/") and name.endswith(".toml")}
        files = {f"jaxfed/{path.relative_to(ROOT)}": path for path in (ROOT / "configs").rglob("*.toml")}
        assert known == files.keys()
        for name, path in files.items():
            assert inside.read(name) == path.read_bytes()
        modules = {str(path.relative_to(ROOT)) for path in (ROOT / "jaxfed").rglob("*.py")}
        assert {name for name in names if name.endswith(".py")} == modules  # neither tests nor developers' scripts
        metadata = next(inside.read(name).decode() for name in names if name.endswith("METADATA"))
        commands = next(inside.read(name).decode() for name in names if name.endswith("entry_points.txt"))
    assert {f"jaxfed/serving/page/{name}" for name in ("index.html", "page.js", "page.css", "icon.svg")} <= names
    assert "jaxfed = jaxfed.__main__:main" in commands
    for extra in ("cuda13", "tpu"):
        assert f"Provides-Extra: {extra}\n" in metadata
        assert f"Requires-Dist: jax[{extra}]>=0.10; extra == '{extra}'" in metadata


def test_the_source_distribution_makes_the_same_wheel(wheel, tmp_path):
    build = [sys.executable, "-m", "hatchling", "build", "--directory", str(tmp_path)]
    subprocess.run([*build, "--target", "sdist"], cwd=ROOT, check=True, capture_output=True)
    source = next(tmp_path.glob("*.tar.gz"))
    with tarfile.open(source) as inside:
        inside.extractall(tmp_path, filter="data")
    unpacked = tmp_path / source.name.removesuffix(".tar.gz")
    assert {"tests", "docs", "scripts", "CHANGELOG.md"} <= {path.name for path in unpacked.iterdir()}
    subprocess.run([*build, "--target", "wheel"], cwd=unpacked, check=True, capture_output=True)
    with zipfile.ZipFile(wheel) as ours, zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as theirs:
        assert set(theirs.namelist()) == set(ours.namelist())


def test_the_container_has_what_the_package_is_built_of():
    """What the Containerfile copies is there, and nothing else reaches the builder."""
    words = (ROOT / "Containerfile").read_text().splitlines()
    copied = {name for line in words if line.startswith("COPY") for name in line.split()[1:-1]}
    assert all((ROOT / name).exists() for name in copied)
    kept = {line[1:] for line in (ROOT / ".containerignore").read_text().splitlines() if line.startswith("!")}
    assert kept == copied


def test_what_the_code_imports_is_a_dependency_of_its_own():
    """And not of another package that may drop it: these are for other systems, or for the command line."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"docstring-parser", "filelock", "platformdirs", "psutil"} <= set(project["dependencies"])


@pytest.mark.full
def test_the_wheel_alone(wheel, tmp_path):
    """In a new environment, in another folder: built-in configurations, one to start from, and a run. What the wheel
    needs is that of this environment, as a package index may be far away."""
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / ("Scripts" if os.name == "nt" else "bin") / "python"
    ask = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.run(ask, check=True, capture_output=True, text=True).stdout.strip())
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    away = tmp_path / "away"
    away.mkdir()
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "XLA"))}

    def jaxfed(*words, code=0):
        command = [str(python.with_name("jaxfed")), *words]
        done = subprocess.run(command, cwd=away, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    where = subprocess.run([str(python), "-c", "import jaxfed; print(jaxfed.__file__)"], cwd=away, env=env, text=True,
                           capture_output=True, check=True).stdout  # fmt: skip
    assert where.startswith(str(site))
    assert jaxfed("--version").startswith("jaxfed ")
    assert "--model.dim" in jaxfed("train", "synthetic_1k", "--help")
    short = ["--rounds", "2", "--evaluation.every", "1", "--data.users", "60", "--cohort.size", "20"]
    assert "test/sampled" in jaxfed("train", "synthetic_1k", *short, "--out", "runs/first")
    assert (away / "runs/first/summary.json").exists()
    assert "runs/first" in jaxfed("evaluate", "runs/first")
    assert "synthetic_1k.toml is written" in jaxfed("init", "synthetic_1k")
    assert "60 users" in jaxfed("data", "synthetic_1k.toml", "--users", "60")
    assert 'did you mean "synthetic_1k"?' in jaxfed("train", "configs/synthetic_1k.toml", code=2)
    (away / "my.csv").write_text("user,item\n" + "".join(f"{u},{i}\n" for u in range(20) for i in range(u % 5, 12)))
    table = jaxfed("reproduce", "--table", "my.csv", "--quick", "--only", "popularity")
    assert "popularity: QUICK" in table
    assert not list(site.glob("jaxfed/configs/results/*.partial"))
