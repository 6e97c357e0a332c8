"""FedDyn: dynamic regularisation, on clients and server."""

import jax
import jax.numpy as jnp
import optax

from jaxfed.algorithms.local_training import output_facts
from jaxfed.algorithms.steering import ControlState, private_part, steered_steps
from jaxfed.core.client_work import ClientWork
from jaxfed.core.link import Channel, link
from jaxfed.core.method import AVERAGE, Method
from jaxfed.core.model import Model
from jaxfed.core.recipe import named
from jaxfed.core.tree import scale_tree, subtract, zeros_like
from jaxfed.core.types import Broadcast, ClientOutput


@named("channel", "feddyn")
def add_server_memory(num_clients: int) -> Channel:
    """FedDyn's server (Acar et al. 2021): adds to the mean update what it has gathered in all rounds.

    Of each round it gathers the sum over those who reported, divided by `num_clients`. The clients' half is in
    `feddyn`. The link stands left of a mean. Left of a mean by row, a row gathers its holders' mean at the same pace.

    Args:
        num_clients: Number of all clients.
    """

    def decode(total, gathered, round):
        share = round.present.sum() / num_clients
        gathered = jax.tree.map(lambda h, d: h + share * d, gathered, total)
        return jax.tree.map(jnp.add, total, gathered), gathered, {}

    return link(decode=decode, init=lambda example: (zeros_like(example), ()), is_average=False, name="feddyn")


def make_dynamic_work(
    model: Model, client_optimizer: optax.GradientTransformation, by_row: bool, strength: float
) -> ClientWork:
    """Local steps under dynamic regularisation."""

    def init(params, key):
        return Broadcast(params), ControlState(model.private(key), zeros_like(params))

    def update(shared, client_state, steps, key):
        start, both = shared.params, (shared.params, client_state.private)
        (end, own), _, seen = steered_steps(
            model.loss, client_optimizer, both, steps, by_row, scale_tree(-1, client_state.variate), strength
        )
        now = jax.tree.map(lambda h, x, y: h - strength * (y - x), client_state.variate, start, end)
        facts = output_facts(model.loss, both, steps)
        return ClientOutput(
            Broadcast(subtract(start, end)), ControlState(own, now), steps.examples, {"train/loss": seen}, **facts
        )

    return ClientWork(init, update)


@named("algorithm")
def feddyn(
    model: Model,
    client_optimizer: optax.GradientTransformation,
    server_optimizer: optax.GradientTransformation = AVERAGE,
    *,
    strength: float = 0.1,
    by_row: bool = False,
    num_clients: int,
) -> Method:
    """FedDyn (Acar et al. 2021): dynamic regularisation on clients and server, with a mean as channel. To a
    client's loss strength / 2 |shared - start|^2 - <h_i, shared> is added, and h_i becomes h_i - strength (end -
    start). The server adds what it has gathered (`add_server_memory`). By row, each of S steps pulls a row by rate x
    strength x S / (steps that hold it) of the way, which must stay below 2.

    Args:
        model: The model.
        client_optimizer: Optimiser of a client's steps. It sees the pair (shared, private) and starts anew each round.
        server_optimizer: Moves the model by what the channel made of all updates. Left out: optax.sgd(1.0).
        strength: alpha of the paper: how strongly a client is held to the model it was sent.
        by_row: true: a local step updates only the table rows in its batch. false: it updates all rows the client
            holds, so weight decay, momentum and proximal terms apply to each of them in every step (slower).
        num_clients: Number of all clients.

    Returns:
        The method, what clients and what the server compute.

    Raises:
        ValueError: the strength is negative.

    Example:
        >>> import jaxfed as jf, optax
        >>> model = jf.models.mf(num_items=100, dim=8)
        >>> method = jf.algorithms.feddyn(model, optax.sgd(0.1), num_clients=1000)
        >>> [link.claims.name for link in method.links]
        ['feddyn']
    """
    if strength < 0:
        raise ValueError(f"strength is {strength}: it must not be negative")

    work = make_dynamic_work(model, client_optimizer, by_row, strength)
    return Method(work, (add_server_memory(num_clients),), private_part=private_part, server=server_optimizer)
