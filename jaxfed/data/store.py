"""Prepared data on disk, mapped into memory: a large data set is split and laid out once."""

import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from jaxfed.data.movielens_files import cache
from jaxfed.data.tables import companions

FORMAT = 5  # of what is kept; raise it when `Population` or `Dataset` changes


def place(section: dict[str, Any]) -> Path:
    """Where the data of a [data] section are kept: by its keys and by size and time of the files it names."""
    named = [os.path.expanduser(x) for x in section.values() if isinstance(x, str)]
    named += [str(file) for x in named for file in companions(Path(x)).values()]
    named += [str(part) for x in named if os.path.isdir(x) for part in sorted(Path(x).rglob("*.parquet"))]
    files = [os.path.abspath(x) for x in named if os.path.isfile(x)]
    stamps = [(name, os.stat(name).st_size, os.stat(name).st_mtime_ns) for name in files]
    key = hashlib.sha256(json.dumps([FORMAT, np.__version__, section, stamps], sort_keys=True).encode())
    return cache() / "prepared" / key.hexdigest()[:24]


def keep(folder: Path, value: Any) -> None:
    """Writes a value (tuples and dicts of arrays) whole or not at all; the arrays apart, as they are in memory."""
    buffers: list[pickle.PickleBuffer] = []
    head = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for number, buffer in enumerate(buffers):
        with open(partial / str(number), "wb") as file:
            file.write(buffer.raw())
    (partial / "head").write_bytes(head)
    if kept(folder) is None:  # damaged
        shutil.rmtree(folder, ignore_errors=True)
    try:
        partial.rename(folder)
    except OSError:  # another process was first
        shutil.rmtree(partial, ignore_errors=True)


def kept(folder: Path) -> Any | None:
    """The value, its arrays mapped from disk and read-only; None where there is none that can be read."""
    try:
        head = (folder / "head").read_bytes()
        files = sorted((file for file in folder.iterdir() if file.name != "head"), key=lambda file: int(file.name))
        buffers = [np.memmap(file, np.uint8, "r") if file.stat().st_size else b"" for file in files]
        return pickle.loads(head, buffers=buffers)
    except (OSError, pickle.UnpicklingError, ValueError, EOFError, LookupError, TypeError, AttributeError, ImportError):
        return None
