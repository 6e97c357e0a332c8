"""Closed forms: clients send sums, the server solves."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxfed.core.client_work import ClientWork
from jaxfed.core.method import Method
from jaxfed.core.model import Model
from jaxfed.core.recipe import named
from jaxfed.core.tables import num_rows
from jaxfed.core.types import Broadcast, ClientOutput, History

MISSING = "the model has no closed form: take one that has (ease, item_knn, transitions, ials)"


@named("algorithm")
def closed_form(model: Model) -> Method:
    """Clients send what their history adds to some sums, and the server solves for the model from these sums.

    One round of everyone gives the same model as central training. Where what a client sends depends on the last model
    (iALS), it takes several rounds. The channel must be a sum: no mean.

    Args:
        model: A model with a closed form (ease, item_knn, transitions, ials).

    Returns:
        The method, what clients and what the server compute.

    Raises:
        ValueError: the model has no closed form.

    Example:
        >>> import jaxfed as jf
        >>> jf.algorithms.closed_form(jf.models.ease(num_items=100)).reads_histories
        True
    """
    closed = model.closed
    if closed is None:
        raise ValueError(f"closed_form: {MISSING}")
    num_items = num_rows(jax.eval_shape(model.init, jax.random.key(0)))

    def update(shared, client_state, steps, key):
        history = History(steps.rows.ravel(), steps.batch["id"].ravel(), num_items)
        sums, fit = closed.statistics(shared.params, history)
        return ClientOutput(Broadcast(sums), (), steps.examples, {"train/loss": fit}, loss=fit.value)

    def update_shapes(shared):
        nothing = jnp.full(1, num_items)
        return Broadcast(closed.statistics(shared.params, History(nothing, nothing, num_items))[0])

    work = ClientWork(lambda params, key: (Broadcast(params), ()), update, update_shapes)
    return Method(work, server=solve_optimizer(1.0, closed), reads_histories=True, needs_all_rows=True)


def solve_optimizer(learning_rate: float, closed: Any) -> optax.GradientTransformation:
    """The server's half of `statistics`: moves the model to the solution of the sums (1.), or a part of the way.

    Raises ValueError for None.
    """
    if closed is None:
        raise ValueError(f"server.solve: {MISSING}")
    if callable(learning_rate):
        raise ValueError("server.solve: a solution has no schedule: leave server.schedule and server.warmup out")

    def update(sums, state, params=None):
        found = closed.solve(sums, params)
        return jax.tree.map(lambda new, old: learning_rate * (new - old), found, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
