"""Structured pruning of a finished model: removes whole heads, units of feed-forward layers, and rows of items."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxfed.core.types import Tree

ATTENTION, FEED_FORWARD = "attention", "feed_forward"  # the names of a block's parts


def measure_norms(parts: list[Any]) -> np.ndarray:
    """float [units]: the norm of all numbers of each unit, of arrays [units, ...]."""
    return np.sqrt(sum(np.square(np.asarray(x, np.float64)).reshape(len(x), -1).sum(1) for x in parts))


def measure_heads(attention: Tree) -> np.ndarray:
    """float [heads]: the strength of each head: the norm of its value weights times that of its output weights.

    attention: kernels [d, heads, width] of `query`, `key` and `value`, and [heads, width, d] of `output`.
    """
    value = [np.moveaxis(np.asarray(attention["value"]["kernel"]), 1, 0), attention["value"]["bias"]]
    return measure_norms(value) * measure_norms([attention["output"]["kernel"]])


def measure_units(feed: Tree) -> np.ndarray:
    """float [hidden]: the strength of each unit: the norm of its input weights times that of its output weights, times
    that of its gate where there is one."""
    first = np.ones(len(feed["output"]["kernel"]))
    for name in ("inner", "gate"):
        if name in feed:
            layer = feed[name]
            first = first * measure_norms(
                [np.asarray(layer["kernel"]).T, *([layer["bias"]] if "bias" in layer else [])]
            )
    return first * measure_norms([feed["output"]["kernel"]])


def list_largest(strength: np.ndarray, count: int) -> np.ndarray:
    """int [count]: the places of the largest, in their order; of equal ones the earlier."""
    return np.sort(np.argsort(-strength, kind="stable")[:count])


def shrink_attention(attention: Tree, count: int) -> Tree:
    """Attention with its `count` strongest heads."""
    kept = list_largest(measure_heads(attention), count)
    shorter = {
        name: {part: jnp.take(x, kept, 0 if part == "bias" else 1) for part, x in attention[name].items()}
        for name in ("query", "key", "value")
    }
    output = attention["output"]
    return {**attention, **shorter, "output": {**output, "kernel": jnp.take(output["kernel"], kept, 0)}}


def shrink_feed_forward(feed: Tree, count: int) -> Tree:
    """A feed-forward layer with its `count` strongest units."""
    kept = list_largest(measure_units(feed), count)
    shorter = {
        name: {part: jnp.take(x, kept, -1) for part, x in feed[name].items()}
        for name in ("inner", "gate")
        if name in feed
    }
    return {**feed, **shorter, "output": {**feed["output"], "kernel": jnp.take(feed["output"]["kernel"], kept, 0)}}


def has_blocks(node: Any) -> bool:
    """Whether there is a block of a transformer in a tree of parameters."""
    if not isinstance(node, dict):
        return False
    return (ATTENTION in node and FEED_FORWARD in node) or any(map(has_blocks, node.values()))


def shrink_block(block: Tree, heads: int, hidden: int) -> Tree:
    """A block with so many heads and units; 0: all. Raises ValueError where it has fewer."""
    there = {
        "heads": (heads, block[ATTENTION]["value"]["kernel"].shape[1]),
        "hidden": (hidden, len(block[FEED_FORWARD]["output"]["kernel"])),
    }
    for name, (asked, number) in there.items():
        if not 0 <= asked <= number:
            raise ValueError(f"{name} is {asked}: a block has {number}, set it from 1 to that")
    attention = shrink_attention(block[ATTENTION], heads) if heads else block[ATTENTION]
    feed = shrink_feed_forward(block[FEED_FORWARD], hidden) if hidden else block[FEED_FORWARD]
    return {**block, ATTENTION: attention, FEED_FORWARD: feed}


def shrink_blocks(params: Tree, heads: int = 0, hidden: int = 0) -> Tree:
    """Removes the weakest heads, and units of feed-forward layers, of every block of a transformer (Michel et al. 2019,
    "Are sixteen heads really better than one?"; Li et al. 2017, "Pruning filters for efficient convnets").

    The strength of a head is the product of the norms of its value and output weights, that of a unit likewise. The
    result fits a smaller model: `sasrec` with that many `heads`, the same `head_width`, and `hidden_width`.

    Args:
        params: The model's parameters, such as those of `sasrec`; tables may be marked.
        heads: Number of heads that each block keeps. 0: all.
        hidden: Number of units that each feed-forward layer keeps. 0: all.

    Returns:
        The smaller parameters.

    Raises:
        ValueError: there is no such block, or it has fewer heads or units.

    Example:
        >>> import jax, jaxfed as jf
        >>> large = jf.models.sasrec(num_items=10, dim=8, heads=4).init(jax.random.key(0))
        >>> small = jf.models.sasrec(num_items=10, dim=8, heads=1, head_width=2, hidden_width=5).init(jax.random.key(0))
        >>> jax.tree.map(jnp.shape, shrink_blocks(large, heads=1, hidden=5)) == jax.tree.map(jnp.shape, small)
        True
    """
    if not has_blocks(params):
        raise ValueError("the model has no blocks of attention and feed-forward layers: take sasrec or bert4rec")

    def shrink(node):
        if ATTENTION in node and FEED_FORWARD in node:
            return shrink_block(node, heads, hidden)
        return {name: shrink(each) if has_blocks(each) else each for name, each in node.items()}

    return shrink(params)


def merge_rows(rows: Any, kept: np.ndarray) -> Any:
    """Replaces the rows [N, d] that are not kept by one row, their mean. To store are then the kept rows, that row, and
    the number of the row of each item.

    Args:
        rows: Vectors of items.
        kept: bool [N].

    Returns:
        [N, d].

    Example:
        >>> merge_rows(jnp.array([[4.0], [1.0], [3.0]]), np.array([True, False, False])).tolist()
        [[4.0], [2.0], [2.0]]
    """
    dropped = jnp.asarray(~kept)[:, None]
    shared = jnp.where(dropped, rows, 0).sum(0) / jnp.maximum(dropped.sum(), 1)
    return jnp.where(dropped, shared.astype(rows.dtype), rows)
