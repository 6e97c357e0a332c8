"""The figures of each user of a finished run, which are kept in its folder so that they are computed once."""

import hashlib
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from jaxfed.config.build import load_data
from jaxfed.data.clients import Clients
from jaxfed.evaluation.split import EvalSplit
from jaxfed.training.best_model import open_best_model
from jaxfed.training.run_dir import read_summary, write_arrays
from jaxfed.training.trained_model import TrainedModel

UserFigures = dict[str, np.ndarray]  # of a run or a row, see `TrainedModel.evaluate_users`
MODEL, HELD_OUT = "params_sha256", "held_out_sha256"  # what is kept beside the figures


def read_users(folder: Path, load: Callable[[Any], Clients] = load_data, part: str = "test") -> UserFigures:
    """The figures of each user of the best model of a finished run, which RUN/users.npz keeps (users_val.npz those on
    validation).

    Args:
        folder: the run's.
        load: reads the data of a [data] section.
        part: the held-out items, "val" or "test".

    Returns:
        As `TrainedModel.evaluate_users`.

    Raises:
        ValueError: the run has no model, or its rows have labels and no ranks.
    """
    return read_users_of(folder, load, part)[0]


def read_users_of(folder: Path, load: Callable[[Any], Clients], part: str) -> tuple[UserFigures, str]:
    """(as `read_users`, the digest of who is asked and what is held out of them)."""
    kept = folder / ("users.npz" if part == "test" else f"users_{part}.npz")
    arrays, digest = load_arrays(kept), read_summary(folder)[MODEL]
    if not (HELD_OUT in arrays and str(arrays.get(MODEL)) == digest):
        parts, keys, best = open_best_model(str(folder), load)
        arrays = TrainedModel(parts, *best, "", keys.evaluation).evaluate_users(part)
        held_out = held_out_digest(
            parts.eval_splits[part], parts.data.population.asked.user_names, parts.data.source.items
        )
        arrays |= {MODEL: np.array(digest), HELD_OUT: np.array(held_out)}
        with suppress(PermissionError):  # a run of somebody else: its figures are computed each time
            write_arrays(kept, arrays)
    users = {name: value for name, value in arrays.items() if name not in (MODEL, HELD_OUT)}
    return users, str(arrays[HELD_OUT])


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file; none where there is no file, or a damaged one."""
    if not path.exists():
        return {}
    try:
        with np.load(path) as found:
            return dict(found)
    except (ValueError, EOFError, zipfile.BadZipFile):
        return {}


def held_out_digest(exam: EvalSplit, users: np.ndarray, items: np.ndarray) -> str:
    """SHA-256 of who is asked and which items are held out of them, by the data's own ids, in whatever order.

    Args:
        exam: what is asked.
        users: str [users]: ids of those of the data.
        items: str [items].
    """
    user = np.repeat(users[exam.user], exam.targets.counts)
    item = items[exam.targets.values]
    order = np.lexsort((item, user))
    lines = [f"{who}\t{what}\n" for who, what in zip(user[order].tolist(), item[order].tolist(), strict=True)]
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogatepass")).hexdigest()
