"""Works that steer local steps against client drift. On tables they act on the rows that a client holds: the dense
methods would also move rows of which the client knows nothing. By row what acts in every step acts in those that hold a
row, so much more strongly that it comes to the same (`repaid`)."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxfed.algorithms.local_training import loss_of_pair, no_private, output_facts
from jaxfed.core.client_work import Batches, ClientWork, Loss, local_sgd, pooled_loss
from jaxfed.core.tables import Table, map_tables, num_rows, take_rows, unwrap
from jaxfed.core.tree import scale_tree, subtract, zeros_like
from jaxfed.core.types import Broadcast, ClientOutput, Key, Mean, Summed, Tree


class ControlState(NamedTuple):
    """What a client keeps: the model's private part, and its control variate, like the shared part."""

    private: Tree
    variate: Tree
    held: Tree = ()  # float table: 1 for the rows that it has trained before; see `scaffold`


class Variates(NamedTuple):
    """What SCAFFOLD's server broadcasts beside the model, and what clients add to it."""

    mean: Tree  # c, like the shared part
    holders: Tree  # float table: how many clients ever trained a row; empty without tables


def private_part(memory: ControlState) -> Tree:
    """Of a client's memory, or of a store of them, what the model's score reads."""
    return memory.private


def scale_to_all_steps(tree: Tree, steps: Batches) -> Tree:
    """What acts in each of S steps on every row, for steps that see their own rows alone: times S / those that hold the
    row, so that over a round it adds up to as much."""
    times = jnp.zeros(num_rows(tree)).at[steps.rows].add(1.0 * steps.live[:, None], mode="drop")
    factor = steps.live.sum() / jnp.maximum(times, 1)
    return map_tables(lambda x: x * factor.reshape(factor.shape + (1,) * (x.ndim - 1)), lambda x: x, tree)


