"""A search for what one client can do to a noised sum: it cannot prove a bound, only break one."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from jaxfed.core.link import Channel, broadcast_state, decode_total, encode_message, list_mechanisms
from jaxfed.core.tables import num_rows
from jaxfed.core.types import ClientView, Key, RoundView, Tree

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
    size = max(num_rows(example), 1)
    mechanisms = [list_mechanisms(each, bound) for each, bound in zip(links, bounds, strict=True)]
    states: list[Tree] = []
    link_states: list[Tree] = []
    for i, each in enumerate(links):
        encoded = jax.eval_shape(lambda i=i: encoded_example(links[:i], bounds, states, link_states, example, size))
        state, link_state = each.init(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), encoded))
        states.append(state)
        link_states.append(link_state)

    def client(update, link_state, states, key, public, id):
        """(message as the server reads it, link_state, the norms that came to local noise, over those claimed)."""
        weight, num_train = 10 ** jax.random.uniform(key, (2,), minval=-2, maxval=4)
        client_view = ClientView((), key, public, id, weight, num_train, jnp.arange(size), size, jnp.arange(OTHERS + 1))
        after, local, steps = [], jnp.float32(0), []
        for i, each in enumerate(links):
            if mechanisms[i] and mechanisms[i][0].kind == "local":
                local = jnp.maximum(local, optax.tree.norm(update) / mechanisms[i][0].l2)
            link_view = client_at_link(client_view, i)._replace(link_state=link_state[i], bound=bounds[i])
            steps.append(link_view)
            update, kept = encode_message(each, update, broadcast_state(each, states[i]), link_view)
            after.append(kept)
        for i, each in reversed(list(enumerate(links))):
            if each.decode_message:
                server_view = steps[i]._replace(link_state=None, key=None)
                update = each.decode_message(update, broadcast_state(each, states[i]), server_view)
        return update, tuple(after), local

    def one_round(carry, key):
        states, link_state = carry
        ids, keys = jnp.arange(OTHERS + 1), jax.random.split(key, OTHERS + 2)
        updates = jax.vmap(lambda k: draw_update(jax.random.fold_in(k, 1), example))(keys[1:])
        run = jax.vmap(client, (0, 0, None, 0, None, 0))
        messages, link_state, local = run(updates, link_state, states, keys[1:], keys[0], ids)
        sums = [jax.tree.map(lambda x, low=low: x[low:].sum(0, dtype=x.dtype), messages) for low in (0, 1)]
        worst, new = local.max(), list(states)
        for i, each in reversed(list(enumerate(links))):
            if mechanisms[i] and mechanisms[i][0].kind != "local":
                moved = jax.tree.map(lambda a, b: (a - b).astype(jnp.float32), *sums)
                worst = jnp.maximum(worst, optax.tree.norm(moved) / mechanisms[i][0].l2)
            all_present, without_first = ids >= 0, ids > 0
            public = jax.random.fold_in(keys[0], i)
            decoded = [
                decode_total(each, x, states[i], RoundView(public, ids, present, bounds[i]))
                for x, present in zip(sums, (all_present, without_first), strict=True)
            ]
            sums, new[i] = [total for total, _, _ in decoded], decoded[0][1]
        return (new, link_state), worst

    def draw(key):
        everyone = jax.tree.map(lambda x: jnp.broadcast_to(x, (OTHERS + 1, *jnp.shape(x))), tuple(link_states))
        return jax.lax.scan(one_round, (states, everyone), jax.random.split(key, rounds))[1].max()

    return float(jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(seed), draws)).max())


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
