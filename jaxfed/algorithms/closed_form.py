"""Closed forms: clients send sums, the server solves."""

import jax
import jax.numpy as jnp

from jaxfed.core.client_work import ClientWork
from jaxfed.core.method import Method
from jaxfed.core.model import ClosedForm, Model
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
        sums, figures = closed.statistics(shared.params, history)
        loss = figures["train/loss"].value if "train/loss" in figures else 0.0
        return ClientOutput(Broadcast(sums), (), steps.examples, figures, loss=loss)

    def update_shapes(shared):
        rows, nothing = num_rows(shared), jnp.full(1, num_items)
        sums = Broadcast(closed.statistics(shared.params, History(nothing, nothing, num_items))[0])
        if not closed.pair_columns:
            return sums
        return jax.tree.map(lambda x: jnp.zeros((rows, *x.shape[1:]), x.dtype), sums)  # a history has pairs, not rows

    work = ClientWork(lambda params, key: (Broadcast(params), ()), update, update_shapes)
    return Method(work, reads_histories=True, needs_all_rows=not closed.pair_columns, closed=closed)


def move_to_solution(learning_rate: float, closed: ClosedForm | None) -> ClosedForm:
    """The server's half of `statistics`: moves the model to the solution of the sums (1.), or a part of the way.

    Raises ValueError where the model has no closed form, and for a schedule.
    """
    if closed is None:
        raise ValueError(f"server.solve: {MISSING}")
    if callable(learning_rate):
        raise ValueError("server.solve: a solution has no schedule: leave server.schedule and server.warmup out")
    if learning_rate == 1:
        return closed

    @jax.jit
    def move(shared, found):
        return jax.tree.map(lambda old, new: old + learning_rate * (new - old), shared, found)

    def solve_in_part(sums, shared, candidate=None):
        return move(shared, closed.solve(sums, shared, candidate))

    if closed.pair_columns and not closed.solve_bytes:  # tables of few neighbours, which hold item numbers
        raise ValueError("server.learning_rate: the neighbours of items differ from round to round: leave it at 1")
    return closed._replace(solve=solve_in_part)
