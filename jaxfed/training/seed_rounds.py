"""The rounds of several seeds as programs of many rounds, which train all seeds side by side."""

import time
from collections import deque
from collections.abc import Generator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxfed.config.build import RunParts
from jaxfed.core.round_loop import PlannedRound
from jaxfed.core.state import State
from jaxfed.core.types import Key
from jaxfed.training.log import log
from jaxfed.training.looped_rounds import list_results, list_stops, plan_rounds, run_programs
from jaxfed.training.rounds import Progress, RoundResult, make_run_keys
from jaxfed.training.session import Session


def launch_seed_rounds(sessions: Sequence[Session], stopped: Sequence[int]) -> list[Generator[RoundResult, None, None]]:
    """The rounds that are left of each of some runs that differ in their seeds, and have done equally many; see
    `train_by_programs`. stopped: signals that came."""
    parts, settings, progress = sessions[0].parts, sessions[0].settings, [each.progress for each in sessions]
    keys = [make_run_keys(each.seed).rounds for each in sessions]
    states = [each.state for each in sessions]
    log(f"compiling {len(sessions)} seeds as one program, which takes longest the first time")
    begin = time.perf_counter()
    compile_seeds(parts, states, keys)
    seconds = time.perf_counter() - begin
    for session in sessions:
        session.compiled, session.label = True, f"seed {session.settings.seed}  "
        session.progress.compile_seconds += seconds / len(sessions)
    todo = range(progress[0].round, settings.rounds)
    periods, seeds = (settings.evaluation.every, settings.run.checkpoint_every), [each.seed for each in sessions]
    return divide_results(run_seeds(parts, states, seeds, todo, keys, periods, stopped), progress)


def merge_plans(rounds: Sequence[PlannedRound]) -> PlannedRound:
    """Planned rounds of each seed as one program has them: [seeds, R, ...], with as many blocks of a kind for all as
    any seed fills [R, kinds]."""
    stacked = jax.tree.map(lambda *x: np.stack(x), *rounds)
    return stacked._replace(blocks_per_kind=stacked.blocks_per_kind.max(0))


def compile_seeds(parts: RunParts, states: Sequence[State], keys: Sequence[Key]) -> None:
    """Compiles the program of the rounds of several seeds by running none of them."""
    assert parts.loop
    assert parts.drawer
    empty = plan_rounds(parts, 0, 0, 1)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *states)
    planned = merge_plans([empty.rounds] * len(states))
    arguments = empty.room, stacked, parts.drawer.train_data(), planned, np.int32(0), jnp.stack(keys)
    jax.block_until_ready(parts.loop.seeds_program(*arguments))


def run_seeds(
    parts: RunParts,
    states: Sequence[State],
    seeds: Sequence[int],
    rounds: range,
    keys: Sequence[Key],
    periods: Sequence[int],
    stopped: Sequence[int] = (),
) -> Generator[list[list[RoundResult]], None, None]:
    """The rounds of each program, by seed; see `run_looped_rounds`.

    Args:
        parts: what the runs share.
        states, seeds, keys: of each run.
        rounds: of all.
        periods: numbers of rounds; a program ends at each multiple of one.
        stopped: signals that came; all runs are told the same of a program, so that they stop after the same round.

    Yields:
        [seeds][rounds of a program].
    """
    loop, drawer = parts.loop, parts.drawer
    assert loop
    assert drawer
    data, key, state = drawer.train_data(), jnp.stack(keys), jax.tree.map(lambda *x: jnp.stack(x), *states)

    def plan(start, stop):
        return [plan_rounds(parts, seed, start, stop) for seed in seeds]

    def launch(plans):
        nonlocal state
        planned, room = merge_plans([each.rounds for each in plans]), max(each.room for each in plans)
        num_rounds = np.int32(plans[0].stop - plans[0].start)
        state, figures = loop.seeds_program(room, state, data, planned, num_rounds, key)
        return figures

    for plans, figures, waited in run_programs(plan, launch, list_stops(rounds, loop.length, periods)):
        halt, share = sum(stopped[:1]), {name: seconds / len(seeds) for name, seconds in waited.items()}
        found = []
        for index, each in enumerate(plans):
            own_state, own = jax.tree.map(lambda x, index=index: x[index], (state, figures))
            results = list_results(parts, each._replace(stages=each.stages | share), own_state, own)
            found.append([done._replace(ready=done.ready._replace(halt=halt)) for done in results])
        yield found


def divide_results(
    programs: Generator[list[list[RoundResult]], None, None], progress: Sequence[Progress]
) -> list[Generator[RoundResult, None, None]]:
    """The rounds of each run, which may be asked for in any order, and left. Each run that is not left is charged an
    equal share of the seconds of a program.

    Args:
        programs: see `run_seeds`.
        progress: of each run.
    """
    waiting: list[deque[RoundResult]] = [deque() for _ in progress]
    running = set(range(len(progress)))

    def take(index):
        try:
            while True:
                if not waiting[index]:
                    begin = time.perf_counter()
                    if (found := next(programs, None)) is None:
                        return
                    seconds = time.perf_counter() - begin
                    progress[index].seconds -= seconds  # the run itself counts all of it
                    for other in running:
                        progress[other].seconds += seconds / len(running)
                        waiting[other].extend(found[other])
                yield waiting[index].popleft()
        finally:
            running.discard(index)
            waiting[index].clear()

    return [take(index) for index in range(len(progress))]
