"""What jaxfed keeps on disk: prepared data, fetched data and compiled programs, listed and removed.

Only what jaxfed writes is removed: files and folders with its names, of this user, that are no links. Whatever else
lies in the same folders stays.
"""

import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from jaxfed.data.sources.movielens_files import FILES, KNOWN, SUMS, cache_folder, file_sha256
from jaxfed.data.sources.pretrained import FILES as MODEL_FILES

KINDS = ("prepared", "fetched", "programs")
PREPARED = re.compile(r"[0-9a-f]{24}(\.\w+\.partial)?")  # folders of `write_cache`, whole ones and those it is at
PREPARED_FILE = re.compile(r"head\.json|\d+\.npy")
HALF_FETCHED = re.compile(r"(ml-100k|minilm)\..+")
FETCHED_MODEL = re.compile("|".join(map(re.escape, MODEL_FILES)))
TEXT_VECTORS = re.compile(r"[0-9a-f]{32}\.npy|tmp\w+\.part")  # of `keep_vectors`
BUILT, BUILT_PARTS = re.compile(r"[0-9a-f]{16}"), re.compile("jaxfed_ml100k|downloads")  # of tensorflow-datasets
PROGRAM = re.compile(r".+-[0-9a-f]{64}-(cache|atime)|.+-[0-9a-f]{64}")  # as JAX calls them
ANYTHING = re.compile(".*")
BEING_WRITTEN = 3600  # seconds since a half-written folder changed, in which somebody may be at it


class CacheEntry(NamedTuple):
    """Something that is kept, in a folder of its own."""

    kind: str  # one of KINDS
    folder: Path
    parts: tuple[Path, ...]  # the files and folders in it that jaxfed wrote
    others: int  # how many other files and folders are in it
    size: int  # bytes of the parts
    changed: float  # when one of them was last written, seconds since 1970
    origin: dict[str, Any]  # the [data] section that it was prepared for; empty where that is not known
    held: str = ""  # why it is not removed; "": it may be


def list_cache(folder: Path | None = None) -> list[CacheEntry]:
    """What jaxfed keeps in its folder, by kind, the latest first."""
    root = folder or cache_folder()
    found = [
        *(find_entry("prepared", each, PREPARED_FILE) for each in find_folders(root / "prepared", PREPARED)),
        *(find_entry("fetched", each, match_fetched_files(each)) for each in find_folders(root, re.compile("ml-100k"))),
        *(find_entry("prepared", each, TEXT_VECTORS) for each in find_folders(root, re.compile("text"))),
        *(find_entry("fetched", each, FETCHED_MODEL) for each in find_folders(root, re.compile("minilm"))),
        *(find_entry("fetched", each, ANYTHING) for each in find_folders(root, HALF_FETCHED)),
        *(find_entry("fetched", each, BUILT_PARTS) for each in find_folders(root / "tfds", BUILT)),
        *(find_entry("programs", each, PROGRAM) for each in find_folders(root, re.compile("xla"))),
    ]
    entries = [each for each in found if each.parts]
    return sorted(entries, key=lambda entry: (KINDS.index(entry.kind), -entry.changed))


def find_folders(folder: Path, name: re.Pattern[str]) -> list[Path]:
    """The folders in a folder that are called so, without links."""
    if not folder.is_dir():
        return []
    return [each for each in sorted(folder.iterdir()) if name.fullmatch(each.name) and is_plain(each) and each.is_dir()]


def match_fetched_files(folder: Path) -> re.Pattern[str]:
    """The names of the raw files of MovieLens in a folder that were fetched, and not put there by somebody else."""
    if (folder / SUMS).is_file():
        lines = (folder / SUMS).read_text("utf-8", "replace").splitlines()
        names = [
            SUMS,
            *({line.partition("  ")[2] for line in lines} & {name for each in FILES.values() for name in each}),
        ]
    else:  # of a wheel, by earlier versions
        names = [
            name for name, sha256 in KNOWN.items() if (folder / name).is_file() and file_sha256(folder / name) == sha256
        ]
    return re.compile("|".join(map(re.escape, names)) or "(?!)")


def is_plain(path: Path) -> bool:
    """Whether a path is a file or a folder and no link to one."""
    return not path.is_symlink() and (path.is_dir() or path.is_file())


def find_entry(kind: str, folder: Path, name: re.Pattern[str]) -> CacheEntry:
    """What is kept in a folder. name: what the files and folders are called that jaxfed writes there."""
    inside = sorted(folder.iterdir())
    parts = tuple(each for each in inside if name.fullmatch(each.name) and is_plain(each))
    states = [each.stat(follow_symlinks=False) for part in parts for each in iterate_files(part)]
    changed = max((state.st_mtime for state in states), default=folder.stat().st_mtime)
    half_written = folder.name.endswith(".partial") or HALF_FETCHED.fullmatch(folder.name)
    held = "another process may be writing it" if half_written and time.time() - changed < BEING_WRITTEN else ""
    if hasattr(os, "getuid") and folder.stat().st_uid != os.getuid():
        held = "it belongs to another user"
    size = sum(state.st_size for state in states)
    return CacheEntry(kind, folder, parts, len(inside) - len(parts), size, changed, read_origin(folder), held)


def iterate_files(path: Path) -> Iterator[Path]:
    """A file; of a folder all files in it and in its folders."""
    if not path.is_dir() or path.is_symlink():
        yield path
        return
    for each in path.iterdir():
        yield from iterate_files(each)


def read_origin(folder: Path) -> dict[str, Any]:
    """The [data] section that data in a folder were prepared for; empty where it is not known."""
    with suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
        return dict(json.loads((folder / "head.json").read_text())["origin"])
    return {}


def clear_cache(entries: Sequence[CacheEntry]) -> Iterator[tuple[CacheEntry, str]]:
    """Removes what `list_cache` found, one after the other.

    Yields:
        (the entry, why something of it stays; "": nothing does).
    """
    for entry in entries:
        if entry.held:
            yield entry, entry.held
            continue
        failed = ""
        for part in entry.parts:
            try:
                shutil.rmtree(part) if part.is_dir() else part.unlink()
            except FileNotFoundError:  # another process was first
                continue
            except OSError as error:
                failed = f"{part.name} cannot be removed: {error.strerror}"
        for folder in (entry.folder, entry.folder.parent):
            with suppress(OSError):  # there is more in it, which is not ours
                folder.rmdir()
        others = "other file or folder stays" if entry.others == 1 else "other files or folders stay"
        yield entry, failed or (f"{entry.others:,} {others} in it" if entry.others else "")
