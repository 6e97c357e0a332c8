"""Algorithms by their names: each is `federate` with its places filled.

The textbook example: theta_0 = [1, 2, 3], two clients with gradients [-3, -2, -1] and [-2, -1, 0], step size 0.1.
FedAvg with one step each and gradient aggregation both give [1.25, 2.15, 3.05]. A well-known article prints
[1.3, 2.2, 3.1] and [1.15, 1.9, 2.55] for it, and a minus sign before the mean difference in the reference form; those
are slips of arithmetic. `tests/test_algorithms.py` works it out.
"""

import optax

from jaxfed.channel import Channel, chain
from jaxfed.channels.difference import difference
from jaxfed.channels.weigh import mean
from jaxfed.federate import Algorithm, federate
from jaxfed.work import Loss
from jaxfed.works.local import gradient, local_steps, nothing


def fedavg(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    num_clients: int,
    channel: Channel | None = None,
    private=nothing,
) -> Algorithm:
    """Federated averaging (McMahan et al. 2017); the plain mean, or pass `weighted_mean()`."""
    return federate(local_steps(loss, optimizer, private), channel or mean(), optax.sgd(1.0), num_clients)


def fedopt(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    server: optax.GradientTransformation,
    num_clients: int,
    channel: Channel | None = None,
    private=nothing,
) -> Algorithm:
    """FedAvg whose mean update goes through a server optimiser (Reddi et al. 2021): optax.sgd with momentum is FedAvgM,
    optax.adam, optax.yogi and optax.adagrad are FedAdam, FedYogi and FedAdagrad."""
    return federate(local_steps(loss, optimizer, private), channel or mean(), server, num_clients)


def fedsgd(
    loss: Loss,
    server: optax.GradientTransformation,
    num_clients: int,
    channel: Channel | None = None,
    private=nothing,
    optimizer: optax.GradientTransformation | None = None,
) -> Algorithm:
    """Federated gradient aggregation: a mean gradient a client, a server step; `optimizer` moves the private part."""
    work = gradient(loss, optimizer or optax.sgd(0.1), private)
    return federate(work, channel or mean(), server, num_clients)


def fedsgd_difference(
    loss: Loss, server: optax.GradientTransformation, num_clients: int, channel: Channel | None = None, private=nothing
) -> Algorithm:
    """The reference form of gradient aggregation: clients send what changed since the last global gradient."""
    return fedsgd(loss, server, num_clients, chain(difference(), channel or mean()), private)
