"""Agnostic federated averaging: as good as possible for the group served worst."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxfed.algorithms.local_training import local_steps
from jaxfed.channels.average import divide_or_zero, map_averaged
from jaxfed.core.aggregate import SUM
from jaxfed.core.link import Channel, link
from jaxfed.core.method import AVERAGE, Method
from jaxfed.core.model import Model
from jaxfed.core.recipe import named
from jaxfed.core.tree import scale_tree


@named("channel", "agnostic")
def agnostic_mean(num_train: Sequence[float], groups: int = 10, rate: float = 0.1, forget: float = 0.5) -> Channel:
    """Agnostic federated averaging (Mohri et al. 2019; Ro et al. 2021), in place of a mean: as good as the worst group.

    A client weighs lambda_g n / N_g: n its examples, g its group, N_g the group's share of them in past rounds. A
    group's weight lambda_g grows by exp(rate * its mean loss). Groups are the quantiles of `num_train`; one group is
    the weighted mean.

    Args:
        num_train: Number of train interactions of each client.
        groups: How many groups clients are in, by how many train interactions they have. 1: the weighted mean.
        rate: How fast the weights of groups follow their losses.
        forget: Share of the groups' past shares that a round forgets.
    """
    if rate < 0 or not 0 < forget <= 1:
        raise ValueError("agnostic: rate must not be negative, forget lies between 0 and 1")
    if groups < 1:
        raise ValueError(f"agnostic.groups is {groups}: it must be at least 1")
    bounds = np.quantile(num_train, np.arange(1, groups) / groups).astype(np.float32)

    def encode(update, sent, client):
        membership = jax.nn.one_hot(jnp.searchsorted(jnp.asarray(bounds), client.num_train, side="right"), groups)
        weight = jnp.vdot(membership, sent[0] / sent[1]) * client.weight
        sent_update = map_averaged(lambda update: scale_tree(weight, update), update)
        return (
            sent_update,
            weight,
            membership * client.weight * client.loss,
            membership * client.weight,
        ), client.link_state

    def decode(summed, state, round):
        (update, weight, loss, count), (now, counts) = summed, state
        mean_loss = jnp.where(count > 0, loss / jnp.where(count > 0, count, 1), 0)
        after = now * jnp.exp(rate * mean_loss)
        shares = jnp.where(count.sum() > 0, count / jnp.maximum(count.sum(), 1), counts)
        counts = jnp.maximum((1 - forget) * counts + forget * shares, 1e-3)
        seen = {"agnostic/largest": now.max() * groups}
        update = map_averaged(lambda update: jax.tree.map(lambda x: divide_or_zero(x, weight), update), update)
        return update, (after / after.sum(), counts), seen

    def init(example):
        return (jnp.full(groups, 1 / groups), jnp.full(groups, 1 / groups)), ()

    return link(
        encode,
        decode,
        init,
        broadcast=lambda state: state,
        aggregator=SUM,
        is_average=True,
        reads_cohort_size=True,
        name="agnostic",
    )


@named("algorithm")
def agnostic(
    model: Model,
    client_optimizer: optax.GradientTransformation,
    server_optimizer: optax.GradientTransformation = AVERAGE,
    *,
    by_row: bool = True,
    groups: int = 10,
    rate: float = 0.1,
    forget: float = 0.5,
    num_train: Sequence[float],
) -> Method:
    """Agnostic federated averaging (Mohri et al. 2019; Ro et al. 2021): as good as possible for the group served worst.
    It averages by itself, so no mean is needed.

    Args:
        model: The model.
        client_optimizer: Optimiser of a client's steps. It sees the pair (shared, private) and starts anew each round.
        server_optimizer: Moves the model by what the channel made of all updates. Left out: optax.sgd(1.0).
        by_row: true: a local step updates only the table rows in its batch. false: it updates all rows the client
            holds, so weight decay, momentum and proximal terms apply to each of them in every step (slower).
        groups: How many groups clients are in, by how many train interactions they have. 1: the weighted mean.
        rate: How fast the weights of groups follow their losses.
        forget: Share of the groups' past shares that a round forgets.
        num_train: Number of train interactions of each client.

    Returns:
        The method, what clients and what the server compute.

    Raises:
        ValueError: a number is out of its range.

    Example:
        >>> import jaxfed as jf, optax
        >>> model = jf.models.mf(num_items=100, dim=8)
        >>> method = jf.algorithms.agnostic(model, optax.sgd(0.1), groups=2, num_train=[3, 5, 9, 20])
        >>> [link.claims.name for link in method.links]
        ['agnostic']
    """
    links = (agnostic_mean(num_train, groups, rate, forget),)
    return Method(local_steps(model, client_optimizer, by_row), links, server=server_optimizer)
