"""Whether a run fits into the machine and its devices: found before it begins, and said in one line."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import psutil

from jaxfed.core.model import ClosedForm
from jaxfed.core.pairs import count_pairs
from jaxfed.core.tables import repeat_rows, take_rows
from jaxfed.core.tree import count_bytes, to_compute_dtype
from jaxfed.core.types import Sampler, Tree
from jaxfed.data.batching import Batching, ClientSizes, measure_clients
from jaxfed.data.blocks import BlockShapes, plan_blocks
from jaxfed.data.population import Population
from jaxfed.data.room import device_memory, free_memory

MOST_MESSAGES = 1 << 30  # bytes of messages and working copies that are held at a time, unless run.chunk says more
ROW = 12  # bytes of a row's numbers: in the total, in the catalogue, and whose it is
EXAMPLE = 40  # bytes of an example while a cohort is packed: random numbers, places, the array that is sent


def machine_memory() -> int:
    """Bytes of the whole machine."""
    return psutil.virtual_memory().total


def check_examples(population: Population, batching: Batching, slots: int) -> None:
    """Raises ValueError where the largest cohort has more examples than the machine can hold while it packs them."""
    negatives, epochs = max(batching.negatives, 0), max(batching.epochs, 1)
    if batching.sequence:  # all items that are read, and the negatives of each step
        negatives = population.num_items if batching.sequence.whole_catalogue else negatives
        one_epoch = batching._replace(epochs=1, batch_size=max(batching.batch_size, 1))
        sizes = measure_clients(population, one_epoch, np.arange(population.num_clients))
        read, steps = (int(np.sort(each)[-slots:].sum()) for each in (sizes.read, sizes.steps))
        examples = epochs * (read + negatives * steps)
    else:
        examples = epochs * (1 + negatives) * int(np.sort(population.num_train)[-slots:].sum())
    if (need := EXAMPLE * examples) > (room := machine_memory()):
        raise ValueError(
            f"a round may have {examples:,} examples, which take {need / 1e9:,.0f} GB, the machine has "
            f"{room / 1e9:,.1f} GB: lower work.epochs, work.negatives or cohort.size"
        )


def estimate_capacity(population: Population, batching: Batching, shapes: BlockShapes, sampler: Sampler) -> int:
    """Blocks that hardly any cohort exceeds: the most in some rounds, and twice as many more as those rounds differ."""
    counts = []
    for round in range(8):
        ids, _ = sampler.draw(0, round)
        clients = ids[ids < population.num_clients]
        owner = shapes.share.owner(clients, population.num_clients)
        counts.append(len(plan_blocks(shapes, measure_clients(population, batching, clients), owner).shapes))
    return 3 * max(counts) - 2 * min(counts)


def largest_block_bytes(shapes: BlockShapes, sends: Callable[[Tree], Tree], shared: Tree, padded: bool) -> int:
    """Bytes of the messages of the largest block.

    Args:
        shapes: the blocks.
        sends: see `ClientWork.update_shapes`.
        shared: shapes of what clients are sent.
        padded: whether all blocks are padded to one shape.
    """

    def send(rows):
        some = jax.eval_shape(lambda x: to_compute_dtype(take_rows(x, jnp.zeros(rows, jnp.int32))), shared)
        return count_bytes(jax.eval_shape(lambda x: repeat_rows(sends(x)), some))

    one, two = send(1), send(2)
    sizes = [(shapes.clients(steps), shapes.rows(steps, size)) for steps, size in shapes.kinds]
    if shapes.pairs:
        sizes = [(clients, count_pairs(rows)) for clients, rows in sizes]
    sizes = [(clients, clients * rows) for clients, rows in sizes]
    sizes = [shapes.padded_shape] if padded else sizes
    return max(clients * one + (rows - clients) * (two - one) + ROW * rows for clients, rows in sizes)


def choose_chunk(
    population: Population,
    batching: Batching,
    shapes: BlockShapes,
    block_bytes: Callable[[BlockShapes], int],
    chunk: int,
    sums: bool,
) -> int:
    """Blocks whose messages are held at a time: `chunk`, or as many as take little of what is free.

    Messages must fit beside each other and the working copies of one block; three times where they are not summed as
    they come.

    Args:
        population: the clients.
        batching: how they cut their data into steps.
        shapes: the blocks.
        block_bytes: bytes of the messages of the largest block, see `largest_block_bytes`.
        chunk: as configured; 0: to be chosen.
        sums: whether messages are summed as they come.

    Returns:
        The number of blocks; 0: all of a cohort.

    Raises:
        ValueError: they do not fit: one line that says what would.
    """
    every = measure_clients(population, batching, np.arange(population.num_clients))
    # the more steps, the fewer clients lie side by side; organisations with many interactions may have few steps
    costliest = np.lexsort((every.largest, every.steps))[-shapes.slots :]
    largest = ClientSizes(*(each[costliest] for each in every))
    owner = np.arange(len(largest.steps)) % shapes.share.size
    blocks, room = len(plan_blocks(shapes, largest, owner).shapes), device_memory()
    block = block_bytes(shapes)
    if not sums:
        check_gathered(blocks, block, room)
        return 0
    fit = room // block - 3  # blocks that fit beside the working copies of one
    if fit < 1:
        raise ValueError(
            f"a block of clients may send {block / 1e9:.2g} GB of messages and needs four times as much, "
            f"{room / 1e9:.2g} GB are free: {suggest_area(shapes, block_bytes, room)}"
        )
    if not chunk:
        fit = min(room // 4, MOST_MESSAGES) // block - 3
        return 0 if blocks <= fit else max(1, fit)
    if min(chunk, blocks) > fit:
        raise ValueError(
            f"run.chunk is {chunk}: so many blocks may hold {min(chunk, blocks) * block / 1e9:.1f} GB of messages, "
            f"{room / 1e9:.1f} GB are free: set run.chunk to {fit} (blocks held at a time), or leave it out"
        )
    return chunk


def check_gathered(blocks: int, block: int, room: int) -> None:
    """Raises ValueError where so many blocks of messages, gathered and compared, do not fit."""
    if (3 * blocks + 3) * block > room:
        raise ValueError(
            f"a link has a reduction of its own, for which {blocks} blocks of messages may take "
            f"{3 * blocks * block / 1e9:.1f} GB, {room / 1e9:.1f} GB are free: set cohort.size lower"
        )


def suggest_area(shapes: BlockShapes, block_bytes: Callable[[BlockShapes], int], room: int) -> str:
    """What makes blocks small enough for so much memory."""
    area = shapes.steps_per_block
    while area > 1:
        area //= 2
        if 4 * block_bytes(shapes._replace(steps_per_block=area, most_clients=0)) <= room:  # an area that is set rules
            return f"set run.area to {area}"
    return "one client with the longest history does not fit: leave such users out, or take a smaller model"


def check_solve(closed: ClosedForm | None) -> None:
    """Raises ValueError where there is no memory to solve for a model; says what would do, if that is known."""
    need, free = closed.solve_bytes if closed else 0, free_memory()
    if closed and need > 0.8 * free:  # other things take memory, too
        raise ValueError(
            f"the model is solved in {need / 1e9:,.1f} GB of memory, {free / 1e9:,.1f} GB are free: {closed.advice}"
        )
