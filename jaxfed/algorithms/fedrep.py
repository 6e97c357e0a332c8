"""FedRep: first the private part alone, then the shared part alone."""

import optax

from jaxfed.algorithms.local_training import local_steps, loss_of_pair, optimize_part, output_facts
from jaxfed.core.client_work import ClientWork, local_sgd
from jaxfed.core.method import AVERAGE, Method
from jaxfed.core.model import Model
from jaxfed.core.recipe import named
from jaxfed.core.tree import subtract
from jaxfed.core.types import Broadcast, ClientOutput


def make_alternating_work(
    model: Model, client_optimizer: optax.GradientTransformation, by_row: bool, passes: int
) -> ClientWork:
    """Steps of the private part, then of the shared part."""

    def update(shared, private, steps, key):
        start = shared.params
        both = start, private
        for _ in range(passes):
            both, _, _ = local_sgd(loss_of_pair(model.loss), optimize_part(client_optimizer, 1), both, steps, by_row)
        (end, private), _, seen = local_sgd(
            loss_of_pair(model.loss), optimize_part(client_optimizer, 0), both, steps, by_row
        )
        return ClientOutput(
            Broadcast(subtract(start, end)),
            private,
            steps.examples,
            {"train/loss": seen},
            **output_facts(model.loss, both, steps),
        )

    return ClientWork(local_steps(model, client_optimizer).init, update)


@named("algorithm")
def fedrep(
    model: Model,
    client_optimizer: optax.GradientTransformation,
    server_optimizer: optax.GradientTransformation = AVERAGE,
    *,
    by_row: bool = True,
    passes: int = 1,
) -> Method:
    """FedRep (Collins et al. 2021): first the private part is trained alone, then the shared part alone.

    With a model whose head is private (`pfedrec`) it is that of the paper, and `fedavg` is FedPer (Arivazhagan et al.
    2019).

    Args:
        model: The model.
        client_optimizer: Optimiser of a client's steps. It sees the pair (shared, private) and starts anew each round.
        server_optimizer: Moves the model by what the channel made of all updates. Left out: optax.sgd(1.0).
        by_row: true: a local step updates only the table rows in its batch. false: it updates all rows the client
            holds, so weight decay, momentum and proximal terms apply to each of them in every step (slower).
        passes: Number of passes over a client's steps to train the private part.

    Returns:
        The method, what clients and what the server compute.

    Example:
        >>> import jaxfed as jf, optax
        >>> model = jf.models.mf(num_items=100, dim=8)
        >>> method = jf.algorithms.fedrep(model, optax.sgd(0.1))
        >>> method.sends_difference  # an update is where the shared part began less where it ended
        True
    """

    work = make_alternating_work(model, client_optimizer, by_row, passes)
    return Method(work, sends_difference=True, server=server_optimizer)
