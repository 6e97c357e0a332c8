"""Secure sums in the compiled round: integers modulo 2^32, and the pads that hide them from the server.

The protocol by which parties agree on their pads, and take back those of the lost, is `jaxfed.secagg.protocol`.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxfed.core.aggregate import SUM
from jaxfed.core.link import Channel, link
from jaxfed.core.recipe import named
from jaxfed.core.tables import num_rows
from jaxfed.core.tree import stochastic_round
from jaxfed.core.types import Key, Mean, RoundView, Tree

BITS = 32
MOST_DIGITS = 20  # binary digits after the point that "auto" keeps


def count_ring_bits(slots: int, fraction_bits: int, most: float) -> int:
    """Bits of a sum over `slots` clients of numbers up to `most`, with so many binary digits after the point."""
    return 1 + math.ceil(math.log2(slots * (most * 2.0**fraction_bits + 1)))


def choose_fraction_bits(fraction_bits: int | str, slots: int, most: float) -> int:
    """The digits asked for; for "auto" as many as a sum over `slots` clients of numbers up to `most` has room for, at
    most MOST_DIGITS. Raises ValueError for another word, or a number that is out of range."""
    if isinstance(fraction_bits, str):
        if fraction_bits != "auto":
            raise ValueError(f'ring: fraction_bits is {fraction_bits!r}: it is a whole number, or "auto"')
        if most == math.inf:  # which the chain refuses
            return MOST_DIGITS
        return max((bits for bits in range(MOST_DIGITS + 1) if count_ring_bits(slots, bits, most) <= BITS), default=0)
    if not 0 <= fraction_bits <= BITS:
        raise ValueError(f"ring: fraction_bits is {fraction_bits}: it must be from 0 to {BITS}")
    return fraction_bits


def check_ring(slots: int, fraction_bits: int, most: float) -> None:
    """Raises ValueError where a sum over `slots` clients of numbers up to `most` could wrap."""
    if most == math.inf:
        raise ValueError("ring: nothing bounds the numbers it sums: put clip before it, or set ring.bound")
    need = count_ring_bits(slots, fraction_bits, most)
    if need > BITS:
        raise ValueError(
            f"ring: the sum of {slots} clients up to {most:g} with {fraction_bits} fractional bits needs {need} "
            f"bits, the ring has {BITS}: lower ring.fraction_bits to {fraction_bits - need + BITS}, or clip more"
        )


def round_to_ring(update: Tree, key: Key, fraction_bits: int, bound: float) -> Tree:
    """An update in int32, x * 2^fraction_bits rounded at random; what is beyond a `bound` above 0 is cut."""
    leaves, structure = jax.tree.flatten(update)
    if not all(jnp.issubdtype(x.dtype, jnp.floating) for x in leaves):
        raise ValueError("ring: it makes integers of floats, and was given integers: use it once, before pads")
    keys = jax.random.split(key, len(leaves))
    rounded = [stochastic_round(x * 2.0**fraction_bits, k) for x, k in zip(leaves, keys, strict=True)]
    if bound:  # or it would wrap
        rounded = [jnp.clip(x, -bound * 2.0**fraction_bits, bound * 2.0**fraction_bits) for x in rounded]
    return jax.tree.unflatten(structure, [x.astype(jnp.int32) for x in rounded])


@named("channel")
def ring(slots: int, fraction_bits: int | str = "auto", bound: float = 0.0, union: bool = False) -> Channel:
    """Sends integers, x * 2^fraction_bits rounded at random, for a secure sum (Bonawitz et al. 2017).

    The sum wraps modulo 2^32 and is exact below that. The numbers that come from the left must be bounded, by links
    there or by `bound`. The server sees the sum alone, if pads (`pads`, `jaxfed.secagg.protocol`) hide the messages. A
    sum that hides which client holds which rows is one of whole tables, and its bytes are counted so.

    Args:
        slots: The largest number of clients in a round.
        fraction_bits: Binary digits after the point that are kept of a number. "auto": as many as the sum has room for
            by its clients and their bound, at most 20.
        bound: The largest number of any message, weights of a mean among them. Larger ones are cut, and `ring/cut` is
            the share of clients with a cut number. 0: no limit but that of the links to the left.
        union: It is public which rows the cohort holds together (found by a union of sets that hides who holds which,
            not simulated), and only these are sent.

    Returns:
        The link.

    Raises:
        ValueError: in a chain, where a sum of so many clients could wrap, or messages are integers already.

    Example:
        >>> import jaxfed as jf
        >>> jf.chain(jf.channels.clip(1.0), jf.channels.ring(slots=100)).claims.reveals  # what the server learns
        'sum'
    """

    def digits(most):
        return choose_fraction_bits(fraction_bits, slots, bound or most)

    def encode(update, sent, client):
        return round_to_ring(update, client.key, digits(client.bound), bound), client.link_state

    def decode(summed, state, round):
        return jax.tree.map(lambda x: x.astype(jnp.float32) / 2.0 ** digits(round.bound), summed), state, {}

    def metrics(update, sent, client):
        is_cut = [(jnp.abs(x) > bound).any() for x in jax.tree.leaves(update)]
        return {"ring/cut": Mean(1.0 * jnp.stack(is_cut).any(), 1.0)}

    return link(
        encode,
        decode,
        metrics=metrics if bound else None,  # a bound of its own may be less than what comes, as weights of a mean are
        aggregator=SUM,
        is_average=False,
        by_entry=True,
        reveals="sum and rows" if union else "sum",
        check=lambda norm: check_ring(slots, digits(norm), bound or norm),
        name="ring",
    )


def draw_pad(key: Key, x: jax.Array, slot: jax.Array, other: jax.Array, cohort: jax.Array) -> jax.Array:
    """The pad that two slots of a cohort share for a leaf like x, as the first of them adds it. key: of the leaf."""
    low, high = jnp.minimum(cohort[slot], cohort[other]), jnp.maximum(cohort[slot], cohort[other])
    key = jax.random.fold_in(jax.random.fold_in(key, low), high)
    bits = jax.lax.bitcast_convert_type(jax.random.bits(key, x.shape, jnp.uint32), jnp.int32)
    return jnp.where(cohort[slot] == cohort[other], 0, jnp.where(cohort[slot] == low, bits, -bits))


def neighbour_offsets(neighbours: int, slots: int) -> jax.Array:
    """int32: where in the circle of slots those sit with whom a slot shares pads, from its own place."""
    reach = min(neighbours // 2 or slots, (slots - 1) // 2)
    offsets = [*range(1, reach + 1), *range(-reach, 0)]
    if not neighbours and slots % 2 == 0:
        offsets.append(slots // 2)
    return jnp.array(offsets or [0], jnp.int32)


def sum_pads(
    key: Key, x: jax.Array, slot: jax.Array, cohort: jax.Array, counts: jax.Array, neighbours: int
) -> jax.Array:
    """The sum of the pads that `slot` shares with those who count, bool [M], for a leaf like x. key: of the leaf."""

    def one(sum, step):
        other = (slot + step) % cohort.size
        return sum + jnp.where(counts[other], draw_pad(key, x, slot, other, cohort), 0), None

    return jax.lax.scan(one, jnp.zeros(x.shape, jnp.int32), neighbour_offsets(neighbours, cohort.size))[0]


def map_with_keys(function: Callable[[jax.Array, Key], jax.Array], tree: Tree, key: Key) -> Tree:
    """function(leaf, its key) of every leaf."""
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, [function(x, jax.random.fold_in(key, n)) for n, x in enumerate(leaves)])


def check_pad_messages(example: Tree) -> tuple[Tree, Tree]:
    """What a link without state starts with. Raises ValueError for messages that pads do not hide."""
    if num_rows(example):
        raise ValueError("pads: they hide numbers, not which rows a client sends: put densify before ring")
    if not all(jnp.issubdtype(x.dtype, jnp.integer) for x in jax.tree.leaves(example)):
        raise ValueError("pads: they live in a ring of integers, and were given floats: put ring before pads")
    return (), ()


def drop_lost_pads(summed: Tree, round: RoundView, neighbours: int) -> Tree:
    """A sum without the halves of pads whose partner did not report."""

    def clean(x, key):
        def one(sum, slot):
            half = sum_pads(key, x, slot, round.clients, ~round.present, neighbours)
            return sum - jnp.where(round.present[slot], half, 0), None

        return jax.lax.scan(one, x, jnp.arange(round.clients.size))[0]

    return map_with_keys(clean, summed, round.key)


@named("channel")
def pads(neighbours: int = 0) -> Channel:
    """Adds to each client's integers the pads that it shares with its neighbours, which cancel in the sum bit by bit.

    Clients sit in a circle of the round's slots. Each shares a pad with as many on either side (Bell et al. 2020): one
    adds it, the other subtracts it. The server removes the pads of those who did not report. Pads take clients x
    neighbours x message random numbers, so they are for checks, and for few clients. They hide numbers, not which rows
    are sent: they need whole tables (`densify`).

    Args:
        neighbours: Number of other clients with which a client shares pads. 0: all (Bonawitz et al. 2017).

    Returns:
        The link; `ring` stands before it.

    Raises:
        ValueError: in a chain, where a message shows rows, or holds floats.

    Example:
        >>> import jaxfed as jf
        >>> jf.channels.pads().claims.reveals  # what the server learns
        'sum'
    """

    def encode(update, sent, client):
        slot, all_slots = jnp.argmax(client.cohort == client.id), jnp.ones(client.cohort.shape, bool)

        def add(x, key):
            return x + sum_pads(key, x, slot, client.cohort, all_slots, neighbours)

        return map_with_keys(add, update, client.public), client.link_state

    def decode(summed, state, round):
        return drop_lost_pads(summed, round, neighbours), state, {}

    return link(
        encode,
        decode,
        check_pad_messages,
        aggregator=SUM,
        is_average=False,
        l2_gain=lambda x: x,
        reveals="sum",
        name="pads",
    )
