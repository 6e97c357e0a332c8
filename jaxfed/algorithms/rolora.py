"""RoLoRA: clients train and send one factor of the adapters in a round; the other one is not trained (it rests)."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from jaxfed.algorithms.discordance import check_factors
from jaxfed.algorithms.local_training import local_steps
from jaxfed.core.client_work import ClientWork, identity
from jaxfed.core.link import Channel, link
from jaxfed.core.method import AVERAGE, Method
from jaxfed.core.model import Model
from jaxfed.core.recipe import named
from jaxfed.core.tree import zeros_like
from jaxfed.core.types import Broadcast, Tree

FACTORS = ("lora_b", "lora_a")  # B in even rounds: it begins with zeros, so A has no gradient at first


def replace_dense(shared: Tree, **new: Tree) -> Tree:
    """Shared parameters with other entries in their collection `params`."""
    return {**shared, "params": shared["params"] | new}


def drop_dense(shared: Tree, *names: str) -> Tree:
    """Shared parameters without some entries of their collection `params`."""
    return {**shared, "params": {name: x for name, x in shared["params"].items() if name not in names}}


def choose_moving(number: jax.Array, moving: Tree, resting: Tree) -> Tree:
    """Both factors: the one that round `number` trains is from `moving`, the other one from `resting`."""
    return {
        name: jax.tree.map(lambda x, y, i=i: jnp.where(number % 2 == i, x, y), moving[name], resting[name])
        for i, name in enumerate(FACTORS)
    }


def clear_resting(number: jax.Array, params: Tree) -> Tree:
    """A change of the shared parameters with zeros in the factor that rests in round `number`."""
    return replace_dense(params, **choose_moving(number, params["params"], zeros_like(params["params"])))


def pack_one_factor(shapes: Callable[[], Tree]) -> Channel:
    """Sends only the factors of the round. In every round a message is as long as the longer of the two factors.

    shapes: gives the shapes of the shared parameters.
    """

    def encode(update, sent, client):
        flat = [ravel_pytree(update.params["params"][name])[0] for name in FACTORS]
        size = max(x.size for x in flat)
        moved = jnp.stack([jnp.pad(x, (0, size - x.size)) for x in flat])[sent % 2]
        params = replace_dense(drop_dense(update.params, *FACTORS), lora=moved)
        return update._replace(params=params), client.link_state

    def decode(total, state, round):
        found, moved = {}, total.params["params"]["lora"]
        for name in FACTORS:
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, moved.dtype), shapes()["params"][name])
            flat, restore = ravel_pytree(zeros)
            found[name] = restore(moved[: flat.size])
        params = replace_dense(drop_dense(total.params, "lora"), **found)
        return total._replace(params=clear_resting(state, params)), state + 1, {}

    return link(
        encode,
        decode,
        lambda example: (jnp.int32(0), ()),
        broadcast=identity,
        l2_gain=identity,
        is_average=False,
        name="rolora",
    )


def train_one_factor(model: Model, client_optimizer: optax.GradientTransformation, by_row: bool) -> ClientWork:
    """Local steps in which the factor that rests stays as the server sent it."""

    def init(params, key):
        check_factors("rolora", params)
        return Broadcast(params, jnp.int32(0)), model.private(key)

    def update(shared, private, steps, key):
        def loss(params, private, batch):
            factors = choose_moving(shared.extra, params["params"], shared.params["params"])
            return model.loss(replace_dense(params, **factors), private, batch)

        work = local_steps(model._replace(loss=loss), client_optimizer, by_row)
        report = work.update(Broadcast(shared.params), private, steps, key)
        return report._replace(update=Broadcast(clear_resting(shared.extra, report.update.params)))

    return ClientWork(init, update, lambda sent: sent._replace(extra=()))


@named("algorithm")
def rolora(
    model: Model,
    client_optimizer: optax.GradientTransformation,
    server_optimizer: optax.GradientTransformation = AVERAGE,
    *,
    by_row: bool = True,
) -> Method:
    """RoLoRA (Chen et al. 2025, "Robust federated finetuning of LLMs via alternating optimization of LoRA"): one factor
    is trained and sent in a round, the other rests.

    Of adapters s (x A) B, clients train and send only B in even rounds, counted from 0, and only A in odd ones. The
    other factor is the same for all, so mean(A B_i) = A mean(B_i). The server needs only a sum: any channel will do.

    Args:
        model: The model, which shares the factors `lora_a` and `lora_b`: text_lora with the rule fedit.
        client_optimizer: Optimiser of a client's steps. It sees the pair (shared, private) and starts anew each round.
        server_optimizer: Moves the model by what the channel made of all updates. Left out: optax.sgd(1.0).
        by_row: Whether a local step updates only the table rows in its batch, see `fedavg`.

    Returns:
        The method, what clients and what the server compute.

    Raises:
        ValueError: when a run begins: the model has no such factors.

    Example:
        >>> import jaxfed as jf, optax
        >>> method = jf.algorithms.rolora(jf.models.mf(num_items=100), optax.sgd(0.1))
        >>> [link.claims.name for link in method.links]
        ['rolora']
    """
    shapes = partial(jax.eval_shape, model.init, jax.random.key(0))
    return Method(
        train_one_factor(model, client_optimizer, by_row),
        (pack_one_factor(shapes),),
        server_optimizer,
        move_extra=lambda extra, update: extra + 1,
        move_params=lambda broadcast, delta, extra: clear_resting(broadcast.extra, delta),
        sends_difference=True,
    )
