"""Checkpoints: the whole state of a run through Orbax, and a record of where it stands, both under a SHA-256.

Orbax does not checksum what it writes: a flipped byte restores without an error. So a checkpoint counts only when its
record has the digest that it names, and its arrays have the digest that the record names. Restoring walks back to the
newest checkpoint that is whole.
"""

import gc
import hashlib
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxfed.core.tree import tree_digest
from jaxfed.core.types import Tree

if TYPE_CHECKING:
    import orbax.checkpoint as ocp  # takes long to import: functions do where they need it

SILENT = logging.CRITICAL + 1
SAVE_LOCK = Lock()  # Orbax numbers the saves of a process: of two at a time, one finds its folder made by the other
FORMAT = 3  # 1: the digest was that of the arrays alone, the record not protected; 2: a state's fields had other names


@contextmanager
def quiet_orbax() -> Iterator[None]:
    """Keeps the tracebacks of Orbax's threads off the screen: what goes wrong is raised, and told by the caller."""
    ignore_late_errors()
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(SILENT)
    try:
        yield
    finally:
        gc.collect()  # asyncio complains of tasks that failed unheard when they are collected
        for logger, level in zip(loggers, levels, strict=True):
            if level != SILENT:  # which a run in another thread has set, and sets back
                logger.setLevel(level)


def ignore_late_errors() -> None:
    """Has Python say nothing of reads and writes that end after another one failed, for good: some end very late."""
    hook = sys.unraisablehook
    if getattr(hook, "__qualname__", "").startswith(ignore_late_errors.__qualname__):
        return

    def not_late(event):
        code = getattr(event.object, "cr_code", None)  # of a coroutine that is thrown away
        if str(event.exc_value) != "Event loop is closed" and "orbax" not in getattr(code, "co_filename", ""):
            hook(event)

    sys.unraisablehook = not_late


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Raises as OSError what the system said, which TensorStore puts into words of its own."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) or not (found := re.search(r"os_error_code='(\d+)'", str(error))):
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(folder)) from None


def check_checkpoint_path(folder: Path) -> None:
    """Raises ValueError where Orbax would write checkpoints that it does not find again."""
    if found := re.search(r"[\[\\]|gs:/", str(folder.absolute())):
        raise ValueError(
            f"{folder.absolute()}: checkpoints cannot lie where a name has {found[0]!r}: take another folder"
        )


@contextmanager
def open_checkpoints(folder: Path, keep: int = 0) -> Iterator["ocp.CheckpointManager"]:
    """The checkpoints of a run, of which `keep` stay; what a kill left half-written is cleared.

    keep 0: to read only, beside a run that may be writing. Raises ValueError where the folder is a file, or cannot be.
    """
    check_checkpoint_path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, checkpoints belong there: move it away")
    import orbax.checkpoint as ocp

    with quiet_orbax(), disk_errors(folder):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep or None, cleanup_tmp_directories=keep > 0, create=keep > 0, read_only=keep == 0
        )
        # a save that failed is raised where it is waited for, and again when Orbax is left
        with ocp.CheckpointManager(folder.absolute(), options=options) as checkpoints:
            yield checkpoints


