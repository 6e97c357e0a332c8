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
from jaxfed.core.client import run_client_block
from jaxfed.core.link import Channel, list_links
from jaxfed.core.method import Method
from jaxfed.core.placement import Placement, make_placement, one_in_flight
from jaxfed.core.server import Accumulator, accumulate, init_accumulator, server_update
from jaxfed.core.state import Plan, State, initial_state, table_rows_of
from jaxfed.core.types import Broadcast, ClientView, Cohort, Key, Tree


class Algorithm(NamedTuple):
    """init(params, key) -> State; step(state, cohort, key) -> (State, info). A step consumes (donates) its state."""

    init: Callable[[Tree, Key], State]
    step: Callable[[State, Cohort, Key], tuple[State, dict[str, jax.Array]]]


class Programs(NamedTuple):
    """What is compiled, see the functions of these names."""

    run_client_block: Callable[..., Any]
    init_accumulator: Callable[..., Any]
    accumulate: Callable[..., Any]
    server_update: Callable[..., Any]
    compare_clients: Callable[..., Any] | None


def federate(
    method: Method,
    channel: Channel,
    num_clients: int,
    placement: Placement | None = None,
    padded_shape: tuple[int, int] | None = None,
    budget: float = 8e9,
    chunk: int = 0,
    host: bool = False,
    download: Callable[[Broadcast, ClientView], Broadcast] | None = None,
    room: int = 0,
    versions: int = 0,
) -> Algorithm:
    """Builds an algorithm from a method and a channel, which comes after the method's own links.

    num_clients: rows of the client store.
    padded_shape: (clients, table rows) to which the part of every block is padded, so that one program adds all shapes.
    budget: bytes of client memory above which `init` raises ValueError.
    chunk: blocks whose messages are held at a time, for memory; 0: all of a cohort's. Only for sums.
    host: the client store stays in the host's memory (`client_store`); a round then waits for its clients.
    download: what a client reads of the model that it is sent (`download`); None: the model's rows as they are.
    room: for a reduction of a link's own, blocks padded to `padded_shape` whose messages find room side by side, so
    that one program reduces cohorts of fewer blocks, too; for more the room is doubled. 0: as many as there are.
    versions: of the model that are kept, for cohorts whose clients were sent different ones (`Cohort.ages`); each takes
    a copy of the model a round, and counts as client memory does. 0: all are sent the present one.
    """
    if (
        method.links or not channel.claims.links
    ):  # else a chain, or what wraps one and would be lost by chaining it anew
        channel = chain(*method.links, channel)
    placed = placement or make_placement()
    plan = Plan(method, channel, num_clients, placed, padded_shape, budget, chunk, host, download, room, versions)
    if chunk and not plan.aggregator.streams:
        raise ValueError("run.chunk: only sums can be added chunk by chunk, and a link has a reduction of its own")
    check_comparison(method, channel)
    if versions and download:
        raise ValueError(
            "clients of different rounds (cohort.buffered) are sent the model as it was: leave [[download]] and "
            "server.edges out"
        )
    programs = Programs(
        run_client_block=one_in_flight(jax.jit(partial(run_client_block, plan))),
        init_accumulator=one_in_flight(jax.jit(partial(init_accumulator, plan), static_argnums=(2, 3))),
        accumulate=one_in_flight(jax.jit(partial(accumulate, plan), donate_argnums=0)),
        server_update=one_in_flight(jax.jit(partial(server_update, plan), donate_argnums=0)),
        compare_clients=method.compare_clients and one_in_flight(jax.jit(method.compare_clients, donate_argnums=1)),
    )
    return Algorithm(partial(initial_state, plan), partial(run_round, plan, programs))


def run_round(
    plan: Plan, programs: Programs, state: State, cohort: Cohort, key: Key
) -> tuple[State, dict[str, jax.Array]]:
    """One round. Every block is a program of its own, so several run side by side."""
    check_cohort(plan, cohort)
    ids, asked, blocks, touched, ages = cohort
    end, store = table_rows_of(state), state.memory if stores.on_host(state.memory) else None
    if store is not None:
        state = state._replace(memory=())
    size = end if touched is None else len(touched)
    tally: Accumulator | None = None
    for low in range(0, len(blocks), plan.chunk or len(blocks)):
        now = state if tally is None else state._replace(memory=tally.memory)
        parts = []
        for block in blocks[low:][: plan.chunk or None]:
            kept = None if store is None else plan.place.block(stores.read_block_clients(store, cohort, block, end))
            parts.append(programs.run_client_block(now, ids, asked, touched, ages, key, block, kept))
        message_rows = sum(part.rows.size for part in parts)
        if tally is None:
            tally = programs.init_accumulator(
                parts[0], asked, size, message_capacity(plan, parts[0].rows.size, message_rows)
            )
            tally = tally._replace(memory=state.memory)
        for part in parts:
            tally = programs.accumulate(tally, part if store is None else part._replace(memory=()))
        if store is not None:
            store = stores.write_clients(store, parts)
    assert tally  # a cohort has a block at least
    tally, memory = tally._replace(memory=()), tally.memory
    state, info = programs.server_update(state._replace(memory=memory), tally, ids, asked, touched, key)
    if store is not None:
        state = state._replace(memory=store)
    if programs.compare_clients:
        kept, figures = programs.compare_clients(state.shared.params, state.memory.work)
        state, info = state._replace(memory=state.memory._replace(work=plan.place.common(kept))), info | figures
    return state, info


def check_comparison(method: Method, channel: Channel) -> None:
    """Raises ValueError for a channel on which the server does not see each update as it was, though it compares."""
    changed = [each.claims.name for each in list_links(channel) if not each.claims.is_average and each.encode]
    if method.compare_clients and changed:
        raise ValueError(f"the server compares what each client sends, and {changed[0]} changes it: keep to a mean")


def check_cohort(plan: Plan, cohort: Cohort) -> None:
    """Raises ValueError for a cohort that is not for this algorithm."""
    if plan.channel.claims.needs_all_rows and cohort.rows is not None:
        raise ValueError(
            f"{plan.channel.claims.name}: it needs every row, and the cohort lists some: set server.lazy = false"
        )
    if cohort.ages is not None and not plan.versions:
        raise ValueError("the cohort's clients were sent models of different rounds: federate with versions")


def message_capacity(plan: Plan, each: int, needed: int) -> int:
    """Rows for which a link's own reduction finds room, where a block has `each` and all of them `needed`."""
    if plan.aggregator.streams:
        return 0
    long = plan.room * each
    while long < needed:
        long = 2 * long or needed
    return long
