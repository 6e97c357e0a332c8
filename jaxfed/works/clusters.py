"""Several models side by side, and clients that choose one."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxfed.rows import Table, catalogue, lift
from jaxfed.types import Key, Mean, Shared, Tree
from jaxfed.work import Loss, Work, pooled
from jaxfed.works.local import local_steps, nothing, on_both


class Member(NamedTuple):
    """A client's memory: the model's private part, and which of the models it chose last."""

    private: Tree
    cluster: jax.Array  # int []


def one_of(params: Tree, cluster: jax.Array) -> Tree:
    """One model of those side by side: of tables [N, k, ...] and other leaves [k, ...]."""
    return lift(lambda x: x[:, cluster], lambda x: x[cluster], params)


def clustered(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    private: Callable[[Key], Tree] = nothing,
    by_row: bool = True,
    clusters: int = 2,
    *,
    initial: Callable[[Key], Tree],
) -> Work:
    """IFCA (Ghosh et al. 2020; HypCluster, Mansour et al. 2020): a client takes the model of lowest loss on its data
    and trains that. The link `cluster_mean` averages each over those who chose it; clients download all of them.

    initial(key) -> parameters: all models but the first one begin there.

    Args:
        by_row: true: a local step updates only the table rows in its batch. false: it updates all rows the client
            holds, so weight decay, momentum and proximal terms apply to each of them in every step (slower).
        clusters: How many models there are.
    """
    if clusters < 1:
        raise ValueError(f"clusters is {clusters}: it must be at least 1")
    work = local_steps(loss, optimizer, private, by_row)

    def init(params, key):
        every = [params, *(initial(jax.random.fold_in(key, j)) for j in range(1, clusters))]
        side_by_side = jax.tree.map(lambda *x: jnp.stack(x), *every)
        stacked = lift(lambda x: jnp.moveaxis(x, 0, 1), lambda x: x, side_by_side)
        rows = catalogue(params)
        held = Table(jnp.zeros((rows, clusters))) if rows else ()
        return Shared(stacked, (jnp.zeros(clusters), held)), Member(private(key), jnp.int32(0))

    def run(shared, mine, steps, key):
        def lost(j):
            return pooled(on_both(loss), (one_of(shared.params, j), mine.private), steps).value

        chosen = jnp.argmin(jnp.stack([lost(j) for j in range(clusters)])).astype(jnp.int32)
        report = work.run(Shared(one_of(shared.params, chosen)), mine.private, steps, key)
        belongs = jax.nn.one_hot(chosen, clusters)
        apart = lift(
            lambda x: x[:, None] * belongs.reshape((1, -1) + (1,) * (x.ndim - 1)),
            lambda x: jnp.multiply.outer(belongs, x),
            report.update.params,
        )
        held = jax.tree.map(lambda x: jnp.broadcast_to(belongs, x.shape), shared.extra[1])
        told = {f"clusters/{j}": Mean(belongs[j], 1.0) for j in range(clusters)}
        return report._replace(
            update=Shared(apart, (belongs, held)),
            memory=Member(report.memory, chosen),
            metrics=report.metrics | told,
        )

    def moves(extra, update):
        return extra

    def view(params, mine):
        return one_of(params, mine.cluster), mine.private

    return Work(init, run, moves, views={"": view})
