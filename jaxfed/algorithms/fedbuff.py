"""FedBuff and FedAsync: clients that were sent models of different rounds."""

from collections.abc import Callable

import optax

from jaxfed.algorithms.local_training import local_steps, no_private
from jaxfed.channels.staleness import mixing, staleness
from jaxfed.core.client_work import Loss
from jaxfed.core.method import Method
from jaxfed.core.types import Key, Tree


def fedbuff(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    private: Callable[[Key], Tree] = no_private,
    by_row: bool = True,
    exponent: float = 0.5,
) -> Method:
    """Buffered asynchronous aggregation (Nguyen et al. 2022), for cohorts of a buffer (`cohort.buffered`).

    Args:
        by_row: true: a local step updates only the table rows in its batch. false: it updates all rows the client
            holds, so weight decay, momentum and proximal terms apply to each of them in every step (slower).
        exponent: An update that is `age` rounds old has weight (1 + age)^-exponent. 0: age is ignored.
    """
    return Method(local_steps(loss, optimizer, private, by_row), (staleness(exponent),))


def fedasync(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    private: Callable[[Key], Tree] = no_private,
    by_row: bool = True,
    rate: float = 0.6,
    exponent: float = 0.5,
) -> Method:
    """Asynchronous mixing of whole models (Xie et al. 2019), for cohorts of one client (`cohort.buffered`, size 1).

    Args:
        by_row: true: a local step updates only the table rows in its batch. false: it updates all rows the client
            holds, so weight decay, momentum and proximal terms apply to each of them in every step (slower).
        rate: How far the server's model moves to a client's, above 0, up to 1.
        exponent: A model that is `age` rounds old has weight (1 + age)^-exponent. 0: age is ignored.
    """
    return Method(local_steps(loss, optimizer, private, by_row), (mixing(rate, exponent),))
