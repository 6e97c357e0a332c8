"""FedAvg and FedProx: clients train the model on their data, the server averages."""

import optax

from jaxfed.algorithms.local_training import train_locally
from jaxfed.core.method import AVERAGE, Method
from jaxfed.core.model import Model
from jaxfed.core.recipe import named


@named("algorithm")
def fedavg(
    model: Model,
    client_optimizer: optax.GradientTransformation,
    server_optimizer: optax.GradientTransformation = AVERAGE,
    *,
    by_row: bool = True,
    accumulate: int = 1,
) -> Method:
    """Federated averaging (McMahan et al. 2017, algorithm 1), with any mean as channel. With a server optimiser it is
    FedOpt (Reddi et al. 2021).

    Args:
        model: The model.
        client_optimizer: Optimiser of a client's steps. It sees the pair (shared, private) and starts anew each round.
        server_optimizer: Moves the model by what the channel made of all updates. Left out: optax.sgd(1.0).
        by_row: true: a local step updates only the table rows in its batch. false: it updates all rows the client
            holds, so weight decay, momentum and proximal terms apply to each of them in every step (slower).
        accumulate: Number of batches in a row whose gradients make one step of the optimiser. It is the step of one
            batch with all their examples, in the memory of one of these batches.

    Returns:
        The method, what clients and what the server compute.

    Raises:
        ValueError: `accumulate` is below 1.

    Example:
        >>> import jaxfed as jf, optax
        >>> model = jf.models.mf(num_items=100, dim=8)
        >>> method = jf.algorithms.fedavg(model, optax.sgd(0.1))
        >>> method.sends_difference  # an update is where the model began less where it ended
        True
    """
    return train_locally(model, client_optimizer, server_optimizer, by_row=by_row, accumulate=accumulate)


@named("algorithm")
def fedprox(
    model: Model,
    client_optimizer: optax.GradientTransformation,
    server_optimizer: optax.GradientTransformation = AVERAGE,
    *,
    by_row: bool = True,
    proximal: float = 0.01,
    accumulate: int = 1,
) -> Method:
    """FedProx (Li et al. 2020, "Federated optimization in heterogeneous networks"): FedAvg whose clients are pulled
    back to where they started.

    Args:
        model: The model.
        client_optimizer: Optimiser of a client's steps. It sees the pair (shared, private) and starts anew each round.
        server_optimizer: Moves the model by what the channel made of all updates. Left out: optax.sgd(1.0).
        by_row: true: a local step updates only the table rows in its batch. false: it updates all rows the client
            holds, so weight decay, momentum and proximal terms apply to each of them in every step (slower).
        proximal: mu of the paper: mu / 2 |shared - start|^2 is added to the loss.
        accumulate: Number of batches in a row whose gradients make one step of the optimiser. It is the step of one
            batch with all their examples, in the memory of one of these batches.

    Returns:
        The method, what clients and what the server compute.

    Raises:
        ValueError: `proximal` is negative, or `accumulate` below 1.

    Example:
        >>> import jaxfed as jf, optax
        >>> model = jf.models.mf(num_items=100, dim=8)
        >>> method = jf.algorithms.fedprox(model, optax.sgd(0.1))
        >>> method.sends_difference  # an update is where the model began less where it ended
        True
    """
    return train_locally(
        model, client_optimizer, server_optimizer, by_row=by_row, proximal=proximal, accumulate=accumulate
    )
