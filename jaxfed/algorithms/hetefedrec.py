"""HeteFedRec: clients with few interactions train only the first columns of the model's vectors."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import optax

from jaxfed.algorithms.submodels import check_rates, make_submodel_method, make_submodel_work
from jaxfed.core.method import AVERAGE, Method
from jaxfed.core.model import Model
from jaxfed.core.recipe import named


def assign_activity_groups(num_train: Sequence[int], shares: Sequence[float]) -> np.ndarray:
    """int [clients]: 0 for the share of the clients with the fewest interactions, 1 for the next share, and so on. Of
    clients with equally many, the earlier comes first."""
    order = np.argsort(np.asarray(num_train), kind="stable")
    ends = np.round(np.cumsum(shares)[:-1] * len(order)).astype(int)
    groups = np.empty(len(order), np.int64)
    groups[order] = np.searchsorted(ends, np.arange(len(order)), side="right")
    return groups


def check_shares(rates: Sequence[float], shares: Sequence[float]) -> None:
    """Raises ValueError where there is not one positive share for each rate, or their sum is not 1."""
    if len(rates) != len(shares) or not all(share > 0 for share in shares) or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(
            f"algorithm.shares are {', '.join(map(str, shares))}: give one above 0 for each of the {len(rates)} rates, "
            "whose sum is 1"
        )


@named("algorithm")
def hetefedrec(
    model: Model,
    client_optimizer: optax.GradientTransformation,
    server_optimizer: optax.GradientTransformation = AVERAGE,
    *,
    num_train: Sequence[int],
    rates: tuple[float, ...] = (0.25, 0.5, 1.0),
    shares: tuple[float, ...] = (0.5, 0.3, 0.2),
) -> Method:
    """HeteFedRec (Yuan et al. 2024): the more interactions a client has, the longer the vectors that it trains.

    A client of rate p trains the first ceil(p d) columns of vectors, and units of layers. Each coordinate is averaged
    over the clients that hold it. The paper's losses and distillation are left out. With rate 1 alone it is FedAvg.

    Args:
        model: The model: mf, pfedrec, neumf or two_tower.
        client_optimizer: Optimiser of a client's steps. It sees the pair (shared, private) and starts anew each round.
        server_optimizer: Moves the model by what the channel made of all updates. Left out: optax.sgd(1.0).
        num_train: Number of train interactions of each client.
        rates: Shares of every width; the first is for the clients with the fewest interactions. One of them is 1.
        shares: Shares of the clients that have each of the rates. Their sum is 1.

    Returns:
        The method, what clients and what the server compute.

    Raises:
        ValueError: rates or shares are not valid; or, when a run begins, the widths of the model are not known.

    Example:
        >>> import jaxfed as jf, optax
        >>> model = jf.models.mf(num_items=100, dim=8)
        >>> hetefedrec(model, optax.sgd(0.1), num_train=[9, 3, 5, 7, 6, 8]).submodels.groups.tolist()
        [2, 0, 0, 1, 0, 1]
    """
    check_rates(rates)
    check_shares(rates, shares)
    work = partial(make_submodel_work, model, client_optimizer, True, scales=False)
    return make_submodel_method(work, rates, False, server_optimizer, assign_activity_groups(num_train, shares))
