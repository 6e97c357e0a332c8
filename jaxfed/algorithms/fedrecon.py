"""FedRecon: the private part is made anew in every round."""

from collections.abc import Callable

import jax.numpy as jnp
import optax

from jaxfed.algorithms.local_training import loss_of_pair, no_private, optimize_part, output_facts, select_steps
from jaxfed.core.client_work import ClientWork, Loss, local_sgd
from jaxfed.core.method import Method
from jaxfed.core.tree import subtract
from jaxfed.core.types import Broadcast, ClientOutput, Key, Tree


def fedrecon(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    private: Callable[[Key], Tree] = no_private,
    by_row: bool = True,
    passes: int = 1,
) -> Method:
    """FedRecon (Singhal et al. 2021): the private part is made anew from each round's support half, then the shared
    part descends the query half with it; nothing is kept, so that a client never seen before is as good as any.

    Every second step is of the query half; a client with one step has it in both.

    Args:
        by_row: true: a local step updates only the table rows in its batch. false: it updates all rows the client
            holds, so weight decay, momentum and proximal terms apply to each of them in every step (slower).
        passes: Times over the support half.
    """

    def update(shared, mine, steps, key):
        start, live = shared.params, steps.live.sum()
        odd = jnp.arange(steps.live.shape[0]) % 2 == 1
        both = start, private(key)
        for _ in range(passes):
            both, _, _ = local_sgd(
                loss_of_pair(loss), optimize_part(optimizer, 1), both, select_steps(steps, ~odd), by_row
            )
        query = select_steps(steps, odd | (live == 1))
        (end, _), _, seen = local_sgd(loss_of_pair(loss), optimize_part(optimizer, 0), both, query, by_row)
        return ClientOutput(
            Broadcast(subtract(start, end)), (), steps.examples, {"train/loss": seen}, **output_facts(loss, both, query)
        )

    return Method(ClientWork(lambda params, key: (Broadcast(params), ()), update), sends_difference=True)
