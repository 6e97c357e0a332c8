"""Secure sums in the compiled round: integers modulo 2^32, and the pads that hide them from the server.

The protocol by which parties agree on their pads, and take back those of the lost, is `jaxfed.secagg.protocol`.
"""

import math

import jax
import jax.numpy as jnp

from jaxfed.core.aggregate import SUM
from jaxfed.core.link import Channel, link
from jaxfed.core.recipe import named
from jaxfed.core.tables import num_rows
from jaxfed.core.tree import stochastic_round
from jaxfed.core.types import Mean

BITS = 32


@named("channel")
def ring(slots: int, fraction_bits: int = 20, bound: float = 0.0, union: bool = False) -> Channel:
    """Sends integers, x * 2^fraction_bits rounded at random, whose sum wraps modulo 2^32 and is exact below that.

    What the links to the left let through must be bounded, by them or by `bound`. The server sees the sum alone, if
    pads (`pads`, `jaxfed.secagg.protocol`) hide the rest; a sum that hides who holds what is one of whole tables, and
    priced so.

    Raises ValueError where a sum of so many clients could wrap.

    Args:
        slots: The largest number of clients in a round.
        fraction_bits: Binary digits after the point that are kept of a number.
        bound: The largest number of any message, weights of a mean among them; larger ones are cut, and `ring/cut` is
            the share of clients of whom something was. 0: what the links to the left let through.
        union: It is public which rows the cohort holds together (found by a union of sets that hides who holds which,
            not simulated), and the sum is priced by them.
    """

    def check(norm):
        most = bound or norm
        if most == math.inf:
            raise ValueError("ring: nothing bounds the numbers it sums: put clip before it, or set ring.bound")
        need = 1 + math.ceil(math.log2(slots * (most * 2.0**fraction_bits + 1)))
        if need > BITS:
            raise ValueError(
                f"ring: the sum of {slots} clients up to {most:g} with {fraction_bits} fractional bits needs {need} "
                f"bits, the ring has {BITS}: lower ring.fraction_bits to {fraction_bits - need + BITS}, or clip more"
            )

    def encode(update, sent, client):
        leaves, structure = jax.tree.flatten(update)
        if not all(jnp.issubdtype(x.dtype, jnp.floating) for x in leaves):
            raise ValueError("ring: it makes integers of floats, and was given integers: use it once, before pads")
        keys = jax.random.split(client.key, len(leaves))
        sent = [stochastic_round(x * 2.0**fraction_bits, k) for x, k in zip(leaves, keys, strict=True)]
        if bound:  # what is beyond is cut, or it would wrap
            sent = [jnp.clip(x, -bound * 2.0**fraction_bits, bound * 2.0**fraction_bits) for x in sent]
        return jax.tree.unflatten(structure, [x.astype(jnp.int32) for x in sent]), client.link_state

    def decode(summed, state, round):
        return jax.tree.map(lambda x: x.astype(jnp.float32) / 2.0**fraction_bits, summed), state, {}

    def metrics(update, sent, client):
        is_cut = [(jnp.abs(x) > bound).any() for x in jax.tree.leaves(update)]
        return {"ring/cut": Mean(1.0 * jnp.stack(is_cut).any(), 1.0)}

    return link(
        encode,
        decode,
        metrics=metrics if bound else None,  # a bound of its own may be less than what comes, as weights of a mean are
        aggregator=SUM,
        is_average=False,
        reveals="sum and rows" if union else "sum",
        check=check,
        name="ring",
    )


@named("channel")
def pads(neighbours: int = 0) -> Channel:
    """Adds to each client's integers the pads it shares with its neighbours, which cancel in the sum bit for bit.

    Clients sit in a circle of the round's slots; each shares a pad with as many on either side (Bell et al. 2020), one
    adding it and the other taking it away. The server takes back the pads of those who did not report. Real pads cost
    clients x neighbours x message random numbers: for checks, and for few clients. Whole tables only: pads hide
    numbers, not which rows are sent.

    Args:
        neighbours: With how many others a client shares pads. 0: with all (Bonawitz et al. 2017).
    """

    def init(example):
        if num_rows(example):
            raise ValueError("pads: they hide numbers, not which rows a client sends: put densify before ring")
        if not all(jnp.issubdtype(x.dtype, jnp.integer) for x in jax.tree.leaves(example)):
            raise ValueError("pads: they live in a ring of integers, and were given floats: put ring before pads")
        return (), ()

    def shared(leaf_key, x, slot, other, cohort):
        """The pad of two slots, as the first of them adds it."""
        low, high = jnp.minimum(cohort[slot], cohort[other]), jnp.maximum(cohort[slot], cohort[other])
        key = jax.random.fold_in(jax.random.fold_in(leaf_key, low), high)
        bits = jax.lax.bitcast_convert_type(jax.random.bits(key, x.shape, jnp.uint32), jnp.int32)
        return jnp.where(cohort[slot] == cohort[other], 0, jnp.where(cohort[slot] == low, bits, -bits))

    def steps(slots):
        reach = min(neighbours // 2 or slots, (slots - 1) // 2)
        offsets = [*range(1, reach + 1), *range(-reach, 0)]
        if not neighbours and slots % 2 == 0:
            offsets.append(slots // 2)
        return jnp.array(offsets or [0], jnp.int32)

    def added(leaf_key, x, slot, cohort, counts):
        """The sum of the pads that `slot` shares with those who count."""

        def one(sum, step):
            other = (slot + step) % cohort.size
            return sum + jnp.where(counts[other], shared(leaf_key, x, slot, other, cohort), 0), None

        return jax.lax.scan(one, jnp.zeros(x.shape, jnp.int32), steps(cohort.size))[0]

    def encode(update, sent, client):
        slot = jnp.argmax(client.cohort == client.id)
        all_slots = jnp.ones(client.cohort.shape, bool)
        leaves, structure = jax.tree.flatten(update)
        padded = [
            x + added(jax.random.fold_in(client.public, n), x, slot, client.cohort, all_slots)
            for n, x in enumerate(leaves)
        ]
        return jax.tree.unflatten(structure, padded), client.link_state

    def decode(summed, state, round):
        """Takes away the halves whose partner did not report."""
        leaves, structure = jax.tree.flatten(summed)

        def clean(n, x):
            def one(sum, slot):
                half = added(jax.random.fold_in(round.key, n), x, slot, round.clients, ~round.present)
                return sum - jnp.where(round.present[slot], half, 0), None

            return jax.lax.scan(one, x, jnp.arange(round.clients.size))[0]

        return jax.tree.unflatten(structure, [clean(n, x) for n, x in enumerate(leaves)]), state, {}

    return link(
        encode,
        decode,
        init,
        aggregator=SUM,
        is_average=False,
        l2_gain=lambda bound: bound,
        reveals="sum",
        name="pads",
    )
