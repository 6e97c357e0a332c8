"""Noise on integers. Floats with noise can be told apart by their lowest bits (Mironov 2012); integers cannot.

Skellam noise goes with a secure sum, so that not even the server sees more: distributed differential privacy.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxfed.channels.noise import check_sensitivity
from jaxfed.core.aggregate import SUM
from jaxfed.core.link import Channel, Reveals, link
from jaxfed.core.recipe import named
from jaxfed.core.tables import l2_norm
from jaxfed.core.tree import stochastic_round
from jaxfed.core.types import Key, Mechanism, Tree

BITS = 32  # of the ring
ROOM = 1 + 2**-4  # how much longer rounding may make an update
FLOAT = 1 + 1e-4  # what a norm in float32 may be off
TAIL = 12  # standard deviations of noise for which the ring has room

Noise = Callable[[Key, float, tuple[int, ...]], jax.Array]  # (key, standard deviation, shape) -> int32


def draw_centred_poisson(key: Key, mean: float, shape: tuple[int, ...]) -> jax.Array:
    """int32: Poisson numbers minus floor(mean), 10 <= mean <= 1e10, by transformed rejection (Hormann 1993, PTRS).

    Numbers near zero and a density that is computed relative to the mode, as `jax.random.poisson` loses a tenth of its
    variance at a mean of 3e6 to the rounding of float32.
    """
    b = 0.931 + 2.53 * math.sqrt(mean)
    a = -0.059 + 0.02483 * b
    squeeze, height = 0.9277 - 3.6224 / (b - 2), 1.1239 + 1.1328 / (b - 3.4)
    fraction = mean - math.floor(mean)

    def log_density(d):
        """log of the Poisson density at floor(mean) + d: Stirling's series about the mean."""
        u = (d - fraction) / mean
        series = u * u * (1 / 2 - u * (1 / 6 - u * (1 / 12 - u * (1 / 20 - u / 30))))
        distance = jnp.where(jnp.abs(u) < 0.03, series, (1 + u) * jnp.log1p(u) - u)
        k = mean * (1 + u)
        return -mean * distance - (math.log(2 * math.pi * mean) + jnp.log1p(u)) / 2 - 1 / (12 * k) + 1 / (360 * k**3)

    def draw(state):
        key, found, done = state
        key, left, right = jax.random.split(key, 3)
        u = jax.random.uniform(left, shape) - 0.5
        v = 1 - jax.random.uniform(right, shape)  # not 0
        us = jnp.maximum(0.5 - jnp.abs(u), 1e-7)
        d = jnp.floor((2 * a / us + b) * u + fraction + 0.43)
        possible = (d >= -float(math.floor(mean))) & ((us >= 0.013) | (v <= us)) & (us > 1e-7)
        inside = (us >= 0.07) & (v <= squeeze)
        below = jnp.log(v * height / (a / (us * us) + b)) <= log_density(jnp.where(possible, d, 0))
        taken = inside | (possible & below)
        return key, jnp.where(done, found, d), done | taken

    start = key, jnp.zeros(shape), jnp.zeros(shape, bool)
    return jax.lax.while_loop(lambda state: ~state[2].all(), draw, start)[1].astype(jnp.int32)


def draw_skellam(key: Key, variance: float, shape: tuple[int, ...]) -> jax.Array:
    """int32: the difference of two Poisson numbers, of this variance."""
    one, other = jax.random.split(key)
    return draw_centred_poisson(one, variance / 2, shape) - draw_centred_poisson(other, variance / 2, shape)


def round_within_norm(update: Tree, key: Key, unit: float, longest: float) -> Tree:
    """int32: unit * update rounded at random, or towards zero where rounding makes it longer than `longest`."""
    leaves, structure = jax.tree.flatten(update)
    grid = [unit * x for x in leaves]
    near = [stochastic_round(x, k) for x, k in zip(grid, jax.random.split(key, len(leaves)), strict=True)]
    fits = l2_norm(jax.tree.unflatten(structure, near)) <= longest
    sent = [jnp.where(fits, x, jnp.trunc(y)) for x, y in zip(near, grid, strict=True)]
    return jax.tree.unflatten(structure, [x.astype(jnp.int32) for x in sent])


