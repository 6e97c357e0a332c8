"""FedRecon: the private part is made anew in every round."""

import jax.numpy as jnp
import optax

from jaxfed.algorithms.local_training import loss_of_pair, optimize_part, output_facts, select_steps
from jaxfed.core.client_work import ClientWork, local_sgd
from jaxfed.core.method import AVERAGE, Method
from jaxfed.core.model import Model
from jaxfed.core.recipe import named
from jaxfed.core.tree import subtract
from jaxfed.core.types import Broadcast, ClientOutput


def make_reconstruction_work(
    model: Model, client_optimizer: optax.GradientTransformation, by_row: bool, passes: int
) -> ClientWork:
    """Steps of a new private part on the support half, then of the shared part on the query half."""

    def update(shared, client_state, steps, key):
        start, live = shared.params, steps.live.sum()
        odd = jnp.arange(steps.live.shape[0]) % 2 == 1
        both = start, model.private(key)
        for _ in range(passes):
            both, _, _ = local_sgd(
                loss_of_pair(model.loss), optimize_part(client_optimizer, 1), both, select_steps(steps, ~odd), by_row
            )
        query = select_steps(steps, odd | (live == 1))
        (end, _), _, seen = local_sgd(loss_of_pair(model.loss), optimize_part(client_optimizer, 0), both, query, by_row)
        return ClientOutput(
            Broadcast(subtract(start, end)),
            (),
            steps.examples,
            {"train/loss": seen},
            **output_facts(model.loss, both, query),
        )

    return ClientWork(lambda params, key: (Broadcast(params), ()), update)


@named("algorithm")
def fedrecon(
    model: Model,
    client_optimizer: optax.GradientTransformation,
    server_optimizer: optax.GradientTransformation = AVERAGE,
    *,
    by_row: bool = True,
    passes: int = 1,
) -> Method:
    """FedRecon (Singhal et al. 2021): the private part is made anew in every round, and nothing is kept.

    It is trained on one half of a client's steps, the support half; then the shared part is trained on the other, the
    query half, which is every second step. A client with one step has it in both. As nothing is kept, a client that was
    never seen before is served as well as any.

    Args:
        model: The model.
        client_optimizer: Optimiser of a client's steps. It sees the pair (shared, private) and starts anew each round.
        server_optimizer: Moves the model by what the channel made of all updates. Left out: optax.sgd(1.0).
        by_row: true: a local step updates only the table rows in its batch. false: it updates all rows the client
            holds, so weight decay, momentum and proximal terms apply to each of them in every step (slower).
        passes: Number of passes over the support half.

    Returns:
        The method, what clients and what the server compute.

    Example:
        >>> import jaxfed as jf, optax
        >>> model = jf.models.mf(num_items=100, dim=8)
        >>> method = jf.algorithms.fedrecon(model, optax.sgd(0.1))
        >>> method.work.init({}, None)[1]  # what a client keeps
        ()
    """

    work = make_reconstruction_work(model, client_optimizer, by_row, passes)
    return Method(work, sends_difference=True, server=server_optimizer)