def steered_optimizer(optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`optimizer` of (shared, private) whose shared gradient is g + shift + pull (value - anchor); its state also sums
    the gradients g. shift, pull and anchor, trees like the shared part, come through `descend`."""

    def init(params):
        return zeros_like(params[0]), optimizer.init(params)

    def update(steps, state, params, shift, pull, anchor):
        moved = jax.tree.map(lambda g, s, p, x, a: g + s + p * (x - a), steps[0], shift, pull, params[0], anchor)
        steps_now, after = optimizer.update((moved, steps[1]), state[1], params)
        return steps_now, (jax.tree.map(jnp.add, state[0], steps[0]), after)

    return optax.GradientTransformationExtraArgs(init, update)


def steered_steps(loss, optimizer, both, steps, by_row, shift, strength=0.0) -> tuple[Tree, Tree, Mean]:
    """(parameters, the sum of the gradients, the losses met) of steps with a shift, and a pull of `strength` to where
    they began."""
    start = both[0]
    pull = jax.tree.map(lambda x: jnp.full_like(x, strength), start)
    shift, pull = scale_to_all_steps((shift, pull), steps) if by_row else (shift, pull)
    ends, state, seen = local_sgd(
        loss_of_pair(loss), steered_optimizer(optimizer), both, steps, by_row, shift=shift, pull=pull, anchor=start
    )
    return ends, state[0], seen


def scaffold_work(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    private: Callable[[Key], Tree] = no_private,
    *,
    population: int,
    by_row: bool = False,
) -> ClientWork:
    """SCAFFOLD (Karimireddy et al. 2020): a step follows g - c_i + c, both downloaded or kept from round to round.

    c_i becomes the mean of the gradients g over the client's local steps, which is the paper's option II for plain SGD,
    and needs no learning rate. c, which is sent with the model, is the mean of the c_i of all `population` clients,
    those included who never took part and have 0; of a row of a table, of all clients who ever trained it. So it
    follows the sum of the changes of those who reported.

    Args:
        population: Number of all clients.
        by_row: true: a local step updates only the table rows in its batch. false: it updates all rows the client
            holds, so weight decay, momentum and proximal terms apply to each of them in every step (slower).
    """

    def init(params, key):
        rows = num_rows(params)
        nobody = Table(jnp.zeros(rows)) if rows else ()
        return Broadcast(params, Variates(zeros_like(params), nobody)), ControlState(
            private(key), zeros_like(params), nobody
        )

    def run(shared, mine, steps, key):
        start, both = shared.params, (shared.params, mine.private)
        shift = subtract(shared.extra.mean, mine.variate)
        (end, own), slopes, seen = steered_steps(loss, optimizer, both, steps, by_row, shift)
        said = output_facts(loss, both, steps)
        now = scale_tree(1 / jnp.maximum(said["steps"], 1), slopes)
        held = jax.tree.map(jnp.ones_like, mine.held)
        change = Summed(Variates(subtract(now, mine.variate), subtract(held, mine.held)))
        memory = ControlState(own, now, held)
        return ClientOutput(
            Broadcast(subtract(start, end), change), memory, steps.examples, {"train/loss": seen}, **said
        )

    def moves(extra, change):
        holders = jax.tree.map(jnp.add, extra.holders, change.values.holders)

        def by_holders(c, x):
            before, after = (each.rows.reshape((-1,) + (1,) * (x.ndim - 1)) for each in (extra.holders, holders))
            return (before * c + x) / jnp.maximum(after, 1)

        mean = map_tables(by_holders, lambda c, x: c + x / population, extra.mean, change.values.mean)
        return Variates(mean, holders)

    def sends(shared):
        return Broadcast(shared.params, Summed(shared.extra))

    return ClientWork(init, run, moves, sends, private=private_part)


def feddyn_work(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    private: Callable[[Key], Tree] = no_private,
    strength: float = 0.1,
    by_row: bool = False,
) -> ClientWork:
    """FedDyn's clients (Acar et al. 2021): the loss has - <h_i, shared> + strength / 2 |shared - start|^2 beside it,
    and h_i becomes h_i - strength (end - start). The server's half is the link `feddyn`. By row a step pulls a row
    by rate x strength x S / (steps that hold it) of the way, which must stay below 2.

    Args:
        strength: alpha of the paper: how strongly a client is held to the model it was sent.
        by_row: true: a local step updates only the table rows in its batch. false: it updates all rows the client
            holds, so weight decay, momentum and proximal terms apply to each of them in every step (slower).
    """
    if strength < 0:
        raise ValueError(f"strength is {strength}: it must not be negative")

    def init(params, key):
        return Broadcast(params), ControlState(private(key), zeros_like(params))

    def run(shared, mine, steps, key):
        start, both = shared.params, (shared.params, mine.private)
        (end, own), _, seen = steered_steps(
            loss, optimizer, both, steps, by_row, scale_tree(-1, mine.variate), strength
        )
        now = jax.tree.map(lambda h, x, y: h - strength * (y - x), mine.variate, start, end)
        said = output_facts(loss, both, steps)
        return ClientOutput(
            Broadcast(subtract(start, end)), ControlState(own, now), steps.examples, {"train/loss": seen}, **said
        )

    return ClientWork(init, run, private=private_part)


class MimeBroadcast(NamedTuple):
    """What Mime's server broadcasts beside the model."""

    statistics: Tree  # of the optimiser, for the shared part
    gradient: Tree  # the mean gradient of the round before, at the model that was sent then
    known: Tree = ()  # float, one a row of a table and one for each other leaf: 0 while nobody has told its gradient


def mime_work(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    private: Callable[[Key], Tree] = no_private,
    correct: bool = True,
) -> ClientWork:
    """Mime, or MimeLite where not `correct` (Karimireddy et al. 2021): clients take steps of `optimizer` with the
    server's statistics held fixed; the server updates them by the mean gradient at the model it sent.

    Mime replaces a batch's gradient g(y) by g(y) - g(x) + c. Its c is the mean gradient of the same cohort, which costs
    one more exchange a round; here it is that of the round before, and what has none yet moves as in MimeLite. By row.

    Args:
        correct: Mime, which corrects each batch's gradient by the mean gradient. false: MimeLite.
    """

    def known(value, like):
        return map_tables(lambda x: jnp.full(len(x), value), lambda x: jnp.float32(value), like)

    def init(params, key):
        return Broadcast(
            params, MimeBroadcast(optimizer.init((params, ())), zeros_like(params), known(0.0, params))
        ), private(key)

    def run(shared, mine, steps, key):
        start, both = shared.params, (shared.params, mine)
        frozen, mean_gradient, told_of = shared.extra

        def update(grads, state, params, statistics, shift):
            both_ways = jax.tree.map(lambda g, c: g + c, grads[0], shift) if correct else grads[0]
            step, _ = optimizer.update((both_ways, ()), statistics, (params[0], ()))
            own, state = optimizer.update(((), grads[1]), state, ((), params[1]))
            return (step[0], own[1]), state

        pace = optax.GradientTransformationExtraArgs(lambda both: optimizer.init(((), both[1])), update)
        aim, batches = centred_loss(loss, both, steps, told_of) if correct else (loss_of_pair(loss), steps)
        (end, own), _, _ = local_sgd(
            aim, pace, both, batches, statistics=frozen, shift=scale_to_all_steps(mean_gradient, steps)
        )

        def at_start(x):
            seen = pooled_loss(loss_of_pair(loss), (x, mine), steps)
            return seen.value, seen

        slope, seen = jax.grad(at_start, has_aux=True)(start)
        sent = Broadcast(subtract(start, end), MimeBroadcast((), slope))
        return ClientOutput(sent, own, steps.examples, {"train/loss": seen}, **output_facts(loss, both, steps))

    def moves(extra, update):
        empty = zeros_like(update.gradient)
        _, statistics = optimizer.update((update.gradient, ()), extra.statistics, (empty, ()))
        return MimeBroadcast(statistics, update.gradient, known(1.0, update.gradient))

    def sends(shared):
        return Broadcast(shared.params, MimeBroadcast((), shared.params))

    return ClientWork(init, run, moves, sends)


def centred_loss(loss: Loss, both: Tree, steps: Batches, known: Tree) -> tuple[Callable, Batches]:
    """(the loss less known * <its gradient at the start, the shared part>, the batches with those gradients)."""

    def gradient(rows, batch):
        (start, mine), there = take_rows((both, known), rows)
        slope = jax.grad(lambda x: loss_of_pair(loss)(unwrap((x, mine)), batch).value)(start)
        return jax.tree.map(lambda x, k: x * k.reshape(k.shape + (1,) * (x.ndim - k.ndim)), slope, there)

    at_start = jax.vmap(gradient)(steps.rows, steps.batch)

    def corrected(both, batch):
        seen, slope = loss_of_pair(loss)(both, batch[0]), unwrap(batch[1])
        inner = sum(jnp.vdot(a, b) for a, b in zip(*map(jax.tree.leaves, (slope, both[0])), strict=True))
        return Mean(seen.total - seen.weight * inner, seen.weight)

    return corrected, steps._replace(batch=(steps.batch, at_start))
