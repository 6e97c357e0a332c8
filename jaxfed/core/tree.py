"""Small functions on trees of arrays."""

import functools
import hashlib
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxfed.core.types import Key, Tree


def subtract(a: Tree, b: Tree) -> Tree:
    """a - b, leaf by leaf."""
    return jax.tree.map(jnp.subtract, a, b)


def scale_tree(factor: jax.typing.ArrayLike, tree: Tree) -> Tree:
    """factor * tree; every leaf keeps its dtype."""
    return jax.tree.map(lambda x: (factor * x).astype(x.dtype), tree)


def zeros_like(tree: Tree) -> Tree:
    """A tree of zeros with the shapes and dtypes of `tree` (arrays or shape structs)."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)


def to_compute_dtype(tree: Tree) -> Tree:
    """Floats of fewer than 32 bits as float32: what is computed with, whatever is stored."""

    def leaf(x):
        return x.astype(jnp.promote_types(x.dtype, jnp.float32)) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(leaf, tree)


def has_storage_dtype(tree: Tree) -> bool:
    """Whether some leaf is stored in less than it is computed in; see `wide`."""
    return any(
        x.dtype != like.dtype
        for x, like in zip(*map(jax.tree.leaves, (tree, jax.eval_shape(to_compute_dtype, tree))), strict=True)
    )


def stochastic_cast(tree: Tree, like: Tree, key: Key) -> Tree:
    """`tree` in the dtypes of `like`; from float32 to bfloat16 rounded at random, with the exact value as the mean.

    Rounded to the nearest, a change of less than 1/512 of a number would be lost, round after round.
    """

    def leaf(number, x, old):
        if (x.dtype, old.dtype) != (jnp.float32, jnp.bfloat16):
            return x.astype(old.dtype)
        bits = jax.lax.bitcast_convert_type(x, jnp.uint32)  # the upper half is the bfloat16 next to it toward zero
        up = random_uint16(jax.random.fold_in(key, number), x.shape).astype(jnp.uint32)
        rounded = jax.lax.bitcast_convert_type((bits + up) & jnp.uint32(0xFFFF0000), jnp.float32)
        return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)

    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, map(leaf, range(len(leaves)), leaves, jax.tree.leaves(like)))


def random_uint16(key: Key, shape: tuple[int, ...]) -> jax.Array:
    """uint16 of a shape: random bits, two numbers of each word, of which `jax.random.bits` would make one."""
    size = math.prod(shape)
    words = jax.random.bits(key, (-(-size // 2),), jnp.uint32)
    return jax.lax.bitcast_convert_type(words, jnp.uint16).ravel()[:size].reshape(shape)


def stochastic_round(x: jax.Array, key: Key) -> jax.Array:
    """float -> float: to the next integer below or above at random, x on average; chances are in units of 2^-24.

    One random number serves an array: those of its entries follow in steps of the golden ratio modulo 1 (Weyl), so each
    by itself is uniform. What two keys round is independent, which is all that a mean over clients asks for; a number
    each took three times as long as the rest of a code.
    """
    entry = jax.lax.iota(jnp.uint32, x.size).reshape(x.shape)
    # 24 bits are an int32 too, which becomes a float in one instruction
    uniform = ((jax.random.bits(key) + entry * jnp.uint32(0x9E3779B9)) >> 8).astype(jnp.int32).astype(jnp.float32)
    low = jnp.floor(x)
    return low + (uniform + 0.5 < (x - low) * 2.0**24)


def sum_first(x: jax.Array) -> jax.Array:
    """The sum over the first axis [K, ...], in an order that depends on nothing but the places: neighbours first.

    The order in which XLA sums differs from program to program, and with it the last bits. Here the bits are the same
    in every program and however many zeros follow. So what a client sends does not depend on who is computed beside it.
    """
    while len(x) > 1:
        x = jnp.pad(x, [(0, -len(x) % 8)] + [(0, 0)] * (x.ndim - 1))
        x = x.reshape(-1, 8, *x.shape[1:])
        x = functools.reduce(jnp.add, [x[:, i] for i in range(8)])
    return x[0] if len(x) else jnp.zeros(x.shape[1:], x.dtype)


def sum_last(x: jax.Array, axes: int) -> jax.Array:
    """The sum over the last `axes` axes, which stay with length 1; see `sum_first`."""
    lead = x.shape[: x.ndim - axes]
    return sum_first(jnp.moveaxis(x.reshape(*lead, -1), -1, 0)).reshape(*lead, *[1] * axes)


def all_finite(tree: Tree) -> jax.Array:
    """bool []: no leaf holds a NaN or an infinity, nor adds up to one.

    A sum: `isfinite(x).all()` takes three times as long, and a product with ones had XLA compute x once more for it.
    """
    leaves = map(jnp.asarray, jax.tree.leaves(tree))
    sums = [jnp.sum(x, dtype=jnp.float32) for x in leaves if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.isfinite(jnp.stack(sums)).all() if sums else jnp.bool_(True)


def count_bytes(tree: Tree) -> int:
    """Bytes of all leaves (arrays or shape structs)."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def tree_digest(tree: Tree) -> str:
    """SHA-256 over path, dtype, shape and bytes of every leaf: equal digests mean equal bits."""
    sha = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        array = np.asarray(leaf)
        sha.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape};".encode())
        sha.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return sha.hexdigest()
