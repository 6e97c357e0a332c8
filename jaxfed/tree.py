"""Small functions on trees of arrays."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np

from jaxfed.types import Tree


def sub(a: Tree, b: Tree) -> Tree:
    """a - b, leaf by leaf."""
    return jax.tree.map(jnp.subtract, a, b)


def scale(factor: jax.typing.ArrayLike, tree: Tree) -> Tree:
    """factor * tree; every leaf keeps its dtype."""
    return jax.tree.map(lambda x: (factor * x).astype(x.dtype), tree)


def zeros(tree: Tree) -> Tree:
    """A tree of zeros with the shapes and dtypes of `tree` (arrays or shape structs)."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)


def finite(tree: Tree) -> jax.Array:
    """bool []: no leaf holds a NaN or an infinity."""
    leaves = map(jnp.asarray, jax.tree.leaves(tree))
    fine = [jnp.isfinite(x).all() for x in leaves if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.stack(fine).all() if fine else jnp.bool_(True)


def nbytes(tree: Tree) -> int:
    """Bytes of all leaves (arrays or shape structs)."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def digest(tree: Tree) -> str:
    """SHA-256 over path, dtype, shape and bytes of every leaf: equal digests mean equal bits."""
    sha = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        array = np.asarray(leaf)
        sha.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape};".encode())
        sha.update(np.ascontiguousarray(array).tobytes())
    return sha.hexdigest()
