"""Clients whose server tells them of those like them: a graph of clients by what they last sent."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxfed.algorithms.local_training import loss_of_pair, output_facts, proximal_optimizer
from jaxfed.algorithms.own_model import OwnModel, new_own_model, own_copy, server_view, stamp_rows
from jaxfed.core.client_work import ClientWork, local_sgd
from jaxfed.core.method import AVERAGE, Method
from jaxfed.core.model import Model
from jaxfed.core.recipe import named
from jaxfed.core.tree import subtract
from jaxfed.core.types import Broadcast, ClientOutput, Tree


class GuidedState(NamedTuple):
    """A client's state. The server knows all of it but the private parts: it sent the one half, and was sent the
    other."""

    own: OwnModel  # the shared part as the client last sent it
    around: Tree  # like the shared part: the mean over its neighbours' ones


def find_neighbours(models: jax.Array, known: jax.Array, count: int, threshold: float) -> jax.Array:
    """float [n, n]: equal weights of each client's neighbours, itself one of them where it is known; rows add up to 1.

    models [n, D]; known bool [n]: others are nobody's neighbours. The `count` with the highest cosine, if any (more
    where they are equal); or else all whose cosine is above `threshold` times the mean of all pairs. Who has none is
    alone.
    """
    unit = models / jnp.maximum(jnp.linalg.norm(models, axis=1, keepdims=True), 1e-9)
    alike, pairs = unit @ unit.T, known[:, None] & known
    ranked = jnp.where(known, alike, -jnp.inf)
    if count:
        least = jnp.sort(ranked, 1)[:, -min(count, len(known)), None]
        near = known & (ranked >= least)
    else:
        near = known & (alike > threshold * jnp.sum(alike * pairs) / jnp.maximum(pairs.sum(), 1))
    near = jnp.where(near.any(1, keepdims=True), near, jnp.eye(len(known), dtype=bool))
    return near / near.sum(1, keepdims=True)


def make_guided_work(
    model: Model, client_optimizer: optax.GradientTransformation, by_row: bool, strength: float
) -> ClientWork:
    """Local steps that are pulled to the neighbours' mean."""

    def init(params, key):
        return Broadcast(params), GuidedState(new_own_model(params, model.private(key), ()), params)

    def update(shared, client_state, steps, key):
        start, both = shared.params, (shared.params, client_state.own.private)
        held = {"anchor": client_state.around} if strength else {}
        pace = proximal_optimizer(client_optimizer, strength) if strength else client_optimizer
        (end, kept), _, seen = local_sgd(loss_of_pair(model.loss), pace, both, steps, by_row, **held)
        new_state = client_state._replace(own=stamp_rows(client_state.own, private=kept, copy=end))
        facts = output_facts(model.loss, both, steps)
        return ClientOutput(Broadcast(subtract(start, end)), new_state, steps.examples, {"train/loss": seen}, **facts)

    views = {
        "": lambda params, client_state: server_view(params, client_state.own),
        "personal": lambda params, client_state: (
            own_copy(client_state.own, params, latest=True),
            client_state.own.private,
        ),
        "neighbours": lambda params, client_state: (client_state.around, client_state.own.private),
    }
    return ClientWork(init, update, views=views)


def average_neighbours(
    params: Tree, store: GuidedState, count: int, threshold: float
) -> tuple[Tree, dict[str, jax.Array]]:
    """What all clients keep [n, ...], with the means of their neighbours made anew, and how many these are."""
    models = jax.vmap(lambda own: own_copy(own, params, latest=True))(store.own)
    known = store.own.rounds > 0
    flat = jnp.concatenate([x.reshape(len(known), -1) for x in jax.tree.leaves(models)], 1)
    weights = find_neighbours(flat, known, count, threshold)
    around = jax.tree.map(lambda x: jnp.tensordot(weights, x, 1), models)
    return store._replace(around=around), {"graph/neighbours": (weights > 0).sum(1).mean()}


@named("algorithm")
def gpfedrec(
    model: Model,
    client_optimizer: optax.GradientTransformation,
    server_optimizer: optax.GradientTransformation = AVERAGE,
    *,
    by_row: bool = True,
    strength: float = 0.1,
    neighbours_count: int = 0,
    threshold: float = 1.0,
) -> Method:
    """GPFedRec (Zhang et al. 2024): each client is pulled to the mean of the models of clients like it.

    A client begins with the server's model, and also downloads `around`, the mean of its neighbours' models: strength
    / 2 |shared - around|^2 is added to its loss. By row, this is for the rows of a step. The server finds neighbours by
    what each client last sent: see `find_neighbours`.

    Of a client's own model, the rows of its last round are its own and the others the server's. Evaluated are the
    server's model, `personal` (a client's own model, which is the paper's) and `neighbours` (their mean). The server's
    model is what the channel makes of all updates; in the paper it is the mean of what clients are sent. Stores two
    full item tables per client (2 x clients x items x dim numbers), and compares all pairs of clients in every round.

    Args:
        model: The model.
        client_optimizer: Optimiser of a client's steps. It sees the pair (shared, private) and starts anew each round.
        server_optimizer: Moves the model by what the channel made of all updates. Left out: optax.sgd(1.0).
        by_row: true: a local step updates only the table rows in its batch. false: it updates all rows the client
            holds, so weight decay, momentum and proximal terms apply to each of them in every step (slower).
        strength: How strongly a client is pulled to its neighbours' mean.
        neighbours_count: How many neighbours a client has. 0: those above the threshold.
        threshold: Neighbours are those whose cosine is above this times the mean cosine of all pairs.

    Returns:
        The method, what clients and what the server compute.

    Raises:
        ValueError: the strength is negative.

    Example:
        >>> import jaxfed as jf, optax
        >>> model = jf.models.mf(num_items=100, dim=8)
        >>> method = jf.algorithms.gpfedrec(model, optax.sgd(0.1))
        >>> sorted(method.work.views)  # the models that are evaluated; "" is the server's
        ['', 'neighbours', 'personal']
    """
    if strength < 0:
        raise ValueError(f"strength is {strength}: it must not be negative")

    return Method(
        make_guided_work(model, client_optimizer, by_row, strength),
        compare_clients=partial(average_neighbours, count=neighbours_count, threshold=threshold),
        own_download=lambda broadcast: broadcast.params,
        server=server_optimizer,
    )
