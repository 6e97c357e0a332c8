"""raFLoRA: clients whose adapters have different ranks, and a mean of each rank over those who have it."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxfed.algorithms.discordance import check_factors
from jaxfed.algorithms.local_training import local_steps
from jaxfed.algorithms.rolora import replace_dense
from jaxfed.algorithms.submodels import SubmodelMember
from jaxfed.channels.average import coordinate_mean
from jaxfed.core.client_work import ClientWork
from jaxfed.core.method import AVERAGE, Method, Submodels
from jaxfed.core.model import Model
from jaxfed.core.recipe import named
from jaxfed.core.streams import SetupStream, setup_rng
from jaxfed.core.tables import map_tables
from jaxfed.core.types import Broadcast, Tree


def take_ranks(params: Tree, rank: int) -> Tree:
    """The shared parameters with the first `rank` columns of each A, and as many rows of each B."""
    dense = params["params"]
    left = jax.tree.map(lambda a: a[..., :rank], dense["lora_a"])
    return replace_dense(params, lora_a=left, lora_b=jax.tree.map(lambda b: b[:rank], dense["lora_b"]))


def mark_held_ranks(ranks: Sequence[int], params: Tree, round: Any = 0) -> Tree:
    """bool [ranks, ...] of each leaf: which coordinates clients of each rank hold. Of a table: of one row."""

    def all_of(shape):
        return jnp.ones((len(ranks), *shape), bool)

    def mark(x, axis):
        held = jnp.arange(x.shape[axis]) < jnp.array(ranks)[:, None]
        return all_of(x.shape) & jnp.expand_dims(held, [i + 1 for i in range(x.ndim) if i != axis % x.ndim])

    dense, rest = params["params"], map_tables(lambda x: all_of(x.shape[1:]), lambda x: all_of(x.shape), params)
    left = jax.tree.map(lambda a: mark(a, -1), dense["lora_a"])
    return replace_dense(rest, lora_a=left, lora_b=jax.tree.map(lambda b: mark(b, 0), dense["lora_b"]))


def check_ranks(ranks: Sequence[int], params: Tree) -> None:
    """Raises ValueError where the largest rank is not that of the model's adapters."""
    check_factors("raflora", params)
    whole = jax.tree.leaves(params["params"]["lora_b"])[0].shape[0]
    if max(ranks) != whole:
        raise ValueError(f"raflora.ranks: the largest is {max(ranks)}, the adapters have rank {whole}: make them equal")


def train_ranks(
    model: Model, client_optimizer: optax.GradientTransformation, by_row: bool, ranks: tuple[int, ...]
) -> ClientWork:
    """Local steps for the ranks that a client has; the others are zero on that client, and are not sent."""

    def init(params, key):
        check_ranks(ranks, params)
        return Broadcast(params), SubmodelMember(model.private(key), jnp.int32(0))

    def update(shared, member, steps, key):
        held = jax.tree.map(lambda x: x[member.group], mark_held_ranks(ranks, shared.params))
        factors = {name: held["params"][name] for name in ("lora_a", "lora_b")}

        def hold(params):
            own = {
                name: jax.tree.map(lambda x, mask: jnp.where(mask, x, 0), params["params"][name], masks)
                for name, masks in factors.items()
            }
            return replace_dense(params, **own)

        def loss(params, private, batch):
            return model.loss(hold(params), private, batch)

        work = local_steps(model._replace(loss=loss), client_optimizer, by_row)
        report = work.update(Broadcast(shared.params), member.private, steps, key)
        sent = Broadcast(hold(report.update.params), jax.nn.one_hot(member.group, len(ranks)))
        return report._replace(update=sent, client_state=member._replace(private=report.client_state))

    return ClientWork(
        init,
        update,
        lambda sent: sent._replace(extra=jnp.zeros(len(ranks))),
        {"": lambda params, member: (params, member.private)},
    )


@named("algorithm")
def raflora(
    model: Model,
    client_optimizer: optax.GradientTransformation,
    server_optimizer: optax.GradientTransformation = AVERAGE,
    *,
    num_clients: int,
    by_row: bool = True,
    ranks: tuple[int, ...] = (8, 4),
    seed: int = 0,
) -> Method:
    """raFLoRA (Wu et al. 2026, "Preventing rank collapse in federated low-rank adaptation with client heterogeneity"):
    clients train adapters of different ranks, and each rank is averaged over the clients that have it.

    A client of rank r_i has the first r_i columns of A and rows of B, trains them and sends them. A mean over all
    clients, with zeros where one has nothing, would shrink high ranks in every round. Here the slices of the factors
    are averaged, from sums and counts (`coordinate_mean`); the paper averages the products of the slices and decomposes
    them by a singular value decomposition. The scale alpha / r uses the largest rank, for all clients.

    Args:
        model: The model, which shares the factors `lora_a` and `lora_b`: text_lora with the rule fedit.
        client_optimizer: Optimiser of a client's steps. It sees the pair (shared, private) and starts anew each round.
        server_optimizer: Moves the model by what the channel made of all updates. Left out: optax.sgd(1.0).
        num_clients: Number of all clients.
        by_row: true: a local step updates only the table rows in its batch. false: it updates all rows the client
            holds, so weight decay, momentum and proximal terms apply to each of them in every step (slower).
        ranks: Ranks that clients have. Each client has one of them, drawn at random. The largest is that of the model.
        seed: Seed of which client has which rank.

    Returns:
        The method, what clients and what the server compute.

    Raises:
        ValueError: a rank is below 1; or, when a run begins, the largest is not that of the model's adapters.

    Example:
        >>> import jaxfed as jf, optax
        >>> method = jf.algorithms.raflora(jf.models.mf(num_items=100), optax.sgd(0.1), num_clients=9)
        >>> [link.claims.name for link in method.links]
        ['coordinate_mean']
    """
    ranks = tuple(ranks)
    if not ranks or min(ranks) < 1:
        raise ValueError(f"ranks are {', '.join(map(str, ranks)) or 'missing'}: set each to 1 or more")
    groups = setup_rng(seed, SetupStream.SUBMODELS, num_clients).integers(len(ranks), size=num_clients)
    places = jnp.asarray(groups, jnp.int32)

    def cut(group, broadcast):
        return broadcast._replace(params=jax.eval_shape(partial(take_ranks, rank=ranks[group]), broadcast.params))

    return Method(
        train_ranks(model, client_optimizer, by_row, ranks),
        (coordinate_mean(partial(mark_held_ranks, ranks)),),
        server_optimizer,
        move_extra=lambda extra, update: (),
        init_client_state=lambda member, client: member._replace(group=places[client]),
        submodels=Submodels(groups, cut, len(ranks)),
    )
