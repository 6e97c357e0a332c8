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
    """bool []: no leaf holds a NaN or an infinity, nor adds up to one.

    A product with ones: a third of the time of `isfinite(x).all()`, which writes a mask and reduces that.
    """
    leaves = map(jnp.asarray, jax.tree.leaves(tree))
    real = [x.ravel() for x in leaves if jnp.issubdtype(x.dtype, jnp.inexact)]
    sums = [jnp.dot(x, jnp.ones_like(x), preferred_element_type=jnp.float32) for x in real]
    return jnp.isfinite(jnp.stack(sums)).all() if sums else jnp.bool_(True)


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
