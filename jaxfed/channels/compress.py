"""Links that make messages smaller.

`rotate` and `low_rank` are linear: the server undoes them on the sum. The others make codes that mean something one
message at a time only: the server reads each before the sum (`Channel.decode_message`), so they come last in a chain.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxfed.core.channel import chain
from jaxfed.core.link import Channel, encode_message, link
from jaxfed.core.recipe import named
from jaxfed.core.streams import WEIGHTS
from jaxfed.core.tables import Table, is_table
from jaxfed.core.tree import stochastic_round, subtract, sum_last, zeros_like
from jaxfed.core.types import Coded, Kept, Key, Tree, Weights


def map_leaves(function: Callable, tree: Tree, key: Key | None = None) -> Tree:
    """Maps function(array, is it a table?, a key of its own) over a tree; what comes of a table is marked again."""
    nodes, structure = jax.tree.flatten(tree, is_leaf=is_table)

    def node(i, x):
        own = None if key is None else jax.random.fold_in(key, i)
        return Table(function(x.rows, True, own)) if is_table(x) else function(x, False, own)

    return jax.tree.unflatten(structure, [node(i, x) for i, x in enumerate(nodes)])


def with_error_feedback(code: Channel) -> Channel:
    """Error feedback: the compression error is added to the client's next message (Seide et al. 2014; Karimireddy et
    al. 2019). Stores one full item table per client (clients x items x dim numbers)."""

    def encode(update, sent, client):
        corrected = jax.tree.map(jnp.add, update, client.link_state)
        message, _ = encode_message(code, corrected, sent, client._replace(link_state=()))
        assert code.decode_message
        return message, subtract(
            corrected, code.decode_message(message, sent, client._replace(link_state=None, key=None))
        )

    # what was held back may come all at once: nothing bounds the norm
    claims = code.claims._replace(l2_gain=None)
    return code._replace(init=lambda example: ((), zeros_like(example)), encode=encode, claims=claims)


def scaled_code(code: Callable, value: Callable, name: str, bits: int) -> Channel:
    """A code of integers and a scale, for each row of a table with several columns and for each other leaf.

    code(x, key, entries) -> (integers like x, scale [rows, 1, ...]) for x [rows, ...], of each of which so many numbers
    are not there to fill a block; value(codes) -> what a code means, in scales.
    """

    def shape(x, in_table):
        return x if in_table and x.ndim > 1 else x[None]  # a number a row: one scale for all rows

    def encode(update, sent, client):
        def one(x, in_table, key):
            whole = shape(x, in_table)
            filled = in_table and x.ndim == 1
            entries = client.held.sum() if filled else math.prod(whole.shape[1:])
            codes, scale = code(whole, key, entries)
            return Coded(codes.reshape(x.shape), bits), scale.reshape(scale.shape[:1])

        pairs = [one_node(one, node, i, client.key) for i, node in enumerate(jax.tree.leaves(update, is_leaf=is_table))]
        structure = jax.tree.structure(update, is_leaf=is_table)
        codes, scales = (jax.tree.unflatten(structure, [pair[i] for pair in pairs]) for i in (0, 1))
        return (codes, scales), client.link_state

    def one_node(one, node, i, key):
        x = node.rows if is_table(node) else node
        codes, scale = one(x, is_table(node), jax.random.fold_in(key, i))
        by_row = is_table(node) and x.ndim > 1
        return (Table(codes) if is_table(node) else codes), (Table(scale) if by_row else scale)

    def decode_message(message, sent, client):
        codes, scales = message

        def meant(node, scale):
            coded, in_table = (node.rows, True) if is_table(node) else (node, False)
            scale = scale.rows if is_table(scale) else scale
            whole = shape(value(coded.values), in_table)
            x = (whole * scale.reshape(scale.shape + (1,) * (whole.ndim - 1))).reshape(coded.values.shape)
            return Table(x) if in_table else x

        def stop(node):
            return is_table(node) or isinstance(node, Coded)

        structure = jax.tree.structure(codes, is_leaf=stop)
        each = zip(jax.tree.leaves(codes, is_leaf=stop), jax.tree.leaves(scales, is_leaf=is_table), strict=True)
        return jax.tree.unflatten(structure, [meant(*pair) for pair in each])

    return link(encode, decode_message=decode_message, name=name)


def uniform_code(bits: int, whole: Callable, name: str) -> Channel:
    """Integers of `bits` bits in units of the largest number; whole(x, key) makes x integers."""
    top, dtype = 2 ** (bits - 1) - 1, jnp.uint8 if bits <= 8 else jnp.uint16

    def code(x, key, entries):
        high, low = (of(x, range(1, x.ndim), keepdims=True, initial=0) for of in (jnp.max, jnp.min))
        largest = jnp.maximum(high, -low)  # of |x|, without writing that down
        # where the unit is too small for a float32 all numbers are sent as 0: 0 times an infinite 1 / unit is NaN
        steps = whole(x * (top / jnp.where(largest > top * jnp.finfo(jnp.float32).tiny, largest, 1)), key)
        return (jnp.clip(steps, -top, top) + top).astype(dtype), largest / top

    return scaled_code(code, lambda codes: codes.astype(jnp.float32) - top, name, bits)


def keep_weights_apart(code: Channel) -> Channel:
    """The code, but for weights: a byte a row, which loses nothing of a weight that all rows share. Codes that drop or
    blur numbers would have the server divide by weights that nobody sent."""
    plain = uniform_code(8, lambda x, key: jnp.trunc(x), "weights")  # toward zero: no norm is enlarged

    def split(tree):
        nodes, structure = jax.tree.flatten(tree, is_leaf=is_weights)
        rest = [Weights(()) if is_weights(node) else node for node in nodes]
        return jax.tree.unflatten(structure, rest), [node.values for node in nodes if is_weights(node)]

    def encode(update, sent, client):
        rest, weights = split(update)
        message, link_state = encode_message(code, rest, sent, client)
        own = client._replace(link_state=(), key=jax.random.fold_in(client.key, WEIGHTS))
        return (message, encode_message(plain, weights, sent, own)[0]), link_state

    def decode_message(message, sent, client):
        assert code.decode_message
        assert plain.decode_message
        rest, weights = (
            code.decode_message(message[0], sent, client),
            iter(plain.decode_message(message[1], sent, client)),
        )
        return jax.tree.map(lambda x: Weights(next(weights)) if is_weights(x) else x, rest, is_leaf=is_weights)

    return code._replace(
        init=lambda example: code.init(split(example)[0]), encode=encode, decode_message=decode_message
    )


def is_weights(node: object) -> bool:
    """Whether a node of a message is `Weights`."""
    return isinstance(node, Weights)


@named("channel")
def quantize(bits: int = 8, keep_error: bool = False) -> Channel:
    """Stochastic uniform quantisation (QSGD, Alistarh et al. 2017): integers of `bits` bits in units of the largest
    number, right on average; 2 bits are TernGrad (Wen et al. 2017).

    Args:
        bits: Bits of a number, from 2 to 16.
        keep_error: Error feedback: the compression error is added to the client's next message. Stores one full item
            table per client (clients x items x dim numbers).
    """
    if not 2 <= bits <= 16:
        raise ValueError(f"quantize.bits is {bits}: it must be 2 to 16")
    made = uniform_code(bits, stochastic_round, "quantize")
    return keep_weights_apart(with_error_feedback(made) if keep_error else made)


@named("channel")
def sign(keep_error: bool = True) -> Channel:
    """One bit a number, and the mean of their sizes (scaled sign, Karimireddy et al. 2019).

    Args:
        keep_error: Error feedback: the compression error is added to the client's next message. Stores one full item
            table per client (clients x items x dim numbers).
    """

    def code(x, key, entries):
        size = sum_last(jnp.abs(x), x.ndim - 1)
        return (x >= 0).astype(jnp.uint8), size / jnp.maximum(entries, 1)

    made = scaled_code(code, lambda codes: 2 * codes.astype(jnp.float32) - 1, "sign", 1)
    return keep_weights_apart(with_error_feedback(made) if keep_error else made)


@named("channel")
def drive() -> Channel:
    """One bit a number after a random rotation, with the scale that makes it right on average (DRIVE, Vargaftik et al.
    2021)."""

    def code(x, key, entries):
        size, square = sum_last(jnp.abs(x), x.ndim - 1), sum_last(x * x, x.ndim - 1)
        return (x >= 0).astype(jnp.uint8), square / jnp.where(size > 0, size, 1)

    return chain(
        rotate(), keep_weights_apart(scaled_code(code, lambda codes: 2 * codes.astype(jnp.float32) - 1, "drive", 1))
    )


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
    2017): numbers become of one size, and a coarse code loses less. The server turns the sum back."""

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


