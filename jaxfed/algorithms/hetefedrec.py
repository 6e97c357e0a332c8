"""HeteFedRec: clients with few interactions train the first columns of the model's vectors alone."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import optax

from jaxfed.algorithms.submodels import check_rates, make_submodel_method, make_submodel_work
from jaxfed.core.method import AVERAGE, Method
from jaxfed.core.model import Model
from jaxfed.core.recipe import named


def group_by_activity(num_train: Sequence[int], shares: Sequence[float]) -> np.ndarray:
    """int [clients]: 0 for the share of the clients with the fewest interactions, 1 for the next, and so on; of equal
    ones the earlier comes first."""
    order = np.argsort(np.asarray(num_train), kind="stable")
    ends = np.round(np.cumsum(shares)[:-1] * len(order)).astype(int)
    groups = np.empty(len(order), np.int64)
    groups[order] = np.searchsorted(ends, np.arange(len(order)), side="right")
    return groups


@named("algorithm")
def hetefedrec(
    model: Model,
    client_optimizer: optax.GradientTransformation,
    server_optimizer: optax.GradientTransformation = AVERAGE,
    *,
    num_train: Sequence[int],
    by_row: bool = True,
    rates: tuple[float, ...] = (0.25, 0.5, 1.0),
    shares: tuple[float, ...] = (0.5, 0.3, 0.2),
) -> Method:
    """HeteFedRec (Yuan et al. 2024, "Hetefedrec: federated recommender systems with model heterogeneity"): the more
    interactions a client has, the longer the vectors that it trains.

    A client of rate p trains the first ceil(p d) columns of the item table and of its user's vector, and as many units
    of every layer. Each coordinate is averaged over the clients that hold it. The paper's loss of several sizes at
    once, its decorrelation of columns and its distillation at the server are not here. Rate 1 alone is FedAvg.

    Args:
        model: The model: mf, pfedrec, neumf or two_tower.
        client_optimizer: Optimiser of a client's steps. It sees the pair (shared, private) and starts anew each round.
        server_optimizer: Moves the model by what the channel made of all updates. Left out: optax.sgd(1.0).
        num_train: Number of train interactions of each client.
        by_row: true: a local step updates only the table rows in its batch. false: it updates all rows the client
            holds, so weight decay, momentum and proximal terms apply to each of them in every step (slower).
        rates: Shares of every width, of the clients with the fewest interactions first.
        shares: Share of the clients that has each of the rates.

    Returns:
        The method, what clients and what the server compute.

    Raises:
        ValueError: there are no such rates or shares; or, when a run begins, the widths of the model are not known.

    Example:
        >>> import jaxfed as jf, optax
        >>> model = jf.models.mf(num_items=100, dim=8)
        >>> method = jf.algorithms.hetefedrec(
        ...     model, optax.sgd(0.1), num_train=[9, 3, 5, 7], rates=(0.5, 1.0), shares=(0.5, 0.5)
        ... )
        >>> method.submodels.groups.tolist()
        [1, 0, 0, 1]
    """
    check_rates(rates)
    if len(rates) != len(shares) or not all(share > 0 for share in shares) or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(
            f"algorithm.shares are {', '.join(map(str, shares))}: give one above 0 for each of the {len(rates)} rates, "
            "whose sum is 1"
        )
    work = partial(make_submodel_work, model, client_optimizer, by_row, scales=False)
    return make_submodel_method(work, rates, False, server_optimizer, group_by_activity(num_train, shares))
