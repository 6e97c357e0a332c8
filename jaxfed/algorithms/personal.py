"""Works of which each client keeps something of its own: a head, a copy of the model, or a mixture with it."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxfed.algorithms.local_training import local_steps, loss_of_pair, no_private, output_facts, proximal_optimizer
from jaxfed.core.client_work import Batches, ClientWork, Loss, local_sgd
from jaxfed.core.tables import Table, map_tables, num_rows
from jaxfed.core.tree import subtract, zeros_like
from jaxfed.core.types import Broadcast, ClientOutput, Key, Mean, Tree


def optimize_part(optimizer: optax.GradientTransformation, part: int) -> optax.GradientTransformation:
    """`optimizer` of (shared, private) that moves the shared (0) or the private part (1), and leaves the other."""

    def update(steps, state, params):
        moved, state = optimizer.update(steps, state, params)
        return tuple(x if i == part else zeros_like(x) for i, x in enumerate(moved)), state

    return optax.GradientTransformation(optimizer.init, update)


def select_steps(steps: Batches, chosen: jax.Array) -> Batches:
    """The steps [S] that are chosen; the others move nothing."""
    return steps._replace(live=steps.live & chosen)


def fedrecon_work(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    private: Callable[[Key], Tree] = no_private,
    by_row: bool = True,
    passes: int = 1,
) -> ClientWork:
    """FedRecon (Singhal et al. 2021): the private part is made anew from each round's support half, then the shared
    part descends the query half with it; nothing is kept, so that a client never seen before is as good as any.

    Every second step is of the query half; a client with one step has it in both.

    Args:
        by_row: true: a local step updates only the table rows in its batch. false: it updates all rows the client
            holds, so weight decay, momentum and proximal terms apply to each of them in every step (slower).
        passes: Times over the support half.
    """

    def run(shared, mine, steps, key):
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

    return ClientWork(lambda params, key: (Broadcast(params), ()), run, descends=True)


def fedrep_work(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    private: Callable[[Key], Tree] = no_private,
    by_row: bool = True,
    passes: int = 1,
) -> ClientWork:
    """FedRep (Collins et al. 2021): first the private part alone, then the shared part alone; a model whose head is
    private makes it that of the paper, and `local_steps` then is FedPer (Arivazhagan et al. 2019).

    Args:
        by_row: true: a local step updates only the table rows in its batch. false: it updates all rows the client
            holds, so weight decay, momentum and proximal terms apply to each of them in every step (slower).
        passes: Times that the private part goes over the client's steps.
    """

    def run(shared, mine, steps, key):
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

    return ClientWork(local_steps(loss, optimizer, private).init, run, descends=True)


class OwnModel(NamedTuple):
    """A client's memory with its own copy of the shared part. Rows that it does not have are the server's."""

    private: Tree  # beside the server's model
    copy: Tree  # like the shared part
    beside: Tree  # the private part of the copy
    written: Tree  # table of float [N]: the client's round in which it wrote a row of its copy; 0: never
    rounds: jax.Array  # float []: rounds it took part in


def new_own_model(params: Tree, private: Tree, beside: Tree) -> OwnModel:
    """The memory of a client that has no copy yet."""
    rows = num_rows(params)
    return OwnModel(private, zeros_like(params), beside, Table(jnp.zeros(rows)) if rows else (), jnp.float32(0))


def own_copy(own: OwnModel, params: Tree, latest: bool = False) -> Tree:
    """The copy, where the client has one; latest: of its last round alone."""

    def row(mine, server):
        rows = own.written.rows
        there = (rows == own.rounds) & (rows > 0) if latest else rows > 0
        return jnp.where(there.reshape(there.shape + (1,) * (mine.ndim - 1)), mine, server)

    return map_tables(row, lambda mine, server: jnp.where(own.rounds > 0, mine, server), own.copy, params)


def stamp_rows(own: OwnModel, **new: Tree) -> OwnModel:
    """The memory after a round in which the client wrote all the rows that it holds."""
    now = own.rounds + 1
    return own._replace(written=jax.tree.map(lambda x: jnp.full_like(x, now), own.written), rounds=now, **new)


def server_view(params: Tree, own: OwnModel) -> tuple[Tree, Tree]:
    """(shared, private) of the server's model at a client."""
    return params, own.private


