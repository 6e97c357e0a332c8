"""Works that steer local steps against client drift. On tables they act on the rows that a client holds: the dense
methods would also move rows of which the client knows nothing. By row what acts in every step acts in those that hold a
row, so much more strongly that it comes to the same (`repaid`)."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxfed.rows import Table, catalogue, lift, plain, take
from jaxfed.tree import scale, sub, zeros
from jaxfed.types import Key, Mean, Report, Shared, Summed, Tree
from jaxfed.work import Loss, Steps, Work, descend, pooled
from jaxfed.works.local import nothing, on_both, told


class Control(NamedTuple):
    """What a client keeps: the model's private part, and its control variate, like the shared part."""

    private: Tree
    variate: Tree
    held: Tree = ()  # float table: 1 for the rows that it has trained before; see `scaffold`


class Variates(NamedTuple):
    """What SCAFFOLD's server broadcasts beside the model, and what clients add to it."""

    mean: Tree  # c, like the shared part
    holders: Tree  # float table: how many clients ever trained a row; empty without tables


def private_of(memory: Control) -> Tree:
    """Of a client's memory, or of a store of them, what the model's score reads."""
    return memory.private


def repaid(tree: Tree, steps: Steps) -> Tree:
    """What acts in each of S steps on every row, for steps that see their own rows alone: times S / those that hold the
    row, so that over a round it adds up to as much."""
    times = jnp.zeros(catalogue(tree)).at[steps.rows].add(1.0 * steps.live[:, None], mode="drop")
    factor = steps.live.sum() / jnp.maximum(times, 1)
    return lift(lambda x: x * factor.reshape(factor.shape + (1,) * (x.ndim - 1)), lambda x: x, tree)


