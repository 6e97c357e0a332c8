"""Malicious clients, to measure what a method bears: links that change what some clients send.

Who is malicious is a function of (seed, client), see `malice`: links with the same `fraction` and `seed` speak of the
same clients, and so does the section [data]. To the left of a link that weighs, an attack changes the update; to its
right also the weights that the client claims. Malicious clients train as all others do, and send something else.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxfed.core.link import Channel, link
from jaxfed.core.malicious import check_fraction, is_malicious
from jaxfed.core.recipe import named
from jaxfed.core.tables import is_table, map_tables
from jaxfed.core.tree import scale_tree as times
from jaxfed.core.tree import sum_first, sum_last
from jaxfed.core.types import ClientView, Tree


def malicious_link(name: str, change: Callable[[Tree, ClientView], Tree], fraction: float, seed: int) -> Channel:
    """A link whose malicious clients send change(message, client) in place of their message."""
    check_fraction(fraction, f"{name}.fraction")

    def encode(message, sent, client):
        bad, false = is_malicious(client.id, fraction, seed), change(message, client)
        return jax.tree.map(lambda sent, true: jnp.where(bad, sent, true), false, message), client.link_state

    return link(encode, name=name)


@named("channel")
def sign_flip(fraction: float = 0.2, scale: float = 1.0, seed: int = 0) -> Channel:
    """Malicious clients send their message turned round (Li et al. 2019, RSA).

    Args:
        fraction: Share of the clients that are malicious.
        scale: A malicious client sends -scale x its message.
        seed: Seed of who is malicious: the same clients as in [data] and in other links for the same fraction and seed.
    """
    return malicious_link("sign_flip", lambda message, client: times(-scale, message), fraction, seed)


@named("channel", "scaled")
def scale_update(fraction: float = 0.2, factor: float = 10.0, seed: int = 0) -> Channel:
    """Malicious clients send a multiple of their message: the boost of model replacement (Bagdasaryan et al. 2020).

    Args:
        fraction: Share of the clients that are malicious.
        factor: A malicious client sends factor x its message.
        seed: Seed of who is malicious: the same clients as in [data] and in other links for the same fraction and seed.
    """
    return malicious_link("scaled", lambda message, client: times(factor, message), fraction, seed)


@named("channel", "noise")
def random_update(fraction: float = 0.2, stddev: float = 1.0, seed: int = 0) -> Channel:
    """Malicious clients send normal numbers in place of their message (Blanchard et al. 2017).

    Args:
        fraction: Share of the clients that are malicious.
        stddev: Standard deviation of the numbers.
        seed: Seed of who is malicious: the same clients as in [data] and in other links for the same fraction and seed.
    """

    def change(message, client):
        leaves, structure = jax.tree.flatten(message)
        keys = [jax.random.fold_in(client.key, number) for number in range(len(leaves))]
        drawn = [stddev * jax.random.normal(key, x.shape) for key, x in zip(keys, leaves, strict=True)]
        return jax.tree.unflatten(structure, [new.astype(x.dtype) for new, x in zip(drawn, leaves, strict=True)])

    return malicious_link("noise", change, fraction, seed)


@named("channel", "promote")
def promote_items(fraction: float = 0.2, targets: tuple[int, ...] = (), factor: float = 10.0, seed: int = 0) -> Channel:
    """Malicious clients send, for the target rows they hold, their own update made `factor` times as long as the mean
    row of the rest of it: explicit boosting (Bhagoji et al. 2019) of the promotion of items (PipAttack: Zhang et al.
    2022; FedRecAttack: Rong et al. 2022).

    A client sends the rows that its data touch. So the malicious need the targets in their data, as positives, which
    `data.promoted` (see `data.poisoning`) puts there for the same fraction and seed. Their own update then raises the
    targets' scores for their own user vectors, trained on real histories: what they believe of other users. The length
    relative to their honest rows is all that this link adds, so what is sent stays in the range of honest updates.

    It stands left of all links that change the message.

    Args:
        fraction: Share of the clients that are malicious.
        targets: Rows of the tables to promote; in a configuration, items by the source's ids.
        factor: Length of a target's row, over the mean length of the others.
        seed: Seed of who is malicious: the same clients as in [data] and in other links for the same fraction and seed.
    """
    if factor < 0:
        raise ValueError(f"promote: factor is {factor}: it must be at least 0")

    def change(message, client):
        target = (client.rows[:, None] == jnp.array(targets, jnp.int32)).any(1)
        arrays = jax.tree.leaves([x for x in jax.tree.leaves(message, is_leaf=is_table) if is_table(x)])
        squares = [sum_last(jnp.square(x), x.ndim - 1).ravel() for x in arrays]
        length = jnp.sqrt(sum(squares, jnp.zeros(client.rows.shape)))
        rest = client.held & ~target
        usual = sum_first(jnp.where(rest, length, 0)) / jnp.maximum(rest.sum(), 1)
        by = jnp.where(target & (length > 0), factor * usual / jnp.where(length > 0, length, 1), 1)
        return map_tables(lambda x: x * by.reshape(by.shape + (1,) * (x.ndim - 1)), lambda x: x, message)

    return malicious_link("promote", change, fraction, seed)
