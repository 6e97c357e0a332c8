"""Device -> edge -> server: a model at each edge, side by side, and their mean every few rounds."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxfed.algorithms.ifca import ClusterMember, select_model
from jaxfed.core.aggregate import SUM
from jaxfed.core.channel import chain
from jaxfed.core.federate import Algorithm, federate
from jaxfed.core.link import Channel, broadcast_state, decode_total, encode_message
from jaxfed.core.method import Method
from jaxfed.core.tables import Table, map_tables, num_rows
from jaxfed.core.tree import count_bytes, to_compute_dtype
from jaxfed.core.types import Broadcast, ClientView, Tree


def stack_copies(tree: Tree, edges: int) -> Tree:
    """A tree side by side with itself: tables [N, edges, ...], other leaves [edges, ...]."""
    return map_tables(lambda x: jnp.stack([x] * edges, 1), lambda x: jnp.stack([x] * edges), tree)


def map_over_edges(f: Callable, *trees: Tree) -> Tree:
    """f of what lies at one edge, for all edges side by side."""
    moved = [map_tables(lambda x: jnp.moveaxis(x, 1, 0), lambda x: x, tree) for tree in trees]
    if not jax.tree.leaves(moved):
        return f(*moved)
    return map_tables(lambda x: jnp.moveaxis(x, 0, 1), lambda x: x, jax.vmap(f)(*moved))


def with_edge_models(method: Method, edge: np.ndarray) -> Method:
    """The same method, where the model of each edge lies at the server. A client is scored by that of its edge."""
    edges, work = int(edge.max()) + 1, method.work

    def init(params, key):
        shared, client_state = work.init(params, key)
        return stack_copies(shared, edges), client_state

    def private_part(store):
        return ClusterMember(method.private_part(store), jnp.asarray(edge, jnp.int32))

    def at(view):
        return lambda params, member: view(select_model(params, member.cluster), member.private)

    return method._replace(
        work=work._replace(
            init=init,
            update_shapes=lambda shared: work.update_shapes(select_model(shared, jnp.int32(0))),
            views={name: at(view) for name, view in work.views.items()},
        ),
        move_extra=partial(map_over_edges, method.move_extra),
        private_part=private_part,
    )


def channel_at_edges(channel: Channel, edge: np.ndarray) -> Channel:
    """A channel of means, clips and codes at every edge: its clients' messages are summed apart, what the links keep at
    a server they keep at each edge. Its state also counts the examples behind each edge's model, row by row, since
    edges last met (`hierarchical`)."""
    edges, home = int(edge.max()) + 1, jnp.asarray(edge, jnp.int32)

    def of(client):
        return home.at[client.id].get(mode="fill", fill_value=0)

    def init(example):
        state, link_state = channel.init(example)
        rows = num_rows(example)
        held = Table(jnp.zeros((rows, edges))) if rows else ()
        return (stack_copies(state, edges), (held, jnp.zeros(edges))), link_state

    def encode(update, sent, client):
        return encode_message(channel, update, select_model(sent, of(client)), client)

    def decode_message(message, sent, client):
        if channel.decode_message:
            message = channel.decode_message(message, select_model(sent, of(client)), client)
        here = jnp.arange(edges) == of(client)
        seen = Table(jnp.full(client.rows.shape, client.weight)) if num_rows(message) else ()

        def beside(x, axis):
            mask = here.reshape((1,) * axis + (-1,) + (1,) * (x.ndim - axis))
            return jnp.where(mask, jnp.expand_dims(x, axis), jnp.zeros((), x.dtype))

        return map_tables(partial(beside, axis=1), partial(beside, axis=0), (message, (seen, client.weight)))

    def decode(summed, state, round):
        message, more = summed
        edge_of_asked = home.at[round.clients].get(mode="fill", fill_value=-1)

        def one(message, state, number):
            key = jax.random.fold_in(round.key, number)
            return decode_total(
                channel, message, state, round._replace(key=key, present=round.present & (edge_of_asked == number))
            )

        update, links, info = map_over_edges(one, message, state[0], jnp.arange(edges))
        gathered = jax.tree.map(jnp.add, state[1], more)
        empty = {"edges/silent": (more[1] == 0).sum()}
        return update, (links, gathered), jax.tree.map(lambda x: x.mean(0), info) | empty

    def metrics(message, sent, client):
        return channel.metrics(message, select_model(sent, of(client)), client) if channel.metrics else {}

    return channel._replace(
        init=init,
        encode=encode,
        decode_message=decode_message,
        decode=decode,
        broadcast=lambda state: broadcast_state(channel, state[0]),
        metrics=metrics,
    )


def check_edges(method: Method, channel: Channel, num_clients: int, edge: np.ndarray, every: int) -> None:
    """Raises ValueError for edges that cannot be."""
    if every < 1:
        raise ValueError(f"server.edge_rounds is {every}: edges meet every 1 or more rounds")
    if len(edge) != num_clients or not (np.bincount(edge) > 0).all():
        empty = np.flatnonzero(np.bincount(edge) == 0)
        what = f"edge {empty[0]} has no clients" if len(empty) else f"{len(edge)} clients have one of {num_clients}"
        raise ValueError(f"server.edges: {what}: give each client an edge, and each edge a client")
    if method.compare_clients:
        raise ValueError("server.edges: this work's server compares all clients with one model: set server.edges = 0")
    if method.parametrization:
        raise ValueError(
            "server.edges: edges average their models, not what a parametrization makes them of: leave it out"
        )
    if method.reads_histories:
        raise ValueError("server.edges: a closed form is solved from one sum: set server.edges = 0")
    claims = channel.claims
    if (
        channel.aggregator not in (None, SUM)
        or claims.mechanisms
        or claims.reveals != "message"
        or claims.needs_all_rows
    ):
        raise ValueError(
            "server.edges: at an edge stand means, clips and codes; noise, secure sums and robust rules are for one "
            "cohort: leave them out, or set server.edges = 0"
        )


def average_over_edges(x: jax.Array, weight: jax.Array, axis: int) -> jax.Array:
    """The mean over an axis of edges, at each of them; as it is where no example is behind it."""
    weight = weight.reshape(weight.shape + (1,) * (x.ndim - weight.ndim))
    every = weight.sum(axis, keepdims=True)
    found = (weight / jnp.where(every > 0, every, 1) * to_compute_dtype(x)).sum(axis, keepdims=True)
    return jnp.where(every > 0, found, x).astype(x.dtype)


def make_edge_meeting(every: int, per_row: bool) -> Callable:
    """The program in which edges average their models, in every `every`-th round; see `hierarchical`."""

    @partial(jax.jit, donate_argnums=(0, 1))
    def meet(params, gathered, number):
        """(the models, the examples behind them) after round `number`."""

        def met(params, gathered):
            rows, weight = gathered
            row = (lambda x: rows.rows) if per_row else (lambda x: weight[None])
            params = map_tables(
                lambda x: average_over_edges(x, row(x), 1), lambda x: average_over_edges(x, weight, 0), params
            )
            return params, jax.tree.map(jnp.zeros_like, gathered)

        return jax.lax.cond(number % every == 0, met, lambda *both: both, params, gathered)

    return meet


def hierarchical(
    method: Method,
    channel: Channel,
    num_clients: int,
    *,
    edge: np.ndarray,
    every: int = 1,
    per_row: bool = False,
    **how: Any,
) -> Algorithm:
    """HierFAVG (Liu et al. 2020, "Client-edge-cloud hierarchical federated learning", algorithm 1): `federate` at every
    edge, and every `every` rounds all edges take the mean of their models, by the examples that these come from.

    edge int [num_clients]: that of each client, from 0. A client downloads and trains the model of its edge alone;
    `channel` and `method.server` work at each edge. per_row: a row of a table is averaged over the edges whose clients
    held it, as `per_row_mean` does over clients. What edges and server exchange is in the info as `edges/bytes_total`.
    Raises ValueError for edges without clients, and for links that are not for several sums.
    """
    channel = chain(*method.links, channel)
    check_edges(method, channel, num_clients, edge, every)
    home = jnp.asarray(edge, jnp.int32)

    def pick(shared: Broadcast, client: ClientView) -> Broadcast:
        e = home.at[client.id].get(mode="fill", fill_value=0)
        return to_compute_dtype(
            map_tables(lambda x: x.at[client.rows, e].get(mode="fill", fill_value=0), lambda x: x[e], shared)
        )

    algorithm = federate(
        with_edge_models(method._replace(links=()), edge),
        channel_at_edges(channel, edge),
        num_clients,
        **how | {"download": pick},
    )

    meet = make_edge_meeting(every, per_row)

    def step(state, cohort, key):
        state, info = algorithm.step(state, cohort, key)
        links, gathered = state.channel
        params, gathered = meet(state.shared.params, gathered, state.round)
        state = state._replace(shared=state.shared._replace(params=params), channel=(links, gathered))
        sent = 2.0 * count_bytes(params) * (state.round // every)  # each edge's model up, and the mean down to each
        return state, info | {"edges/bytes_total": sent}

    return Algorithm(algorithm.init, step)
