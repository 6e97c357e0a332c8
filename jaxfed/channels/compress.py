"""Links that code the numbers of a message in few bits.

Codes mean something one message at a time only: the server reads each before the sum (`Channel.decode_message`), so
they come last in a chain. So do those of `channels.sparse`; those of `channels.linear_maps` are undone on the sum.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxfed.channels.linear_maps import rotate
from jaxfed.core.channel import chain
from jaxfed.core.link import Channel, encode_message, link
from jaxfed.core.recipe import named
from jaxfed.core.streams import WEIGHTS
from jaxfed.core.tables import Table, is_table
from jaxfed.core.tree import stochastic_round, subtract, sum_last, zeros_like
from jaxfed.core.types import Coded, Key, Weights


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


def split_by_scale(x: jax.Array, in_table: bool) -> jax.Array:
    """[scales, ...]: numbers by the scale that they have, one for each row of a table with several columns."""
    return x if in_table and x.ndim > 1 else x[None]  # a number a row: one scale for all rows


def encode_node(code: Callable, node: Any, key: Key) -> tuple[Any, Any]:
    """(codes, scale) of a node by code(x, in a table, key), marked as tables where they have its rows."""
    x = node.rows if is_table(node) else node
    codes, scale = code(x, is_table(node), key)
    by_row = is_table(node) and x.ndim > 1
    return (Table(codes) if is_table(node) else codes), (Table(scale) if by_row else scale)


def read_node(value: Callable, node: Any, scale: Any) -> Any:
    """What a node of codes means; value(codes): in scales."""
    coded, in_table = (node.rows, True) if is_table(node) else (node, False)
    scale = scale.rows if is_table(scale) else scale
    whole = split_by_scale(value(coded.values), in_table)
    x = (whole * scale.reshape(scale.shape + (1,) * (whole.ndim - 1))).reshape(coded.values.shape)
    return Table(x) if in_table else x


def scaled_code(code: Callable, value: Callable, name: str, bits: int) -> Channel:
    """A code of integers and a scale, for each row of a table with several columns and for each other leaf.

    code(x, key, entries) -> (integers like x, scale [rows, 1, ...]) for x [rows, ...], of each of which so many numbers
    are not there to fill a block; value(codes) -> what a code means, in scales.
    """

    def encode(update, sent, client):
        def one(x, in_table, key):
            whole = split_by_scale(x, in_table)
            filled = in_table and x.ndim == 1
            entries = client.held.sum() if filled else math.prod(whole.shape[1:])
            codes, scale = code(whole, key, entries)
            return Coded(codes.reshape(x.shape), bits), scale.reshape(scale.shape[:1])

        pairs = [
            encode_node(one, node, jax.random.fold_in(client.key, i))
            for i, node in enumerate(jax.tree.leaves(update, is_leaf=is_table))
        ]
        structure = jax.tree.structure(update, is_leaf=is_table)
        codes, scales = (jax.tree.unflatten(structure, [pair[i] for pair in pairs]) for i in (0, 1))
        return (codes, scales), client.link_state

    def decode_message(message, sent, client):
        codes, scales = message

        def stop(node):
            return is_table(node) or isinstance(node, Coded)

        structure = jax.tree.structure(codes, is_leaf=stop)
        each = zip(jax.tree.leaves(codes, is_leaf=stop), jax.tree.leaves(scales, is_leaf=is_table), strict=True)
        return jax.tree.unflatten(structure, [read_node(value, *pair) for pair in each])

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
    """Stochastic uniform quantisation (QSGD, Alistarh et al. 2017): integers of `bits` bits, in units of the largest
    number, rounded at random so that they are right on average. With 2 bits it is TernGrad (Wen et al. 2017).

    Args:
        bits: Bits of a number, from 2 to 16.
        keep_error: Error feedback: the compression error is added to the client's next message. Stores one full item
            table per client (clients x items x dim numbers).

    Returns:
        The link; it stands last in a chain.

    Raises:
        ValueError: `bits` is not from 2 to 16.

    Example:
        A message of 1000 numbers, at 4 bits each, and their unit:

        >>> import jaxfed as jf, jax.numpy as jnp
        >>> from jaxfed.core.wire import make_wire
        >>> int(make_wire(jf.channels.quantize(bits=4), jf.Broadcast(jnp.zeros(1000))).up(0))
        504
    """
    if not 2 <= bits <= 16:
        raise ValueError(f"quantize.bits is {bits}: it must be 2 to 16")
    made = uniform_code(bits, stochastic_round, "quantize")
    return keep_weights_apart(with_error_feedback(made) if keep_error else made)


@named("channel")
def sign(keep_error: bool = True) -> Channel:
    """One bit for each number, its sign, and the mean size of all of them (scaled sign, Karimireddy et al. 2019).

    Args:
        keep_error: Error feedback: the compression error is added to the client's next message. Stores one full item
            table per client (clients x items x dim numbers).

    Returns:
        The link; it stands last in a chain.

    Example:
        A message of 1000 numbers, at 1 bit each, and their mean size:

        >>> import jaxfed as jf, jax.numpy as jnp
        >>> from jaxfed.core.wire import make_wire
        >>> int(make_wire(jf.channels.sign(), jf.Broadcast(jnp.zeros(1000))).up(0))
        129
    """

    def code(x, key, entries):
        size = sum_last(jnp.abs(x), x.ndim - 1)
        return (x >= 0).astype(jnp.uint8), size / jnp.maximum(entries, 1)

    made = scaled_code(code, lambda codes: 2 * codes.astype(jnp.float32) - 1, "sign", 1)
    return keep_weights_apart(with_error_feedback(made) if keep_error else made)


@named("channel")
def drive() -> Channel:
    """One bit for each number after a random rotation, and a scale (DRIVE, Vargaftik et al. 2021).

    The scale makes the numbers right on average.

    Returns:
        A chain of `rotate` and the code; it stands last in a chain.

    Example:
        >>> import jaxfed as jf
        >>> jf.channels.drive().claims.name
        'rotate, drive'
    """

    def code(x, key, entries):
        size, square = sum_last(jnp.abs(x), x.ndim - 1), sum_last(x * x, x.ndim - 1)
        return (x >= 0).astype(jnp.uint8), square / jnp.where(size > 0, size, 1)

    return chain(
        rotate(), keep_weights_apart(scaled_code(code, lambda codes: 2 * codes.astype(jnp.float32) - 1, "drive", 1))
    )
