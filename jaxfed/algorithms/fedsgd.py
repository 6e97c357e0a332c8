"""FedSGD: clients send the gradient of all their data."""

import jax
import optax

from jaxfed.algorithms.local_training import loss_of_pair
from jaxfed.core.client_work import ClientWork, pooled_loss
from jaxfed.core.method import AVERAGE, Method
from jaxfed.core.model import Model
from jaxfed.core.recipe import named
from jaxfed.core.types import Broadcast, ClientOutput


def make_gradient_work(model: Model, client_optimizer: optax.GradientTransformation) -> ClientWork:
    """The gradient of the shared part, and one step of the private part."""

    inner = optax.with_extra_args_support(client_optimizer)

    def init(params, key):
        return Broadcast(params), model.private(key)

    def update(shared, private, steps, key):
        both = shared.params, private

        def objective(both):
            seen = pooled_loss(loss_of_pair(model.loss), both, steps)
            return seen.value, seen

        slope, seen = jax.grad(objective, has_aux=True)(both)
        step, _ = inner.update(slope, inner.init(both), both, examples=seen.weight)
        private = optax.apply_updates(private, step[1])
        return ClientOutput(Broadcast(slope[0]), private, steps.examples, {"train/loss": seen}, loss=seen.value)

    return ClientWork(init, update)


@named("algorithm")
def fedsgd(
    model: Model,
    client_optimizer: optax.GradientTransformation,
    server_optimizer: optax.GradientTransformation = AVERAGE,
) -> Method:
    """FedSGD (McMahan et al. 2017): clients send one gradient of the mean loss over all their examples.

    The private part takes one step of `client_optimizer`; what that makes of the shared part is not used.

    Args:
        model: The model.
        client_optimizer: Optimiser of a client's steps. It sees the pair (shared, private) and starts anew each round.
        server_optimizer: Moves the model by what the channel made of all updates. Left out: optax.sgd(1.0).

    Returns:
        The method, what clients and what the server compute.

    Example:
        >>> import jaxfed as jf, optax
        >>> model = jf.models.mf(num_items=100, dim=8)
        >>> method = jf.algorithms.fedsgd(model, optax.sgd(0.1), optax.adam(0.05))
        >>> method.sends_difference  # an update is a gradient
        False
    """
    return Method(make_gradient_work(model, client_optimizer), server=server_optimizer)
