"""Parametrizations of a model's tables: what the server holds where it does not hold each row of each table."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfed.core.model import Model
from jaxfed.core.parametrization import Parametrization
from jaxfed.core.recipe import named
from jaxfed.core.tables import Table, is_table, take_rows
from jaxfed.core.types import Key, Tree


def is_matrix(node) -> bool:
    """Whether a node of a tree is a table with more than one number to a row."""
    return is_table(node) and node.rows.ndim > 1


def check_tables(name: str, model: Model) -> None:
    """Raises ValueError where a model has no table with more than one number to a row."""
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    if not any(map(is_matrix, jax.tree.leaves(shapes, is_leaf=is_table))):
        raise ValueError(
            f"parametrization.{name}: the model has no table of item vectors: leave the parametrization out"
        )


def map_matrices(change, tree: Tree, key: Key) -> Tree:
    """The tree with change(array, key) in place of each table with more than one number to a row."""
    nodes, structure = jax.tree.flatten(tree, is_leaf=is_table)
    changed = [
        change(node.rows, jax.random.fold_in(key, number)) if is_matrix(node) else node
        for number, node in enumerate(nodes)
    ]
    return jax.tree.unflatten(structure, changed)


def entry_size(x: jax.Array) -> jax.Array:
    """float []: the root of the mean square of an array's numbers."""
    return jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32))))


class FactoredTable(NamedTuple):
    """A table [N, ...] as a product."""

    rows: Table  # [N, r]
    basis: jax.Array  # [r, ...]


@named("parametrization", "low_rank")
def low_rank_tables(model: Model, rank: int = 8) -> Parametrization:
    """Each table of item vectors [N, d] is a product A B of a table A [N, r] and a matrix B [r, d].

    The server trains both. Clients download the rows of A B that they hold, and send an update of them, as without it.
    A starts with normal numbers, such that A B has entries as large as the model's own.
    For r much smaller than d, B starts close to an
    orthonormal basis, so a step of A moves A B like a step of the table itself along r axes. Tables of one dimension (a
    bias) stay as they are.

    Args:
        model: The model whose tables they are.
        rank: Number r of columns of A; from 1 to the length d of the vectors.

    Returns:
        The parametrization, for `jaxfed.Experiment`.

    Raises:
        ValueError: the model has no such table, or the rank is not possible.

    Example:
        >>> from jaxfed.models.mf import mf
        >>> held = low_rank_tables(mf(1000, 1, dim=64), rank=4).init(jax.random.key(0))
        >>> jax.tree.map(jnp.shape, held["tables"]["item"])
        FactoredTable(rows=Table(rows=(1000, 4)), basis=(4, 64))
    """
    check_tables("low_rank", model)
    for node in jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0)), is_leaf=is_table):
        width = int(np.prod(node.rows.shape[1:])) if is_matrix(node) else 0
        if width and not 1 <= rank <= width:
            raise ValueError(f"parametrization.rank is {rank}: vectors have {width} numbers, set it from 1 to {width}")

    def init(key):
        model_key, own_key = jax.random.split(key)

        def factor(table, key):
            left, right = jax.random.split(key)
            width = int(np.prod(table.shape[1:]))
            size = entry_size(table) * (width / rank) ** 0.5
            rows = size * jax.random.normal(left, (len(table), rank))
            return FactoredTable(
                Table(rows.astype(table.dtype)), jax.random.normal(right, (rank, *table.shape[1:])) / width**0.5
            )

        return map_matrices(factor, model.init(model_key), own_key)

    def forward(theta, rows):
        def multiply(node):
            if not isinstance(node, FactoredTable):
                return node
            held = node.rows.rows
            return Table(jnp.tensordot(held.astype(jnp.float32), node.basis, 1).astype(held.dtype))

        held = theta if rows is None else take_rows(theta, rows)
        return jax.tree.map(multiply, held, is_leaf=lambda node: isinstance(node, FactoredTable) or is_table(node))

    return Parametrization(init, forward)


class HashedTable(NamedTuple):
    """A table [N, ...] whose rows are sums of rows of a smaller one."""

    buckets: jax.Array  # [buckets, ...]


def hash_rows(ids: jax.Array, multiplier: int, offset: int, buckets: int) -> jax.Array:
    """int32, like `ids`: the bucket of each row of the catalogue, by a multiplicative hash with public constants."""
    mixed = ids.astype(jnp.uint32) * jnp.uint32(multiplier) + jnp.uint32(offset)
    mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x9E3779B1)  # the upper bits of a product are the well mixed ones
    return ((mixed ^ (mixed >> 16)) % jnp.uint32(buckets)).astype(jnp.int32)


@named("parametrization", "hashed")
def hashed_tables(model: Model, buckets: int = 1024, hashes: int = 2, seed: int = 0) -> Parametrization:
    """Each row of a table of item vectors is a sum of rows of a table of `buckets` rows, by hashes of its number.

    Svenstrup et al. 2017, "Hash embeddings for efficient word representations", with weights of 1. Two items have the
    same vector where their hashes give the same buckets, in any order. Tables of one dimension (a bias)
    stay as they are.

    Args:
        model: The model whose tables they are.
        buckets: Number of rows of the table that the server trains.
        hashes: Number of hash functions, each of which adds one row.
        seed: Seed of the hash functions; everybody may know it.

    Returns:
        The parametrization, for `jaxfed.Experiment`.

    Raises:
        ValueError: the model has no such table, or a number is below 1.

    Example:
        >>> from jaxfed.models.mf import mf
        >>> held = hashed_tables(mf(1000, 1, dim=64), buckets=100).init(jax.random.key(0))
        >>> jax.tree.map(jnp.shape, held["tables"]["item"])
        HashedTable(buckets=(100, 64))
    """
    check_tables("hashed", model)
    for name, size in (("buckets", buckets), ("hashes", hashes)):
        if size < 1:
            raise ValueError(f"parametrization.{name} is {size}: it must be at least 1")
    constants = np.random.default_rng([seed, hashes]).integers(0, 1 << 32, (hashes, 2), np.uint32).tolist()
    sizes = jax.eval_shape(model.init, jax.random.key(0))

    def init(key):
        model_key, own_key = jax.random.split(key)

        def shrink(table, key):
            numbers = jax.random.normal(key, (buckets, *table.shape[1:])) * entry_size(table) / hashes**0.5
            return HashedTable(numbers.astype(table.dtype))

        return map_matrices(shrink, model.init(model_key), own_key)

    def forward(theta, rows):
        def expand(size, node):
            if not isinstance(node, HashedTable):
                return node if rows is None else take_rows(node, rows)
            ids = jnp.arange(len(size.rows)) if rows is None else rows
            places = [hash_rows(ids, multiplier | 1, offset, buckets) for multiplier, offset in constants]
            held = node.buckets.astype(jnp.float32)
            found = functools.reduce(jnp.add, [held[each] for each in places])
            return Table(found.astype(node.buckets.dtype))

        return jax.tree.map(expand, sizes, theta, is_leaf=is_table)

    return Parametrization(init, forward)


def identity_parametrization(model: Model) -> None:
    """The server holds the model's tables themselves."""
