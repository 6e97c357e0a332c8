"""Noise that the nodes of a secure sum add in shares, so that not even the server sees a sum without it (distributed
differential privacy: Kairouz, Liu and Steinke 2021; of Skellam noise: Agarwal, Kairouz and Liu 2021).

Skellam numbers add up to Skellam numbers. Each share has the variance of the whole divided by the number of nodes that
must stay to the end of a sum. So the noise is never less than the accountant counts on, and more where more nodes stay:
up to 1.5 times the variance. Nodes that show their shares to the server take them out of it.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxfed.channels.integer_noise import draw_skellam
from jaxfed.core.channel import chain
from jaxfed.core.link import Channel, list_links, list_mechanisms
from jaxfed.deployment.node_states import draw_secret_key
from jaxfed.deployment.roster import find_threshold

SKELLAM = "skellam"  # the link whose noise can be added in shares
LEAST_VARIANCE = 20.0  # of a share, in grid units: `draw_skellam` draws no less


def can_share_noise(channel: Channel) -> bool:
    """Whether nodes can add the noise of a channel in shares."""
    return any(each.claims.name == SKELLAM for each in list_links(channel))


def find_share_variance(channel: Channel, nodes: int) -> float:
    """The variance of the share of one of so many nodes, in grid units. Raises ValueError where it is too small."""
    total = sum((each.multiplier * each.l2) ** 2 for each in list_mechanisms(channel) if each.kind == SKELLAM)
    share = total / find_threshold(nodes)
    if share < LEAST_VARIANCE:
        raise ValueError(
            f"deploy: a node's share of the noise would have a variance of {share:.3g} grid units, and the least that "
            f"can be drawn is {LEAST_VARIANCE:g}: raise {SKELLAM}.fraction_bits by 1 or more"
        )
    return share


def draw_noise_share(channel: Channel, nodes: int, length: int, secret: bytes, session: bytes) -> np.ndarray:
    """uint32 [length]: what one of so many nodes adds to its vector, modulo 2^32.

    Args:
        channel: The channel, whose noise it is.
        nodes: Number of nodes of the federation.
        length: Numbers of the vector.
        secret: The node's.
        session: Of the secure sum. Each has noise of its own: two sums with the same noise would differ by messages.

    Raises:
        ValueError: a share would be too small to be drawn.
    """
    key = jax.random.wrap_key_data(jnp.asarray(draw_secret_key(secret, "noise", session.hex())))
    return np.asarray(draw_skellam(key, find_share_variance(channel, nodes), (length,))).astype(np.uint32)


def leave_noise_to_nodes(channel: Channel, nodes: int) -> Channel:
    """The channel of a server that finds the noise in the sum already, as so many nodes have added it. What it claims
    stays. Raises ValueError where they cannot, so that nobody would."""
    if not nodes or not can_share_noise(channel):
        raise ValueError(
            "deploy: the facts say that nodes add noise in shares, which needs the link skellam and the nodes' keys: "
            "set noise_shares of facts.json to false, or add them"
        )
    find_share_variance(channel, nodes)  # raises where shares are too small

    def skip_own_noise(each):
        def decode(total, state, round):
            return each.decode(total, state, round._replace(noise_in_sum=True))

        return each._replace(decode=decode)

    return chain(*(skip_own_noise(each) if each.claims.name == SKELLAM else each for each in list_links(channel)))
