"""Discrete Gaussian noise on an integer sum: what central Gaussian noise should be outside of a simulation."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from jaxfed.channels.integer_noise import integer_noise_link
from jaxfed.core.link import Channel
from jaxfed.core.recipe import named
from jaxfed.core.types import Key

LARGEST = 4096.0  # standard deviation in grid units: the table has some ten entries for each


def magnitude_table(stddev: float) -> np.ndarray:
    """uint64 [n]: 2^64 times the probability that a discrete Gaussian number is at most k away from 0, for k = 0 ...

    The last entry stands for 2^64. A probability is right to a factor of 1 +- 2^-51, which adds n 2^-50 to the epsilon
    of n numbers. Rounding to multiples of 2^-64 and the cut tail are a total variation of at most (10 stddev + 2) 2^-64
    a number, which adds (1 + e^epsilon) n times that to delta: some 2e-7 for n = 10^6, a standard deviation of 100 and
    epsilon = 8. The accountant does not add either: n is the numbers of a model times the rounds.
    """
    k = np.arange(int(10 * stddev) + 2)
    weight = np.exp(-0.5 * (k / stddev) ** 2) * np.where(k == 0, 1.0, 2.0)
    shares = [int(each) for each in weight / weight.sum() * 2.0**64 if each >= 1]
    shares[0] += (1 << 64) - sum(shares)  # what rounding has left goes to the most probable one
    return np.array([min(total, (1 << 64) - 1) for total in itertools.accumulate(shares)], np.uint64)


def draw_discrete_gaussian(key: Key, stddev: float, shape: tuple[int, ...]) -> jax.Array:
    """int32: numbers x with probability proportional to exp(-x^2 / (2 stddev^2)) (Canonne, Kamath and Steinke 2020).

    The distance from 0 is looked up in a table by 64 random bits, so no float is near the result; a bit is its sign.
    """
    table = magnitude_table(stddev)
    high, low = jnp.asarray((table >> 32).astype(np.uint32)), jnp.asarray((table & 0xFFFFFFFF).astype(np.uint32))
    for_high, for_low, for_sign = jax.random.split(key, 3)
    upper, lower = jax.random.bits(for_high, shape, jnp.uint32), jax.random.bits(for_low, shape, jnp.uint32)

    def halve(i, found):  # the number of entries that are not above the random number: a binary search
        beyond = found + (jnp.int32(1) << (len(table).bit_length() - 1 - i))
        at = jnp.minimum(beyond, len(table)) - 1
        below = (high[at] < upper) | ((high[at] == upper) & (low[at] <= lower))
        return jnp.where((beyond <= len(table)) & below, beyond, found)

    distance = jax.lax.fori_loop(0, len(table).bit_length(), halve, jnp.zeros(shape, jnp.int32))
    distance = jnp.minimum(distance, len(table) - 1)
    return jnp.where(jax.random.bits(for_sign, shape, jnp.uint8) & 1 == 1, -distance, distance)


@named("channel")
def discrete_gaussian(slots: int, multiplier: float = 1.0, fraction_bits: int = 8) -> Channel:
    """Central differential privacy on integers: discrete Gaussian noise on the sum of x * 2^fraction_bits, rounded at
    random (Canonne, Kamath and Steinke 2020; Kairouz et al. 2021).

    Its Renyi divergences are at most those of Gaussian noise. Use it in place of `gaussian` where a reader of the
    result may look at the lowest bits of its floats. Unlike `skellam` it does not hide messages from the server.

    Args:
        slots: The largest number of clients in a round.
        multiplier: Standard deviation of the noise, divided by the largest norm of what a client can add.
        fraction_bits: Binary digits after the point that are kept of a number.

    Returns:
        The link.

    Raises:
        ValueError: in a chain, where nothing to the left of the link bounds a message, or integers get too large.

    Example:
        >>> import jaxfed as jf
        >>> channel = jf.chain(jf.channels.clip(0.5), jf.channels.discrete_gaussian(slots=100))
        >>> channel.claims.mechanisms(3.0)[0].kind
        'discrete_gaussian'
    """
    return integer_noise_link(
        "discrete_gaussian", slots, multiplier, fraction_bits, (4.0, LARGEST), draw_discrete_gaussian
    )
