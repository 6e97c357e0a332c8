"""FedRep: first the private part alone, then the shared part alone."""

from collections.abc import Callable

import optax

from jaxfed.algorithms.local_training import local_steps, loss_of_pair, no_private, optimize_part, output_facts
from jaxfed.core.client_work import ClientWork, Loss, local_sgd
from jaxfed.core.method import Method
from jaxfed.core.tree import subtract
from jaxfed.core.types import Broadcast, ClientOutput, Key, Tree


def fedrep(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    private: Callable[[Key], Tree] = no_private,
    by_row: bool = True,
    passes: int = 1,
) -> Method:
    """FedRep (Collins et al. 2021): first the private part alone, then the shared part alone; a model whose head is
    private makes it that of the paper, and `local_steps` then is FedPer (Arivazhagan et al. 2019).

    Args:
        by_row: true: a local step updates only the table rows in its batch. false: it updates all rows the client
            holds, so weight decay, momentum and proximal terms apply to each of them in every step (slower).
        passes: Times that the private part goes over the client's steps.
    """

    def update(shared, mine, steps, key):
        start = shared.params
        both = start, mine
        for _ in range(passes):
            both, _, _ = local_sgd(loss_of_pair(loss), optimize_part(optimizer, 1), both, steps, by_row)
        (end, mine), _, seen = local_sgd(loss_of_pair(loss), optimize_part(optimizer, 0), both, steps, by_row)
        return ClientOutput(
            Broadcast(subtract(start, end)),
            mine,
            steps.examples,
            {"train/loss": seen},
            **output_facts(loss, both, steps),
        )

    return Method(ClientWork(local_steps(loss, optimizer, private).init, update), sends_difference=True)
