"""Central training: the twin of a federated run, with all data in one place."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxfed.algorithms.fedsgd import make_gradient_work
from jaxfed.algorithms.local_training import loss_of_pair
from jaxfed.core import tables, tree
from jaxfed.core.client_work import pooled_loss
from jaxfed.core.federate import Algorithm, FrozenParts, federate, put_frozen
from jaxfed.core.link import link
from jaxfed.core.method import AVERAGE, Method
from jaxfed.core.model import Model
from jaxfed.core.parametrization import frozen_arguments
from jaxfed.core.placement import Placement, make_placement
from jaxfed.core.pruning import prune_params
from jaxfed.core.recipe import named
from jaxfed.core.state import State
from jaxfed.core.types import Broadcast, ClientState, Cohort, Key, Mean, Tree
from jaxfed.core.wire import Wire


@named("algorithm")
def central(model: Model, server_optimizer: optax.GradientTransformation = AVERAGE) -> Method:
    """Central training, the twin of a federated run: same model, loss, data and evaluation, and no messages.

    A round is one step of `server_optimizer` on the mean loss over all examples of the clients of its cohort. It moves
    the shared parameters and the private parts, as one model. For a model without a private part, federated rounds take
    the same steps if each client sends one gradient (`fedsgd`), the mean is weighted by examples, and
    `server.lazy = false`. Private parts differ: here `server_optimizer` moves them, those of absent clients too if it
    has a momentum.

    Args:
        model: The model.
        server_optimizer: Moves the whole model. Left out: optax.sgd(1.0).

    Returns:
        The method, for `jaxfed.Experiment`. The channel must be empty.

    Example:
        >>> import jaxfed as jf, optax
        >>> jf.algorithms.central(jf.models.mf(num_items=100), optax.adam(0.01)).is_central
        True
    """
    return Method(make_gradient_work(model, optax.identity()), server=server_optimizer, is_central=True)


def build_central(
    method: Method, model: Model, num_clients: int, placement: Placement | None = None, frozen: Tree = ()
) -> Algorithm:
    """The rounds of central training, with the same calls as those of `federate`."""
    place = placement or make_placement()
    frozen_parts = put_frozen(place, method.parametrization, frozen)
    federated = federate(method._replace(is_central=False), link(), num_clients, place, frozen=frozen)
    add = jax.jit(partial(add_gradient, method, model), donate_argnums=2)
    move = jax.jit(partial(move_model, method), donate_argnums=0)

    def init(params, key):
        state = federated.init(params, key)
        whole = state.shared.params, state.client_states.work
        return state._replace(opt=place.constrain(jax.jit(method.server.init)(tree.to_compute_dtype(whole)), "server"))

    def step(state: State, cohort: Cohort, key: Key) -> tuple[State, dict[str, jax.Array]]:
        whole = state.shared.params, state.client_states.work
        total: Any = tree.zeros_like(tree.to_compute_dtype(whole)), Mean(jnp.zeros(()), jnp.zeros(()))
        for block in cohort.blocks:
            total = add(whole, frozen_parts, total, cohort.ids, cohort.present, cohort.rows, block)
        state, loss = move(state, total)
        present, asked = jnp.asarray(cohort.present), jnp.asarray(cohort.ids) < num_clients
        counts = {"clients/reported": present.sum(), "clients/refused": jnp.int32(0)}
        counts |= {"clients/dropped": (asked & ~present).sum(), "clients/present": present}
        return state, {"train/loss": loss, **counts, "rows/sent": jnp.zeros(len(cohort.ids), jnp.int32)}

    return Algorithm(init, step)


def add_gradient(
    method: Method, model: Model, whole, frozen_parts: FrozenParts, total, ids, present, touched, block
) -> tuple[Tree, Mean]:
    """Adds a block's gradient of the summed loss, and the loss, to `total`.

    Gradients include the parametrization and the look-up of rows.
    """
    frozen, loss, end = frozen_parts.clients, loss_of_pair(model.loss), ids.shape[0]
    who = ids.at[block.slots].get(mode="fill", fill_value=jnp.iinfo(jnp.int32).max)
    counts = present.at[block.slots].get(mode="fill", fill_value=False) & (block.slots < end)

    def objective(whole):
        held, private = tree.to_compute_dtype(whole)
        forward: Callable | None = method.parametrization and method.parametrization.forward
        if forward:
            params = tree.to_compute_dtype(forward(held, touched, *frozen_arguments(frozen_parts.server)))
        else:
            params = held if touched is None else tables.take_rows(held, touched)

        def client(id, rows, data):
            past_end = jnp.iinfo(jnp.int32).max
            item = rows if touched is None else touched.at[rows].get(mode="fill", fill_value=past_end)
            data = data._replace(frozen=tables.take_rows(frozen, item)) if jax.tree.leaves(frozen) else data
            return pooled_loss(loss, (tables.take_rows(params, rows), tables.gather_client(private, id, item)), data)

        each = jax.vmap(client)(who, block.rows, block.data)
        summed = jax.tree.map(lambda x: jnp.where(counts, x, 0).sum(), each)
        return summed.total, summed

    gradient, seen = jax.grad(objective, has_aux=True)(whole)
    return jax.tree.map(jnp.add, total, (gradient, seen))


def move_model(method: Method, state: State, total: tuple[Tree, Mean]) -> tuple[State, jax.Array]:
    """One step of the server's optimiser, on the mean of the loss."""
    whole = state.shared.params, state.client_states.work
    gradient = jax.tree.map(lambda x: Mean(x, total[1].weight).value, total[0])
    change, opt = method.server.update(gradient, state.opt, tree.to_compute_dtype(whole))
    params, private = tables.add_rows(whole, None, change)
    if method.parametrization:
        params = prune_params(method.parametrization.pruning, whole[0], params, state.round + 1)
    shared, kept = Broadcast(params, state.shared.extra), ClientState(private, state.client_states.channel)
    return state._replace(shared=shared, client_states=kept, opt=opt, round=state.round + 1), total[1].value


def no_wire() -> Wire:
    """That of central training: nothing is sent, as the server has the data."""

    def nothing(rows, *facts):
        return np.zeros(np.shape(rows), np.int64)

    return Wire(nothing, nothing, "all data")
