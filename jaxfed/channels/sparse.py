"""Links that send a share of the numbers of a message: the largest, or random ones. They come last in a chain."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxfed.channels.compress import keep_weights_apart, with_error_feedback
from jaxfed.channels.linear_maps import map_leaves
from jaxfed.core.link import Channel, link
from jaxfed.core.recipe import named
from jaxfed.core.types import Kept


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
    """Sends the largest numbers of each leaf, and their places (Aji and Heafield 2017).

    Args:
        share: Share of the numbers that is sent.
        keep_error: Error feedback: the compression error is added to the client's next message. Stores one full item
            table per client (clients x items x dim numbers).

    Returns:
        The link; it stands last in a chain.

    Raises:
        ValueError: the share is not from 0.0001 to 1.

    Example:
        The 100 largest of 1000 numbers, 32 bits each, and 10 bits for each place:

        >>> import jaxfed as jf, jax.numpy as jnp
        >>> from jaxfed.core.wire import make_wire
        >>> int(make_wire(jf.channels.top_k(0.1), jf.Broadcast(jnp.zeros(1000))).up(0)) == 100 * (32 + 10) / 8
        True
    """
    made = sparse_code(share, lambda x, key: jnp.abs(x), False, lambda entries, count: 1.0, "top_k")
    made = made._replace(
        claims=made.claims._replace(l2_gain=lambda bound: bound)
    )  # a part of a vector is no longer than it
    return keep_weights_apart(with_error_feedback(made) if keep_error else made)


@named("channel")
def random_k(share: float = 0.1, keep_error: bool = False) -> Channel:
    """Sends numbers of each leaf at random places, which client and server draw alike (Konecny et al. 2016).

    So only the numbers are sent. They are divided by the share, which makes them right on average, unless errors are
    fed back.

    Args:
        share: Share of the numbers that is sent.
        keep_error: Error feedback: the compression error is added to the client's next message. Stores one full item
            table per client (clients x items x dim numbers).

    Returns:
        The link; it stands last in a chain.

    Raises:
        ValueError: the share is not from 0.0001 to 1.

    Example:
        100 of 1000 numbers, 32 bits each:

        >>> import jaxfed as jf, jax.numpy as jnp
        >>> from jaxfed.core.wire import make_wire
        >>> int(make_wire(jf.channels.random_k(0.1), jf.Broadcast(jnp.zeros(1000))).up(0))
        400
    """

    def pick(x, key):
        return 1 + jax.random.uniform(key, x.shape)

    def gain(entries, count):
        return 1.0 if keep_error else entries / jnp.maximum(count, 1)

    made = sparse_code(share, pick, True, gain, "random_k")
    return keep_weights_apart(with_error_feedback(made) if keep_error else made)
