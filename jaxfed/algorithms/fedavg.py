"""FedAvg and FedProx: clients train the model on their data, the server averages."""

from collections.abc import Callable

import optax

from jaxfed.algorithms.local_training import no_private, train_locally
from jaxfed.core.client_work import Loss
from jaxfed.core.method import Method
from jaxfed.core.types import Key, Tree


def fedavg(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    private: Callable[[Key], Tree] = no_private,
    by_row: bool = True,
) -> Method:
    """Federated averaging (McMahan et al. 2017, algorithm 1), with a mean of the user's choice as channel. With a
    server optimiser it is FedOpt (Reddi et al. 2021).

    Args:
        by_row: true: a local step updates only the table rows in its batch. false: it updates all rows the client
            holds, so weight decay, momentum and proximal terms apply to each of them in every step (slower).
    """
    return train_locally(loss, optimizer, private, by_row)


def fedprox(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    private: Callable[[Key], Tree] = no_private,
    by_row: bool = True,
    proximal: float = 0.01,
) -> Method:
    """FedAvg whose clients are pulled back to where they started (Li et al. 2020, "Federated optimization in
    heterogeneous networks").

    Args:
        by_row: true: a local step updates only the table rows in its batch. false: it updates all rows the client
            holds, so weight decay, momentum and proximal terms apply to each of them in every step (slower).
        proximal: mu: the loss has mu / 2 |shared - start|^2 beside it.
    """
    return train_locally(loss, optimizer, private, by_row, proximal)
