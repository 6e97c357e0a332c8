"""Programs of many rounds: a loop on the device, which asks the host for nothing between two rounds.

The host says who takes part in each round and how many blocks of each kind they fill; the data of a block are drawn
where its clients train. What happens in a round is what `federate.run_round` does, by the same functions.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxfed.core.client import broadcast_model, run_client_block
from jaxfed.core.method import Method
from jaxfed.core.placement import one_in_flight
from jaxfed.core.server import Accumulator, accumulate, init_accumulator, server_update
from jaxfed.core.state import Plan, State, table_rows_of
from jaxfed.core.types import Array, Block, Key, Tree


class PlannedRound(NamedTuple):
    """What the host says of a round; of R rounds, all arrays [R, ...]."""

    ids: Any  # int32 [M]: see `Cohort`
    present: Any  # bool [M]
    ages: Any  # int32 [M]; None: all are sent the present model
    blocks_per_kind: Any  # int32 [kinds]
    draw_inputs: Tree  # what `BlockSource` reads


class BlockSource(NamedTuple):
    """Where the blocks of a round come from, inside of a program.

    Args:
        kinds: Number of kinds of blocks, in the order in which they run.
        draw: draw(kind, data, planned, i) -> `Block`: block i of a kind; its rows are those of the catalogue.
        list_rows: list_rows(data, planned, room) -> (int32 [room]: the rows that the cohort holds, int32 [rows + 1]:
            the position of each row among them); None: rounds run on all rows.
        end: Rows of the tables; a row of a block from there on is unused.
    """

    kinds: int
    draw: Callable[[int, Tree, PlannedRound, Array], Block]
    list_rows: Callable[[Tree, PlannedRound, int], tuple[jax.Array, jax.Array]] | None
    end: int


def check_loop(plan: Plan) -> None:
    """Raises ValueError where rounds of an algorithm ask the host for something. A chunk does not: messages are added
    block by block."""
    reasons = {
        "the server solves for its model on the host": plan.method.closed is not None,
        "what clients keep lies on the host (run.client_store)": plan.store_on_host,
        "the server compares what each client sends": plan.method.compare_clients is not None,
        "a link has a reduction of its own": not plan.aggregator.streams,
    }
    if found := [reason for reason, holds in reasons.items() if holds]:
        raise ValueError(f"run.rounds_per_program: {found[0]}, so the host starts each round: set it to 1")


def run_planned_round(
    plan: Plan, source: BlockSource, room: int, frozen: Any, data: Tree, key: Key, state: State, planned: PlannedRound
) -> tuple[State, dict[str, jax.Array]]:
    """One round inside of a program; see `run_round`.

    Args:
        plan, frozen, key: as there; frozen: `FrozenParts`.
        source: draws the blocks.
        room: rows of the tables that the cohort may hold; static.
        data: what the source draws from.
        state: before the round.
        planned: who takes part.

    Returns:
        (the state after the round, its figures; among them `rows/held` int32 [M]: rows that each client holds).
    """
    touched = row_positions = None
    if source.list_rows:
        touched, row_positions = source.list_rows(data, planned, room)
    broadcast = broadcast_model(plan, state.shared, touched, frozen.server) if plan.method.parametrization else None
    client_states, state = state.client_states, state._replace(client_states=())

    def draw(kind: int, block_index: Any) -> Block:
        return source.draw(kind, data, planned, block_index)

    def run_block(block: Block, client_states: Tree) -> Any:
        if row_positions is not None:
            block = block._replace(rows=row_positions[block.rows])
        block = plan.place.block(block)  # its clients are divided among the devices
        read = state._replace(client_states=client_states)
        cohort = planned.ids, planned.present, touched, planned.ages
        return run_client_block(plan, read, *cohort, key, block, None, broadcast, frozen.clients)

    def add_block(kind: int, block_index: Any, heard: tuple[Accumulator, jax.Array]) -> tuple[Accumulator, jax.Array]:
        (accumulated, rows_held), block = heard, draw(kind, block_index)
        counts = (block.rows < source.end).sum(1, dtype=jnp.int32)
        rows_held = rows_held.at[block.slots].set(counts, mode="drop")
        return accumulate(plan, accumulated, run_block(block, accumulated.client_states)), rows_held

    messages = jax.eval_shape(lambda: run_block(draw(0, 0), client_states))
    size = table_rows_of(plan, state._replace(client_states=client_states)) if touched is None else touched.size
    accumulated = init_accumulator(plan, messages, planned.present, size, 0)._replace(client_states=client_states)
    heard = accumulated, jnp.zeros(len(planned.present), jnp.int32)
    for kind in range(source.kinds):
        heard = jax.lax.fori_loop(0, planned.blocks_per_kind[kind], partial(add_block, kind), heard)
    accumulated, rows_held = heard
    state = state._replace(client_states=accumulated.client_states)
    reports = accumulated._replace(client_states=()), planned.ids, planned.present, touched, key
    state, info = server_update(plan, state, *reports, frozen.server)
    end = table_rows_of(plan, state)
    union = jnp.int32(end) if touched is None else (touched < end).sum(dtype=jnp.int32)
    return state, info | {"rows/union": union, "rows/held": rows_held}


def run_planned_rounds(
    plan: Plan,
    source: BlockSource,
    room: int,
    frozen: Any,
    state: State,
    data: Tree,
    planned: PlannedRound,
    num_rounds: Array,
    key: Key,
) -> tuple[State, dict[str, jax.Array]]:
    """The first `num_rounds` of R planned rounds.

    Args:
        plan, source, room, frozen, state, data, key: see `run_planned_round`.
        planned: of R rounds.
        num_rounds: int []: at most R. It is no part of the program, which serves any number up to R.

    Returns:
        (the state after them, figures [R, ...]).
    """

    @jax.jit  # traced once, though it is also asked for its shapes
    def run(state: State, round_index: Any) -> tuple[State, dict[str, jax.Array]]:
        planned_round = jax.tree.map(lambda x: x[round_index], planned)
        return run_planned_round(plan, source, room, frozen, data, key, state, planned_round)

    def run_and_record(round_index: Any, state_and_figures: tuple) -> tuple:
        state, figures = state_and_figures
        state, info = run(state, round_index)
        return state, jax.tree.map(lambda rows, x: rows.at[round_index].set(x), figures, info)

    first = jnp.int32(0)  # of the type that the loop counts in: a Python number would have `run` traced again
    info = jax.eval_shape(run, state, first)[1]
    figures = jax.tree.map(lambda x: jnp.zeros((len(planned.present), *x.shape), x.dtype), info)
    return jax.lax.fori_loop(first, num_rounds, run_and_record, (state, figures))


def make_round_loops(
    plan: Plan, frozen: Any, source: BlockSource, remake_method: Callable[[dict[str, Any]], Method] | None = None
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What runs many rounds as one program, and what runs those of several runs side by side.

    Args:
        plan, frozen: of the algorithm.
        source: draws the blocks.
        remake_method: remake_method(hyperparameters) -> the method with other hyper-parameters of its optimisers.
            None: they are always the same.

    Returns:
        (of one run, of S runs): program(room, state, data, planned, num_rounds, key), see `run_planned_rounds`, and
        program(room, state, data, planned, num_rounds, key, hyperparameters). Both consume their state, and are
        compiled for each room. Of S runs, states, planned rounds, keys and figures have a leading axis [S], but for
        `blocks_per_kind`, which is what any of the runs needs, the same for all. hyperparameters: {name: float [S]},
        what `remake_method` is told; empty: nothing. They have JAX's weak type, so that tables of 16 bits keep theirs.

    Raises:
        ValueError: rounds need the host.
    """
    check_loop(plan)
    plan = plan._replace(padded_shape=None)  # no part of the program adds blocks of several kinds

    def run(room, state, data, planned, num_rounds, key, frozen, plan=plan):
        return run_planned_rounds(plan, source, room, frozen, state, data, planned, num_rounds, key)

    def run_jointly(room, state, data, planned, num_rounds, key, hyperparameters, frozen):
        by_run = PlannedRound(ids=0, present=0, ages=0, blocks_per_kind=None, draw_inputs=0)

        def run_one(state, planned, key, values):
            own = plan._replace(method=remake_method(values).with_server()) if remake_method and values else plan
            return run(room, state, data, planned, num_rounds, key, frozen, own)

        return jax.vmap(run_one, (0, by_run, 0, 0))(state, planned, key, hyperparameters)

    def compile_lazily(function):
        # frozen parts as an argument: constants would be compiled into the program
        program = partial(jax.jit(function, static_argnums=0, donate_argnums=1), frozen=frozen)
        return one_in_flight(program, plan.place.devices)

    return compile_lazily(run), compile_lazily(run_jointly)
