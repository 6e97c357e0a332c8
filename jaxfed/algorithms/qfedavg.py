"""q-FedAvg: clients with a higher loss count for more."""

import jax
import jax.numpy as jnp
import optax

from jaxfed.algorithms.local_training import local_steps
from jaxfed.channels.average import divide_or_zero, drop_sums, map_averaged
from jaxfed.core.aggregate import SUM
from jaxfed.core.link import Channel, link
from jaxfed.core.method import AVERAGE, Method
from jaxfed.core.model import Model
from jaxfed.core.recipe import named
from jaxfed.core.tables import squared_norm
from jaxfed.core.tree import scale_tree


@named("channel", "fair")
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


@named("algorithm")
def qfedavg(
    model: Model,
    client_optimizer: optax.GradientTransformation,
    server_optimizer: optax.GradientTransformation = AVERAGE,
    *,
    by_row: bool = True,
    q: float = 1.0,
    rate: float = 0.1,
) -> Method:
    """q-FedAvg (Li et al. 2020): clients with a higher loss count for more. It averages by itself, so no mean is
    needed.

    Args:
        model: The model.
        client_optimizer: Optimiser of a client's steps. It sees the pair (shared, private) and starts anew each round.
        server_optimizer: Moves the model by what the channel made of all updates. Left out: optax.sgd(1.0).
        by_row: true: a local step updates only the table rows in its batch. false: it updates all rows the client
            holds, so weight decay, momentum and proximal terms apply to each of them in every step (slower).
        q: How much more clients with a high loss count. 0: the plain mean.
        rate: The clients' learning rate, 1 / L in the paper.

    Returns:
        The method, what clients and what the server compute.

    Raises:
        ValueError: `q` is negative, or `rate` is not positive.

    Example:
        >>> import jaxfed as jf, optax
        >>> model = jf.models.mf(num_items=100, dim=8)
        >>> method = jf.algorithms.qfedavg(model, optax.sgd(0.1))
        >>> [link.claims.name for link in method.links]
        ['fair']
    """
    return Method(local_steps(model, client_optimizer, by_row), (fair_mean(q, rate),), server=server_optimizer)
