"""Sending what changed since the last aggregate."""

import jax.numpy as jnp

from jaxfed.channels.average import drop_sums, map_averaged
from jaxfed.core.link import Channel, link
from jaxfed.core.recipe import named
from jaxfed.core.tables import Table, map_tables
from jaxfed.core.tree import subtract, zeros_like
from jaxfed.core.types import Weights


@named("channel")
def difference() -> Channel:
    """Clients send how their update differs from the last aggregate: u_k - g. The server adds g to the mean again.

    g, the last aggregate, is state of the server and is downloaded with the model. The message carries a one for the
    client and for each row it holds, which the later links weigh as they weigh u_k - g. So the server knows which share
    s of g to add, mean(u_k - g) + s g = mean(u_k), also for rows that only some clients hold. While the links to its
    right are linear, the result is as without this link. Under compression the difference is smaller than u_k and loses
    less.

    Returns:
        The link; a mean stands to its right.

    Example:
        >>> import jaxfed as jf, jax.numpy as jnp
        >>> jf.channels.difference().init({"bias": jnp.ones(2)})[0]["bias"].tolist()  # g before the first round
        [0.0, 0.0]
    """

    def init(example):
        return zeros_like(example), ()

    def encode(update, last, client):
        held, one = Weights(Table(1.0 * client.held)), jnp.ones(())
        return (map_averaged(lambda update: subtract(update, drop_sums(last)), update), held, one), client.link_state

    def decode(total, last, round):
        change, held, one = total

        def back(x, g):
            share = held.values.rows.reshape((-1,) + (1,) * (x.ndim - 1))
            return x + share * g

        def whole(change):
            return map_tables(back, lambda x, g: x + one * g, change, drop_sums(last))

        update = map_averaged(whole, change)
        return update, update, {}

    return link(encode, decode, init, broadcast=lambda last: last, is_average=False, name="difference")
