"""The federated round. Every algorithm is `federate(method, channel, num_clients)`.

    gather rows -> work.update -> channel.encode | sum -> channel.decode -> server.update
    one client, vmapped over a block           |  the server
    client.py                                  |  server.py

Four programs run a round: `run_client_block` (one compilation for each shape of block), `init_accumulator`,
`accumulate` and `server_update` (one each).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax

from jaxfed.core import client_store as stores
from jaxfed.core.channel import chain
from jaxfed.core.client import broadcast_model, run_client_block
from jaxfed.core.link import Channel, list_links
from jaxfed.core.method import Method
from jaxfed.core.parametrization import Parametrization, apply_parametrization
from jaxfed.core.placement import Placement, make_placement, one_in_flight
from jaxfed.core.round_loop import make_round_loops
from jaxfed.core.server import (
    Accumulator,
    accumulate,
    decode_sums,
    init_accumulator,
    server_update,
    solve_model,
)
from jaxfed.core.state import Plan, State, initial_state, table_rows_of
from jaxfed.core.tables import num_rows
from jaxfed.core.types import Broadcast, ClientView, Cohort, Key, Tree


class Algorithm(NamedTuple):
    """What runs federated rounds; `federate` makes it.

    Args:
        init: init(params, key) -> `State`. params: the model's shared parameters; theta, where the method has a
            `Parametrization`.
        step: step(state, cohort, key) -> (`State`, info): one round. It consumes (donates) its state.
        make_loops: make_loops(source, remake_method) -> what runs many rounds as one program, and what does so for
            several runs, see `make_round_loops`. None: there is none.
    """

    init: Callable[[Tree, Key], State]
    step: Callable[[State, Cohort, Key], tuple[State, dict[str, jax.Array]]]
    make_loops: Callable[..., tuple[Callable[..., Any], Callable[..., Any]]] | None = None


class FrozenParts(NamedTuple):
    """The frozen parts, on their devices."""

    clients: Tree  # `Model.frozen`
    server: Tree  # `Parametrization.frozen`


class Programs(NamedTuple):
    """What is compiled, see the functions of these names."""

    broadcast_model: Callable[..., Any] | None  # None: the server broadcasts what it holds
    run_client_block: Callable[..., Any]
    init_accumulator: Callable[..., Any]
    accumulate: Callable[..., Any]
    server_update: Callable[..., Any]  # of a closed form: `decode_sums`
    compare_clients: Callable[..., Any] | None


def federate(
    method: Method,
    channel: Channel,
    num_clients: int,
    placement: Placement | None = None,
    padded_shape: tuple[int, int] | None = None,
    client_memory_budget: float = 8e9,
    chunk: int = 0,
    store_on_host: bool = False,
    download: Callable[[Broadcast, ClientView], Broadcast] | None = None,
    capacity: int = 0,
    history_length: int = 0,
    frozen: Tree = (),
) -> Algorithm:
    """Builds an algorithm from a method and a channel.

    Args:
        method: What clients and the server compute.
        channel: What happens to updates on their way; it comes after the method's own links.
        num_clients: Number of all clients.
        placement: The devices, see `make_placement`. None: one device.
        padded_shape: (clients, table rows) that the part of every block is padded to: one program then adds all.
        client_memory_budget: Bytes of client states above which `init` raises ValueError.
        chunk: Number of blocks whose messages are in memory at once; only for sums. 0: all of a cohort's.
        store_on_host: What clients keep stays in the host's memory; a round then waits for its clients.
        download: What a client reads of the model that it is sent. None: the rows as they are.
        capacity: Number of padded blocks whose messages an aggregator that is no sum has a place for. 0: all.
        history_length: Number of past models that are kept, for cohorts that were sent different ones. 0: none.
        frozen: `Model.frozen`, which clients read and nobody trains.

    Returns:
        The algorithm.

    Raises:
        ValueError: the links, or the arguments, do not go together: one line that says what to do.

    Example:
        >>> import jaxfed as jf, optax
        >>> method = jf.algorithms.fedavg(jf.models.mf(num_items=20, dim=2), optax.sgd(0.1))
        >>> algorithm = jf.federate(method, jf.channels.mean(), num_clients=5)
    """
    plan = Plan(
        method=method.with_server(),
        channel=with_method_links(method, channel),
        num_clients=num_clients,
        place=placement or make_placement(),
        padded_shape=padded_shape,
        client_memory_budget=client_memory_budget,
        chunk=chunk,
        store_on_host=store_on_host,
        download=download or method.send_to_client,
        capacity=capacity,
        history_length=history_length,
        frozen_rows=num_rows(frozen),
    )
    check_plan(plan)
    placed = put_frozen(plan.place, method.parametrization, frozen)
    step = partial(run_round, plan, make_programs(plan), placed)
    return Algorithm(partial(initial_state, plan), step, partial(make_round_loops, plan, placed))


def with_method_links(method: Method, channel: Channel) -> Channel:
    """The channel behind the links of a method."""
    if method.links or not channel.claims.links:  # else a chain, or what wraps one, which a new chain would lose
        return chain(*method.links, channel)
    return channel


def put_frozen(place: Placement, parametrization: Parametrization | None, frozen: Tree) -> FrozenParts:
    """What is frozen as an argument of the programs: as a constant it would be compiled into each of them."""
    return FrozenParts(*place.constrain((frozen, parametrization.frozen if parametrization else ()), "server"))


def make_programs(plan: Plan) -> Programs:
    """The programs of a plan, each compiled when it is first run."""
    method = plan.method
    parametrized, in_turn = method.parametrization is not None, partial(one_in_flight, devices=plan.place.devices)
    return Programs(
        broadcast_model=in_turn(jax.jit(partial(broadcast_model, plan))) if parametrized else None,
        run_client_block=in_turn(jax.jit(partial(run_client_block, plan))),
        init_accumulator=in_turn(jax.jit(partial(init_accumulator, plan), static_argnums=(2, 3))),
        accumulate=in_turn(jax.jit(partial(accumulate, plan), donate_argnums=0)),
        server_update=in_turn(
            jax.jit(partial(decode_sums, plan), static_argnums=0, donate_argnums=2)
            if method.closed
            else jax.jit(partial(server_update, plan), donate_argnums=0)
        ),
        compare_clients=method.compare_clients and in_turn(jax.jit(method.compare_clients, donate_argnums=1)),
    )


def run_round(
    plan: Plan, programs: Programs, frozen: FrozenParts, state: State, cohort: Cohort, key: Key
) -> tuple[State, dict[str, jax.Array]]:
    """One round. Every block is a program of its own, so several run side by side."""
    check_cohort(plan, cohort)
    ids, asked, blocks, touched, ages = cohort
    end, store = table_rows_of(plan, state), state.client_states if stores.on_host(state.client_states) else None
    if store is not None:
        state = state._replace(client_states=())
    size = end if touched is None else len(touched)
    accumulated: Accumulator | None = None
    broadcast = programs.broadcast_model and programs.broadcast_model(state.shared, touched, frozen.server)
    for low in range(0, len(blocks), plan.chunk or len(blocks)):
        now = state if accumulated is None else state._replace(client_states=accumulated.client_states)
        parts = []
        for block in blocks[low:][: plan.chunk or None]:
            kept = None if store is None else plan.place.block(stores.read_block_clients(store, cohort, block, end))
            parts.append(
                programs.run_client_block(now, ids, asked, touched, ages, key, block, kept, broadcast, frozen.clients)
            )
        if store is not None:
            store = stores.write_clients(store, parts, plan.num_parts)
            parts = [part._replace(client_states=()) for part in parts]
        message_rows = sum(part.rows.size for part in parts)
        if accumulated is None:
            accumulated = programs.init_accumulator(
                parts[0], asked, size, message_capacity(plan, parts[0].rows.size, message_rows)
            )
            accumulated = accumulated._replace(client_states=state.client_states)
        for part in parts:
            accumulated = programs.accumulate(accumulated, part)
    assert accumulated  # a cohort has a block at least
    accumulated, client_states = accumulated._replace(client_states=()), accumulated.client_states
    state, reports = state._replace(client_states=client_states), (accumulated, ids, asked, touched, key)
    if plan.method.closed:
        read = state.channel, state.client_states, state.round
        sums, links, client_states, number, info = programs.server_update(end, *read, *reports)
        state = state._replace(channel=links, client_states=client_states, round=number)
        state, info = solve_model(plan, state, sums, info, touched)
    else:
        state, info = programs.server_update(state, *reports, frozen.server)
    if store is not None:
        state = state._replace(client_states=store)
    if programs.compare_clients:
        params = apply_parametrization(plan.method.parametrization, state.shared.params)
        kept, figures = programs.compare_clients(params, state.client_states.work)
        client_states = state.client_states._replace(work=plan.place.constrain(kept, "copied"))
        state, info = state._replace(client_states=client_states), info | figures
    return state, info


def check_plan(plan: Plan) -> None:
    """Raises ValueError for arguments of `federate` that do not go together."""
    if plan.chunk and not plan.aggregator.streams:
        raise ValueError("run.chunk: only sums can be added chunk by chunk, and a link has a reduction of its own")
    changed = [each.claims.name for each in list_links(plan.channel) if not each.claims.is_average and each.encode]
    if plan.method.compare_clients and changed:
        raise ValueError(f"the server compares what each client sends, and {changed[0]} changes it: keep to a mean")
    if plan.history_length and plan.download:
        raise ValueError(
            "clients of different rounds (cohort.buffered) are sent the model as it was: leave [[download]] and "
            "server.edges out"
        )
    if plan.history_length and plan.method.parametrization:
        raise ValueError(
            "clients of different rounds (cohort.buffered) are sent the model as it was, and of a parametrization the "
            "server keeps none: leave it out"
        )


def check_cohort(plan: Plan, cohort: Cohort) -> None:
    """Raises ValueError for a cohort that is not for this algorithm."""
    if uneven := [len(block.slots) for block in cohort.blocks if len(block.slots) % plan.num_parts]:
        raise ValueError(f"a block of {uneven[0]} places does not divide among {plan.num_parts} devices: pad it")
    if plan.channel.claims.needs_all_rows and cohort.rows is not None:
        raise ValueError(
            f"{plan.channel.claims.name}: it needs every row, and the cohort lists some: set server.lazy = false"
        )
    if cohort.ages is not None and not plan.history_length:
        raise ValueError("the cohort's clients were sent models of different rounds: pass history_length to federate")


def message_capacity(plan: Plan, each: int, needed: int) -> int:
    """Rows that a link's own reduction has places for, where a block has `each` and all of them `needed`."""
    if plan.aggregator.streams:
        return 0
    long = plan.capacity * each
    while long < needed:
        long = 2 * long or needed
    return long
