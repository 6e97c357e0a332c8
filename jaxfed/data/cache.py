"""Prepared data on disk, mapped into memory: a large data set is split and laid out once.

A folder holds arrays as NumPy's files and `head.json`, which says what they are parts of, their lengths and SHA-256.
Nothing of it is code. A folder that other users may write to, or that is another user's, is not read. The programs that
JAX compiles lie in the same cache (`xla/`), are code, and are not checked: $JAXFED_DATA must be a folder of one's own.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from jaxfed.data.sources.movielens_files import cache_folder
from jaxfed.data.sources.tables import PATHS, companions

FORMAT = 10  # of what is kept; raise it when `Population` or `Dataset` changes
OTHERS_MAY_WRITE = 0o022
SYSTEM = 0  # the user that may write everywhere


def cache_place(section: dict[str, Any]) -> Path:
    """Where the data of a [data] section are kept: by its keys and by size and time of the files it names."""
    section = section | {key: find_full_path(section[key]) for key in PATHS if key in section}
    values = [section[key] for key in PATHS if section.get(key)]
    named = [os.path.expanduser(x) for value in values for x in ([value] if isinstance(value, str) else value)]
    named += [str(file) for x in named for file in companions(Path(x)).values()]
    named += [str(part) for x in named if os.path.isdir(x) for part in sorted(Path(x).rglob("*.parquet"))]
    files = [os.path.abspath(x) for x in named if os.path.isfile(x)]
    stamps = [(name, os.stat(name).st_size, os.stat(name).st_mtime_ns) for name in files]
    key = hashlib.sha256(json.dumps([FORMAT, np.__version__, section, stamps], sort_keys=True).encode())
    return cache_folder() / "prepared" / key.hexdigest()[:24]


def find_full_path(value: str | Sequence[str]) -> Any:
    """The whole path of what is there, or of each of several; any other value as it is."""
    if not isinstance(value, str):
        return [find_full_path(each) for each in value]
    path = os.path.expanduser(value)
    return os.path.abspath(path) if value and os.path.exists(path) else value


def flatten_value(value: Any, arrays: list[np.ndarray]) -> Any:
    """A value in JSON's types, its arrays put at the end of `arrays` and named by their number there.

    Raises TypeError for what is neither an array, a tuple, a dict by words, nor plain.
    """
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        arrays.append(value)
        return {"array": len(arrays) - 1}
    if isinstance(value, tuple):
        parts = [flatten_value(each, arrays) for each in value]
        return {"kind": type(value).__name__, "parts": parts}
    if isinstance(value, dict):
        return {"keys": list(value), "parts": [flatten_value(each, arrays) for each in value.values()]}
    plain = value.item() if isinstance(value, np.generic) else value
    if plain is not None and not isinstance(plain, bool | int | float | str):
        raise TypeError(f"{type(value).__name__} cannot be kept")
    return plain


def unflatten_value(value: Any, arrays: Sequence[np.ndarray], kinds: dict[str, Any]) -> Any:
    """Undoes `flatten_value`. kinds: the named tuples that there may be, by name."""
    if not isinstance(value, dict):
        return value
    if "array" in value:
        return arrays[value["array"]]
    parts = [unflatten_value(each, arrays, kinds) for each in value["parts"]]
    if "keys" in value:
        return dict(zip(value["keys"], parts, strict=True))
    return tuple(parts) if value["kind"] == "tuple" else kinds[value["kind"]](*parts)


def head_digest(head: dict[str, Any]) -> str:
    """SHA-256 of a head without its own digest."""
    rest = {key: value for key, value in head.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def stored_file_sha256(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_cache(folder: Path, value: Any, kinds: Sequence[type], origin: dict[str, Any] | None = None) -> None:
    """Writes a value (named tuples `kinds`, tuples and dicts of arrays) whole or not at all, and to disk.

    origin: the [data] section that it is of, in JSON's types, for who lists what is kept.

    Raises OSError where it cannot be written, TypeError for another value.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(".partial", f"{folder.name}.", folder.parent))  # for this user alone
    try:
        arrays: list[np.ndarray] = []
        head: dict[str, Any] = {"format": FORMAT, "name": folder.name, "value": flatten_value(value, arrays)}
        head["origin"] = {key: find_full_path(each) if key in PATHS else each for key, each in (origin or {}).items()}
        head["files"] = [write_array(partial / f"{number}.npy", array) for number, array in enumerate(arrays)]
        head["sha256"] = head_digest(head)
        (partial / "head.json").write_text(json.dumps(head))
        for name in (partial / "head.json", partial):
            sync_to_disk(name)
        found, wrong = read_cache(folder, kinds)
        if found is None and wrong and not find_distrust(folder):
            shutil.rmtree(folder)  # damaged
        if not folder.exists():  # else another process was first, or it is not ours
            partial.rename(folder)
            sync_to_disk(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_array(path: Path, array: np.ndarray) -> tuple[int, str]:
    """(length, SHA-256) of the file that an array was written to."""
    np.save(path, array, allow_pickle=False)
    sync_to_disk(path)
    return path.stat().st_size, stored_file_sha256(path)


def sync_to_disk(path: Path) -> None:
    """Returns once a file or a folder is on disk: a rename may come before what it names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def find_distrust(folder: Path) -> str:
    """Why what lies in a folder may be anybody's; "": only this user, or the system's, can have written it."""
    status = folder.stat()
    if status.st_uid not in (os.getuid(), SYSTEM):
        return "it belongs to another user"
    return "other users may write to it" if status.st_mode & OTHERS_MAY_WRITE else ""


def read_cache(folder: Path, kinds: Sequence[type]) -> tuple[Any | None, str]:
    """What `keep` wrote.

    Args:
        folder: where it may lie.
        kinds: the named tuples that it may hold.

    Returns:
        (the value, its arrays mapped from disk and read-only, ""), or (None, why not, "" where there is no folder).
    """
    if not folder.exists():
        return None, ""
    if wrong := find_distrust(folder):
        return None, f"prepared data in {folder} are not used: {wrong}"
    try:
        head = json.loads((folder / "head.json").read_text())
        if head["sha256"] != head_digest(head) or (head["format"], head["name"]) != (FORMAT, folder.name):
            raise ValueError("head.json is not what was written")
        files = [folder / f"{number}.npy" for number in range(len(head["files"]))]
        sizes, digests = zip(*head["files"], strict=True)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for file, size, now, digest in zip(files, sizes, pool.map(stored_file_sha256, files), digests, strict=True):
                if (file.stat().st_size, now) != (size, digest):
                    raise ValueError(f"{file.name} is not what was written")
        arrays = [np.load(file, mmap_mode="r", allow_pickle=False) for file in files]
        return unflatten_value(head["value"], arrays, {kind.__name__: kind for kind in kinds}), ""
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        return None, f"prepared data in {folder} were damaged ({error}) and are made anew"