def keep_own_copy(work: ClientWork) -> ClientWork:
    """The same work, whose clients keep what they have trained until their next round, to be evaluated as `personal`:
    rows of their last round are theirs, the others the server's. PFedRec (Zhang et al. 2023) is evaluated so. Raises
    ValueError for a work that does not descend alone.
    """
    if not work.descends:
        raise ValueError(
            "work.keep_copy: this work ends nowhere on the client, or keeps things of its own: set it to false, or "
            "take local_steps, alternate or reconstruct"
        )

    def init(params, key):
        shared, private = work.init(params, key)
        return shared, new_own_model(params, private, ())

    def run(shared, own, steps, key):
        report = work.run(shared, own.private, steps, key)
        end = subtract(shared.params, report.update.params)
        return report._replace(memory=stamp_rows(own, private=report.memory, copy=end))

    def personal(params, own):
        return own_copy(own, params, latest=True), own.private

    return work._replace(init=init, run=run, views={"": server_view, "personal": personal})


def own_view(params: Tree, own: OwnModel) -> tuple[Tree, Tree]:
    """(shared, private) of a client's own model."""
    return own_copy(own, params), own.beside


def ditto_work(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    private: Callable[[Key], Tree] = no_private,
    by_row: bool = True,
    strength: float = 0.1,
) -> ClientWork:
    """Ditto (Li et al. 2021): beside the local steps of FedAvg, each client trains a model of its own, pulled by
    strength / 2 |own - server's|^2; evaluated as `personal`. Stores one full item table per client
    (clients x items x dim numbers).

    Args:
        by_row: true: a local step updates only the table rows in its batch. false: it updates all rows the client
            holds, so weight decay, momentum and proximal terms apply to each of them in every step (slower).
        strength: lambda of the paper: how strongly a client's own model is pulled to the server's.
    """
    if strength < 0:
        raise ValueError(f"strength is {strength}: it must not be negative")
    shared_work = local_steps(loss, optimizer, private, by_row)

    def init(params, key):
        return Broadcast(params), new_own_model(params, private(key), private(key))

    def run(shared, own, steps, key):
        report, start = shared_work.run(shared, own.private, steps, key), shared.params
        both = own_copy(own, start), own.beside
        (copy, beside), _, _ = local_sgd(
            loss_of_pair(loss), proximal_optimizer(optimizer, strength), both, steps, by_row, anchor=start
        )
        return report._replace(memory=stamp_rows(own, private=report.memory, copy=copy, beside=beside))

    return ClientWork(init, run, views={"": server_view, "personal": own_view})


def apfl_work(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    private: Callable[[Key], Tree] = no_private,
    by_row: bool = True,
    mixture: float = 0.5,
) -> ClientWork:
    """APFL (Deng et al. 2020) with a fixed mixture: beside the local steps of FedAvg, each client trains a copy v for
    the loss of mixture v + (1 - mixture) w, w as it moves in the same steps; evaluated as `personal`, with the server's
    model as w. Stores one full item table per client (clients x items x dim numbers).

    Args:
        by_row: true: a local step updates only the table rows in its batch. false: it updates all rows the client
            holds, so weight decay, momentum and proximal terms apply to each of them in every step (slower).
        mixture: Weight of the client's copy in the mixture. 0: the server's model; 1: the copy.
    """
    if not 0 <= mixture <= 1:
        raise ValueError(f"mixture is {mixture}: it lies between 0 and 1")
    shared_work = local_steps(loss, optimizer, private, by_row)

    def mixed(copy, server):
        return jax.tree.map(lambda v, w: mixture * v + (1 - mixture) * w, copy, server)

    def init(params, key):
        return Broadcast(params), new_own_model(params, private(key), private(key))

    def run(shared, own, steps, key):
        report, start = shared_work.run(shared, own.private, steps, key), shared.params

        def aim(both, batch):
            (copy, theirs), (beside, mine) = both
            plain, blend = loss(theirs, mine, batch), mixed(copy, jax.lax.stop_gradient(theirs))
            return Mean(plain.total + loss(blend, beside, batch).total, plain.weight)

        def apart(both):
            (copy, theirs), (beside, mine) = both
            return (copy, beside), (theirs, mine)

        def update(grads, state, params):
            each = zip(apart(grads), state, apart(params), strict=True)
            ((copy, beside), first), ((theirs, mine), second) = (optimizer.update(*one) for one in each)
            return ((copy, theirs), (beside, mine)), (first, second)

        pace = optax.GradientTransformation(lambda both: tuple(map(optimizer.init, apart(both))), update)
        both = (own_copy(own, start), start), (own.beside, own.private)
        ((copy, _), (beside, _)), _, _ = local_sgd(aim, pace, both, steps, by_row)
        return report._replace(memory=stamp_rows(own, private=report.memory, copy=copy, beside=beside))

    def personal(params, own):
        return mixed(own_copy(own, params), params), own.beside

    return ClientWork(init, run, views={"": server_view, "personal": personal})
