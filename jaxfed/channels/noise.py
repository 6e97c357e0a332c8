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

    Every row of every table gets noise, also those that nobody holds: a row without noise would show that nobody holds
    it.

    Args:
        multiplier: Standard deviation of the noise, divided by the largest norm of what one client can add to the sum.

    Returns:
        The link.

    Raises:
        ValueError: in a chain, where the multiplier is not positive, or nothing to the left of the link bounds a
            message.

    Example:
        >>> import jaxfed as jf
        >>> mechanism, = jf.chain(jf.channels.clip(0.5), jf.channels.gaussian(2.0)).claims.mechanisms(3.0)
        >>> mechanism.multiplier, mechanism.l2  # the noise has a standard deviation of their product
        (2.0, 0.5)
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
    """A client sends every row of every table, with zeros in those that it does not hold.

    Zeros still show which rows these are. Only with noise on each message (`local_gaussian`), or in a sum of hidden
    messages (`ring`, `pads`), nobody learns which rows a client holds, and how many. Whole tables are sent, and (as
    asking for some rows would show them) whole tables are downloaded.

    Returns:
        The link.

    Example:
        >>> import jaxfed as jf, jax.numpy as jnp
        >>> from types import SimpleNamespace
        >>> client = SimpleNamespace(link_state=(), rows=jnp.array([3, 1]), size=4)  # it holds rows 3 and 1 of 4
        >>> jf.channels.densify().encode(jf.Table(jnp.array([0.5, 0.25])), (), client)[0].rows.tolist()
        [0.0, 0.25, 0.0, 0.5]
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
    """Local differential privacy (Kasiviswanathan et al. 2011): each client adds normal noise to its own message.

    The message must not show rows, so `densify` stands before it. Links to its right see noised messages alone and may
    do anything with them; but nothing bounds the norm of such a message.

    Args:
        multiplier: Standard deviation of the noise, divided by the largest norm of a message.

    Returns:
        The link.

    Raises:
        ValueError: in a chain, where the multiplier is not positive, nothing to the left of the link bounds a message,
            or a message shows rows.

    Example:
        >>> import jaxfed as jf
        >>> jf.chain(jf.channels.clip(0.5), jf.channels.local_gaussian(2.0)).claims.mechanisms(3.0)[0].kind
        'local'
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
