"""Keyed bijections: random orders whose every element is computed by itself, on any device, without a sort."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

FEISTEL_ROUNDS = 8  # with 6, some pairs of places are more frequent than others
SHORTEST_HALF = 6  # a network on smaller halves takes many rounds more
GOLDEN, STRIDE = np.uint32(0x9E3779B9), np.uint32(0x85EBCA6B)


class BijectionKey(NamedTuple):
    """Two words of a keyed bijection."""

    even: jax.Array  # uint32
    odd: jax.Array  # uint32


def hash_bits(x: jax.Array) -> jax.Array:
    """uint32 -> uint32: each bit of the result depends on all bits (lowbias32, Wellons 2018)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def fold_in_number(key: BijectionKey, number: jax.Array | int) -> BijectionKey:
    """The key of a number below a key."""
    number = jnp.asarray(number).astype(jnp.uint32)
    return BijectionKey(
        hash_bits(hash_bits(number * GOLDEN + key.even) + key.odd),
        hash_bits(hash_bits(number * STRIDE + key.odd) ^ key.even),
    )


def divide_integers(index: jax.Array, size: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(int32 quotient, int32 remainder) of integers from 0 to below 2^31; the quotient must be below 2^20.

    By the quotient of floats, which is off by one at most: a processor divides several floats at a time.
    """
    quotient = (index.astype(jnp.float32) / size.astype(jnp.float32)).astype(jnp.int32)
    rest = index - quotient * size
    off = (rest >= size).astype(jnp.int32) - (rest < 0)
    return quotient + off, rest - off * size


def draw_below(size: jax.Array, key: BijectionKey) -> jax.Array:
    """int32: a random number of [0, size) for each key: the upper word of size times the key's even word. No number
    has a chance that differs from 1 / size by more than 2^-32. size int: from 1 to below 2^30, of the keys' shape or
    one that broadcasts."""
    size = size.astype(jnp.uint32)
    high, low, size_high, size_low = key.even >> 16, key.even & 0xFFFF, size >> 16, size & 0xFFFF
    middle = high * size_low + (low * size_low >> 16)
    carry = (middle & 0xFFFF) + low * size_high >> 16
    return (high * size_high + (middle >> 16) + carry).astype(jnp.int32)


def apply_feistel_network(
    index: jax.Array, high: jax.Array, low: jax.Array, key: BijectionKey, inverse: bool = False
) -> jax.Array:
    """int32: a keyed bijection of [0, high * low), by a Feistel network on pairs (index // low, index % low).

    Each of its rounds moves one half around by a hash of the other half; for the inverse they are undone, the last one
    first.
    """
    halves = [half.astype(jnp.uint32) for half in divide_integers(index, low)]
    sizes = [high.astype(jnp.uint32), low.astype(jnp.uint32)]
    for number in reversed(range(FEISTEL_ROUNDS)) if inverse else range(FEISTEL_ROUNDS):
        this, other = number % 2, 1 - number % 2
        salt = key[this] + jnp.uint32(number * int(STRIDE) & 0xFFFFFFFF)
        shift = (hash_bits(halves[other] * GOLDEN + salt) >> 16) * sizes[this] >> 16
        moved = halves[this] + (sizes[this] - shift if inverse else shift)
        halves[this] = jnp.where(moved >= sizes[this], moved - sizes[this], moved)
    return (halves[0] * sizes[1] + halves[1]).astype(jnp.int32)


def permute_indices(
    index: jax.Array, size: jax.Array, key: BijectionKey, largest: int, inverse: bool = False
) -> jax.Array:
    """int32 [m, k]: keyed bijections of [0, size) at each index.

    A bijection of [0, s), s a little above the size; one that lands past the size goes on from there until it does not
    (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"). Where each of the few numbers between size and s
    ends is computed once.

    Args:
        index: int [m, k]: from 0 to below `size`.
        size: int [m, 1]: from 1 to below 2^30.
        key: which bijections, words [m, 1].
        largest: no size is above.
        inverse: Whether the inverse bijections are asked for.
    """
    high = jnp.maximum(jnp.ceil(jnp.sqrt(size.astype(jnp.float32))).astype(jnp.int32), SHORTEST_HALF)
    low = jnp.maximum(divide_integers(size + high - 1, high)[0], SHORTEST_HALF)
    past = size + jnp.arange(max(math.isqrt(largest) + 2, SHORTEST_HALF**2))  # from the size on, to s and beyond

    def go_on(index, ends):
        end = jnp.take_along_axis(ends, jnp.clip(index - size, 0, past.shape[-1] - 1), 1, mode="clip")
        return jnp.where(index >= size, end, index)

    ends = apply_feistel_network(jnp.minimum(past, high * low - 1), high, low, key, inverse)
    # each time twice as many jumps; no index lands where they never end. A loop of XLA writes the result down: fused
    # with what follows, each of the many indices would compute all of it again
    ends = jax.lax.fori_loop(0, past.shape[-1].bit_length(), lambda _, ends: go_on(ends, ends), ends)
    return go_on(apply_feistel_network(index, high, low, key, inverse), ends)
