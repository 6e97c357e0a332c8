"""Local training: steps on the loss of a client's own data, and what methods made of them share."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jaxfed.core.client_work import Batches, ClientWork, Loss, group_steps, local_sgd, pooled_loss
from jaxfed.core.method import AVERAGE, Method
from jaxfed.core.model import Model, with_frozen
from jaxfed.core.tree import subtract, zeros_like
from jaxfed.core.types import Broadcast, ClientOutput, Tree


def loss_of_pair(loss: Loss) -> Callable:
    """A loss of the pair (shared, private), which is what a client's optimiser sees."""
    return lambda both, batch, *frozen: loss(with_frozen(both[0], *frozen), both[1], batch)


def output_facts(loss: Loss, both: Tree, steps: Batches, accumulate: int = 1) -> dict[str, jax.Array]:
    """What a report says beside the update: the steps taken, and the loss of the model that was sent."""
    taken = group_steps(steps.live, accumulate).any(1).sum(dtype=jnp.float32)
    return {"steps": taken, "loss": pooled_loss(loss_of_pair(loss), both, steps).value}


def proximal_optimizer(
    optimizer: optax.GradientTransformation, strength: float
) -> optax.GradientTransformationExtraArgs:
    """`optimizer` of (shared, private) with strength / 2 |shared - anchor|^2 added to the loss; see `local_sgd`."""

    inner = optax.with_extra_args_support(optimizer)

    def update(steps, state, params, anchor, **more):
        pull = jax.tree.map(lambda g, x, a: g + strength * (x - a), steps[0], params[0], anchor)
        return inner.update((pull, steps[1]), state, params, **more)

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def optimize_part(optimizer: optax.GradientTransformation, part: int) -> optax.GradientTransformationExtraArgs:
    """`optimizer` of (shared, private) that moves the shared (0) or the private part (1), and leaves the other."""

    inner = optax.with_extra_args_support(optimizer)

    def update(steps, state, params, **more):
        moved, state = inner.update(steps, state, params, **more)
        return tuple(x if i == part else zeros_like(x) for i, x in enumerate(moved)), state

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def select_steps(steps: Batches, chosen: jax.Array) -> Batches:
    """The steps [S] that are chosen; the others move nothing."""
    return steps._replace(live=steps.live & chosen)


def local_steps(
    model: Model,
    client_optimizer: optax.GradientTransformation,
    by_row: bool = True,
    proximal: float = 0.0,
    accumulate: int = 1,
) -> ClientWork:
    """Mini-batch descent on (shared, private) together; sends start - end of the shared part (McMahan et al. 2017).

    `client_optimizer` sees the pair (shared, private) and starts anew each round. Raises ValueError where proximal is
    negative, or accumulate below 1.

    Args:
        by_row: true: a local step updates only the table rows in its batch. false: it updates all rows the client
            holds, so weight decay, momentum and proximal terms apply to each of them in every step (slower).
        proximal: mu of FedProx (Li et al. 2020): the loss has mu / 2 |shared - start|^2 beside it.
        accumulate: Number of batches in a row whose gradients make one step of the optimiser. It is the step of one
            batch with all their examples, in the memory of one of these batches.
    """
    if accumulate < 1:
        raise ValueError(f"accumulate is {accumulate}: it must be at least 1")
    if proximal < 0:
        raise ValueError(f"proximal is {proximal}: it must not be negative")

    def init(params, key):
        return Broadcast(params), model.private(key)

    def update(shared, private, steps, key):
        start, both = shared.params, (shared.params, private)
        held = {"anchor": start} if proximal else {}
        pace = proximal_optimizer(client_optimizer, proximal) if proximal else client_optimizer
        (end, private), _, seen = local_sgd(loss_of_pair(model.loss), pace, both, steps, by_row, accumulate, **held)
        return ClientOutput(
            Broadcast(subtract(start, end)),
            private,
            steps.examples,
            {"train/loss": seen},
            **output_facts(model.loss, both, steps, accumulate),
        )

    return ClientWork(init, update)


def train_locally(
    model: Model,
    client_optimizer: optax.GradientTransformation,
    server_optimizer: optax.GradientTransformation = AVERAGE,
    *,
    by_row: bool = True,
    proximal: float = 0.0,
    accumulate: int = 1,
) -> Method:
    """Local steps, whatever the channel makes of them: FedAvg with a mean, and the half of many other methods.

    Args:
        model: The model.
        client_optimizer: Optimiser of a client's steps. It sees the pair (shared, private) and starts anew each round.
        server_optimizer: Moves the model by what the channel made of all updates. Left out: optax.sgd(1.0).
        by_row: true: a local step updates only the table rows in its batch. false: it updates all rows the client
            holds, so weight decay, momentum and proximal terms apply to each of them in every step (slower).
        proximal: mu of FedProx (Li et al. 2020): the loss has mu / 2 |shared - start|^2 beside it.
        accumulate: Number of batches in a row whose gradients make one step of the optimiser. It is the step of one
            batch with all their examples, in the memory of one of these batches.

    Returns:
        The method, what clients and what the server compute.

    Raises:
        ValueError: `proximal` is negative, or `accumulate` below 1.

    Example:
        >>> import jaxfed as jf, optax
        >>> model = jf.models.mf(num_items=100, dim=8)
        >>> method = train_locally(model, optax.sgd(0.1))
    """
    work = local_steps(model, client_optimizer, by_row, proximal, accumulate)
    return Method(work, sends_difference=True, server=server_optimizer)
