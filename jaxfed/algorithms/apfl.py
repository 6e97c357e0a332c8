"""APFL: each client mixes a model of its own with the shared one."""

import jax
import optax

from jaxfed.algorithms.local_training import local_steps, loss_of_pair
from jaxfed.algorithms.own_model import new_own_model, own_copy, server_view, stamp_rows
from jaxfed.core.client_work import ClientWork, local_sgd
from jaxfed.core.method import AVERAGE, Method
from jaxfed.core.model import Model
from jaxfed.core.recipe import named
from jaxfed.core.types import Broadcast, Mean


def make_apfl_work(
    model: Model, client_optimizer: optax.GradientTransformation, by_row: bool, mixture: float
) -> ClientWork:
    """Local steps of the shared model, and of the client's own copy in the mixture."""
    loss = loss_of_pair(model.loss)
    shared_work = local_steps(model, client_optimizer, by_row)

    def mixed(copy, server):
        return jax.tree.map(lambda v, w: mixture * v + (1 - mixture) * w, copy, server)

    def init(params, key):
        return Broadcast(params), new_own_model(params, model.private(key), model.private(key))

    def update(shared, own, steps, key):
        report, start = shared_work.update(shared, own.private, steps, key), shared.params

        def aim(both, batch, *frozen):
            (copy, params_now), (beside, private) = both
            plain = loss((params_now, private), batch, *frozen)
            blend = mixed(copy, jax.lax.stop_gradient(params_now))
            return Mean(plain.total + loss((blend, beside), batch, *frozen).total, plain.weight)

        def apart(both):
            (copy, params_now), (beside, private) = both
            return (copy, beside), (params_now, private)

        inner = optax.with_extra_args_support(client_optimizer)

        def step(grads, state, params, **more):
            each = zip(apart(grads), state, apart(params), strict=True)
            ((copy, beside), first), ((params_now, private), second) = (inner.update(*one, **more) for one in each)
            return ((copy, params_now), (beside, private)), (first, second)

        pace = optax.GradientTransformationExtraArgs(lambda both: tuple(map(client_optimizer.init, apart(both))), step)
        both = (own_copy(own, start), start), (own.beside, own.private)
        ((copy, _), (beside, _)), _, _ = local_sgd(aim, pace, both, steps, by_row)
        return report._replace(client_state=stamp_rows(own, private=report.client_state, copy=copy, beside=beside))

    def personal(params, own):
        return mixed(own_copy(own, params), params), own.beside

    return ClientWork(init, update, views={"": server_view, "personal": personal})


@named("algorithm")
def apfl(
    model: Model,
    client_optimizer: optax.GradientTransformation,
    server_optimizer: optax.GradientTransformation = AVERAGE,
    *,
    by_row: bool = True,
    mixture: float = 0.5,
) -> Method:
    """APFL (Deng et al. 2020) with a fixed mixture: each client mixes a copy of its own with the shared model.

    Beside the local steps of FedAvg, a client trains a copy v for the loss of mixture v + (1 - mixture) w, where w is
    the shared model, which moves in the same steps. The mixture with the server's model is evaluated as `personal`.
    Stores one full item table per client (clients x items x dim numbers).

    Args:
        model: The model.
        client_optimizer: Optimiser of a client's steps. It sees the pair (shared, private) and starts anew each round.
        server_optimizer: Moves the model by what the channel made of all updates. Left out: optax.sgd(1.0).
        by_row: true: a local step updates only the table rows in its batch. false: it updates all rows the client
            holds, so weight decay, momentum and proximal terms apply to each of them in every step (slower).
        mixture: Weight of the client's copy in the mixture. 0: the server's model; 1: the copy.

    Returns:
        The method, what clients and what the server compute.

    Raises:
        ValueError: the mixture is not between 0 and 1.

    Example:
        >>> import jaxfed as jf, optax
        >>> model = jf.models.mf(num_items=100, dim=8)
        >>> method = jf.algorithms.apfl(model, optax.sgd(0.1))
        >>> sorted(method.work.views)  # the models that are evaluated; "" is the server's
        ['', 'personal']
    """
    if not 0 <= mixture <= 1:
        raise ValueError(f"mixture is {mixture}: it lies between 0 and 1")
    return Method(make_apfl_work(model, client_optimizer, by_row, mixture), server=server_optimizer)
