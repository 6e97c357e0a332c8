"""The client store kept on the host: what clients hold between rounds, where a device cannot hold it for all of them.

On a device it is a tree of arrays [n, ...] that programs read and write (`tables.gather_client`,
`tables.scatter_client_tables`, `tables.scatter_client_leaves`). Here it is the same tree of NumPy arrays: a round sends
its cohort's part to the device and waits to write it back in place.
"""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from jaxfed.core.placement import flatten_parts
from jaxfed.core.tables import map_tables
from jaxfed.core.types import Block, Cohort, Messages, Tree

TOGETHER = 1 << 16  # clients whose states are made at a time


def on_host(store: Tree) -> bool:
    """Whether a client store is one of this module."""
    return any(isinstance(x, np.ndarray) for x in jax.tree.leaves(store))


def make_host_store(memories: Callable[[jax.Array], Tree], num_clients: int) -> Tree:
    """The store of all clients, from a function that makes that of some [m]."""
    shapes = jax.eval_shape(memories, jax.ShapeDtypeStruct((1,), np.int32))
    store = jax.tree.map(lambda x: np.empty((num_clients, *x.shape[1:]), x.dtype), shapes)
    for low in range(0, num_clients, TOGETHER):
        some = memories(jnp.arange(low, min(low + TOGETHER, num_clients)))
        jax.tree.map(lambda x, new, low=low: np.copyto(x[low : low + len(new)], new), store, some)
    return store


def read_clients(store: Tree, who: np.ndarray, held: np.ndarray | None = None) -> Tree:
    """What clients `who` [m] hold: leaves [m, ...], of tables rows `held` [m, K] (None: all); past the end is zeros."""

    def leaf(x):
        return gather_or_zero(x, (who,), who < len(x))

    if held is None:
        return jax.tree.map(leaf, store)
    rows, owner = held, np.broadcast_to(who[:, None], held.shape)
    return map_tables(lambda x: gather_or_zero(x, (owner, rows), (owner < len(x)) & (rows < x.shape[1])), leaf, store)


def gather_or_zero(x: np.ndarray, index: tuple[np.ndarray, ...], inside: np.ndarray) -> np.ndarray:
    """x[index], zeros where that is not inside."""
    got = x[tuple(np.where(inside, i, 0) for i in index)]
    got[~inside] = 0
    return got


def read_block_clients(store: Tree, cohort: Cohort, block: Block, size: int) -> Tree:
    """What the clients of a block hold, of tables [n, size] the rows that the block does."""
    who = gather_or_end(np.asarray(cohort.ids), np.asarray(block.slots), np.iinfo(np.int32).max)
    rows = np.asarray(block.rows)
    return read_clients(store, who, rows if cohort.rows is None else gather_or_end(np.asarray(cohort.rows), rows, size))


def gather_or_end(x: np.ndarray, index: np.ndarray, end: int) -> np.ndarray:
    """x[index], `end` where the index is past the end."""
    return np.where(index < len(x), x[np.minimum(index, len(x) - 1)], end)


def write_clients(store: Tree, messages: Iterable[Messages], num_parts: int) -> Tree:
    """Waits for the messages of a round and writes their client states into the store, in place."""
    for block in messages:
        kept = block.client_states, block.ids, block.owner, block.held
        new, ids, owner, held = flatten_parts(jax.device_get(kept), num_parts)

        def leaf(x, y, ids=ids):
            x[ids[ids < len(x)]] = y[ids < len(x)]
            return x

        def table(x, y, owner=owner, held=held):
            there = (owner < len(x)) & (held < x.shape[1])
            x[owner[there], held[there]] = y[there]
            return x

        store = map_tables(table, leaf, store, new)
    return store
