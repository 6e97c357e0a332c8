"""q-FedAvg: clients with a higher loss count for more."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jaxfed.algorithms.local_training import local_steps, no_private
from jaxfed.channels.average import divide_or_zero, drop_sums, map_averaged
from jaxfed.core.aggregate import SUM
from jaxfed.core.client_work import Loss
from jaxfed.core.link import Channel, link
from jaxfed.core.method import Method
from jaxfed.core.tables import squared_norm
from jaxfed.core.tree import scale_tree
from jaxfed.core.types import Key, Tree


def fair_mean(q: float = 1.0, rate: float = 0.1) -> Channel:
    """q-FedAvg (Li et al. 2020, "Fair resource allocation in federated learning", algorithm 2), in place of a mean.

    The server moves by sum(F^q D) / sum(q F^(q-1) |D|^2 + F^q / rate): F a client's loss at the model that it was sent,
    D its update / rate. q = 0 is the plain mean.

    Args:
        q: How much more clients with a high loss count. 0: the plain mean.
        rate: The clients' learning rate, 1 / L in the paper.
    """
    if q < 0 or rate <= 0:
        raise ValueError("fair: q must not be negative, rate must be positive")

    def encode(update, sent, client):
        loss, step = jnp.maximum(client.loss, 1e-10), map_averaged(lambda update: scale_tree(1 / rate, update), update)
        steep = q * loss ** (q - 1) * squared_norm(drop_sums(step)) + loss**q / rate
        return (map_averaged(lambda step: scale_tree(loss**q, step), step), steep), client.link_state

    def decode(summed, state, round):
        update, steep = summed
        return map_averaged(lambda update: jax.tree.map(lambda x: divide_or_zero(x, steep), update), update), state, {}

    return link(encode, decode, aggregator=SUM, is_average=True, name="fair")


def qfedavg(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    private: Callable[[Key], Tree] = no_private,
    by_row: bool = True,
    q: float = 1.0,
    rate: float = 0.1,
) -> Method:
    """q-FedAvg (Li et al. 2020), in place of a mean.

    Args:
        by_row: true: a local step updates only the table rows in its batch. false: it updates all rows the client
            holds, so weight decay, momentum and proximal terms apply to each of them in every step (slower).
        q: How much more clients with a high loss count. 0: the plain mean.
        rate: The clients' learning rate, 1 / L in the paper.
    """
    return Method(local_steps(loss, optimizer, private, by_row), (fair_mean(q, rate),))
