"""Whether a run fits into the machine and its devices: found before it begins, and said in one line."""

import jax
import jax.numpy as jnp
import numpy as np
import psutil

from jaxfed.core.tables import take_rows
from jaxfed.core.tree import count_bytes, to_compute_dtype
from jaxfed.core.types import Sampler, Tree
from jaxfed.data.batching import Batching
from jaxfed.data.blocks import BlockShapes, plan_blocks
from jaxfed.data.population import Population

EXAMPLE = 40  # bytes of an example while a cohort is packed: random numbers, places, the array that is sent


def device_memory() -> int:
    """Bytes of one device, of the whole machine where the device does not say."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit") or machine_memory()


def machine_memory() -> int:
    """Bytes of the whole machine."""
    return psutil.virtual_memory().total


def check_examples(population: Population, batching: Batching, slots: int) -> None:
    """Raises ValueError where the largest cohort has more examples than the machine can hold while it packs them."""
    largest = int(np.sort(population.num_train)[-slots:].sum())
    examples = max(batching.epochs, 1) * (1 + max(batching.negatives, 0)) * largest
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
        counts.append(len(plan_blocks(shapes, batching, population.num_train[clients], owner).shapes))
    return 3 * max(counts) - 2 * min(counts)


def check_memory(population, batching: Batching, shapes: BlockShapes, sends, shared: Tree, chunk: int, sums: bool):
    """Raises ValueError when the messages of a cohort of the largest clients do not fit into a device beside each other
    and the working copies of one block; three times where a reduction of a link's own collects and compares them."""
    clients, rows = shapes.padded_shape
    one, two = (
        count_bytes(
            jax.eval_shape(lambda x, k=k: sends(to_compute_dtype(take_rows(x, jnp.zeros(k, jnp.int32)))), shared)
        )
        for k in (1, 2)
    )
    block = clients * one + (rows - clients) * (two - one)
    largest = np.sort(population.num_train)[-shapes.slots :]
    owner = np.arange(len(largest)) % shapes.share.size
    blocks, room = len(plan_blocks(shapes, batching, largest, owner).shapes), device_memory()
    if not sums and (3 * blocks + 3) * block > room:
        raise ValueError(
            f"a link has a reduction of its own, for which {blocks} blocks of messages may take "
            f"{3 * blocks * block / 1e9:.1f} GB, a device has {room / 1e9:.1f} GB: set cohort.size lower"
        )
    if (min(chunk or blocks, blocks) + 3) * block > room:
        fit = max(1, room // block - 3)
        raise ValueError(
            f"the {blocks} blocks of a cohort may hold {blocks * block / 1e9:.1f} GB of messages, a device has "
            f"{room / 1e9:.1f} GB: set run.chunk to {fit} (blocks held at a time), or run.area lower"
        )
