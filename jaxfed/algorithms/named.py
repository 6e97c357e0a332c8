"""Algorithms by their names: each is `federate` with its places filled.

The textbook example: theta_0 = [1, 2, 3], two clients with gradients [-3, -2, -1] and [-2, -1, 0], step size 0.1.
FedAvg with one step each and gradient aggregation both give [1.25, 2.15, 3.05]. A well-known article prints
[1.3, 2.2, 3.1] and [1.15, 1.9, 2.55] for it, and a minus sign before the mean difference in the reference form; those
are slips of arithmetic. `tests/algorithms/test_named.py` works it out.
"""

from collections.abc import Callable, Sequence

import jax
import optax

from jaxfed.algorithms import control, drift
from jaxfed.algorithms.fair import agnostic_mean, fair_mean
from jaxfed.algorithms.gpfedrec import graph_guided_work
from jaxfed.algorithms.local_training import gradient_work, local_steps, no_private
from jaxfed.channels.average import mean, weighted_mean
from jaxfed.channels.difference import difference
from jaxfed.channels.staleness import mixing, staleness
from jaxfed.core.channel import Channel, chain, links_of
from jaxfed.core.client_work import ClientWork, Loss, identity
from jaxfed.core.federate import Algorithm, federate
from jaxfed.core.types import Tree


def with_server_comparison(
    algorithm: Algorithm, work: ClientWork, channel: Channel, place: Callable[[Tree], Tree] = identity
) -> Algorithm:
    """The same algorithm, after each of whose rounds the server compares what clients sent; see `Work.compares`. place:
    lays the clients' memory where it was. As it is for other works.

    Raises ValueError for a channel on which the server does not see each update as it was.
    """
    if not (compares := work.compares):
        return algorithm
    if others := [each.claims.name for each in links_of(channel) if not each.claims.is_average and each.encode]:
        raise ValueError(f"the server compares what each client sends, and {others[0]} changes it: keep to a mean")
    look = jax.jit(compares, donate_argnums=1)

    def step(state, cohort, key):
        state, info = algorithm.step(state, cohort, key)
        mine, seen = look(state.shared.params, state.memory[0])
        return state._replace(memory=(place(mine), *state.memory[1:])), info | seen

    return algorithm._replace(step=step)


def fedavg(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    num_clients: int,
    channel: Channel | None = None,
    private=no_private,
) -> Algorithm:
    """Federated averaging (McMahan et al. 2017); the plain mean, or pass `weighted_mean()`."""
    return federate(local_steps(loss, optimizer, private), channel or mean(), optax.sgd(1.0), num_clients)


def fedopt(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    server: optax.GradientTransformation,
    num_clients: int,
    channel: Channel | None = None,
    private=no_private,
) -> Algorithm:
    """FedAvg whose mean update goes through a server optimiser (Reddi et al. 2021): optax.sgd with momentum is FedAvgM;
    FedAdam, FedYogi and FedAdagrad are in `server_optimizers`. Optax's adam, yogi and adagrad correct their bias or add
    epsilon elsewhere, and are other algorithms."""
    return federate(local_steps(loss, optimizer, private), channel or mean(), server, num_clients)


def fedsgd(
    loss: Loss,
    server: optax.GradientTransformation,
    num_clients: int,
    channel: Channel | None = None,
    private=no_private,
    optimizer: optax.GradientTransformation | None = None,
) -> Algorithm:
    """Federated gradient aggregation: a mean gradient a client, a server step; `optimizer` moves the private part."""
    work = gradient_work(loss, optimizer or optax.sgd(0.1), private)
    return federate(work, channel or mean(), server, num_clients)


def fedsgd_difference(
    loss: Loss,
    server: optax.GradientTransformation,
    num_clients: int,
    channel: Channel | None = None,
    private=no_private,
) -> Algorithm:
    """The reference form of gradient aggregation: clients send what changed since the last global gradient."""
    return fedsgd(loss, server, num_clients, chain(difference(), channel or mean()), private)


def fedprox(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    num_clients: int,
    proximal: float = 0.01,
    channel: Channel | None = None,
    private=no_private,
) -> Algorithm:
    """FedAvg whose clients are pulled back to where they started (Li et al. 2020)."""
    work = local_steps(loss, optimizer, private, proximal=proximal)
    return federate(work, channel or mean(), optax.sgd(1.0), num_clients)


