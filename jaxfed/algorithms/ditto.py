"""Ditto: each client trains a model of its own beside the shared one."""

import optax

from jaxfed.algorithms.local_training import local_steps, loss_of_pair, proximal_optimizer
from jaxfed.algorithms.own_model import new_own_model, own_copy, own_view, server_view, stamp_rows
from jaxfed.core.client_work import ClientWork, local_sgd
from jaxfed.core.method import AVERAGE, Method
from jaxfed.core.model import Model
from jaxfed.core.recipe import named
from jaxfed.core.types import Broadcast


def make_ditto_work(
    model: Model, client_optimizer: optax.GradientTransformation, by_row: bool, strength: float
) -> ClientWork:
    """Local steps of the shared model, and of the client's own, which is pulled to it."""
    shared_work = local_steps(model, client_optimizer, by_row)

    def init(params, key):
        return Broadcast(params), new_own_model(params, model.private(key), model.private(key))

    def update(shared, own, steps, key):
        report, start = shared_work.update(shared, own.private, steps, key), shared.params
        both = own_copy(own, start), own.beside
        (copy, beside), _, _ = local_sgd(
            loss_of_pair(model.loss), proximal_optimizer(client_optimizer, strength), both, steps, by_row, anchor=start
        )
        return report._replace(client_state=stamp_rows(own, private=report.client_state, copy=copy, beside=beside))

    return ClientWork(init, update, views={"": server_view, "personal": own_view})


@named("algorithm")
def ditto(
    model: Model,
    client_optimizer: optax.GradientTransformation,
    server_optimizer: optax.GradientTransformation = AVERAGE,
    *,
    by_row: bool = True,
    strength: float = 0.1,
) -> Method:
    """Ditto (Li et al. 2021): beside the local steps of FedAvg, each client trains a model of its own.

    Its loss has strength / 2 |own - server's|^2 beside it, which pulls it to the server's model. It is evaluated as
    `personal`. Stores one full item table per client (clients x items x dim numbers).

    Args:
        model: The model.
        client_optimizer: Optimiser of a client's steps. It sees the pair (shared, private) and starts anew each round.
        server_optimizer: Moves the model by what the channel made of all updates. Left out: optax.sgd(1.0).
        by_row: true: a local step updates only the table rows in its batch. false: it updates all rows the client
            holds, so weight decay, momentum and proximal terms apply to each of them in every step (slower).
        strength: lambda of the paper: how strongly a client's own model is pulled to the server's.

    Returns:
        The method, what clients and what the server compute.

    Raises:
        ValueError: the strength is negative.

    Example:
        >>> import jaxfed as jf, optax
        >>> model = jf.models.mf(num_items=100, dim=8)
        >>> method = jf.algorithms.ditto(model, optax.sgd(0.1))
        >>> sorted(method.work.views)  # the models that are evaluated; "" is the server's
        ['', 'personal']
    """
    if strength < 0:
        raise ValueError(f"strength is {strength}: it must not be negative")
    return Method(make_ditto_work(model, client_optimizer, by_row, strength), server=server_optimizer)
