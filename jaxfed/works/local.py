"""Works that descend the loss of a client's own data."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jaxfed.rows import plain, take
from jaxfed.tree import sub
from jaxfed.types import Key, Mean, Report, Shared, Tree
from jaxfed.work import Loss, Work, descend


def nothing(key: Key) -> Tree:
    """The private part of a model that has none."""
    return ()


def local_steps(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    private: Callable[[Key], Tree] = nothing,
    by_row: bool = True,
) -> Work:
    """Mini-batch descent on (shared, private) together; sends start - end of the shared part (McMahan et al. 2017).

    `optimizer` sees the pair (shared, private) and starts afresh each round.
    """

    def init(params, key):
        return Shared(params), private(key)

    def run(shared, mine, steps, key):
        start = shared.params
        (end, mine), seen = descend(
            lambda both, batch: loss(both[0], both[1], batch), optimizer, (start, mine), steps, by_row
        )
        return Report(Shared(sub(start, end)), mine, steps.examples, {"train/loss": seen})

    return Work(init, run)


def gradient(loss: Loss, optimizer: optax.GradientTransformation, private: Callable[[Key], Tree] = nothing) -> Work:
    """One gradient of the mean loss over all local examples (FedSGD); the private part takes one step of `optimizer`.

    `optimizer` sees the pair (shared, private) as in `local_steps`; what it says of the shared part is not used.
    """

    def run(shared, mine, steps, key):
        both = shared.params, mine

        def objective(both):
            def one(rows, live, batch):
                params, mine = plain(take(both, rows))
                seen = loss(params, mine, batch)
                return jax.tree.map(lambda x: jnp.where(live, x, 0), seen)

            seen = jax.tree.map(jnp.sum, jax.vmap(one)(steps.rows, steps.live, steps.batch))
            return seen.value, seen

        slope, seen = jax.grad(objective, has_aux=True)(both)
        step, _ = optimizer.update(slope, optimizer.init(both), both)
        return Report(Shared(slope[0]), optax.apply_updates(mine, step[1]), steps.examples, {"train/loss": Mean(*seen)})

    return Work(local_steps(loss, optimizer, private).init, run)