def scaffold(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    num_clients: int,
    channel: Channel | None = None,
    private=no_private,
) -> Algorithm:
    """Control variates against drift (Karimireddy et al. 2020)."""
    work = control.scaffold_work(loss, optimizer, private, population=num_clients)
    return federate(work, channel or mean(), optax.sgd(1.0), num_clients)


def feddyn(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    num_clients: int,
    strength: float = 0.1,
    channel: Channel | None = None,
    private=no_private,
) -> Algorithm:
    """Dynamic regularisation (Acar et al. 2021).

    Args:
        loss: the loss of the model, see `Model.loss`.
        optimizer: the clients' optimiser.
        num_clients: the number of all clients, by which the server divides what it gathers.
        strength: alpha of the paper: how strongly a client is held to the model it was sent.
        channel: links between clients and server; None: the plain mean.
        private: the private part of the model, from a key.
    """
    work = control.feddyn_work(loss, optimizer, private, strength)
    return federate(work, chain(drift.add_server_memory(num_clients), channel or mean()), optax.sgd(1.0), num_clients)


def fednova(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    num_clients: int,
    channel: Channel | None = None,
    private=no_private,
) -> Algorithm:
    """Updates per step, so that who takes more steps does not pull more (Wang et al. 2020)."""
    links = chain(drift.normalize_steps(), channel or weighted_mean())
    return federate(local_steps(loss, optimizer, private), links, optax.sgd(1.0), num_clients)


def mime(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    num_clients: int,
    correct: bool = True,
    channel: Channel | None = None,
    private=no_private,
) -> Algorithm:
    """Clients that mimic a centralised optimiser (Karimireddy et al. 2021); not `correct`: MimeLite."""
    return federate(
        control.mime_work(loss, optimizer, private, correct), channel or mean(), optax.sgd(1.0), num_clients
    )


def qfedavg(
    loss: Loss, optimizer: optax.GradientTransformation, num_clients: int, q: float, rate: float, private=no_private
) -> Algorithm:
    """Clients with a higher loss count for more (Li et al. 2020); rate: that of the clients' SGD."""
    return federate(local_steps(loss, optimizer, private), fair_mean(q, rate), optax.sgd(1.0), num_clients)


def agnostic_fedavg(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    num_clients: int,
    activity: Sequence[float],
    groups: int = 10,
    rate: float = 0.1,
    private=no_private,
) -> Algorithm:
    """As good as possible for the group served worst (Mohri et al. 2019; Ro et al. 2021)."""
    return federate(
        local_steps(loss, optimizer, private), agnostic_mean(activity, groups, rate), optax.sgd(1.0), num_clients
    )


def fedbuff(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    num_clients: int,
    versions: int,
    exponent: float = 0.5,
    rate: float = 1.0,
    channel: Channel | None = None,
    private=no_private,
) -> Algorithm:
    """Buffered asynchronous aggregation (Nguyen et al. 2022), a cohort being what the buffer holds; versions: one more
    than the largest of `Cohort.ages`."""
    links = chain(staleness(exponent), channel or mean())
    return federate(local_steps(loss, optimizer, private), links, optax.sgd(rate), num_clients, versions=versions)


def fedasync(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    num_clients: int,
    versions: int,
    rate: float = 0.6,
    exponent: float = 0.5,
    private=no_private,
) -> Algorithm:
    """Asynchronous mixing of whole models (Xie et al. 2019), for cohorts of one client."""
    links = chain(mixing(rate, exponent), mean())
    return federate(local_steps(loss, optimizer, private), links, optax.sgd(1.0), num_clients, versions=versions)


def gpfedrec(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    num_clients: int,
    strength: float = 0.1,
    threshold: float = 1.0,
    channel: Channel | None = None,
    private=no_private,
) -> Algorithm:
    """Clients pulled to the mean of those like them (Zhang et al. 2024)."""
    work, channel = (
        graph_guided_work(loss, optimizer, private, True, strength, 0, threshold),
        channel or mean(),
    )
    return with_server_comparison(federate(work, channel, optax.sgd(1.0), num_clients), work, channel)
