"""Links that weigh clients by how badly the model serves them."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxfed.channels.average import divide_or_zero, drop_sums, map_averaged
from jaxfed.core.aggregate import SUM
from jaxfed.core.channel import Channel, link
from jaxfed.core.tables import squared_norm
from jaxfed.core.tree import scale_tree


def fair_mean(q: float = 1.0, rate: float = 0.1) -> Channel:
    """q-FedAvg (Li et al. 2020, "Fair resource allocation in federated learning", algorithm 2), in place of a mean.

    The server moves by sum(F^q D) / sum(q F^(q-1) |D|^2 + F^q / rate): F a client's loss at the model that it was sent,
    D its update / rate. q = 0 is the plain mean.

    Args:
        q: How much more clients with a high loss count. 0: the plain mean.
        rate: The clients' learning rate, 1 / L in the paper.
    """
    if q < 0 or rate <= 0:
        raise ValueError("fair: q must not be negative, rate must be positive")

    def encode(update, sent, client):
        loss, step = jnp.maximum(client.loss, 1e-10), map_averaged(lambda update: scale_tree(1 / rate, update), update)
        steep = q * loss ** (q - 1) * squared_norm(drop_sums(step)) + loss**q / rate
        return (map_averaged(lambda step: scale_tree(loss**q, step), step), steep), client.memory

    def decode(summed, state, round):
        update, steep = summed
        return map_averaged(lambda update: jax.tree.map(lambda x: divide_or_zero(x, steep), update), update), state, {}

    return link(encode, decode, aggregator=SUM, is_average=True, name="fair")


def agnostic_mean(activity: Sequence[float], groups: int = 10, rate: float = 0.1, forget: float = 0.5) -> Channel:
    """Agnostic federated averaging (Mohri et al. 2019; Ro et al. 2021), in place of a mean: as good as the worst group.

    A client weighs lambda_g n / N_g: n its examples, g its group, N_g the group's share of them in past rounds. A
    group's weight lambda_g grows by exp(rate * its mean loss). Groups are the quantiles of `activity`; one group is the
    weighted mean.

    Args:
        activity: Number of train interactions of each client.
        groups: How many groups clients are in, by activity. 1: the weighted mean.
        rate: How fast the weights of groups follow their losses.
        forget: Share of the groups' past shares that a round forgets.
    """
    if rate < 0 or not 0 < forget <= 1:
        raise ValueError("agnostic: rate must not be negative, forget lies between 0 and 1")
    if groups < 1:
        raise ValueError(f"agnostic.groups is {groups}: it must be at least 1")
    bounds = np.quantile(activity, np.arange(1, groups) / groups).astype(np.float32)

    def encode(update, sent, client):
        mine = jax.nn.one_hot(jnp.searchsorted(jnp.asarray(bounds), client.activity, side="right"), groups)
        weight = jnp.vdot(mine, sent[0] / sent[1]) * client.weight
        sent_update = map_averaged(lambda update: scale_tree(weight, update), update)
        return (sent_update, weight, mine * client.weight * client.loss, mine * client.weight), client.memory

    def decode(summed, state, round):
        (update, weight, loss, count), (now, counts) = summed, state
        heard = jnp.where(count > 0, loss / jnp.where(count > 0, count, 1), 0)
        after = now * jnp.exp(rate * heard)
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
