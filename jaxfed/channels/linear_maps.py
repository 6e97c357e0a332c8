"""Links that send linear maps of a message, random rotations and few directions: the server undoes them on the sum."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxfed.core.link import Channel, link
from jaxfed.core.recipe import named
from jaxfed.core.tables import Table, is_table
from jaxfed.core.types import Key, Tree


def map_leaves(function: Callable, tree: Tree, key: Key | None = None) -> Tree:
    """Maps function(array, is it a table?, a key of its own) over a tree; what comes of a table is marked again."""
    nodes, structure = jax.tree.flatten(tree, is_leaf=is_table)

    def node(i, x):
        own = None if key is None else jax.random.fold_in(key, i)
        return Table(function(x.rows, True, own)) if is_table(x) else function(x, False, own)

    return jax.tree.unflatten(structure, [node(i, x) for i, x in enumerate(nodes)])


def hadamard_transform(x: jax.Array) -> jax.Array:
    """The orthonormal Walsh-Hadamard transform of the last axis, whose length is a power of two; its own inverse."""
    size, lead = x.shape[-1], x.shape[:-1]
    half = 1
    while half < size:
        pairs = x.reshape(*lead, size // (2 * half), 2, half)
        x = jnp.stack([pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]], -2).reshape(
            *lead, size
        )
        half *= 2
    return x / jnp.sqrt(jnp.float32(size))


@named("channel")
def rotate() -> Channel:
    """Random signs, then a Hadamard transform, along the last axis where its length is a power of two (Suresh et al.
    2017). Then all numbers have a similar size, and a coarse code loses less. The server turns the sum back.

    Returns:
        The link.

    Example:
        >>> import jax, jaxfed as jf, jax.numpy as jnp
        >>> from types import SimpleNamespace
        >>> client = SimpleNamespace(link_state=(), public=jax.random.key(0))
        >>> jnp.abs(jf.channels.rotate().encode(jnp.array([2.0, 0.0, 0.0, 0.0]), (), client)[0]).tolist()
        [1.0, 1.0, 1.0, 1.0]
    """

    def signs(x, key):
        return jax.random.rademacher(key, x.shape[-1:], x.dtype)

    def turns(x):
        return x.ndim and x.shape[-1] > 1 and x.shape[-1] & (x.shape[-1] - 1) == 0

    def columns(x, in_table):
        return turns(x) and not (in_table and x.ndim == 1)  # rows are not columns

    def encode(update, sent, client):
        def turn(x, in_table, key):
            return hadamard_transform(x * signs(x, key)) if columns(x, in_table) else x

        return map_leaves(turn, update, client.public), client.link_state

    def decode(total, state, round):
        def back(x, in_table, key):
            return hadamard_transform(x) * signs(x, key) if columns(x, in_table) else x

        return map_leaves(back, total, round.key), state, {}

    return link(encode, decode, l2_gain=lambda bound: bound, is_average=False, name="rotate")


def draw_directions(columns: int, rank: int, key: Key) -> jax.Array:
    """[columns, rank]: random orthonormal directions, columns of a Hadamard matrix with random signs."""
    signs, order = jax.random.split(key)
    flips = jax.random.rademacher(signs, (columns, 1), jnp.float32)
    return (flips * hadamard_transform(jnp.eye(columns)))[:, jax.random.permutation(order, columns)[:rank]]


def has_columns(x: jax.Array, in_table: bool) -> bool:
    """Whether the last axis of a leaf holds columns: that of a table of one number a row holds rows."""
    return x.ndim > 1 or (x.ndim == 1 and not in_table)


def is_cut(columns: int, rank: int) -> bool:
    """Whether so many columns are sent as `rank` numbers: a power of two above it."""
    return columns > rank and columns & (columns - 1) == 0


def note_columns(example: Tree) -> tuple[Tree, Tree]:
    """The state of `low_rank`, which stays zero. Its shapes say how many columns there were: a checkpoint holds no
    empty arrays."""
    nodes = [(x.rows, True) if is_table(x) else (x, False) for x in jax.tree.leaves(example, is_leaf=is_table)]
    return [jnp.zeros(x.shape[-1] if has_columns(x, in_table) else ()) for x, in_table in nodes], ()


@named("channel")
def low_rank(rank: int = 8, gain: float = 1.0) -> Channel:
    """Sends the coordinates of each row in `rank` random orthonormal directions, drawn anew each round (after CoLR,
    Nguyen et al. 2024: one factor is random and known to all, the other is learned).

    Linear: the server multiplies the sum by the directions, and by `gain`. The directions are columns of a Hadamard
    matrix with random signs; leaves whose last axis is no power of two above `rank` are sent whole.

    Args:
        rank: Number of directions, which is how many numbers are sent of a row.
        gain: What the server multiplies by. 0: columns / rank, which makes it right on average.

    Returns:
        The link.

    Raises:
        ValueError: `rank` is below 1.

    Example:
        >>> import jax, jaxfed as jf, jax.numpy as jnp
        >>> from types import SimpleNamespace
        >>> client = SimpleNamespace(link_state=(), public=jax.random.key(0))
        >>> jf.channels.low_rank(rank=2).encode(jf.Table(jnp.ones((5, 8))), (), client)[0].rows.shape
        (5, 2)
    """
    if rank < 1:
        raise ValueError(f"low_rank.rank is {rank}: it must be at least 1")

    def encode(update, sent, client):
        def cut(x, in_table, key):
            if not (has_columns(x, in_table) and is_cut(x.shape[-1], rank)):
                return x
            return x @ draw_directions(x.shape[-1], rank, key)

        return map_leaves(cut, update, client.public), client.link_state

    def decode(total, state, round):
        sizes = iter(jax.tree.leaves(state))

        def back(x, in_table, key):
            columns = next(sizes)
            if not (columns.ndim and is_cut(columns.size, rank)):
                return x
            return (gain or columns.size / rank) * x @ draw_directions(columns.size, rank, key).T

        return map_leaves(back, total, round.key), state, {}

    l2_gain = (lambda bound: bound) if 0 < gain <= 1 else None
    return link(encode, decode, note_columns, l2_gain=l2_gain, is_average=False, name="low_rank")
