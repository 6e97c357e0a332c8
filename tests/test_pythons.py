"""The other Pythons and systems that the project claims: what differs there."""

import subprocess
import sys

import jax
import numpy as np

from jaxfed.data.interactions import data_digest
from jaxfed.data.sources import movielens
from tests.conftest import known_flags

# Windows has none of these; what others import of them, they import where they are. Two names are missing there, too.
WINDOWS = """
import builtins, os, signal, sys
import jax, orbax.checkpoint, psutil
real, missing = builtins.__import__, ("fcntl", "resource", "grp", "pwd", "termios")

def windows(name, globals=None, *rest):
    if name in missing and (globals or {}).get("__name__", "").startswith("jaxfed"):
        raise ModuleNotFoundError(name)
    return real(name, globals, *rest)

builtins.__import__ = windows
del os.sysconf, signal.SIGHUP
"""


def test_flags_that_this_jaxlib_does_not_know_are_left_out():
    known = "--xla_backend_optimization_level=0"
    assert known_flags(known) == known
    assert known_flags(f"--xla_no_such_flag=1 {known}") == known


def test_movielens_without_array_record(monkeypatch):
    """Which is installed on Linux only: the same rows, titles and features from the raw files."""
    prepared = movielens.ml_100k()
    monkeypatch.setitem(sys.modules, "array_record", None)
    monkeypatch.delattr(movielens, "build_tfds")  # of the data set that needs it
    again = movielens.ml_100k()
    assert data_digest(again) == movielens.ORDER
    pairs = zip(*(map(np.asarray, jax.tree.leaves(each)) for each in (again, prepared)), strict=True)
    assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in pairs)


def test_what_windows_does_not_have_is_not_imported(tmp_path):
    """Simulated, by hiding it: the modules load, memory is counted, a run's folder is locked."""
    code = f"""{WINDOWS}
import jaxfed.cli.main, jaxfed.training.loop, jaxfed.bench.workloads, jaxfed.cli.launch
from pathlib import Path
from jaxfed.training.run_dir import lock_folder
from jaxfed.data.room import device_memory
assert device_memory() > 1e8
with lock_folder(Path({str(tmp_path)!r})):
    try:
        with lock_folder(Path({str(tmp_path)!r})):
            raise SystemExit("locked twice")
    except ValueError as error:
        assert "another process" in str(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