def steered(optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`optimizer` of (shared, private) whose shared gradient is g + shift + pull (value - anchor); its state also sums
    the gradients g. shift, pull and anchor, trees like the shared part, come through `descend`."""

    def init(params):
        return zeros(params[0]), optimizer.init(params)

    def update(steps, state, params, shift, pull, anchor):
        moved = jax.tree.map(lambda g, s, p, x, a: g + s + p * (x - a), steps[0], shift, pull, params[0], anchor)
        steps_now, after = optimizer.update((moved, steps[1]), state[1], params)
        return steps_now, (jax.tree.map(jnp.add, state[0], steps[0]), after)

    return optax.GradientTransformationExtraArgs(init, update)


def steer(loss, optimizer, both, steps, by_row, shift, strength=0.0) -> tuple[Tree, Tree, Mean]:
    """(parameters, the sum of the gradients, the losses met) of steps with a shift, and a pull of `strength` to where
    they began."""
    start = both[0]
    pull = jax.tree.map(lambda x: jnp.full_like(x, strength), start)
    shift, pull = repaid((shift, pull), steps) if by_row else (shift, pull)
    ends, state, seen = descend(
        on_both(loss), steered(optimizer), both, steps, by_row, shift=shift, pull=pull, anchor=start
    )
    return ends, state[0], seen


def scaffold(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    private: Callable[[Key], Tree] = nothing,
    *,
    population: int,
    by_row: bool = False,
) -> Work:
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
        rows = catalogue(params)
        nobody = Table(jnp.zeros(rows)) if rows else ()
        return Shared(params, Variates(zeros(params), nobody)), Control(private(key), zeros(params), nobody)

    def run(shared, mine, steps, key):
        start, both = shared.params, (shared.params, mine.private)
        shift = sub(shared.extra.mean, mine.variate)
        (end, own), slopes, seen = steer(loss, optimizer, both, steps, by_row, shift)
        said = told(loss, both, steps)
        now = scale(1 / jnp.maximum(said["steps"], 1), slopes)
        held = jax.tree.map(jnp.ones_like, mine.held)
        change = Summed(Variates(sub(now, mine.variate), sub(held, mine.held)))
        memory = Control(own, now, held)
        return Report(Shared(sub(start, end), change), memory, steps.examples, {"train/loss": seen}, **said)

    def moves(extra, change):
        holders = jax.tree.map(jnp.add, extra.holders, change.values.holders)

        def by_holders(c, x):
            before, after = (each.rows.reshape((-1,) + (1,) * (x.ndim - 1)) for each in (extra.holders, holders))
            return (before * c + x) / jnp.maximum(after, 1)

        mean = lift(by_holders, lambda c, x: c + x / population, extra.mean, change.values.mean)
        return Variates(mean, holders)

    def sends(shared):
        return Shared(shared.params, Summed(shared.extra))

    return Work(init, run, moves, sends, private=private_of)


def dynamic(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    private: Callable[[Key], Tree] = nothing,
    strength: float = 0.1,
    by_row: bool = False,
) -> Work:
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
        return Shared(params), Control(private(key), zeros(params))

    def run(shared, mine, steps, key):
        start, both = shared.params, (shared.params, mine.private)
        (end, own), _, seen = steer(loss, optimizer, both, steps, by_row, scale(-1, mine.variate), strength)
        now = jax.tree.map(lambda h, x, y: h - strength * (y - x), mine.variate, start, end)
        said = told(loss, both, steps)
        return Report(Shared(sub(start, end)), Control(own, now), steps.examples, {"train/loss": seen}, **said)

    return Work(init, run, private=private_of)


class Frozen(NamedTuple):
    """What Mime's server broadcasts beside the model."""

    statistics: Tree  # of the optimiser, for the shared part
    gradient: Tree  # the mean gradient of the round before, at the model that was sent then
    known: Tree = ()  # float, one a row of a table and one for each other leaf: 0 while nobody has told its gradient


def mime(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    private: Callable[[Key], Tree] = nothing,
    correct: bool = True,
) -> Work:
    """Mime, or MimeLite where not `correct` (Karimireddy et al. 2021): clients take steps of `optimizer` with the
    server's statistics held fixed; the server updates them by the mean gradient at the model it sent.

    Mime replaces a batch's gradient g(y) by g(y) - g(x) + c. Its c is the mean gradient of the same cohort, which costs
    one more exchange a round; here it is that of the round before, and what has none yet moves as in MimeLite. By row.

    Args:
        correct: Mime, which corrects each batch's gradient by the mean gradient. false: MimeLite.
    """

    def known(value, like):
        return lift(lambda x: jnp.full(len(x), value), lambda x: jnp.float32(value), like)

    def init(params, key):
        return Shared(params, Frozen(optimizer.init((params, ())), zeros(params), known(0.0, params))), private(key)

    def run(shared, mine, steps, key):
        start, both = shared.params, (shared.params, mine)
        frozen, mean_gradient, told_of = shared.extra

        def update(grads, state, params, statistics, shift):
            both_ways = jax.tree.map(lambda g, c: g + c, grads[0], shift) if correct else grads[0]
            step, _ = optimizer.update((both_ways, ()), statistics, (params[0], ()))
            own, state = optimizer.update(((), grads[1]), state, ((), params[1]))
            return (step[0], own[1]), state

        pace = optax.GradientTransformationExtraArgs(lambda both: optimizer.init(((), both[1])), update)
        aim, batches = centred(loss, both, steps, told_of) if correct else (on_both(loss), steps)
        (end, own), _, _ = descend(aim, pace, both, batches, statistics=frozen, shift=repaid(mean_gradient, steps))

        def at_start(x):
            seen = pooled(on_both(loss), (x, mine), steps)
            return seen.value, seen

        slope, seen = jax.grad(at_start, has_aux=True)(start)
        sent = Shared(sub(start, end), Frozen((), slope))
        return Report(sent, own, steps.examples, {"train/loss": seen}, **told(loss, both, steps))

    def moves(extra, update):
        empty = zeros(update.gradient)
        _, statistics = optimizer.update((update.gradient, ()), extra.statistics, (empty, ()))
        return Frozen(statistics, update.gradient, known(1.0, update.gradient))

    def sends(shared):
        return Shared(shared.params, Frozen((), shared.params))

    return Work(init, run, moves, sends)


def centred(loss: Loss, both: Tree, steps: Steps, known: Tree) -> tuple[Callable, Steps]:
    """(the loss less known * <its gradient at the start, the shared part>, the batches with those gradients)."""

    def gradient(rows, batch):
        (start, mine), there = take((both, known), rows)
        slope = jax.grad(lambda x: on_both(loss)(plain((x, mine)), batch).value)(start)
        return jax.tree.map(lambda x, k: x * k.reshape(k.shape + (1,) * (x.ndim - k.ndim)), slope, there)

    at_start = jax.vmap(gradient)(steps.rows, steps.batch)

    def corrected(both, batch):
        seen, slope = on_both(loss)(both, batch[0]), plain(batch[1])
        inner = sum(jnp.vdot(a, b) for a, b in zip(*map(jax.tree.leaves, (slope, both[0])), strict=True))
        return Mean(seen.total - seen.weight * inner, seen.weight)

    return corrected, steps._replace(batch=(steps.batch, at_start))
