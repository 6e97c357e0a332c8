"""FedSGD: clients send the gradient of all their data."""

from collections.abc import Callable

import jax
import optax

from jaxfed.algorithms.local_training import loss_of_pair, no_private
from jaxfed.core.client_work import ClientWork, Loss, pooled_loss
from jaxfed.core.method import Method
from jaxfed.core.types import Broadcast, ClientOutput, Key, Tree


def fedsgd(loss: Loss, optimizer: optax.GradientTransformation, private: Callable[[Key], Tree] = no_private) -> Method:
    """One gradient of the mean loss over all local examples (FedSGD); the private part takes one step of `optimizer`.

    `optimizer` sees the pair (shared, private) as in `local_steps`; what it says of the shared part is not used.
    """

    def init(params, key):
        return Broadcast(params), private(key)

    def update(shared, mine, steps, key):
        both = shared.params, mine

        def objective(both):
            seen = pooled_loss(loss_of_pair(loss), both, steps)
            return seen.value, seen

        slope, seen = jax.grad(objective, has_aux=True)(both)
        step, _ = optimizer.update(slope, optimizer.init(both), both)
        mine = optax.apply_updates(mine, step[1])
        return ClientOutput(Broadcast(slope[0]), mine, steps.examples, {"train/loss": seen}, loss=seen.value)

    return Method(ClientWork(init, update))
