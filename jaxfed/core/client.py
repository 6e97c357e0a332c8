"""The clients' side of a round: one pure function of one client, vmapped over a block of them."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxfed.core import tables, tree
from jaxfed.core.channel import broadcast_state, encode_message
from jaxfed.core.state import Plan, State, table_rows_of
from jaxfed.core.streams import CLIENTS
from jaxfed.core.types import Broadcast, ClientView, Messages, Tree


def run_client(plan: Plan, common: tuple, one: tuple) -> tuple:
    """One client's round, from the model it is sent to the message it sends. A pure function.

    common: what is the same for all; one: what is its own. Returns (message, what it keeps, whether all is finite,
    metrics).
    """
    (shared, past, sent, number, cohort, round_key), (id, age, mine, theirs, held, block) = common, one
    work, channel, size = plan.work, plan.channel, tables.num_rows(shared)
    secret, noise = jax.random.split(jax.random.fold_in(jax.random.fold_in(round_key, CLIENTS), id))
    me = ClientView((), None, round_key, id, jnp.float32(1), block.activity, held, size, cohort, age=age)
    slices = jax.lax.optimization_barrier(receive_rows(plan, shared, past, number, me))
    report = work.run(slices, mine, block.data, secret)
    me = me._replace(memory=theirs, key=noise, weight=report.weight, steps=report.steps, loss=report.loss)
    got = tables.take_rows(sent, held)
    message, theirs = encode_message(channel, report.update, got, me)
    metrics = report.metrics | (channel.metrics(report.update, got, me) if channel.metrics else {})
    if channel.decode_message:  # the server's side of codes that mean something alone only
        now = tree.to_compute_dtype(tables.take_rows(shared, held)) if plan.versions else slices
        seen = me._replace(memory=None, key=None, drift=tree.subtract(now.params, slices.params))
        message = channel.decode_message(message, got, seen)
    message = jax.lax.optimization_barrier(message)
    # a link that makes integers of what is not a number could hide it
    hidden = () if all(jnp.issubdtype(x.dtype, jnp.inexact) for x in jax.tree.leaves(message)) else report.update
    fine = tree.all_finite((report.weight, report.memory, message, theirs, hidden))
    return message, (report.memory, theirs), fine, metrics


def receive_rows(plan: Plan, shared: Broadcast, past: Tree, number: jax.Array, me: ClientView) -> Broadcast:
    """The rows of the model that a client starts from: of the one it was sent, `age` rounds ago."""
    if plan.versions:  # (version, rows) is one indexing, as (client, rows) is
        return tree.to_compute_dtype(tables.gather_client(past, (number - me.age) % plan.versions, me.rows))
    return plan.download(shared, me) if plan.download else tree.to_compute_dtype(tables.take_rows(shared, me.rows))


def run_client_block(plan: Plan, state: State, ids, present, touched, ages, key, block, memory) -> Messages:
    """All that happens on devices, one block of clients. Only the messages leave. memory: None to read it here."""
    key, size, nobody = jax.random.fold_in(key, state.round), table_rows_of(state), plan.num_clients
    who = ids.at[block.slots].get(mode="fill", fill_value=nobody)
    held = block.rows if touched is None else touched.at[block.rows].get(mode="fill", fill_value=size)
    if memory is None:
        memory = jax.vmap(tables.gather_client, (None, 0, 0))(state.memory, who, held)
    since = jnp.zeros_like(block.slots) if ages is None else ages.at[block.slots].get(mode="fill", fill_value=0)
    common = state.shared, state.past, broadcast_state(plan.channel, state.channel), state.round, ids, key
    each = plan.place.clients(lambda common, one: run_client(plan, common, one))
    messages, memory, fine, metrics = each(common, (who, since, *memory, held, block))
    # an update that is not finite, or what would be sent of it, is discarded: as if the client had never reported
    counts = fine & present.at[block.slots].get(mode="fill", fill_value=False)
    ends = size if touched is None else touched.size, size, nobody
    return plan.place.together(flatten_messages(block, counts, who, held, messages, memory, metrics, ends, plan.lay))


def flatten_messages(block, counts, ids, held, messages, memory, metrics, ends, lay) -> Messages:
    """Lays what a block of m clients gave flat, nothing of those who do not count, all of it padded to `lay`."""
    room, size, num_clients = ends  # past the end of the total, of the catalogue, of the clients
    owner = jnp.where(counts, ids, num_clients)
    places, held = (jnp.where(counts[:, None], x, end).ravel() for x, end in ((block.rows, room), (held, size)))
    wide, long = lay or (owner.size, held.size)

    def clear(x):
        return jnp.where(counts.reshape((-1,) + (1,) * (x.ndim - 1)), x, jnp.zeros_like(x))

    def fill(x, to, value):
        return jnp.pad(x, (0, to - x.size), constant_values=value)

    # rows of those who do not count lie past the end already: no pass over tables to clear them
    messages, memory = tables.map_tables(lambda x: x, clear, (messages, memory))
    messages, memory = tables.pad_tables(tables.flatten_tables((messages, memory)), wide, long)
    return Messages(
        messages,
        memory,
        present=fill(counts, wide, False),
        sizes=fill(jnp.where(counts, (held.reshape(block.rows.shape) < size).sum(1), 0), wide, 0),
        slots=fill(block.slots, wide, np.iinfo(np.int32).max),
        ids=fill(owner, wide, num_clients),
        rows=fill(places, long, room),
        held=fill(held, long, size),
        owner=fill(jnp.where(held < size, jnp.repeat(owner, block.rows.shape[1]), num_clients), long, num_clients),
        metrics=jax.tree.map(lambda x: clear(x).sum(0), metrics),
    )
