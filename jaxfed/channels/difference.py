"""Sending what changed since the last aggregate."""

import jax.numpy as jnp

from jaxfed.channel import Channel, link
from jaxfed.channels.weigh import averaged, without_sums
from jaxfed.rows import Table, lift
from jaxfed.tree import sub, zeros
from jaxfed.types import Weights


def difference() -> Channel:
    """The reference form of federated gradient aggregation: clients send u_k - g, the server adds the mean back.

    g, the last aggregate, is server state and downloaded with the model. The message carries a one for the client and
    for each row it holds, which the later links weigh as they weigh u_k - g: the server then knows which share s of g
    to add, mean(u_k - g) + s g = mean(u_k), also for rows that only some clients hold. Equal to no link at all while
    the links to its right are linear; under compression the difference is smaller than u_k and loses less.

    (A well-known article subtracts the mean difference from g; the sign is a slip, see `algorithms`.)
    """

    def init(example):
        return zeros(example), ()

    def encode(update, last, client):
        held, one = Weights(Table(1.0 * client.held)), jnp.ones(())
        return (averaged(lambda update: sub(update, without_sums(last)), update), held, one), client.memory

    def decode(total, last, round):
        change, held, one = total

        def back(x, g):
            share = held.values.rows.reshape((-1,) + (1,) * (x.ndim - 1))
            return x + share * g

        def whole(change):
            return lift(back, lambda x, g: x + one * g, change, without_sums(last))

        update = averaged(whole, change)
        return update, update, {}

    return link(encode, decode, init, send=lambda last: last, name="difference")
