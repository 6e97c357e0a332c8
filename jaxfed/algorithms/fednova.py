"""FedNova: updates per step, so that who takes more steps does not pull more."""

from collections.abc import Callable

import jax.numpy as jnp
import optax

from jaxfed.algorithms.local_training import local_steps, no_private
from jaxfed.channels.average import map_averaged
from jaxfed.core.client_work import Loss
from jaxfed.core.link import Channel, link
from jaxfed.core.method import Method
from jaxfed.core.tree import scale_tree
from jaxfed.core.types import Key, Tree


def normalize_steps() -> Channel:
    """FedNova (Wang et al. 2020): a client sends its update per step, and its steps; the server multiplies the mean of
    the one by the mean of the other. For plain local SGD; put it before (left of) a mean, whose weights are the p_i."""

    def encode(update, sent, client):
        steps = jnp.maximum(client.steps, 1.0)
        return (map_averaged(lambda update: scale_tree(1 / steps, update), update), steps), client.link_state

    def decode(total, state, round):
        update, steps = total
        return map_averaged(lambda update: scale_tree(steps, update), update), state, {}

    return link(encode, decode, is_average=False, name="fednova")


def fednova(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    private: Callable[[Key], Tree] = no_private,
    by_row: bool = True,
) -> Method:
    """FedNova (Wang et al. 2020, "Tackling the objective inconsistency problem in heterogeneous federated
    optimization") of local SGD: put a mean as channel, whose weights are the p_i.

    Args:
        by_row: true: a local step updates only the table rows in its batch. false: it updates all rows the client
            holds, so weight decay, momentum and proximal terms apply to each of them in every step (slower).
    """
    return Method(local_steps(loss, optimizer, private, by_row), (normalize_steps(),))
