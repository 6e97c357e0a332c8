"""Rows: a leaf whose leading axis is the catalogue is marked once, as a `Table`.

Everything made from the parameters (optimiser state, error feedback, messages) inherits the mark, so one `take_rows`
serves them all. A table is [N, ...] at the server, [K, ...] at a client, [k, ...] in a step; the ids that say
which rows travel beside it. Past the end (id N) reads zeros and writes nothing; never use -1, which wraps.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxfed.core.tree import sum_first
from jaxfed.core.types import Array, Tree


class Table(NamedTuple):
    """A leaf whose leading axis is the catalogue, or some rows of it: it travels row by row.

    Args:
        rows: [N, ...] at the server, [K, ...] at a client, [k, ...] in a step; or a tree of such arrays.

    Example:
        >>> import jaxfed as jf, jax.numpy as jnp
        >>> jf.Table(jnp.zeros((100, 8))).rows.shape
        (100, 8)
    """

    rows: Any


class SameRows(NamedTuple):
    """A part of a message that is the same for every row that the client holds: sent once, added to each in the sum.

    Where a link looks at more than one number of a message at a time, it is given the rows themselves (`repeat_rows`).

    Args:
        values: [...]: one row.
        places: `Table` [K, 0]: as many rows as the client holds, without numbers.
    """

    values: Any
    places: Table


def same_rows(values: jax.Array, rows: int) -> SameRows:
    """A row of a message that is the same for `rows` rows."""
    return SameRows(values, Table(jnp.zeros((rows, 0))))


def is_same_rows(node: Any) -> bool:
    """Whether a node of a tree is a `SameRows`."""
    return isinstance(node, SameRows)


def repeat_rows(tree: Tree, clients: int | None = None) -> Tree:
    """The tree with a `Table` in place of each `SameRows`. clients: of so many, rows end to end; None: of one."""

    def repeat(node):
        if not is_same_rows(node):
            return node
        values = node.values[None] if clients is None else node.values
        return Table(jnp.repeat(values, node.places.rows.shape[0] // (clients or 1), axis=0))

    return jax.tree.map(repeat, tree, is_leaf=is_same_rows)


def is_table(node: Any) -> bool:
    """Whether a node of a tree is a `Table`; the `is_leaf` of every walk that must see the marks."""
    return isinstance(node, Table)


def map_tables(on_table: Callable, on_leaf: Callable, tree: Tree, *rest: Tree) -> Tree:
    """Maps the arrays of tables by one function and all other arrays by another."""

    def node(first, *others):
        if is_table(first):
            return Table(jax.tree.map(on_table, first.rows, *(other.rows for other in others)))
        return on_leaf(first, *others)

    return jax.tree.map(node, tree, *rest, is_leaf=is_table)


def wrap(tree: Tree) -> Tree:
    """Wraps every leaf of `tree` as a table."""
    return jax.tree.map(Table, tree)


def unwrap(tree: Tree) -> Tree:
    """Takes the marks off: what a loss, a score or a user wants to see."""
    return jax.tree.map(lambda x: x.rows if is_table(x) else x, tree, is_leaf=is_table)


def num_rows(tree: Tree, axis: int = 0) -> int:
    """The common number of rows of all tables (0: there are none).

    Raises ValueError when tables differ in length.
    """
    tables = [x.rows for x in jax.tree.leaves(tree, is_leaf=is_table) if is_table(x)]
    sizes = {leaf.shape[axis] for leaf in jax.tree.leaves(tables)}
    if len(sizes) > 1:
        raise ValueError(f"tables of different lengths: {sorted(sizes)}")
    return max(sizes, default=0)


def take_rows(tree: Tree, ids: Array) -> Tree:
    """Rows `ids` of every table, other leaves as they are; an id past the end reads zeros."""
    return map_tables(lambda x: x.at[ids].get(mode="fill", fill_value=0), lambda x: x, tree)


def take_rows_unmasked(tree: Tree, ids: jax.Array) -> Tree:
    """As `take_rows`, but an id past the end reads some row: where that does not matter, no mask is made."""
    return map_tables(lambda x: x.at[ids].get(mode="clip"), lambda x: x, tree)


def add_rows(tree: Tree, ids: jax.Array | None, delta: Tree) -> Tree:
    """Adds to rows `ids` (repeats accumulate, past the end is dropped; None: all) and to other leaves whole; keeps
    dtypes."""

    def whole(x, d):
        return (x + d).astype(x.dtype)

    def to_rows(x, d):
        return x.at[ids].add(d.astype(x.dtype), mode="drop")

    return map_tables(whole if ids is None else to_rows, whole, tree, delta)


def put_rows(tree: Tree, ids: jax.Array | None, new: Tree) -> Tree:
    """Replaces rows `ids` (distinct; None: all) and other leaves whole."""
    if ids is None:
        return new
    return map_tables(lambda x, n: x.at[ids].set(n, mode="drop"), lambda x, n: n, tree, new)


def gather_client(store: Tree, i: jax.Array, ids: jax.Array) -> Tree:
    """Tree `i` of a store of trees [n, ...]; of its tables [n, N, ...] only rows `ids` are read.

    (tree, row) is one indexing: `store[i]` and then `take_rows` would build a whole table per client under vmap.
    """
    return map_tables(
        lambda x: x.at[i, ids].get(mode="fill", fill_value=0), lambda x: x.at[i].get(mode="fill", fill_value=0), store
    )


def scatter_client_tables(store: Tree, owner: jax.Array, ids: jax.Array, new: Tree) -> Tree:
    """Writes back the tables of many trees, rows at (owner, ids) [R]; past the end is dropped."""
    return map_tables(lambda x, y: x.at[owner, ids].set(y, mode="drop"), lambda x, y: x, store, new)


def scatter_client_leaves(store: Tree, i: jax.Array, new: Tree) -> Tree:
    """Writes back the leaves of many trees but for their tables, at `i` [W]; past the end is dropped."""
    return map_tables(lambda x, y: x, lambda x, y: x.at[i].set(y, mode="drop"), store, new)


def clear_padding(tree: Tree, held: jax.Array) -> Tree:
    """The tree with zeros in the rows [K] of its tables that are not `held` (bool [K])."""

    def clear(x):
        return jnp.where(held.reshape((-1,) + (1,) * (x.ndim - 1)), x, jnp.zeros_like(x))

    return map_tables(clear, lambda x: x, tree)


def squared_norm(tree: Tree) -> jax.Array:
    """float []: the sum of the squares of all numbers. Zeros at the end of tables change no bit; see `sum_first`."""

    def squares(x):
        return jnp.square(x.astype(jnp.promote_types(x.dtype, jnp.float32)))

    parts = map_tables(
        lambda x: sum_first(sum_first(squares(x)).ravel()), lambda x: sum_first(squares(x).ravel()), tree
    )
    return sum(jax.tree.leaves(parts), jnp.zeros(()))


def l2_norm(tree: Tree) -> jax.Array:
    """float []: the L2 norm of all numbers together; see `squared_norm`."""
    return jnp.sqrt(squared_norm(tree))


def flatten_tables(tree: Tree) -> Tree:
    """Tables [m, K, ...] as rows [m * K, ...], other leaves as they are."""
    return map_tables(lambda x: x.reshape((x.shape[0] * x.shape[1], *x.shape[2:])), lambda x: x, tree)


def pad_tables(tree: Tree, clients: int, rows: int, value: Any = 0) -> Tree:
    """Lengthens the first axis: tables to `rows`, other leaves to `clients`."""

    def to(size):
        return lambda x: jnp.pad(x, ((0, size - x.shape[0]),) + ((0, 0),) * (x.ndim - 1), constant_values=value)

    return map_tables(to(rows), to(clients), tree)
