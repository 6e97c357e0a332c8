"""Weights that are pruned in the course of a run: which weights, when, and how messages change.

The server prunes a weight by setting it to zero, and a weight that is zero stays zero. So the model itself says which
weights are kept, and every client reads this from what it downloads. No weight that is kept is ever exactly zero.
"""

import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfed.core.leaf_paths import join_path
from jaxfed.core.tables import is_table
from jaxfed.core.types import Broadcast, Tree

SMALLEST = float(np.finfo(np.float32).tiny)  # stands for a kept zero: too small to change a sum in float32


class Pruning(NamedTuple):
    """Which dense weights are pruned by their magnitude, and when (Zhu and Gupta 2017, "To prune, or not to prune").

    In round t from `start` to `end` a share s (1 - (1 - (t - start) / (end - start))^3) of each leaf is zero, where s
    is `sparsity`. This changes every `every` rounds and in round `end`.

    Args:
        paths: The leaves of the model's shared parameters, as "params/encoder/block_0/attention/query/kernel".
        sparsity: Share of the weights of each leaf that is pruned in the end.
        start: Round after which weights are pruned.
        end: Round before which weights are pruned for the last time.
        every: Number of rounds between two changes.

    Example:
        >>> pruning_rounds(Pruning(("params/kernel",), 0.5, start=10, end=25, every=10)).tolist()
        [20, 25]
    """

    paths: tuple[str, ...]
    sparsity: float
    start: int
    end: int
    every: int


class FrozenAndMasks(NamedTuple):
    """What a loss receives beside the shared parameters: what is frozen, and which parameters are kept."""

    frozen: Tree
    masks: dict[str, jax.Array]  # {path: bool array of the leaf's shape} of each pruned leaf


def list_dense_paths(params: Tree, pattern: str) -> tuple[str, ...]:
    """The paths, with slashes, of the leaves outside of tables in which a regular expression is found."""
    nodes = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_table)
    return tuple(name for path, x in nodes if not is_table(x) and re.search(pattern, name := join_path(path)))


def pruning_rounds(pruning: Pruning) -> np.ndarray:
    """int [levels]: the rounds before which weights are pruned."""
    return np.array([*range(pruning.start + pruning.every, pruning.end, pruning.every), pruning.end])


def count_kept(pruning: Pruning, entries: int) -> np.ndarray:
    """int [levels + 1]: how many of the entries of a leaf are kept before the first pruning and after each."""
    done = (pruning_rounds(pruning) - pruning.start) / max(pruning.end - pruning.start, 1)
    shares = (
        pruning.sparsity * (1 - (1 - np.clip(done, 0, 1)) ** 3) if pruning.end > pruning.start else pruning.sparsity
    )
    pruned = np.floor(np.round(np.broadcast_to(shares, done.shape) * entries, 6)).astype(np.int64)
    return entries - np.append(0, pruned)


def find_masks(pruning: Pruning | None, params: Tree) -> dict[str, jax.Array]:
    """Which weights are kept, of each pruned leaf by its path; {} where nothing is pruned."""
    paths = pruning.paths if pruning else ()
    return {
        name: x != 0 for path, x in jax.tree_util.tree_leaves_with_path(params) if (name := join_path(path)) in paths
    }


def clear_pruned(params: Tree, masks: dict[str, jax.Array]) -> Tree:
    """Parameters, or an update of them, with zeros in place of pruned entries."""

    def clear(path, x):
        name = join_path(path)
        return jnp.where(masks[name], x, 0) if name in masks else x

    return jax.tree_util.tree_map_with_path(clear, params) if masks else params


def fill_zeros(pruning: Pruning, params: Tree) -> Tree:
    """Parameters without exact zeros in the leaves that will be pruned, so that all weights count as kept."""

    def fill(path, x):
        return jnp.where(x == 0, jnp.asarray(SMALLEST, x.dtype), x) if join_path(path) in pruning.paths else x

    return jax.tree_util.tree_map_with_path(fill, params)


def mark_largest(x: jax.Array, count: jax.Array) -> jax.Array:
    """bool, like x: its `count` largest entries by magnitude; of equal ones the later."""
    order = jnp.argsort(jnp.abs(x).ravel(), stable=True)
    return (jnp.zeros(x.size, bool).at[order].set(jnp.arange(x.size) >= x.size - count)).reshape(x.shape)


def prune_params(pruning: Pruning | None, before: Tree, after: Tree, round: jax.Array) -> Tree:
    """The pruned parameters with which a round begins. before: those of the last round. after: those that the server
    optimiser made of them. round: int [], the number of rounds done."""
    if pruning is None:
        return after
    rounds = jnp.asarray(pruning_rounds(pruning))
    level, due = jnp.searchsorted(rounds, round, side="right"), (rounds == round).any()

    def prune(path, old, new):
        if join_path(path) not in pruning.paths:
            return new
        new = jnp.where(old != 0, jnp.where(new == 0, jnp.asarray(SMALLEST, new.dtype), new), 0)
        count = jnp.asarray(count_kept(pruning, new.size))[level]
        kept = jax.lax.cond(due, lambda: mark_largest(new, count), lambda: new != 0)
        return jnp.where(kept, new, 0)

    return jax.tree_util.tree_map_with_path(prune, before, after)


def find_level(pruning: Pruning, round: int) -> int:
    """How often weights have been pruned before a round."""
    return int(np.searchsorted(pruning_rounds(pruning), round, side="right"))


def kept_shapes(pruning: Pruning, level: int, broadcast: Broadcast) -> Broadcast:
    """Shapes of a broadcast as it is sent: of each pruned leaf, only the entries that are kept."""

    def cut(path, x):
        if join_path(path) not in pruning.paths:
            return x
        return jax.ShapeDtypeStruct((int(count_kept(pruning, math.prod(x.shape))[level]),), x.dtype)

    return broadcast._replace(params=jax.tree_util.tree_map_with_path(cut, broadcast.params))


def count_mask_bytes(pruning: Pruning, level: int, params: Tree) -> int:
    """Bytes that say which weights are kept: one bit for each weight of a leaf with pruned weights."""
    sizes = [
        math.prod(x.shape)
        for path, x in jax.tree_util.tree_leaves_with_path(params)
        if join_path(path) in pruning.paths
    ]
    return sum(-(-size // 8) for size in sizes if count_kept(pruning, size)[level] < size)