def check_ring_bits(name: str, slots: int, l2: float, stddev: float, fraction_bits: int) -> None:
    """Raises ValueError where the noisy sum of `slots` clients could wrap around 2^32."""
    need = 1 + math.ceil(math.log2(slots * l2 + TAIL * stddev))
    if need > BITS:
        raise ValueError(
            f"{name}: the sum of {slots} clients with {fraction_bits} fractional bits needs {need} bits, the ring "
            f"has {BITS}: lower {name}.fraction_bits to {fraction_bits - need + BITS}, or lower the clip bound"
        )


def integer_noise_link(
    name: str,
    slots: int,
    multiplier: float,
    fraction_bits: int,
    limits: tuple[float, float],
    noise: Noise,
    reveals: Reveals = "message",
) -> Channel:
    """A link that sends integers, x * 2^fraction_bits rounded at random, and adds integer noise to their sum modulo
    2^32. `noise(key, stddev, shape)` draws it; `limits` are of its standard deviation, in grid units."""
    unit = 2.0**fraction_bits

    def longest(bound):  # norm of a message, in grid units
        return unit * check_sensitivity(name, multiplier, bound) * ROOM

    def l2_gain(bound):
        return longest(bound) * FLOAT

    def check(bound):
        stddev = multiplier * l2_gain(bound)
        if not limits[0] <= stddev <= limits[1]:
            more = math.log2((limits[0] if stddev < limits[0] else limits[1]) / stddev)
            fitting = fraction_bits + (math.ceil(more) if more > 0 else math.floor(more))
            raise ValueError(
                f"{name}: noise of standard deviation {stddev:.3g} in grid units (1 grid unit = 2^-fraction_bits), "
                f"{limits[0]:g} to {limits[1]:g} can be drawn: set {name}.fraction_bits to {fitting}"
            )
        check_ring_bits(name, slots, l2_gain(bound), stddev, fraction_bits)

    def mechanisms(bound):
        # whole numbers: the L1 norm is no larger than the square of the L2 norm
        return (Mechanism(name, multiplier, l1=l2_gain(bound) ** 2, l2=l2_gain(bound)),)

    def encode(update, sent, client):
        return round_within_norm(update, client.key, unit, longest(client.bound)), client.link_state

    def decode(summed, state, round):
        stddev = multiplier * l2_gain(round.bound)
        leaves, structure = jax.tree.flatten(summed)
        keys = jax.random.split(round.key, len(leaves))
        if not round.noise_in_sum:
            leaves = [x + noise(k, stddev, x.shape) for x, k in zip(leaves, keys, strict=True)]
        out = [x.astype(jnp.float32) / unit for x in leaves]
        return jax.tree.unflatten(structure, out), state, {"noise/stddev": jnp.float32(stddev / unit)}

    return link(
        encode,
        decode,
        aggregator=SUM,
        is_average=False,
        l2_gain=l2_gain,
        mechanisms=mechanisms,
        check=check,
        needs_all_rows=True,
        name=name,
        reveals=reveals,
    )


@named("channel")
def skellam(slots: int, multiplier: float = 1.0, fraction_bits: int = 12) -> Channel:
    """Sends integers, x * 2^fraction_bits rounded at random, into a sum modulo 2^32 that has Skellam noise (Agarwal,
    Kairouz and Liu 2021).

    Where rounding makes an update too long, it is rounded towards zero instead (in place of the retries of Kairouz et
    al. 2021), so that the bound on its norm always holds. The simulation adds the noise to the sum, all of it whoever
    reports. In a deployment with own keys each node adds a share: those of the nodes that must stay are enough.

    Args:
        slots: The largest number of clients in a round.
        multiplier: Standard deviation of the noise, divided by the largest norm of an update.
        fraction_bits: Binary digits after the point that are kept of a number.

    Returns:
        The link.

    Raises:
        ValueError: in a chain, where nothing to the left of the link bounds a message, or integers get too large.

    Example:
        >>> import jaxfed as jf
        >>> jf.chain(jf.channels.clip(0.5), jf.channels.skellam(slots=100)).claims.reveals  # what the server learns
        'sum'
    """

    def noise(key, stddev, shape):
        return draw_skellam(key, stddev**2, shape)

    return integer_noise_link("skellam", slots, multiplier, fraction_bits, (10.0, 1e5), noise, reveals="sum")
