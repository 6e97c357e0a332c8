"""Checkpoints: the whole state of a run through Orbax, with a SHA-256 of its arrays beside them.

Orbax does not checksum arrays: a flipped byte restores without an error. So a checkpoint counts only when the digest
of what was read is the digest of what was written, and restoring walks back to the newest one that does.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxfed.tree import digest
from jaxfed.types import Tree

FORMAT = 1


def manager(folder: Path, keep: int) -> ocp.CheckpointManager:
    """The checkpoints of a run; what a kill left half-written is cleared when it opens."""
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep, enable_async_checkpointing=True, cleanup_tmp_directories=True, create=True
    )
    return ocp.CheckpointManager(folder.absolute(), options=options)


def save(checkpoints: ocp.CheckpointManager, step: int, state: Tree, meta: dict[str, Any]) -> None:
    """Writes a checkpoint in the background; `meta` is JSON."""
    meta = {**meta, "format": FORMAT, "sha256": digest(state)}
    arguments = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
    checkpoints.save(step, args=arguments, force=True)


def restore(
    checkpoints: ocp.CheckpointManager, template: Tree, say: Callable[[str], None]
) -> tuple[Tree, dict[str, Any]] | None:
    """(state, meta) of the newest checkpoint that is whole, None when there are none at all.

    `template` gives structure, shapes, dtypes and shardings. Newer, damaged ones are told to `say` and deleted, as the
    run will come to their rounds again. Raises ValueError when none is whole, or for another format.
    """
    shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, template)
    damaged: list[int] = []
    for step in sorted(checkpoints.all_steps(), reverse=True):
        both = ocp.args.Composite(state=ocp.args.StandardRestore(shapes), meta=ocp.args.JsonRestore())
        try:
            found = checkpoints.restore(step, args=both)
            state, meta = found["state"], dict(found["meta"])
            wrong = "" if digest(state) == meta["sha256"] else "its arrays do not match their SHA-256"
        except Exception as error:  # Orbax raises a bare Exception for truncated data, and a dozen other kinds
            wrong, meta = f"it cannot be read: {type(error).__name__}", {}
        if meta.get("format", FORMAT) != FORMAT:
            raise ValueError(f"checkpoint {step} has format {meta['format']}, this version of jaxfed reads {FORMAT}")
        if not wrong:
            for step in damaged:
                checkpoints.delete(step)
            return state, meta
        say(f"checkpoint {step} is damaged ({wrong}); going back to the one before")
        damaged.append(step)
    if damaged:
        raise ValueError(f"none of the checkpoints {damaged} is whole: start the run anew in another folder (--out)")
    return None
