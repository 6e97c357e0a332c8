"""`jaxfed doctor`: what it says, and one line for each thing that is wrong."""

import os
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import jax
import pytest

from jaxfed.cli import doctor, main

ROOT = Path(__file__).parents[2]


@pytest.fixture
def diagnosis(monkeypatch, capsys, tmp_path):
    """run() -> (what it prints, its problems), with a data folder of its own."""
    monkeypatch.setenv("JAXFED_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(sys, "argv", ["jaxfed", "doctor"])

    def run():
        code = 0
        try:
            main.main()
        except SystemExit as exit:
            code = exit.code
        out = capsys.readouterr().out
        problems = [line.strip() for line in out.partition("problems\n")[2].splitlines()]
        assert code == (0 if problems == ["none"] else 1)
        return out, problems

    return run


def test_all_is_well(diagnosis, tmp_path):
    out, problems = diagnosis()
    assert problems == ["none"]
    for package in doctor.PACKAGES:
        assert f"{package:<18}{metadata.version(package)}" in out
    assert "8 x cpu (cpu)" in out
    assert f"{tmp_path}/data ($JAXFED_DATA)  not there yet" in out
    assert "not fetched: jaxfed data ml-100k" in out


def test_every_extra_is_explained():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras.keys() <= doctor.EXTRAS.keys()


def test_folders_are_measured(diagnosis, tmp_path):
    (tmp_path / "data" / "prepared" / "one").mkdir(parents=True)
    (tmp_path / "data" / "prepared" / "one" / "x.npy").write_bytes(bytes(2_500_000))
    out, problems = diagnosis()
    assert problems == ["none"]
    assert "2.5 MB in 1 files" in out
    assert f"{'prepared sets':<18}1" in out


def test_a_folder_that_is_a_file(diagnosis, tmp_path):
    (tmp_path / "data").write_text("")
    problems = diagnosis()[1]
    assert f"{tmp_path}/data is a file, a folder is needed: set JAXFED_DATA to a folder of your own" in problems


def test_no_write_access(diagnosis, tmp_path, monkeypatch):
    """The superuser may write everywhere, so the system is asked in place of a folder."""
    (tmp_path / "data").mkdir()
    may = os.access
    mine = tmp_path / "data"
    monkeypatch.setattr(os, "access", lambda path, mode: may(path, mode) and Path(path) != mine)
    problems = diagnosis()[1]
    assert problems == [f"no write access to {tmp_path}/data: set JAXFED_DATA to a folder of your own"]


def test_others_may_write(diagnosis, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data").chmod(0o777)
    problems = diagnosis()[1]
    assert problems == [
        f"other users may write to {tmp_path}/data, so it cannot be trusted: chmod go-w {tmp_path}/data"
    ]


def test_a_full_disk(diagnosis, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 5_000_000}))
    assert all(each.startswith("only 5 MB are free at ") for each in diagnosis()[1])


def test_damaged_data(diagnosis, tmp_path):
    (tmp_path / "data" / "ml-100k").mkdir(parents=True)
    for name in ("u.data", "u.item", "u.user"):
        (tmp_path / "data" / "ml-100k" / name).write_text("1")
    problems = diagnosis()[1]
    assert problems == [f"{tmp_path}/data/ml-100k is damaged: remove it, then jaxfed data ml-100k"]


@pytest.mark.parametrize(
    ("platforms", "version", "problem"),
    [
        ("", "", "an NVIDIA GPU is here and JAX computes on the CPU: pip install 'jaxfed[cuda13]'"),
        ("cpu", "", "an NVIDIA GPU is here and JAX_PLATFORMS=cpu hides it: unset JAX_PLATFORMS"),
        ("", "0.10", "an NVIDIA GPU is here and JAX does not use it: its driver may be older than"),
    ],
)
def test_a_gpu_that_is_not_used(monkeypatch, platforms, version, problem):
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: str(path) == "/dev/nvidia0" or exists(path))
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.setattr(doctor, "installed_version", lambda package: version)
    (found,) = doctor.unused_accelerator()
    assert found.startswith(problem)


def test_no_device(diagnosis, monkeypatch):
    def fail():
        raise RuntimeError("Unable to initialize backend 'cuda'\nand more")

    monkeypatch.setattr(jax, "devices", fail)
    assert diagnosis()[1] == ["JAX finds no device: Unable to initialize backend 'cuda'"]


def test_old_and_missing_packages(monkeypatch):
    monkeypatch.setattr(metadata, "requires", lambda name: ["numpy>=99.1", "no-such-package", "x; extra == 'dev'"])
    problems: list[str] = []
    doctor.version_lines(problems)
    numpy = metadata.version("numpy")
    assert problems == [
        f"numpy {numpy} is older than jaxfed needs: pip install 'numpy>=99.1'",
        "no-such-package is not installed: pip install no-such-package",
    ]


@pytest.mark.parametrize(("text", "numbers"), [("0.12.8", (0, 12, 8)), ("2.0rc1", (2, 0)), ("1.", (1,)), ("x", ())])
def test_version_numbers(text, numbers):
    assert doctor.version_numbers(text) == numbers


def test_it_imports_neither_optax_nor_orbax():
    """So that it answers within two seconds."""
    code = "import sys; sys.argv = ['jaxfed', 'doctor']\nfrom jaxfed.cli import main\n"
    code += "try: main.main()\nexcept SystemExit: pass\n"
    code += "print(sorted({'optax', 'flax', 'orbax', 'pyarrow', 'tyro', 'scipy'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
