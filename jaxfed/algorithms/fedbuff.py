"""FedBuff and FedAsync: clients that were sent models of different rounds."""

import optax

from jaxfed.algorithms.local_training import local_steps
from jaxfed.channels.staleness import mixing, staleness
from jaxfed.core.method import AVERAGE, Method
from jaxfed.core.model import Model
from jaxfed.core.recipe import named


@named("algorithm")
def fedbuff(
    model: Model,
    client_optimizer: optax.GradientTransformation,
    server_optimizer: optax.GradientTransformation = AVERAGE,
    *,
    by_row: bool = True,
    exponent: float = 0.5,
) -> Method:
    """FedBuff (Nguyen et al. 2022): buffered asynchronous aggregation, for cohorts of a buffer (`cohort.buffered`).

    Args:
        model: The model.
        client_optimizer: Optimiser of a client's steps. It sees the pair (shared, private) and starts anew each round.
        server_optimizer: Moves the model by what the channel made of all updates. Left out: optax.sgd(1.0).
        by_row: true: a local step updates only the table rows in its batch. false: it updates all rows the client
            holds, so weight decay, momentum and proximal terms apply to each of them in every step (slower).
        exponent: An update that is `age` rounds old has weight (1 + age)^-exponent. 0: age is ignored.

    Returns:
        The method, what clients and what the server compute.

    Raises:
        ValueError: the exponent is negative.

    Example:
        >>> import jaxfed as jf, optax
        >>> model = jf.models.mf(num_items=100, dim=8)
        >>> method = jf.algorithms.fedbuff(model, optax.sgd(0.1))
        >>> [link.claims.name for link in method.links]
        ['staleness']
    """
    return Method(local_steps(model, client_optimizer, by_row), (staleness(exponent),), server=server_optimizer)


@named("algorithm")
def fedasync(
    model: Model,
    client_optimizer: optax.GradientTransformation,
    server_optimizer: optax.GradientTransformation = AVERAGE,
    *,
    by_row: bool = True,
    rate: float = 0.6,
    exponent: float = 0.5,
) -> Method:
    """FedAsync (Xie et al. 2019): asynchronous mixing of whole models, for cohorts of one client (`cohort.buffered`,
    size 1).

    Args:
        model: The model.
        client_optimizer: Optimiser of a client's steps. It sees the pair (shared, private) and starts anew each round.
        server_optimizer: Moves the model by what the channel made of all updates. Left out: optax.sgd(1.0).
        by_row: true: a local step updates only the table rows in its batch. false: it updates all rows the client
            holds, so weight decay, momentum and proximal terms apply to each of them in every step (slower).
        rate: How far the server's model moves to a client's, above 0, up to 1.
        exponent: A model that is `age` rounds old has weight (1 + age)^-exponent. 0: age is ignored.

    Returns:
        The method, what clients and what the server compute.

    Raises:
        ValueError: the rate is not above 0 and up to 1, or the exponent is negative.

    Example:
        >>> import jaxfed as jf, optax
        >>> model = jf.models.mf(num_items=100, dim=8)
        >>> method = jf.algorithms.fedasync(model, optax.sgd(0.1))
        >>> [link.claims.name for link in method.links]
        ['mixing']
    """
    return Method(local_steps(model, client_optimizer, by_row), (mixing(rate, exponent),), server=server_optimizer)
