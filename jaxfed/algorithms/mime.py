"""Mime and MimeLite: clients that mimic a centralised optimiser."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxfed.algorithms.local_training import loss_of_pair, output_facts
from jaxfed.algorithms.steering import scale_to_all_steps
from jaxfed.core.client_work import Batches, ClientWork, Loss, frozen_rows, local_sgd, pooled_loss
from jaxfed.core.method import AVERAGE, Method
from jaxfed.core.model import Model
from jaxfed.core.recipe import named
from jaxfed.core.tables import map_tables, take_rows, unwrap
from jaxfed.core.tree import subtract, zeros_like
from jaxfed.core.types import Broadcast, ClientOutput, Mean, Tree


class MimeBroadcast(NamedTuple):
    """What Mime's server broadcasts beside the model."""

    statistics: Tree  # of the optimiser, for the shared part
    gradient: Tree  # the mean gradient of the round before, at the model that was sent then
    known: Tree = ()  # float, one a row of a table and one for each other leaf: 0 while nobody has told its gradient


def make_mime_work(model: Model, client_optimizer: optax.GradientTransformation, correct: bool) -> ClientWork:
    """Local steps with the server's statistics, and the gradient at the model that was sent."""

    inner = optax.with_extra_args_support(client_optimizer)

    def init(params, key):
        return Broadcast(
            params, MimeBroadcast(client_optimizer.init((params, ())), zeros_like(params), mark_known(0.0, params))
        ), model.private(key)

    def update(shared, private, steps, key):
        start, both = shared.params, (shared.params, private)
        frozen, mean_gradient, told_of = shared.extra

        def step(grads, state, params, statistics, shift, **more):
            both_ways = jax.tree.map(lambda g, c: g + c, grads[0], shift) if correct else grads[0]
            moved, _ = inner.update((both_ways, ()), statistics, (params[0], ()), **more)
            own, state = inner.update(((), grads[1]), state, ((), params[1]), **more)
            return (moved[0], own[1]), state

        pace = optax.GradientTransformationExtraArgs(lambda both: client_optimizer.init(((), both[1])), step)
        aim, batches = centred_loss(model.loss, both, steps, told_of) if correct else (loss_of_pair(model.loss), steps)
        (end, own), _, _ = local_sgd(
            aim, pace, both, batches, statistics=frozen, shift=scale_to_all_steps(mean_gradient, steps)
        )

        def at_start(x):
            seen = pooled_loss(loss_of_pair(model.loss), (x, private), steps)
            return seen.value, seen

        slope, seen = jax.grad(at_start, has_aux=True)(start)
        sent = Broadcast(subtract(start, end), MimeBroadcast((), slope))
        return ClientOutput(sent, own, steps.examples, {"train/loss": seen}, **output_facts(model.loss, both, steps))

    def update_shapes(shared):
        return Broadcast(shared.params, MimeBroadcast((), shared.params))

    return ClientWork(init, update, update_shapes)


def mark_known(value: float, like: Tree) -> Tree:
    """A value for each row of the tables and for each other leaf."""
    return map_tables(lambda x: jnp.full(len(x), value), lambda x: jnp.float32(value), like)


@named("algorithm")
def mime(
    model: Model,
    client_optimizer: optax.GradientTransformation,
    server_optimizer: optax.GradientTransformation = AVERAGE,
    *,
    correct: bool = True,
) -> Method:
    """Mime or MimeLite (Karimireddy et al. 2021): clients mimic a central optimiser.

    They take steps of `client_optimizer` with the server's statistics (momentum, ...), which stay fixed in a round. The
    server updates these by the mean gradient at the model that it sent. Mime also replaces a batch's gradient g(y) by
    g(y) - g(x) + c. Its c is the mean gradient of the same cohort, which takes one more exchange in a round; here it is
    that of the round before, and what has none yet moves as in MimeLite. Local steps are by row.

    Args:
        model: The model.
        client_optimizer: Optimiser of a client's steps. It sees the pair (shared, private) and starts anew each round.
        server_optimizer: Moves the model by what the channel made of all updates. Left out: optax.sgd(1.0).
        correct: true: Mime, which corrects each batch's gradient by the mean gradient. false: MimeLite.

    Returns:
        The method, what clients and what the server compute.

    Example:
        >>> import jax, jaxfed as jf, optax
        >>> model = jf.models.mf(num_items=100, dim=8)
        >>> method = jf.algorithms.mime(model, optax.sgd(0.1))
        >>> key = jax.random.key(0)
        >>> method.work.init(model.init(key), key)[0].extra._fields  # what is broadcast beside the model
        ('statistics', 'gradient', 'known')
    """

    inner = optax.with_extra_args_support(client_optimizer)

    def move_extra(extra, update):
        empty = zeros_like(update.gradient)
        _, statistics = inner.update((update.gradient, ()), extra.statistics, (empty, ()), examples=1.0)
        return MimeBroadcast(statistics, update.gradient, mark_known(1.0, update.gradient))

    work = make_mime_work(model, client_optimizer, correct)
    return Method(work, move_extra=move_extra, server=server_optimizer)


def centred_loss(loss: Loss, both: Tree, steps: Batches, known: Tree) -> tuple[Callable, Batches]:
    """(the loss less known * <its gradient at the start, the shared part>, the batches with those gradients)."""

    def gradient(rows, batch):
        (start, private), there = take_rows((both, known), rows)
        slope = jax.grad(lambda x: loss_of_pair(loss)(unwrap((x, private)), batch, *frozen_rows(steps, rows)).value)(
            start
        )
        return jax.tree.map(lambda x, k: x * k.reshape(k.shape + (1,) * (x.ndim - k.ndim)), slope, there)

    at_start = jax.vmap(gradient)(steps.rows, steps.batch)

    def corrected(both, batch, *frozen):
        seen, slope = loss_of_pair(loss)(both, batch[0], *frozen), unwrap(batch[1])
        inner = sum(jnp.vdot(a, b) for a, b in zip(*map(jax.tree.leaves, (slope, both[0])), strict=True))
        return Mean(seen.total - seen.weight * inner, seen.weight)

    return corrected, steps._replace(batch=(steps.batch, at_start))
