"""The clients' side of a round. `client_round` could run on a client, `open_message` on the server; the simulator
composes them with what is sent, and vmaps that over a block of clients."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfed.core import tables, tree
from jaxfed.core.client_work import ClientWork
from jaxfed.core.link import Channel, broadcast_state, encode_message
from jaxfed.core.pairs import find_pairs, number_row_pairs
from jaxfed.core.parametrization import frozen_arguments
from jaxfed.core.placement import map_parts, split_parts
from jaxfed.core.pruning import FrozenAndMasks, clear_pruned, find_masks
from jaxfed.core.state import Plan, State, broadcast_shapes, has_pair_sums, sent_model, table_rows_of
from jaxfed.core.streams import CLIENTS
from jaxfed.core.types import Block, Broadcast, ClientState, ClientView, Key, Mean, Messages, Tree


class ClientDownload(NamedTuple):
    """What a client is sent in a round."""

    broadcast: Broadcast  # tables: the client's rows [K, ...]
    links: Tree  # what each link broadcasts, its tables likewise
    frozen: Tree = ()  # the frozen part of the model, its tables likewise; it has that since it first took part
    masks: dict[str, jax.Array] = {}  # which weights are kept, of each pruned leaf by its path


class ClientInput(NamedTuple):
    """What a client has of its own when a round begins."""

    id: jax.Array
    state: ClientState  # tables: its rows [K, ...]
    rows: jax.Array  # int [K]: the rows that it holds
    num_train: jax.Array  # float []: its number of train interactions
    data: Tree  # what `ClientWork.update` reads
    age: Any = 0  # int []: rounds since the model that it was sent was the server's


class PublicRound(NamedTuple):
    """What everybody knows of a round."""

    key: Key  # public randomness
    cohort: jax.Array  # int [M]: who was asked
    size: int  # rows of the catalogue


class ClientRound(NamedTuple):
    """What a client makes of a round."""

    message: Tree  # for the server
    state: ClientState  # kept on the client
    metrics: dict[str, Mean]  # the simulator's view; nothing of it is sent
    is_finite: jax.Array  # bool []: whether it reports at all
    weight: jax.Array  # float []: training examples it used; edges are told


def client_view(own: ClientInput, public: PublicRound) -> ClientView:
    """A client as links see it, before it has computed anything; it has no key and no link state yet."""
    return ClientView(
        (), None, public.key, own.id, jnp.float32(1), own.num_train, own.rows, public.size, public.cohort, age=own.age
    )


def client_round(
    work: ClientWork, channel: Channel, received: ClientDownload, own: ClientInput, public: PublicRound, key: Key
) -> ClientRound:
    """A round on a client, from what it is sent to the message that it sends. A pure function.

    It could run on the client: nothing here is of another client, of rows that this one does not hold, or of what the
    server knew in earlier rounds.

    Args:
        work: what the client computes.
        channel: what happens to its update on the way.
        received: what it was sent.
        own: what it has of its own.
        public: what everybody knows of the round.
        key: randomness nobody else has.
    """
    secret, noise = jax.random.split(key)
    frozen = FrozenAndMasks(received.frozen, received.masks) if received.masks else received.frozen
    data = own.data._replace(frozen=frozen) if jax.tree.leaves(frozen) else own.data
    output = work.update(received.broadcast, own.state.work, data, secret)
    update = output.update._replace(params=clear_pruned(output.update.params, received.masks))
    facts = {"weight": output.weight, "steps": output.steps, "loss": output.loss}
    view = client_view(own, public)._replace(link_state=own.state.channel, key=noise, **facts)
    message, kept = encode_message(channel, update, received.links, view)
    metrics = output.metrics
    if channel.metrics:
        metrics = metrics | channel.metrics(update, received.links, view)
    # a link that makes integers of what is not a number could hide it
    shown = all(jnp.issubdtype(jnp.result_type(x), jnp.inexact) for x in jax.tree.leaves(message))
    hidden = () if shown else update
    is_finite = tree.all_finite((output.weight, output.client_state, kept, hidden))
    return ClientRound(message, ClientState(output.client_state, kept), metrics, is_finite, output.weight)


def open_message(channel: Channel, message: Tree, links: Tree, sender: ClientView) -> tuple[Tree, jax.Array]:
    """The server's side of one message: (what it means, bool []: whether it is finite).

    Args:
        channel: the channel that the message came through.
        message: what the client sent.
        links: what each link had broadcast to the client.
        sender: what the server knows of the client; of its `drift` see `ClientView`.
    """
    if channel.decode_message:
        message = channel.decode_message(message, links, sender)
    message = jax.lax.optimization_barrier(message)
    return message, tree.all_finite(message)


def broadcast_model(plan: Plan, shared: Broadcast, touched: jax.Array | None, frozen: Tree = ()) -> Broadcast:
    """What the server makes of theta for the clients of a round: the rows that they touch, or all rows (`touched` is
    None, or codes are made of the whole model). frozen: see `Parametrization.frozen`."""
    assert plan.method.parametrization
    rows = None if plan.download else touched
    params = plan.method.parametrization.forward(shared.params, rows, *frozen_arguments(frozen))
    if rows is None:
        return plan.place.constrain(Broadcast(params, shared.extra), "server")
    return plan.place.constrain(Broadcast(params, tables.take_rows(shared.extra, rows)), "copied")


def simulate_client(plan: Plan, size: int, common: tuple, own: ClientInput, places: jax.Array | None = None) -> tuple:
    """What is sent to a client, its round, and what the server reads of its message: what is vmapped over a block.

    size: rows of the catalogue. common: what is the same for all. places: where the client's rows lie in those that
    are broadcast; None: these are all there are. Returns (message, what it keeps, whether all is finite, metrics).
    """
    shared, history, sent, frozen, number, cohort, round_key = common
    public = PublicRound(round_key, cohort, size)
    view = client_view(own, public)
    found = view if places is None else view._replace(rows=places)
    slices = jax.lax.optimization_barrier(receive_rows(plan, shared, history, number, found))
    pruning = plan.method.parametrization and plan.method.parametrization.pruning
    masks = find_masks(pruning, slices.params)
    links, frozen = tables.take_rows((sent, frozen), own.rows)
    received = ClientDownload(slices, links, frozen, masks)
    key = jax.random.fold_in(jax.random.fold_in(round_key, CLIENTS), own.id)
    done = client_round(plan.method.work, plan.channel, received, own, public, key)
    sender = view._replace(link_state=None, weight=done.weight)
    if plan.channel.decode_message:
        now = tree.to_compute_dtype(tables.take_rows(shared, own.rows)) if plan.history_length else slices
        sender = sender._replace(drift=tree.subtract(now.params, slices.params))
    message, is_finite = open_message(plan.channel, done.message, received.links, sender)
    return message, done.state, done.is_finite & is_finite, done.metrics


def receive_rows(plan: Plan, shared: Broadcast, history: Tree, number: jax.Array, client: ClientView) -> Broadcast:
    """The rows of the model that a client starts from: of the one it was sent, `age` rounds ago."""
    if plan.history_length:  # (version, rows) is one indexing, as (client, rows) is
        return tree.to_compute_dtype(
            tables.gather_client(history, (number - client.age) % plan.history_length, client.rows)
        )
    return (
        plan.download(shared, client) if plan.download else tree.to_compute_dtype(tables.take_rows(shared, client.rows))
    )


def run_client_block(
    plan: Plan,
    state: State,
    ids,
    present,
    touched,
    ages,
    key,
    block,
    client_states,
    broadcast: Broadcast | None = None,
    frozen: Tree = (),
) -> Messages:
    """All that happens on devices, one block of clients. Only messages leave, in `Plan.num_parts` parts.
    client_states: None to read them here. broadcast: see `broadcast_model`; None: what the
    server holds. frozen: see `Model.frozen`."""
    key, size, nobody = jax.random.fold_in(key, state.round), table_rows_of(plan, state), plan.num_clients
    who = ids.at[block.slots].get(mode="fill", fill_value=nobody)
    held, block = locate_rows(plan, state, block, touched)
    if client_states is None:
        client_states = jax.vmap(tables.gather_client, (None, 0, 0))(state.client_states, who, held)
    since = jnp.zeros_like(block.slots) if ages is None else ages.at[block.slots].get(mode="fill", fill_value=0)
    shared = sent_model(plan.method, state.shared) if broadcast is None else broadcast
    common = shared, state.model_history, broadcast_state(plan.channel, state.channel), frozen, state.round, ids, key
    rows = max(tables.num_rows(broadcast_shapes(plan, state.shared)), plan.frozen_rows)
    places = None if broadcast is None or touched is None or plan.download else block.rows
    each = plan.place.clients(lambda common, one: simulate_client(plan, rows, common, *one))
    own = ClientInput(who, client_states, held, block.num_train, block.data, since)
    messages, client_states, is_finite, metrics = each(common, (own, places))
    # an update that is not finite, or what would be sent of it, is discarded: as if the client had never reported
    counts = is_finite & present.at[block.slots].get(mode="fill", fill_value=False)
    ends = size if touched is None else touched.size, size, nobody
    parts = split_parts((block, counts, who, held, messages, client_states, metrics), plan.num_parts)
    padded = plan.padded_shape and tuple(-(-size // plan.num_parts) for size in plan.padded_shape)
    return plan.place_parts(
        map_parts(partial(flatten_messages, ends=ends, padded_shape=padded), plan.num_parts)(*parts)
    )


def locate_rows(plan: Plan, state: State, block: Block, touched: jax.Array | None) -> tuple[Any, Block]:
    """(int [m, K]: the rows of the catalogue that the clients of a block hold, the block with their positions in the
    total). Where sums are over pairs of rows, these are the rows."""
    size = table_rows_of(plan, state)
    if not has_pair_sums(plan.method):
        return block.rows if touched is None else touched.at[block.rows].get(mode="fill", fill_value=size), block
    held = jax.vmap(lambda rows: number_row_pairs(rows, tables.num_rows(state.shared)))(block.rows)
    return held, block._replace(rows=held if touched is None else find_pairs(held, touched, size))


def flatten_messages(block, counts, ids, held, messages, client_states, metrics, ends, padded_shape) -> Messages:
    """Lays what a block of m clients gave flat, nothing of those who do not count, padded to `padded_shape`."""
    total_rows, size, num_clients = ends  # past the end of the total, of the catalogue, of the clients
    owner = jnp.where(counts, ids, num_clients)
    places, held = (jnp.where(counts[:, None], x, end).ravel() for x, end in ((block.rows, total_rows), (held, size)))
    wide, long = padded_shape or (owner.size, held.size)

    def clear(x):
        return jnp.where(counts.reshape((-1,) + (1,) * (x.ndim - 1)), x, jnp.zeros_like(x))

    def fill(x, to, value):
        return jnp.pad(x, (0, to - x.size), constant_values=value)

    # rows of those who do not count lie past the end already: no pass over tables to clear them
    messages, client_states = tables.map_tables(lambda x: x, clear, (messages, client_states))
    messages, client_states = tables.pad_tables(tables.flatten_tables((messages, client_states)), wide, long)
    return Messages(
        messages,
        client_states,
        present=fill(counts, wide, False),
        sizes=fill(jnp.where(counts, (held.reshape(block.rows.shape) < size).sum(1), 0), wide, 0),
        slots=fill(block.slots, wide, np.iinfo(np.int32).max),
        ids=fill(owner, wide, num_clients),
        rows=fill(places, long, total_rows),
        held=fill(held, long, size),
        owner=fill(jnp.where(held < size, jnp.repeat(owner, block.rows.shape[1]), num_clients), long, num_clients),
        metrics=jax.tree.map(lambda x: clear(x).sum(0), metrics),
    )
