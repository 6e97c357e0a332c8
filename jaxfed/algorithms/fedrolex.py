"""FedRolex: each client trains units of every width of the model, other ones in each round."""

from functools import partial

import optax

from jaxfed.algorithms.submodels import draw_groups, make_submodel_method, make_submodel_work
from jaxfed.core.method import AVERAGE, Method
from jaxfed.core.model import Model
from jaxfed.core.recipe import named


@named("algorithm")
def fedrolex(
    model: Model,
    client_optimizer: optax.GradientTransformation,
    server_optimizer: optax.GradientTransformation = AVERAGE,
    *,
    num_clients: int,
    by_row: bool = True,
    rates: tuple[float, ...] = (1.0, 0.5),
    seed: int = 0,
) -> Method:
    """FedRolex (Alam et al. 2022): as `heterofl`, of units that roll: in round t unit (j + t) mod d in place of unit j.

    So every unit is trained even where no client can hold the whole model.

    Args:
        model: The model: mf, pfedrec, neumf or two_tower.
        client_optimizer: Optimiser of a client's steps. It sees the pair (shared, private) and starts anew each round.
        server_optimizer: Moves the model by what the channel made of all updates. Left out: optax.sgd(1.0).
        num_clients: Number of all clients.
        by_row: true: a local step updates only the table rows in its batch. false: it updates all rows the client
            holds, so weight decay, momentum and proximal terms apply to each of them in every step (slower).
        rates: Shares of every width that clients train. Each client has one of them, drawn at random.
        seed: Seed of which client has which rate.

    Returns:
        The method, what clients and what the server compute.

    Raises:
        ValueError: there are no such rates; or, when a run begins, the widths of the model are not known.

    Example:
        >>> import jaxfed as jf, optax
        >>> model = jf.models.mf(num_items=100, dim=8)
        >>> method = jf.algorithms.fedrolex(model, optax.sgd(0.1), num_clients=1000, rates=(0.5, 0.25))
        >>> [link.claims.name for link in method.links]
        ['coordinate_mean']
    """
    work = partial(make_submodel_work, model, client_optimizer, by_row)
    return make_submodel_method(work, rates, True, server_optimizer, draw_groups(rates, seed, num_clients))
