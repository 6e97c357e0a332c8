"""FedNova: updates per step, so that who takes more steps does not pull more."""

import jax.numpy as jnp
import optax

from jaxfed.algorithms.local_training import local_steps
from jaxfed.channels.average import map_averaged
from jaxfed.core.link import Channel, link
from jaxfed.core.method import AVERAGE, Method
from jaxfed.core.model import Model
from jaxfed.core.recipe import named
from jaxfed.core.tree import scale_tree


@named("channel", "fednova")
def normalize_steps() -> Channel:
    """FedNova (Wang et al. 2020): a client sends its update divided by its number of steps, and that number.

    The server multiplies the mean of the one by the mean of the other. For plain local SGD; put it before (left of) a
    mean, whose weights are the p_i of the paper.
    """

    def encode(update, sent, client):
        steps = jnp.maximum(client.steps, 1.0)
        return (map_averaged(lambda update: scale_tree(1 / steps, update), update), steps), client.link_state

    def decode(total, state, round):
        update, steps = total
        return map_averaged(lambda update: scale_tree(steps, update), update), state, {}

    return link(encode, decode, is_average=False, name="fednova")


@named("algorithm")
def fednova(
    model: Model,
    client_optimizer: optax.GradientTransformation,
    server_optimizer: optax.GradientTransformation = AVERAGE,
    *,
    by_row: bool = True,
) -> Method:
    """FedNova (Wang et al. 2020, "Tackling the objective inconsistency problem in heterogeneous federated
    optimization"): updates count by step, so that clients with more steps do not pull more.

    For plain local SGD, with a mean as channel, whose weights are the p_i of the paper.

    Args:
        model: The model.
        client_optimizer: Optimiser of a client's steps. It sees the pair (shared, private) and starts anew each round.
        server_optimizer: Moves the model by what the channel made of all updates. Left out: optax.sgd(1.0).
        by_row: true: a local step updates only the table rows in its batch. false: it updates all rows the client
            holds, so weight decay, momentum and proximal terms apply to each of them in every step (slower).

    Returns:
        The method, what clients and what the server compute.

    Example:
        >>> import jaxfed as jf, optax
        >>> model = jf.models.mf(num_items=100, dim=8)
        >>> method = jf.algorithms.fednova(model, optax.sgd(0.1))
        >>> [link.claims.name for link in method.links]
        ['fednova']
    """
    return Method(local_steps(model, client_optimizer, by_row), (normalize_steps(),), server=server_optimizer)
