"""A search for what one client can do to a noised sum: it cannot prove a bound, only break one."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxfed.core.link import Channel, broadcast_state, decode_total, encode_message, list_mechanisms
from jaxfed.core.tables import num_rows
from jaxfed.core.types import ClientView, Key, Mechanism, RoundView, Tree

OTHERS = 3  # clients beside the one that is searched for
SHAPES = 4  # of updates; see `drawn`


def draw_update(key: Key, example: Tree) -> Tree:
    """An update of any size, from a thousandth to a thousand: normal, one number, all alike, or a few large ones."""
    size, shape, inner = jax.random.split(key, 3)
    scale, which = 10 ** jax.random.uniform(size, minval=-3, maxval=3), jax.random.randint(shape, (), 0, SHAPES)
    leaves, structure = jax.tree.flatten(example)

    def one(x, key):
        a, b = jax.random.split(key)
        normal = jax.random.normal(a, x.shape)
        spike = jnp.zeros(x.size).at[jax.random.randint(b, (), 0, x.size)].set(1).reshape(x.shape)
        return jnp.stack([normal, spike, jnp.ones(x.shape), normal**5])[which]

    keys = jax.random.split(inner, len(leaves))
    return jax.tree.unflatten(structure, [scale * one(x, k) for x, k in zip(leaves, keys, strict=True)])


class ProbedChain(NamedTuple):
    """A chain whose links are searched one by one."""

    links: Sequence[Channel]
    bounds: Sequence[float]  # what each is told of the norm of its messages
    mechanisms: Sequence[Sequence[Mechanism]]  # of each
    size: int  # rows of the tables


def search_largest_gain(
    links: Sequence[Channel],
    bounds: Sequence[float],
    example: Tree,
    draws: int = 64,
    rounds: int = 4,
    seed: int = 0,
) -> float:
    """The most that one client moved what a link noises, over the norm that the link's noise is made for.

    links: of a chain. bounds: what each was told of the norm of its messages (`channel_checks.check_order`). example:
    an update with marked tables, of which every client holds every row.

    A sum is decoded up to the noise, with the client and without it, its link state as it became in the rounds before.
    Of a message that is private by itself the norm is that of what comes to its noise.
    """
    mechanisms = [list_mechanisms(each, bound) for each, bound in zip(links, bounds, strict=True)]
    chain = ProbedChain(links, bounds, mechanisms, max(num_rows(example), 1))
    states, link_states = init_links(chain, example)

    def draw(key):
        of_all = jax.tree.map(lambda x: jnp.broadcast_to(x, (OTHERS + 1, *jnp.shape(x))), tuple(link_states))
        run = partial(run_probed_round, chain, example)
        return jax.lax.scan(run, (states, of_all), jax.random.split(key, rounds))[1].max()

    return float(jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(seed), draws)).max())


def init_links(chain: ProbedChain, example: Tree) -> tuple[list[Tree], list[Tree]]:
    """The states of the links on the server and on one client."""
    states: list[Tree] = []
    link_states: list[Tree] = []
    for i, each in enumerate(chain.links):
        encoded = jax.eval_shape(
            lambda i=i: encoded_example(chain.links[:i], chain.bounds, states, link_states, example, chain.size)
        )
        state, link_state = each.init(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), encoded))
        states.append(state)
        link_states.append(link_state)
    return states, link_states


def send_update(
    chain: ProbedChain, update: Tree, link_state: tuple, states: list, key: Key, public: Key, id: jax.Array
) -> tuple[Tree, tuple, jax.Array]:
    """(message as the server reads it, link_state, the norms that came to local noise, over those claimed)."""
    weight, num_train = 10 ** jax.random.uniform(key, (2,), minval=-2, maxval=4)
    rows, cohort = jnp.arange(chain.size), jnp.arange(OTHERS + 1)
    client_view = ClientView((), key, public, id, weight, num_train, rows, chain.size, cohort)
    after, local, views = [], jnp.float32(0), []
    for i, each in enumerate(chain.links):
        if chain.mechanisms[i] and chain.mechanisms[i][0].kind == "local":
            local = jnp.maximum(local, optax.tree.norm(update) / chain.mechanisms[i][0].l2)
        view = client_at_link(client_view, i)._replace(link_state=link_state[i], bound=chain.bounds[i])
        views.append(view)
        update, kept = encode_message(each, update, broadcast_state(each, states[i]), view)
        after.append(kept)
    for i, each in reversed(list(enumerate(chain.links))):
        if each.decode_message:
            server_view = views[i]._replace(link_state=None, key=None)
            update = each.decode_message(update, broadcast_state(each, states[i]), server_view)
    return update, tuple(after), local


def run_probed_round(chain: ProbedChain, example: Tree, carry: tuple, key: Key) -> tuple[tuple, jax.Array]:
    """((the states of the links, the clients' link_states), the largest gain) of one round, for a scan."""
    states, link_state = carry
    ids, keys = jnp.arange(OTHERS + 1), jax.random.split(key, OTHERS + 2)
    updates = jax.vmap(lambda k: draw_update(jax.random.fold_in(k, 1), example))(keys[1:])
    run = jax.vmap(partial(send_update, chain), (0, 0, None, 0, None, 0))
    messages, link_state, local = run(updates, link_state, states, keys[1:], keys[0], ids)
    sums = [jax.tree.map(lambda x, low=low: x[low:].sum(0, dtype=x.dtype), messages) for low in (0, 1)]
    worst, new = local.max(), list(states)
    all_present, without_first = ids >= 0, ids > 0
    for i, each in reversed(list(enumerate(chain.links))):
        if chain.mechanisms[i] and chain.mechanisms[i][0].kind != "local":
            moved = jax.tree.map(lambda a, b: (a - b).astype(jnp.float32), *sums)
            worst = jnp.maximum(worst, optax.tree.norm(moved) / chain.mechanisms[i][0].l2)
        public = jax.random.fold_in(keys[0], i)
        decoded = [
            decode_total(each, x, states[i], RoundView(public, ids, present, chain.bounds[i]))
            for x, present in zip(sums, (all_present, without_first), strict=True)
        ]
        sums, new[i] = [total for total, _, _ in decoded], decoded[0][1]
    return (new, link_state), worst


def client_at_link(client: ClientView, i: int) -> ClientView:
    """The client as link i of a chain knows it."""
    return client._replace(key=jax.random.fold_in(client.key, i), public=jax.random.fold_in(client.public, i))


def encoded_example(
    links: Sequence[Channel], bounds: Sequence[float], states: list, link_states: list, update: Tree, size: int
) -> Tree:
    """What comes out of some links, for shapes."""
    key, one = jax.random.key(0), jnp.float32(1)
    for i, each in enumerate(links):
        cohort = jnp.arange(OTHERS + 1)
        view = ClientView(link_states[i], key, key, jnp.int32(0), one, one, jnp.arange(size), size, cohort)
        update, _ = encode_message(each, update, broadcast_state(each, states[i]), view._replace(bound=bounds[i]))
    return update
