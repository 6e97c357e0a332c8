"""What a client update of a matrix factorisation costs in `jaxfed bench`: bytes by hand, operations as XLA counts them.

XLA counts no bytes that are of use here: of a gather from a table it counts the whole table, however few rows are read.
"""

from functools import partial
from typing import Any, cast

import jax
import numpy as np

from jaxfed.bench.chip_peaks import compare_to_peak
from jaxfed.config.build import RunParts
from jaxfed.core.client import run_client_block
from jaxfed.core.tables import num_rows
from jaxfed.core.tree import count_bytes
from jaxfed.core.types import Block, Cohort
from jaxfed.data.packing import pack_cohort
from jaxfed.training.rounds import initial_arrays, make_run_keys

PASSES_OF_ROUND = 2  # a row that a client holds is downloaded, and its difference is sent
PASSES_OF_STEP = 4  # the forward pass reads a row, its gradient is written, the update reads and writes the row
BATCH_BYTES = 12  # of a row of a step: its position, its label and its weight


def count_update_bytes(parts: RunParts, cohort: Cohort) -> float:
    """Bytes that the update of a client of a matrix factorisation must read and write, the mean over a cohort.

    Each row that the client holds is downloaded once and sent once, and its own vectors are read once and written once.
    Each row of a step, and the client's own vectors in it, are read by the forward pass; a gradient is written for
    them; and the update reads and writes them. Padding and what the server adds are left out. Much of this traffic
    stays in caches, so that it may exceed what the memory can do.

    Args:
        parts: what the rounds are made of.
        cohort: the clients of one round, drawn on the host.

    Returns:
        Bytes of one client update.
    """
    key = jax.random.key(0)
    params, private = jax.eval_shape(parts.model.init, key), jax.eval_shape(parts.model.private, key)
    row_bytes, own_bytes = count_bytes(params) / num_rows(params), count_bytes(private)
    end = parts.shapes.end if cohort.rows is None else len(cohort.rows)
    held = sum(int((np.asarray(block.rows) < end).sum()) for block in cohort.blocks)
    used = [np.asarray(block.data.batch["weight"]) > 0 for block in cohort.blocks]  # [m, S, width]
    rows, steps = (sum(int(x.sum()) for x in each) for each in (used, [x.any(-1) for x in used]))
    clients = int((cohort.ids < parts.data.population.num_clients).sum())
    of_round = PASSES_OF_ROUND * (held * row_bytes + clients * own_bytes)
    of_steps = PASSES_OF_STEP * (rows * row_bytes + steps * own_bytes) + BATCH_BYTES * rows
    return (of_round + of_steps) / clients


def count_update_flops(parts: RunParts, cohort: Cohort) -> float | None:
    """Floating-point operations of a client update as XLA counts them, the mean over a cohort; padding is counted.

    They are those of `run_client_block`, without the server's part. XLA counts the body of a loop once, however often
    it runs. So a block with s steps and k times its rows takes a k + c s + b operations: a k for its rows, c s for what
    is made of each step outside of the loop, and b for the body, once. Compiled with (s, k) = (2, 1), (3, 1) and
    (2, 2), it gives a, and b + c of a step, by which the rows and steps of all blocks are multiplied. Comparisons
    and selections count as operations; exponentials and logarithms do not.

    Args:
        parts: what the rounds are made of.
        cohort: the clients of one round.

    Returns:
        Operations of one client update. None: the compiler does not say, or has made loops of something else than
        the steps, too, which would be counted once.
    """
    first = cohort.blocks[0]
    clients, rows = first.rows.shape
    counted = [
        count_block_flops(parts, cohort, set_block_shape(first, s, k)) for s, k in ((2, rows), (3, rows), (2, 2 * rows))
    ]
    if None in counted:
        return None
    base, longer, wider = cast(list[float], counted)
    of_rows = wider - base  # a
    of_step = 3 * base - longer - wider  # b + c
    held = sum(block.rows.size for block in cohort.blocks) / (clients * rows)
    padded_steps = sum(block.data.rows.size for block in cohort.blocks) / (clients * first.data.rows.shape[2])
    return (of_rows * held + of_step * padded_steps) / int((cohort.ids < parts.data.population.num_clients).sum())


def set_block_shape(block: Block, steps: int, rows: int) -> Block:
    """The shapes of a block whose clients have so many steps and rows."""

    def with_length(length, x):
        return jax.ShapeDtypeStruct((x.shape[0], length, *x.shape[2:]), x.dtype)

    data, of_steps = block.data, partial(with_length, steps)
    data = data._replace(rows=of_steps(data.rows), live=of_steps(data.live), batch=jax.tree.map(of_steps, data.batch))
    return block._replace(rows=with_length(rows, block.rows), data=data)


def count_block_flops(parts: RunParts, cohort: Cohort, block: Block) -> float | None:
    """Operations of the program of a block of several steps as XLA counts them, the body of their loop once. None: it
    does not say, or there are other loops."""
    plan, _, frozen = cast(partial, parts.algorithm.step).args
    state, key = jax.eval_shape(lambda: initial_arrays(parts, 0)["state"]), make_run_keys(0).rounds
    program = jax.jit(partial(run_client_block, plan._replace(padded_shape=None)))
    common = state, cohort.ids, cohort.present, cohort.rows, cohort.ages, key
    compiled = program.lower(*common, block, None, None, frozen.clients).compile()
    found: Any = compiled.cost_analysis()
    costs = found[0] if isinstance(found, list) and found else found  # a list in some versions of JAX
    if (compiled.as_text() or "").count(" while(") != 1 or not costs or costs.get("flops", 0) <= 0:
        return None
    return float(costs["flops"])


def estimate_costs(parts: RunParts, seed: int, clients_per_second: float) -> dict[str, float | None]:
    """The costs of a client update of a matrix factorisation, and what is done of them in a second.

    Args:
        parts: what the rounds are made of.
        seed: of the rounds, of which the first is looked at.
        clients_per_second: client updates a second.

    Returns:
        {name: figure}. None: XLA does not tell the number of operations, or the peak of the device is not known.
    """
    cohort = pack_cohort(parts.data.population, parts.batching, parts.shapes, *parts.sampler.draw(seed, 0), seed, 0)
    bytes_moved, flops = count_update_bytes(parts, cohort), count_update_flops(parts, cohort)
    return {
        "predicted_bytes_per_update": round(bytes_moved, 1),
        "measured_flops_per_update": None if flops is None else round(flops, 1),
        "gigabytes_per_second": round(bytes_moved * clients_per_second / 1e9, 3),
        "gigaflops_per_second": None if flops is None else round(flops * clients_per_second / 1e9, 3),
        **compare_to_peak(
            jax.devices()[0].device_kind,
            bytes_moved * clients_per_second,
            None if flops is None else flops * clients_per_second,
        ),
    }
