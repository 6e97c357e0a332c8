"""The folder of a run: whose it is, and files that are written whole or not at all."""

import errno
import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from jaxfed.config.config_files import config_differences, read_config
from jaxfed.config.schema import make_config
from jaxfed.config.settings import Config
from jaxfed.core.excerpt import shorten

OWNER_ALONE = 0o600  # of a file
PRIVATE = 0o700  # of a run's folder: its checkpoints hold what clients keep to themselves
SUMMARY: dict[str, Any] = {  # what every summary says, and others read
    **dict.fromkeys(("rounds", "best_round"), int),
    **dict.fromkeys(("params_sha256", "data_sha256", "server_sees"), str),
    **dict.fromkeys(("seconds", "bytes_up_per_client", "bytes_down_per_client"), int | float),
    "epsilon": int | float | None,
}
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_folder(folder: Path, config: Config, resume: bool) -> None:
    """Raises ValueError when the folder holds a run that is not to be resumed, or one of another configuration.

    The number of rounds may differ, see `resume.check_config`.
    """
    known = folder / "config.toml"
    if known.exists() and not resume:
        other = config_differences(make_config(read_config(known)), config)
        raise ValueError(
            f"{folder} already holds a run of another configuration ({'; '.join(other)}): pass another --out"
            if other
            else f"{folder} already holds a run: pass --resume to go on with it, or another --out"
        )
    strangers = folder.exists() and not (folder.is_dir() and all(map(is_unstarted_file, folder.iterdir())))
    if strangers and not known.exists():
        raise ValueError(f"{folder} contains files that are not from a run (no config.toml): pass another --out")
    if known.exists():
        check_same_config(folder, make_config(read_config(known)), config)


def is_unstarted_file(entry: Path) -> bool:
    """Whether something in a folder is what a run leaves that ended before its first step."""
    if entry.name == "checkpoints":
        return entry.is_dir() and not any(entry.iterdir())
    return entry.name in (".lock", "config.toml.partial")


def check_same_config(folder: Path, old: Config, config: Config, paths: bool = True) -> None:
    """Raises ValueError where a run's configuration is another one; paths: see `config_differences`."""
    if changed := config_differences(old, config, paths):
        raise ValueError(f"{folder} was run with another configuration ({'; '.join(changed)}): pass another --out")


def locate_run(folder: str) -> Path:
    """The folder of a run. Raises ValueError where there is none."""
    path = Path(folder)
    if path.is_file():
        raise ValueError(f"{folder} is a file: name the folder of a run, which jaxfed train leaves at its run.out")
    if (path / "checkpoints").is_dir() and not (path / "config.toml").is_file():
        raise ValueError(
            f"{folder} was saved by a program from pieces without names: make the same Experiment and call its restore"
        )
    if not (path / "config.toml").is_file():
        raise ValueError(f"{folder}: no run here (no config.toml): name the folder that jaxfed train left (run.out)")
    return path


def holds_run(folder: Path) -> bool:
    """Whether a run was begun in a folder."""
    begun = any((folder / name).exists() for name in ("metrics.jsonl", "checkpoints"))
    return begun and (folder / "config.toml").is_file()


def write_file(path: Path, text: str) -> None:
    """Writes a file whole or not at all, a full disk and a power failure included."""
    write_whole(path, text.encode())


def write_whole(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Writes bytes as `write_file` writes text. mode: of the file, less what the process masks."""
    partial = path.with_suffix(path.suffix + ".partial")
    try:
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def write_arrays(path: Path, arrays: dict[str, Any], mode: int = 0o666) -> None:
    """Writes arrays as an .npz file, whole or not at all. mode: see `write_whole`."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_whole(path, buffer.getvalue(), mode)


def set_summary_aside(folder: Path, rounds: int) -> None:
    """Renames the summary of a run that goes on beyond `rounds` rounds, if there is one: `summary_ROUNDS.json`."""
    if (folder / "summary.json").exists():
        (folder / "summary.json").replace(folder / f"summary_{rounds}.json")


def read_summary(folder: Path, select: str = "rounds") -> dict[str, Any]:
    """What RUN/summary.json says. Raises ValueError, which names the file, where it is damaged, or lacks `select`."""
    path = folder / "summary.json"
    again = f"jaxfed train {folder}/config.toml --resume makes it anew"
    try:
        found = json.loads(path.read_text())
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is damaged: it is not JSON; {again}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: it is no summary of a run; {again}")
    for name, kind in {select: object, **SUMMARY}.items():
        if name not in found or not isinstance(found[name], kind):
            raise ValueError(f"{path} is damaged: it does not say {name}; {again}")
    for name, value in found.items():
        if "/" in name and not isinstance(value, int | float | None):
            raise ValueError(f"{path} is damaged: {shorten(name)} is no number; {again}")
    return found


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Raises ValueError while another process runs in this folder."""
    try:
        held = FileLock(folder / ".lock", blocking=False).acquire()
    except Timeout:
        raise ValueError(f"{folder}: another process is running here; stop it or pass another --out") from None
    with held:
        yield


@contextmanager
def disk_full_errors(folder: Path) -> Iterator[None]:
    """Raises ValueError, with what to do, where what is done inside finds no room on the disk."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        again = f"run: jaxfed train {folder}/config.toml --resume"
        todo = again if (folder / "config.toml").exists() else "start again"
        raise ValueError(f"disk full ({error.strerror}): free some space, then {todo}") from None
