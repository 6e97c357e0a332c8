"""IFCA: several models side by side, and clients that choose one."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxfed.algorithms.local_training import local_steps, loss_of_pair
from jaxfed.channels.average import cluster_mean
from jaxfed.core.client_work import ClientWork, pooled_loss
from jaxfed.core.method import AVERAGE, Method
from jaxfed.core.model import Model
from jaxfed.core.recipe import named
from jaxfed.core.tables import Table, map_tables, num_rows
from jaxfed.core.types import Broadcast, Mean, Tree


class ClusterMember(NamedTuple):
    """A client's state: the model's private part, and which of the models it chose last."""

    private: Tree
    cluster: jax.Array  # int []


def select_model(params: Tree, cluster: jax.Array) -> Tree:
    """One model of those side by side: of tables [N, k, ...] and other leaves [k, ...]."""
    return map_tables(lambda x: x[:, cluster], lambda x: x[cluster], params)


def make_ifca_work(
    model: Model, client_optimizer: optax.GradientTransformation, by_row: bool, clusters: int
) -> ClientWork:
    """Local steps of the model that has the lowest loss."""
    work = local_steps(model, client_optimizer, by_row)

    def init(params, key):
        every = [params, *(model.init(jax.random.fold_in(key, j)) for j in range(1, clusters))]
        side_by_side = jax.tree.map(lambda *x: jnp.stack(x), *every)
        stacked = map_tables(lambda x: jnp.moveaxis(x, 0, 1), lambda x: x, side_by_side)
        rows = num_rows(params)
        held = Table(jnp.zeros((rows, clusters))) if rows else ()
        return Broadcast(stacked, (jnp.zeros(clusters), held)), ClusterMember(model.private(key), jnp.int32(0))

    def update(shared, client_state, steps, key):
        def lost(j):
            return pooled_loss(
                loss_of_pair(model.loss), (select_model(shared.params, j), client_state.private), steps
            ).value

        chosen = jnp.argmin(jnp.stack([lost(j) for j in range(clusters)])).astype(jnp.int32)
        report = work.update(Broadcast(select_model(shared.params, chosen)), client_state.private, steps, key)
        belongs = jax.nn.one_hot(chosen, clusters)
        apart = map_tables(
            lambda x: x[:, None] * belongs.reshape((1, -1) + (1,) * (x.ndim - 1)),
            lambda x: jnp.multiply.outer(belongs, x),
            report.update.params,
        )
        held = jax.tree.map(lambda x: jnp.broadcast_to(belongs, x.shape), shared.extra[1])
        counts = {f"clusters/{j}": Mean(belongs[j], 1.0) for j in range(clusters)}
        return report._replace(
            update=Broadcast(apart, (belongs, held)),
            client_state=ClusterMember(report.client_state, chosen),
            metrics=report.metrics | counts,
        )

    def view(params, client_state):
        return select_model(params, client_state.cluster), client_state.private

    return ClientWork(init, update, views={"": view})


@named("algorithm")
def ifca(
    model: Model,
    client_optimizer: optax.GradientTransformation,
    server_optimizer: optax.GradientTransformation = AVERAGE,
    *,
    by_row: bool = True,
    clusters: int = 2,
) -> Method:
    """IFCA (Ghosh et al. 2020; HypCluster, Mansour et al. 2020): several models, of which a client trains the best.

    A client downloads all models, and trains the one with the lowest loss on its data. Its link, `cluster_mean`,
    averages each model over those who chose it.

    Args:
        model: The model.
        client_optimizer: Optimiser of a client's steps. It sees the pair (shared, private) and starts anew each round.
        server_optimizer: Moves the model by what the channel made of all updates. Left out: optax.sgd(1.0).
        by_row: true: a local step updates only the table rows in its batch. false: it updates all rows the client
            holds, so weight decay, momentum and proximal terms apply to each of them in every step (slower).
        clusters: Number of models.

    Returns:
        The method, what clients and what the server compute.

    Raises:
        ValueError: there are no clusters.

    Example:
        >>> import jaxfed as jf, optax
        >>> model = jf.models.mf(num_items=100, dim=8)
        >>> method = jf.algorithms.ifca(model, optax.sgd(0.1))
        >>> [link.claims.name for link in method.links]
        ['cluster_mean']
    """
    if clusters < 1:
        raise ValueError(f"clusters is {clusters}: it must be at least 1")
    work = make_ifca_work(model, client_optimizer, by_row, clusters)
    return Method(work, (cluster_mean(),), move_extra=lambda extra, update: extra, server=server_optimizer)
