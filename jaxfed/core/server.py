"""The server's side of a round: hear one block after the other, then undo the links and move the model."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxfed.core import tables, tree
from jaxfed.core.aggregate import Capacity, sum_parts
from jaxfed.core.client_work import identity
from jaxfed.core.link import Channel, decode_total
from jaxfed.core.method import Method
from jaxfed.core.pairs import PairSums, count_pairs
from jaxfed.core.parametrization import make_pull_back
from jaxfed.core.placement import Placement, flatten_parts, map_parts
from jaxfed.core.pruning import prune_params
from jaxfed.core.state import Plan, State, has_pair_sums, table_rows_of
from jaxfed.core.streams import STORE
from jaxfed.core.types import Array, Broadcast, Key, Mean, Messages, RoundView, Tree


class Accumulator(NamedTuple):
    """What the server has heard so far in a round. Of several parts (`Plan.num_parts`) all arrays but the client
    store have a leading axis: each device adds what its own clients send, and `combine_parts` makes one of them."""

    total: Tree  # of the aggregator: a running sum, tables whole; or all messages beside each other
    client_states: Tree  # the client store; new rows of its tables are written, and of one part all that is new
    new_states: Tree  # of several parts: what is to be written into other leaves of the store: [M, ...]; else [0, ...]
    present: jax.Array  # bool [M]
    metrics: dict[str, Mean]
    rows: jax.Array  # int [M]: table rows that each has sent
    sent: jax.Array  # bool [rows of the total]: whether anybody did


def init_accumulator(plan: Plan, messages: Messages, asked: jax.Array, rows: int, message_rows: int) -> Accumulator:
    """What the server has heard before anybody is heard, but for the client store; placed as `accumulate` gives it
    back, or that compiles twice.

    messages: of any block, for their shapes. rows: of the total's tables. message_rows: see `Capacity`.
    """

    def empty(size, x):
        return jnp.zeros((size, *x.shape[1:]), x.dtype)

    part, parts = messages, plan.num_parts
    if parts > 1:
        part = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), messages)
    total = plan.aggregator.init(part, Capacity(rows, asked.size, message_rows))
    waiting = asked.size if parts > 1 else 0
    new_states = tables.map_tables(partial(empty, 0), partial(empty, waiting), part.client_states)
    present, metrics, sizes = tree.zeros_like((asked, part.metrics, jnp.zeros(len(asked), jnp.int32)))
    one = Accumulator(total, (), new_states, present, metrics, sizes, jnp.zeros(rows, bool))
    return plan.place_parts(one if parts == 1 else jax.tree.map(lambda x: jnp.stack([x] * parts), one))


def accumulate(plan: Plan, accumulated: Accumulator, messages: Messages) -> Accumulator:
    """Adds one block's messages to what the server has heard, each device those of its own clients. Of what clients
    keep, tables are written here on all devices, and other leaves by `write_client_states`; of one part both here."""

    def add(heard, messages):
        return Accumulator(
            plan.aggregator.add(heard.total, messages),
            (),
            tables.scatter_client_leaves(heard.new_states, messages.slots, messages.client_states),
            heard.present.at[messages.slots].set(messages.present, mode="drop"),
            jax.tree.map(jnp.add, heard.metrics, messages.metrics),
            heard.rows.at[messages.slots].set(messages.sizes, mode="drop"),
            heard.sent.at[messages.rows].set(True, mode="drop"),
        )

    kept = flatten_parts((messages.owner, messages.held, messages.client_states), plan.num_parts)
    client_states = tables.scatter_client_tables(accumulated.client_states, *plan.place.constrain(kept, "copied"))
    if plan.num_parts == 1:
        client_states = tables.scatter_client_leaves(client_states, messages.ids, messages.client_states)
    heard = map_parts(add, plan.num_parts)(accumulated._replace(client_states=()), messages)
    return plan.place_parts(heard)._replace(client_states=client_states)


def combine_parts(plan: Plan, accumulated: Accumulator) -> Accumulator:
    """One of what each device has heard: the only sum over devices in a round."""
    if plan.num_parts == 1 or not plan.aggregator.combine:
        return accumulated
    total = plan.aggregator.combine(accumulated.total)
    others = sum_parts(accumulated._replace(total=(), client_states=()))
    return plan.place.constrain(others._replace(total=total), "copied")


def write_client_states(plan: Plan, store: Tree, ids: jax.Array, accumulated: Accumulator) -> Tree:
    """The client store with what those who reported keep from now on. What `accumulate` writes is written already."""
    if plan.num_parts == 1:
        return store
    at = jnp.where(accumulated.present, ids, plan.num_clients)
    return tables.scatter_client_leaves(store, at, accumulated.new_states)


class ServerMoves(NamedTuple):
    """What the server makes of a round, for the rows of the tables that it was given."""

    delta: Tree  # to be added to the parameters
    extra: Tree  # broadcast beside the model from now on
    opt: Tree  # the server optimiser's state
    links: Tree  # the links' states


def server_round(
    method: Method,
    channel: Channel,
    broadcast: Broadcast,
    opt: Tree,
    links: Tree,
    aggregate: Tree,
    round: RoundView,
    pull_back: Callable[[Tree], Tree] = identity,
) -> tuple[ServerMoves, dict[str, jax.Array]]:
    """The server's round: undoes the links on the aggregate, and asks the server optimiser for a step. A pure function.

    Args:
        method: whose server this is.
        channel: the channel that the messages came through.
        broadcast: the model (theta, where there is a parametrization) and what rides along, in the dtype that is
            computed with.
        opt: the state of `method.server`.
        links: the states of the links.
        aggregate: of all messages, see `Channel.aggregator`.
        round: who was asked, and who reported.
        pull_back: from an update of params to that of theta (`parametrization.make_pull_back`).

    Returns:
        (what moves, figures).
    """
    update, links, info = decode_total(channel, aggregate, links, round)
    delta, opt = method.server.update(pull_back(update.params), opt, broadcast.params)
    if method.move_params:
        delta = method.move_params(broadcast, delta, update.extra)
    return ServerMoves(delta, method.move_extra(broadcast.extra, update.extra), opt, links), info


def decode_sums(
    plan: Plan,
    end: int,
    links: Tree,
    client_states: Tree,
    number: jax.Array,
    accumulated: Accumulator,
    ids: jax.Array,
    asked: jax.Array,
    touched: jax.Array | None,
    key: Key,
) -> tuple[Tree, Tree, Tree, jax.Array, dict[str, jax.Array]]:
    """What the server of a closed form reads of round `number`: (the sums, the links' states, the client store, the
    number of the next round, figures). end: of the rows."""
    accumulated = combine_parts(plan, accumulated)
    client_states = write_client_states(plan, client_states, ids, accumulated)
    seen = links if touched is None else tables.take_rows(links, touched)
    round = RoundView(jax.random.fold_in(key, number), ids, accumulated.present)
    summed = plan.aggregator.result(accumulated.total, accumulated.sent.size)
    update, moved, info = decode_total(plan.channel, summed, seen, round)
    at = None if touched is None else jnp.where(accumulated.sent, touched, end)
    links = plan.place.constrain(tables.put_rows(links, at, moved), "server")
    return update.params, links, client_states, number + 1, round_figures(plan, accumulated, ids, asked) | info


def solve_model(
    plan: Plan, state: State, sums: Tree, info: dict[str, Any], touched: Array | None
) -> tuple[State, dict[str, Any]]:
    """(the state after a round of a closed form, figures). The model is solved on the host, unless nobody reported.

    Where there are candidates to choose from, the sums are among the figures.
    """
    closed, shared = plan.method.closed, state.shared
    assert closed
    if np.asarray(info["clients/present"]).any():
        sums = read_sums(plan, state, sums, touched)
        if closed.candidates:
            info = info | {"sums": sums}
        else:
            shared = Broadcast(put_solution(plan.place, closed.solve(sums, shared.params)))
    return state._replace(shared=shared), info


def put_solution(place: Placement, params: Tree) -> Tree:
    """Parameters that the host has solved for, laid out as the server keeps them."""
    return place.constrain(params, "server")


def read_sums(plan: Plan, state: State, sums: Tree, touched: Array | None) -> Tree:
    """The sums over clients as `ClosedForm.solve` takes them."""
    if not has_pair_sums(plan.method):
        return sums
    size, values = tables.num_rows(state.shared), np.asarray(sums["tables"]["pairs"].rows)
    ids = np.arange(len(values)) if touched is None else np.asarray(touched, np.int64)
    used = np.searchsorted(ids, count_pairs(size))  # past the end: unused
    return {**sums, "tables": {"pairs": PairSums(ids[:used], values[:used], size)}}


def server_update(
    plan: Plan,
    state: State,
    accumulated: Accumulator,
    ids: jax.Array,
    asked: jax.Array,
    touched: jax.Array | None,
    key: Key,
    frozen: Tree = (),
) -> tuple[State, dict[str, jax.Array]]:
    """Undoes the links and moves the model, of its tables only the rows touched. frozen: see
    `Parametrization.frozen`."""
    accumulated = combine_parts(plan, accumulated)
    shared, opt, links, client_states, number, history = state
    client_states = write_client_states(plan, client_states, ids, accumulated)
    seen = (shared, opt, links) if touched is None else tables.take_rows((shared, opt, links), touched)
    seen = tree.to_compute_dtype(seen[0]), *seen[1:]
    round = RoundView(jax.random.fold_in(key, number), ids, accumulated.present)
    summed = plan.aggregator.result(accumulated.total, accumulated.sent.size)
    pull_back = make_pull_back(plan.method.parametrization, shared.params, touched, accumulated.sent, frozen)
    moves, info = server_round(plan.method, plan.channel, seen[0], seen[1], seen[2], summed, round, pull_back)
    # what only absent clients hold rests, as if they had not been asked
    at = None if touched is None else jnp.where(accumulated.sent, touched, table_rows_of(plan, state))
    if tree.has_storage_dtype(shared):
        after = Broadcast(optax.apply_updates(seen[0].params, moves.delta), moves.extra)
        shared = tables.put_rows(shared, at, tree.stochastic_cast(after, shared, jax.random.fold_in(round.key, STORE)))
    else:  # an optimiser that does not ask for the model never has its rows read
        shared = Broadcast(
            tables.add_rows(shared.params, at, moves.delta), tables.put_rows(shared.extra, at, moves.extra)
        )
    if plan.method.parametrization:
        pruning = plan.method.parametrization.pruning
        shared = shared._replace(params=prune_params(pruning, state.shared.params, shared.params, number + 1))
    opt, links = tables.put_rows((opt, links), at, (moves.opt, moves.links))
    shared, opt, links = plan.place.constrain((shared, opt, links), "server")
    number += 1
    if plan.history_length:
        history = jax.tree.map(lambda x, new: x.at[number % plan.history_length].set(new), history, shared)
    return State(shared, opt, links, client_states, number, history), round_figures(
        plan, accumulated, ids, asked
    ) | info


def round_figures(plan: Plan, accumulated: Accumulator, ids: jax.Array, asked: jax.Array) -> dict[str, jax.Array]:
    """What the clients reported, and how many did."""
    counts = {"clients/reported": accumulated.present.sum(), "clients/refused": (asked & ~accumulated.present).sum()}
    counts |= {"clients/dropped": ((ids < plan.num_clients) & ~asked).sum()}
    counts |= {"clients/present": accumulated.present, "rows/sent": accumulated.rows}  # [M], as are no other figures
    return plan.method.summarize_metrics({name: mean.value for name, mean in accumulated.metrics.items()}) | counts