def record_digest(record: dict[str, Any]) -> str:
    """SHA-256 of a record without its own digest, as canonical JSON."""
    rest = {key: value for key, value in record.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def seal_record(record: dict[str, Any], step: int, arrays: str) -> dict[str, Any]:
    """A record with its format, its step, the digest of the arrays beside it, and a digest of all this."""
    record = {**record, "format": FORMAT, "step": step, "arrays": arrays}
    return {**record, "sha256": record_digest(record)}


def find_damage(record: Any, step: int) -> str:
    """What is wrong with the record of a checkpoint; "" if nothing is.

    Args:
        record: what was read as JSON, whatever it is.
        step: the number of the checkpoint that it lies in.
    """
    if not isinstance(record, dict):
        return "its record is not a JSON object"
    if record.get("format") != FORMAT:
        return f"its record has format {str(record.get('format'))[:20]}, this version reads format {FORMAT}"
    if record.get("sha256") != record_digest(record):
        return "its record does not match its SHA-256"
    if record.get("step") != step:
        return f"its record belongs to round {record.get('step')}"
    return ""


def read_record(folder: Path, step: int) -> tuple[dict[str, Any], str]:
    """(the record of a checkpoint in a folder of checkpoints, "") or ({}, why it is none)."""
    try:  # where Orbax puts JSON; read without it, as it has all processes wait for each other
        record = json.loads((folder / str(step) / "meta" / "metadata").read_text())
    except (OSError, ValueError, RecursionError) as error:
        return {}, f"its record cannot be read: {type(error).__name__}"
    wrong = find_damage(record, step)
    return ({}, wrong) if wrong else (record, "")


def checkpoint_steps(folder: Path) -> list[int]:
    """The numbers of the checkpoints in a folder, the newest first."""
    names = [entry.name for entry in folder.iterdir() if entry.is_dir()] if folder.is_dir() else []
    return sorted((int(name) for name in names if name.isdecimal() and name == str(int(name))), reverse=True)


def newest_record(folder: Path, problem: Callable[[dict[str, Any]], str] = lambda record: "") -> dict[str, Any]:
    """The record of the newest sound checkpoint in a folder; {}: there is none. problem: as in `restore_newest`."""
    for step in checkpoint_steps(folder):
        record, wrong = read_record(folder, step)
        if not wrong and not problem(record):
            return record
    return {}


def find_same_arrays(tree: Tree) -> list[list[int]]:
    """[leaf, an earlier one] of all leaves that are the same array: a large model that is state and best at once is
    written once."""
    first: dict[int, int] = {}
    places = [first.setdefault(id(leaf), place) for place, leaf in enumerate(jax.tree.leaves(tree))]
    return [[place, earlier] for place, earlier in enumerate(places) if place != earlier]


def drop_same_arrays(leaves: list[Any], same: list[list[int]]) -> list[Any]:
    """The leaves with a single zero in place of each that is the same as an earlier one; Orbax writes no empty ones."""
    left_out = {place for place, _ in same}
    return [np.zeros(1, np.float32) if place in left_out else leaf for place, leaf in enumerate(leaves)]


def save_checkpoint(checkpoints: "ocp.CheckpointManager", step: int, state: Tree, record: dict[str, Any]) -> None:
    """Writes a checkpoint in the background; the record is JSON."""
    import orbax.checkpoint as ocp

    same = find_same_arrays(state)
    record = seal_record({**record, "same": same}, step, tree_digest(state))
    once = jax.tree.unflatten(jax.tree.structure(state), drop_same_arrays(jax.tree.leaves(state), same))
    arguments = ocp.args.Composite(state=ocp.args.StandardSave(once), meta=ocp.args.JsonSave(record))
    checkpoints.save(step, args=arguments, force=True)


@contextmanager
def background_saver(
    checkpoints: "ocp.CheckpointManager", several: bool = False, consumed: bool = True
) -> Iterator[Callable[[int, Tree, dict[str, Any]], None]]:
    """Yields save(step, state, record), which returns as soon as the state is copied; on leaving, all are written.

    several: processes that save together, for which Orbax must be called by the main thread. consumed: whether the
    next step consumes the state, which must be copied then.

    Orbax writes in the background too, but holds its caller for 20 to 60 ms before it does. An error of one save is
    raised by the next, or on leaving. A process that is killed leaves a save whole, or none.
    """
    pending: list[Future] = []
    if several:
        yield partial(save_checkpoint, checkpoints)
        checkpoints.wait_until_finished()
        return

    def write(step, state, record):
        with SAVE_LOCK:
            save_checkpoint(checkpoints, step, state, record)
            checkpoints.wait_until_finished()

    def later(step, state, record):
        while pending:  # one at a time: a disk that falls behind slows the run, and does not fill its memory
            pending.pop().result()
        copied: dict[int, np.ndarray] = {}  # the same arrays stay the same
        for leaf in jax.tree.leaves(state):
            if id(leaf) not in copied:
                copied[id(leaf)] = (np.array if consumed else np.asarray)(leaf)
        copy = jax.tree.map(lambda leaf: copied[id(leaf)], state)
        pending.append(pool.submit(write, step, copy, record))

    with ThreadPoolExecutor(1) as pool:
        yield later
        while pending:
            pending.pop().result()


def read_arrays(
    checkpoints: "ocp.CheckpointManager", step: int, shapes: Tree, same: list[list[int]]
) -> tuple[Any, str]:
    """(the arrays of a checkpoint, "") or (None, why they cannot be read). same: see `find_same_arrays`."""
    import orbax.checkpoint as ocp

    structure = jax.tree.structure(shapes)
    once = jax.tree.unflatten(structure, drop_same_arrays(jax.tree.leaves(shapes), same))
    wanted = ocp.args.Composite(state=ocp.args.StandardRestore(once))
    try:
        leaves = jax.tree.leaves(checkpoints.restore(step, args=wanted)["state"])
        for place, earlier in same:
            leaves[place] = leaves[earlier]
        return jax.tree.unflatten(structure, leaves), ""
    except Exception as error:  # Orbax raises a bare Exception for truncated data, and a dozen other kinds
        return None, f"its arrays cannot be read: {type(error).__name__}"


def restore_newest(
    checkpoints: "ocp.CheckpointManager",
    template: Tree,
    say: Callable[[str], None],
    problem: Callable[[dict[str, Any]], str] = lambda record: "",
) -> tuple[Tree, dict[str, Any], list[int]] | None:
    """The newest checkpoint that is whole.

    Args:
        checkpoints: those of the run.
        template: gives structure, shapes, dtypes and shardings. Its `state` has the `round` that it is of.
        say: is told of newer checkpoints that are damaged, one line each.
        problem: says what is wrong with a sound record, before arrays are read; "": nothing. It may raise.

    Returns:
        (arrays, record, the steps of newer and damaged ones), None when there are no checkpoints at all.

    Raises:
        ValueError: there are checkpoints, and none is whole.
    """
    import orbax.checkpoint as ocp

    shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, template)
    damaged: list[int] = []
    folder, wrong = Path(checkpoints.directory), ""
    for step in checkpoint_steps(folder):
        state: Any = None
        record, wrong = read_record(folder, step)
        wrong = wrong or problem(record)
        if not wrong:
            state, wrong = read_arrays(checkpoints, step, shapes, record.get("same", []))
        if not wrong and tree_digest(state) != record["arrays"]:
            wrong = "its arrays do not match their SHA-256"
        if not wrong and int(state["state"].round) != step:
            wrong = f"its arrays are those of round {int(state['state'].round)}"
        if not wrong:  # what was on the host comes back to the host, to be written in place
            kept = jax.tree.map(lambda x, new: np.array(new) if isinstance(x, np.ndarray) else new, template, state)
            return kept, record, damaged
        say(f"checkpoint {step} is damaged ({wrong}); going back to the one before")
        damaged.append(step)
    if damaged:
        raise ValueError(
            f"none of the checkpoints {damaged} is whole (the oldest: {wrong}): start the run anew in another folder "
            "(--out)"
        )
    return None