def kept_count(share: float, entries: jax.Array) -> jax.Array:
    """ceil(share * entries), the share in ten thousandths, without an overflow of int32; see `wire.kept`."""
    parts = round(share * 10_000)
    return entries // 10_000 * parts + -(-(entries % 10_000 * parts) // 10_000)


def bisect_int32(enough: Callable, needed: bool | jax.Array = True) -> jax.Array:
    """The largest int32 t >= 0 for which enough(t) holds; it holds for 0, and for none beyond the first it fails. Not
    needed: 0, at no cost if that is so for all clients of a block."""

    def narrow(i, least):
        higher = least | (1 << (30 - i))
        return jnp.where(enough(higher), higher, least)

    return jax.lax.fori_loop(0, jnp.where(needed, 31, 0), narrow, jnp.int32(0))


def select_largest(x: jax.Array, count: jax.Array) -> jax.Array:
    """bool like x: the `count` >= 1 largest of numbers that are not negative, the first of equal ones.

    By bisection on the bits of floats, which are ordered as the numbers are: no sort.
    """
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    least = bisect_int32(lambda t: (bits >= t).sum() >= count)
    above, equal = bits > least, bits == least
    place = jnp.arange(x.size)[::-1].reshape(x.shape)
    left = count - above.sum()
    tied = equal.sum() > left
    return above | (equal & (place >= bisect_int32(lambda t: (equal & (place >= t)).sum() >= left, tied)))


