"""Differential privacy: links that add noise. The unit is the user: a client's whole message counts as one record.

What a client could add to the sum is the norm that the links to the left of a noise link let through; `chain` tells it,
and refuses links to the right that could enlarge it. Private parts of a model never leave a client: the guarantee is
joint differential privacy (Kearns et al. 2014), of all that the server ever shows to others.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxfed.core.aggregate import SUM
from jaxfed.core.link import Channel, link
from jaxfed.core.recipe import named
from jaxfed.core.tables import Table, is_table, num_rows
from jaxfed.core.types import Key, Mechanism, Tree


def add_normal_noise(tree: Tree, stddev: jax.typing.ArrayLike, key: Key) -> Tree:
    """The tree with independent normal noise on every number."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(
        structure, [x + stddev * jax.random.normal(k, x.shape, x.dtype) for x, k in zip(leaves, keys, strict=True)]
    )


def check_sensitivity(name: str, multiplier: float, norm: float) -> float:
    """The norm at a noise link. Raises ValueError where nothing bounds it."""
    if not multiplier > 0:
        raise ValueError(f"{name}.multiplier is {multiplier}: it must be positive; leave the link out for no noise")
    if norm == math.inf:
        raise ValueError(
            f"{name}: nothing to its left bounds what one client can add to the sum: put clip before it, and weights "
            "that depend on private data (weighted_mean, per_row_mean) before the clip"
        )
    return norm


@named("channel")
def gaussian(multiplier: float = 1.0) -> Channel:
    """Central differential privacy: normal noise on the decoded sum (McMahan et al. 2018, "Learning differentially
    private recurrent language models").

    Every row of every table is noised, also those nobody held: a row without noise would say that nobody held it.

    Args:
        multiplier: Standard deviation of the noise, over what one client can add to the sum.
    """

    def mechanisms(bound):
        return (Mechanism("gaussian", multiplier, l2=check_sensitivity("gaussian", multiplier, bound)),)

    def decode(total, state, round):
        stddev = multiplier * check_sensitivity("gaussian", multiplier, round.bound)
        return add_normal_noise(total, stddev, round.key), state, {"noise/stddev": jnp.float32(stddev)}

    return link(
        decode=decode,
        aggregator=SUM,  # what one client can add is what it can add to a sum, to no other aggregate
        is_average=False,
        l2_gain=lambda bound: bound,
        mechanisms=mechanisms,
        needs_all_rows=True,
        name="gaussian",
    )


class WholeTable(NamedTuple):
    """A table of which a client sends every row: a leaf like any other to the links that come after."""

    rows: Any


@named("channel")
def densify() -> Channel:
    """A client sends every row of every table, zeros where it holds none. Zeros still tell which: only with noise on
    each message (`local_gaussian`) or a sum of hidden ones (`ring`, `pads`) do neither its rows nor their number show.

    The price is that of whole tables, up and (as asking for rows would show them) down.
    """

    def encode(update, sent, client):
        def spread(x):
            return jnp.zeros((client.size, *x.shape[1:]), x.dtype).at[client.rows].add(x, mode="drop")

        def whole(node):
            return WholeTable(jax.tree.map(spread, node.rows)) if is_table(node) else node

        return jax.tree.map(whole, update, is_leaf=is_table), client.link_state

    def decode(total, state, round):
        def table(node):
            return Table(node.rows) if isinstance(node, WholeTable) else node

        return jax.tree.map(table, total, is_leaf=lambda node: isinstance(node, WholeTable)), state, {}

    return link(encode, decode, is_average=False, l2_gain=lambda bound: bound, needs_all_rows=True, name="densify")


@named("channel")
def local_gaussian(multiplier: float = 1.0) -> Channel:
    """Local differential privacy: each client adds the noise itself, to a message that shows no rows (`densify`).

    What comes after sees noise alone and may do anything; but nothing bounds the norm of a noised message.

    Args:
        multiplier: Standard deviation of the noise, over the largest norm of a message.
    """

    def mechanisms(bound):
        return (Mechanism("local", multiplier, l2=check_sensitivity("local_gaussian", multiplier, bound)),)

    def encode(update, sent, client):
        stddev = multiplier * check_sensitivity("local_gaussian", multiplier, client.bound)
        return add_normal_noise(update, stddev, client.key), client.link_state

    def init(example):
        if num_rows(example):
            raise ValueError("local_gaussian: noise does not hide which rows a client sends: put densify before it")
        return (), ()

    return link(encode, init=init, mechanisms=mechanisms, needs_all_rows=True, name="local_gaussian")
