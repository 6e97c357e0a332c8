"""Checkpoints: the whole state of a run through Orbax, with a SHA-256 of its arrays beside them.

Orbax does not checksum arrays: a flipped byte restores without an error. So a checkpoint counts only when the digest
of what was read is the digest of what was written, and restoring walks back to the newest one that does.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxfed.tree import digest
from jaxfed.types import Tree

FORMAT = 1


def manager(folder: Path, keep: int = 0) -> ocp.CheckpointManager:
    """The checkpoints of a run, of which `keep` stay; what a kill left half-written is cleared.

    keep 0: to read only, beside a run that may be writing.
    """
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep or None, cleanup_tmp_directories=keep > 0, create=keep > 0, read_only=keep == 0
    )
    return ocp.CheckpointManager(folder.absolute(), options=options)


def save(checkpoints: ocp.CheckpointManager, step: int, state: Tree, meta: dict[str, Any]) -> None:
    """Writes a checkpoint in the background; `meta` is JSON."""
    meta = {**meta, "format": FORMAT, "sha256": digest(state)}
    arguments = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
    checkpoints.save(step, args=arguments, force=True)


@contextmanager
def background(
    checkpoints: ocp.CheckpointManager, several: bool = False
) -> Iterator[Callable[[int, Tree, dict[str, Any]], None]]:
    """Yields save(step, state, meta), which returns as soon as the state is copied; on leaving, all are written.

    several: processes that save together, for which Orbax must be called by the main thread.

    Orbax writes in the background too, but holds its caller for 20 to 60 ms before it does. An error of one save is
    raised by the next, or on leaving. A process that is killed leaves a save whole, or none.
    """
    pending: list[Future] = []
    if several:
        yield partial(save, checkpoints)
        checkpoints.wait_until_finished()
        return

    def write(step, state, meta):
        save(checkpoints, step, state, meta)
        checkpoints.wait_until_finished()

    def later(step, state, meta):
        while pending:  # one at a time: a disk that falls behind slows the run, and does not fill its memory
            pending.pop().result()
        copy = jax.tree.map(np.array, jax.device_get(state))  # the next step consumes the state
        pending.append(pool.submit(write, step, copy, meta))

    with ThreadPoolExecutor(1) as pool:
        yield later
        while pending:
            pending.pop().result()


def item(checkpoints: ocp.CheckpointManager, step: int, **wanted: Any) -> tuple[Any, str]:
    """(one item of a checkpoint, "") or (None, why it cannot be read)."""
    try:
        return checkpoints.restore(step, args=ocp.args.Composite(**wanted))[next(iter(wanted))], ""
    except Exception as error:  # Orbax raises a bare Exception for truncated data, and a dozen other kinds
        return None, f"it cannot be read: {type(error).__name__}"


def told(checkpoints: ocp.CheckpointManager) -> dict[str, Any] | None:
    """What the newest checkpoint that can be read says of itself; None: there is none."""
    metas = (item(checkpoints, step, meta=ocp.args.JsonRestore())[0] for step in sorted(checkpoints.all_steps())[::-1])
    return next(filter(None, metas), None)


def restore(
    checkpoints: ocp.CheckpointManager,
    template: Tree,
    say: Callable[[str], None],
    check: Callable[[dict[str, Any]], None] = lambda meta: None,
) -> tuple[Tree, dict[str, Any], list[int]] | None:
    """(state, meta, damaged) of the newest checkpoint that is whole, None when there are none at all.

    `template` gives structure, shapes, dtypes and shardings. check(meta) may raise before arrays are read. Newer,
    damaged ones are told to `say`. Raises ValueError when none is whole, or for another format.
    """
    shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, template)
    damaged: list[int] = []
    for step in sorted(checkpoints.all_steps(), reverse=True):
        meta, wrong = item(checkpoints, step, meta=ocp.args.JsonRestore())
        if not wrong:
            if meta["format"] != FORMAT:
                raise ValueError(f"checkpoint {step} has format {meta['format']}, this version reads {FORMAT}")
            check(meta)
            state, wrong = item(checkpoints, step, state=ocp.args.StandardRestore(shapes))
            if not wrong and digest(state) != meta["sha256"]:
                wrong = "its arrays do not match their SHA-256"
        if not wrong:  # what was on the host comes back to the host, to be written in place
            kept = jax.tree.map(lambda x, new: np.array(new) if isinstance(x, np.ndarray) else new, template, state)
            return kept, meta, damaged
        say(f"checkpoint {step} is damaged ({wrong}); going back to the one before")
        damaged.append(step)
    if damaged:
        raise ValueError(f"none of the checkpoints {damaged} is whole: start the run anew in another folder (--out)")
    return None