def sparse_code(share: float, pick: Callable, public_places: bool, gain: Callable, name: str) -> Channel:
    """Sends a share of the numbers of each leaf; pick(x, key) -> a size for each, of which the largest are sent."""
    if not 0.0001 <= share <= 1:
        raise ValueError(f"{name}.share is {share}: it must lie between 0.0001 and 1")

    def encode(update, sent, client):
        held = client.held.sum()

        def one(x, in_table, key):
            filled = jnp.ones(x.shape, bool)
            if in_table:  # rows that are only there to fill a block are nobody's
                filled &= client.held.reshape((-1,) + (1,) * (x.ndim - 1))
            entries = held * math.prod(x.shape[1:]) if in_table else jnp.int32(x.size)
            count = kept_count(share, entries)
            chosen = select_largest(jnp.where(filled, pick(x, key), 0), count) & filled
            return Kept(jnp.where(chosen, x, 0) * gain(entries, count), chosen, share, public_places)

        return map_leaves(one, update, jax.random.fold_in(client.public, client.id)), client.link_state

    def decode_message(message, sent, client):
        return jax.tree.map(lambda node: node.values, message, is_leaf=lambda node: isinstance(node, Kept))

    return link(encode, decode_message=decode_message, name=name)


@named("channel")
def top_k(share: float = 0.1, keep_error: bool = True) -> Channel:
    """The largest share of the numbers of each leaf, and where they are (Aji and Heafield 2017).

    Args:
        share: Share of the numbers that is sent.
        keep_error: Error feedback: the compression error is added to the client's next message. Stores one full item
            table per client (clients x items x dim numbers).
    """
    made = sparse_code(share, lambda x, key: jnp.abs(x), False, lambda entries, count: 1.0, "top_k")
    made = made._replace(
        claims=made.claims._replace(l2_gain=lambda bound: bound)
    )  # a part of a vector is no longer than it
    return keep_weights_apart(with_error_feedback(made) if keep_error else made)


