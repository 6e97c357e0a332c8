"""SCAFFOLD: control variates on clients and server."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxfed.algorithms.local_training import output_facts
from jaxfed.algorithms.steering import ControlState, private_part, steered_steps
from jaxfed.core.client_work import ClientWork
from jaxfed.core.method import AVERAGE, Method
from jaxfed.core.model import Model
from jaxfed.core.recipe import named
from jaxfed.core.tables import Table, map_tables, num_rows
from jaxfed.core.tree import scale_tree, subtract, zeros_like
from jaxfed.core.types import Broadcast, ClientOutput, Summed, Tree


class Variates(NamedTuple):
    """What SCAFFOLD's server broadcasts beside the model, and what clients add to it."""

    mean: Tree  # c, like the shared part
    holders: Tree  # float table: how many clients ever trained a row; empty without tables


def make_scaffold_work(model: Model, client_optimizer: optax.GradientTransformation, by_row: bool) -> ClientWork:
    """Local steps along g - c_i + c, and the change of c_i."""

    def init(params, key):
        rows = num_rows(params)
        nobody = Table(jnp.zeros(rows)) if rows else ()
        return Broadcast(params, Variates(zeros_like(params), nobody)), ControlState(
            model.private(key), zeros_like(params), nobody
        )

    def update(shared, client_state, steps, key):
        start, both = shared.params, (shared.params, client_state.private)
        shift = subtract(shared.extra.mean, client_state.variate)
        (end, own), slopes, seen = steered_steps(model.loss, client_optimizer, both, steps, by_row, shift)
        facts = output_facts(model.loss, both, steps)
        now = scale_tree(1 / jnp.maximum(facts["steps"], 1), slopes)
        held = jax.tree.map(jnp.ones_like, client_state.held)
        change = Summed(Variates(subtract(now, client_state.variate), subtract(held, client_state.held)))
        new_state = ControlState(own, now, held)
        return ClientOutput(
            Broadcast(subtract(start, end), change), new_state, steps.examples, {"train/loss": seen}, **facts
        )

    def update_shapes(shared):
        return Broadcast(shared.params, Summed(shared.extra))

    return ClientWork(init, update, update_shapes)


def combine_variates(extra: Variates, change: Summed, num_clients: int) -> Variates:
    """c after a round in which the control variates of clients changed by `change` in all."""
    holders = jax.tree.map(jnp.add, extra.holders, change.values.holders)

    def by_holders(c, x):
        before, after = (each.rows.reshape((-1,) + (1,) * (x.ndim - 1)) for each in (extra.holders, holders))
        return (before * c + x) / jnp.maximum(after, 1)

    mean = map_tables(by_holders, lambda c, x: c + x / num_clients, extra.mean, change.values.mean)
    return Variates(mean, holders)


@named("algorithm")
def scaffold(
    model: Model,
    client_optimizer: optax.GradientTransformation,
    server_optimizer: optax.GradientTransformation = AVERAGE,
    *,
    num_clients: int,
    by_row: bool = False,
) -> Method:
    """SCAFFOLD (Karimireddy et al. 2020): control variates c_i on clients and c on the server steer local steps.

    A step follows g - c_i + c in place of the gradient g. c_i becomes the mean of g over the client's local steps,
    which is the paper's option II for plain SGD and needs no learning rate. c is sent with the model. It is the mean of
    the c_i of all `num_clients` clients, also of those that never took part, whose c_i is 0; of a row of a table, of
    all clients that ever trained it.

    Args:
        model: The model.
        client_optimizer: Optimiser of a client's steps. It sees the pair (shared, private) and starts anew each round.
        server_optimizer: Moves the model by what the channel made of all updates. Left out: optax.sgd(1.0).
        num_clients: Number of all clients.
        by_row: true: a local step updates only the table rows in its batch. false: it updates all rows the client
            holds, so weight decay, momentum and proximal terms apply to each of them in every step (slower).

    Returns:
        The method, what clients and what the server compute.

    Example:
        >>> import jaxfed as jf, optax
        >>> model = jf.models.mf(num_items=100, dim=8)
        >>> method = jf.algorithms.scaffold(model, optax.sgd(0.1), num_clients=1000)
        >>> method.sends_difference  # clients keep more than the private part of the model
        False
    """
    work = make_scaffold_work(model, client_optimizer, by_row)
    move_extra = partial(combine_variates, num_clients=num_clients)
    return Method(work, move_extra=move_extra, private_part=private_part, server=server_optimizer)
