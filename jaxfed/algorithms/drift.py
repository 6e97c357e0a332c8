"""Links against client drift: what a mean of updates of unequal length, or of absent clients, gets wrong."""

import jax
import jax.numpy as jnp

from jaxfed.channels.average import map_averaged
from jaxfed.core.channel import Channel, link
from jaxfed.core.tree import scale_tree, zeros_like


def normalize_steps() -> Channel:
    """FedNova (Wang et al. 2020): a client sends its update per step, and its steps; the server multiplies the mean of
    the one by the mean of the other. For plain local SGD; put it before (left of) a mean, whose weights are the p_i."""

    def encode(update, sent, client):
        steps = jnp.maximum(client.steps, 1.0)
        return (map_averaged(lambda update: scale_tree(1 / steps, update), update), steps), client.memory

    def decode(total, state, round):
        update, steps = total
        return map_averaged(lambda update: scale_tree(steps, update), update), state, {}

    return link(encode, decode, is_average=False, name="fednova")


def add_server_memory(population: int) -> Channel:
    """FedDyn's server (Acar et al. 2021): adds to the mean update what it has gathered of all of them: of each round
    the sum over those who reported, divided by all clients, `population`. The clients' half is the work `dynamic`; put
    it left of a mean. Left of a mean by row, a row gathers its holders' mean at the same pace.

    Args:
        population: Number of all clients.
    """

    def decode(total, gathered, round):
        share = round.present.sum() / population
        gathered = jax.tree.map(lambda h, d: h + share * d, gathered, total)
        return jax.tree.map(jnp.add, total, gathered), gathered, {}

    return link(decode=decode, init=lambda example: (zeros_like(example), ()), is_average=False, name="feddyn")