@named("channel")
def random_k(share: float = 0.1, keep_error: bool = False) -> Channel:
    """A share of the numbers of each leaf, at places that client and server draw alike: only the numbers are sent.

    Divided by that share, which makes them right on average, unless errors are fed back.

    Args:
        share: Share of the numbers that is sent.
        keep_error: Error feedback: the compression error is added to the client's next message. Stores one full item
            table per client (clients x items x dim numbers).
    """

    def pick(x, key):
        return 1 + jax.random.uniform(key, x.shape)

    def gain(entries, count):
        return 1.0 if keep_error else entries / jnp.maximum(count, 1)

    made = sparse_code(share, pick, True, gain, "random_k")
    return keep_weights_apart(with_error_feedback(made) if keep_error else made)


@named("channel")
def low_rank(rank: int = 8, gain: float = 1.0) -> Channel:
    """Sends the coordinates of each row in `rank` random orthonormal directions, drawn anew each round (in the manner
    of CoLR, Nguyen et al. 2024: one factor is random and known to all, the other is learned).

    Linear: the server multiplies the sum by the directions, and by `gain`. The directions are columns of a Hadamard
    matrix with random signs; leaves whose last axis is no power of two above `rank` are sent whole.

    Args:
        rank: Directions, which are the numbers sent of a row.
        gain: What the server multiplies by. 0: columns / rank, which makes it right on average.
    """
    if rank < 1:
        raise ValueError(f"low_rank.rank is {rank}: it must be at least 1")

    def cut(columns):
        return columns > rank and columns & (columns - 1) == 0

    def directions(columns, key):
        signs, order = jax.random.split(key)
        flips = jax.random.rademacher(signs, (columns, 1), jnp.float32)
        return (flips * hadamard_transform(jnp.eye(columns)))[:, jax.random.permutation(order, columns)[:rank]]

    def wide(x, in_table):
        return x.ndim > 1 or (x.ndim == 1 and not in_table)

    def encode(update, sent, client):
        def one(x, in_table, key):
            if not (wide(x, in_table) and cut(x.shape[-1])):
                return x
            return x @ directions(x.shape[-1], key)

        return map_leaves(one, update, client.public), client.link_state

    def init(example):
        # shapes of the state, which stays zero, say how many columns there were (a checkpoint holds no empty arrays)
        nodes = [(x.rows, True) if is_table(x) else (x, False) for x in jax.tree.leaves(example, is_leaf=is_table)]
        return [jnp.zeros(x.shape[-1] if wide(x, in_table) else ()) for x, in_table in nodes], ()

    def decode(total, state, round):
        nodes, structure = jax.tree.flatten(total, is_leaf=is_table)
        whole = []
        for i, (node, dims) in enumerate(zip(nodes, jax.tree.leaves(state), strict=True)):
            x, in_table = (node.rows, True) if is_table(node) else (node, False)
            if dims.ndim and cut(dims.size):
                x = (gain or dims.size / rank) * x @ directions(dims.size, jax.random.fold_in(round.key, i)).T
            whole.append(Table(x) if in_table else x)
        return jax.tree.unflatten(structure, whole), state, {}

    l2_gain = (lambda bound: bound) if 0 < gain <= 1 else None
    return link(encode, decode, init, l2_gain=l2_gain, is_average=False, name="low_rank")
