"""The folder of a run: whose it is, and files that are written whole or not at all."""

from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from jaxfed.config import config_of, differences, read


def check_folder(folder: Path, config: Any, resume: bool) -> None:
    """Raises ValueError when the folder holds a run that is not to be resumed, or one of another configuration."""
    known = folder / "config.toml"
    if known.exists() and not resume:
        raise ValueError(f"{folder} already holds a run: pass --resume to go on with it, or another --out")
    if folder.exists() and not known.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} holds something else than a run (no config.toml): pass another --out")
    if known.exists():
        changed = differences(config_of(read(known)), config)
        if changed:
            raise ValueError(f"{folder} was run with another configuration ({'; '.join(changed)}): pass another --out")


def same_data(folder: Path, meta: dict[str, Any], digest: str) -> None:
    """Raises ValueError when a checkpoint is of a run on other data."""
    if meta["data"] != digest:
        raise ValueError(f"{folder} was run on other data, or on the same rows in another order: pass another --out")


def write_file(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_text(text)
    partial.replace(path)


@contextmanager
def alone(folder: Path):
    """Raises ValueError while another process runs in this folder."""
    try:
        held = FileLock(folder / ".lock", blocking=False).acquire()
    except Timeout:
        raise ValueError(f"{folder}: another process is running here; stop it or pass another --out") from None
    with held:
        yield
