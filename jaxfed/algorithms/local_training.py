"""Works that descend the loss of a client's own data."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jaxfed.core.client_work import Batches, ClientWork, Loss, local_sgd, pooled_loss
from jaxfed.core.tree import subtract
from jaxfed.core.types import Broadcast, ClientOutput, Key, Tree


def no_private(key: Key) -> Tree:
    """The private part of a model that has none."""
    return ()


def loss_of_pair(loss: Loss) -> Callable:
    """A loss of the pair (shared, private), which is what a client's optimiser sees."""
    return lambda both, batch: loss(both[0], both[1], batch)


def output_facts(loss: Loss, both: Tree, steps: Batches) -> dict[str, jax.Array]:
    """What a report says beside the update: the steps taken, and the loss of the model that was sent."""
    return {"steps": steps.live.sum(dtype=jnp.float32), "loss": pooled_loss(loss_of_pair(loss), both, steps).value}


def proximal_optimizer(
    optimizer: optax.GradientTransformation, strength: float
) -> optax.GradientTransformationExtraArgs:
    """`optimizer` of (shared, private) with strength / 2 |shared - anchor|^2 added to the loss; see `descend`."""

    def update(steps, state, params, anchor):
        pull = jax.tree.map(lambda g, x, a: g + strength * (x - a), steps[0], params[0], anchor)
        return optimizer.update((pull, steps[1]), state, params)

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def local_steps(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    private: Callable[[Key], Tree] = no_private,
    by_row: bool = True,
    proximal: float = 0.0,
) -> ClientWork:
    """Mini-batch descent on (shared, private) together; sends start - end of the shared part (McMahan et al. 2017).

    `optimizer` sees the pair (shared, private) and starts afresh each round. Raises ValueError where proximal is
    negative.

    Args:
        by_row: true: a local step updates only the table rows in its batch. false: it updates all rows the client
            holds, so weight decay, momentum and proximal terms apply to each of them in every step (slower).
        proximal: mu of FedProx (Li et al. 2020): the loss has mu / 2 |shared - start|^2 beside it.
    """
    if proximal < 0:
        raise ValueError(f"proximal is {proximal}: it must not be negative")

    def init(params, key):
        return Broadcast(params), private(key)

    def run(shared, mine, steps, key):
        start, both = shared.params, (shared.params, mine)
        held = {"anchor": start} if proximal else {}
        pace = proximal_optimizer(optimizer, proximal) if proximal else optimizer
        (end, mine), _, seen = local_sgd(loss_of_pair(loss), pace, both, steps, by_row, **held)
        return ClientOutput(
            Broadcast(subtract(start, end)),
            mine,
            steps.examples,
            {"train/loss": seen},
            **output_facts(loss, both, steps),
        )

    return ClientWork(init, run, descends=True)


def gradient_work(
    loss: Loss, optimizer: optax.GradientTransformation, private: Callable[[Key], Tree] = no_private
) -> ClientWork:
    """One gradient of the mean loss over all local examples (FedSGD); the private part takes one step of `optimizer`.

    `optimizer` sees the pair (shared, private) as in `local_steps`; what it says of the shared part is not used.
    """

    def run(shared, mine, steps, key):
        both = shared.params, mine

        def objective(both):
            seen = pooled_loss(loss_of_pair(loss), both, steps)
            return seen.value, seen

        slope, seen = jax.grad(objective, has_aux=True)(both)
        step, _ = optimizer.update(slope, optimizer.init(both), both)
        mine = optax.apply_updates(mine, step[1])
        return ClientOutput(Broadcast(slope[0]), mine, steps.examples, {"train/loss": seen}, loss=seen.value)

    return ClientWork(local_steps(loss, optimizer, private).init, run)
