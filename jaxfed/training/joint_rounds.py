"""The rounds of several runs, side by side in programs of many rounds. The runs differ in their seeds, and in
hyper-parameters of their optimisers."""

import time
from collections import deque
from collections.abc import Generator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfed.config.build import RunParts
from jaxfed.config.hyperparameters import find_different_hyperparameters
from jaxfed.core.round_loop import PlannedRound
from jaxfed.core.state import State
from jaxfed.core.types import Key
from jaxfed.training.log import log
from jaxfed.training.looped_rounds import list_results, list_stops, plan_rounds, run_programs
from jaxfed.training.rounds import Progress, RoundResult, make_run_keys
from jaxfed.training.session import Session

BRANCHES = (  # Python code asks for a value that is not known yet
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)


class JointRuns(NamedTuple):
    """Runs whose rounds are those of one program."""

    parts: RunParts  # of the first; those of the others differ from them in hyper-parameters of optimisers alone
    seeds: list[int]
    keys: list[Key]
    hyperparameters: dict[str, list[float]]  # those that differ, of each run, by their dotted keys


def launch_joint_rounds(
    sessions: Sequence[Session], stopped: Sequence[int]
) -> list[Generator[RoundResult, None, None]]:
    """The rounds that are left of each of some runs, see `train_by_programs`.

    Args:
        sessions: The runs have done equally many rounds, and differ in their seeds and in hyper-parameters of their
            optimisers, of which `find_fixed_hyperparameters` names none.
        stopped: signals that came.
    """
    settings, progress = sessions[0].settings, [each.progress for each in sessions]
    runs = JointRuns(
        sessions[0].parts,
        [each.seed for each in sessions],
        [make_run_keys(each.seed).rounds for each in sessions],
        find_different_hyperparameters([each.settings for each in sessions]),
    )
    states = [each.state for each in sessions]
    log(f"compiling {describe_runs(runs)} as one program, which takes longest the first time")
    begin = time.perf_counter()
    compile_joint_program(runs, states)
    seconds = time.perf_counter() - begin
    for index, session in enumerate(sessions):
        own = "".join(f"{key.split('.', 1)[1]}={values[index]:g}  " for key, values in runs.hyperparameters.items())
        session.compiled, session.label = True, f"seed {session.settings.seed}  {own}"
        session.progress.compile_seconds += seconds / len(sessions)
    todo = range(progress[0].round, settings.rounds)
    periods = settings.evaluation.every, settings.run.checkpoint_every
    return divide_results(run_joint_rounds(runs, states, todo, periods, stopped), progress)


def describe_runs(runs: JointRuns) -> str:
    """How many seeds a program has, or how many runs."""
    return f"{len(runs.seeds)} runs" if runs.hyperparameters else f"{len(runs.seeds)} seeds"


def find_fixed_hyperparameters(parts: RunParts, values: dict[str, list[float]]) -> list[str]:
    """The dotted keys of hyper-parameters that cannot be traced, since Python code branches on them, such as a momentum
    that may be 0. Runs of one program must have the same values.

    Args:
        parts: of a run.
        values: of the runs, by their dotted keys.
    """
    assert parts.loop
    if (remake_method := parts.loop.remake_method) is None:
        return [*values]

    def is_fixed(key: str) -> bool:
        try:
            jax.eval_shape(lambda x: remake_method({key: x}).with_server() and x, values[key][0])
        except BRANCHES:
            return True
        return False

    return [key for key in values if is_fixed(key)]


def merge_plans(rounds: Sequence[PlannedRound]) -> PlannedRound:
    """Planned rounds of each run as one program has them: [S, R, ...], with as many blocks of a kind for all as any
    run fills [R, kinds]."""
    stacked = jax.tree.map(lambda *x: np.stack(x), *rounds)
    return stacked._replace(blocks_per_kind=stacked.blocks_per_kind.max(0))


def stack_inputs(runs: JointRuns, states: Sequence[State]) -> tuple[State, Key, dict[str, jax.Array]]:
    """(states, keys, hyper-parameters) of all runs, with a leading axis."""
    # `array` would make them strongly typed, and tables of fewer bits would lose their type
    found = {key: jnp.stack([jnp.asarray(each) for each in values]) for key, values in runs.hyperparameters.items()}
    return jax.tree.map(lambda *x: jnp.stack(x), *states), jnp.stack(runs.keys), found


def compile_joint_program(runs: JointRuns, states: Sequence[State]) -> None:
    """Compiles the program of the rounds of several runs by running none of them."""
    loop, drawer = runs.parts.loop, runs.parts.drawer
    assert loop
    assert drawer
    empty, (state, key, hyperparameters) = plan_rounds(runs.parts, 0, 0, 1), stack_inputs(runs, states)
    planned = merge_plans([empty.rounds] * len(states))
    arguments = empty.room, state, drawer.train_data(), planned, np.int32(0), key, hyperparameters
    jax.block_until_ready(loop.joint_program(*arguments))


def run_joint_rounds(
    runs: JointRuns,
    states: Sequence[State],
    rounds: range,
    periods: Sequence[int],
    stopped: Sequence[int] = (),
) -> Generator[list[list[RoundResult]], None, None]:
    """The rounds of each program, by run; see `run_looped_rounds`.

    Args:
        runs: what runs.
        states: of each run.
        rounds: of all.
        periods: numbers of rounds; a program ends at each multiple of one.
        stopped: signals that came; all runs are told the same of a program, so that they stop after the same round.

    Yields:
        [runs][rounds of a program].
    """
    loop, drawer = runs.parts.loop, runs.parts.drawer
    assert loop
    assert drawer
    data, (state, key, hyperparameters) = drawer.train_data(), stack_inputs(runs, states)

    def plan(start, stop):
        return [plan_rounds(runs.parts, seed, start, stop) for seed in runs.seeds]

    def launch(plans):
        nonlocal state
        planned, room = merge_plans([each.rounds for each in plans]), max(each.room for each in plans)
        num_rounds = np.int32(plans[0].stop - plans[0].start)
        state, figures = loop.joint_program(room, state, data, planned, num_rounds, key, hyperparameters)
        return figures

    for plans, figures, waited in run_programs(plan, launch, list_stops(rounds, loop.length, periods)):
        halt, share = sum(stopped[:1]), {name: seconds / len(states) for name, seconds in waited.items()}
        found = []
        for index, each in enumerate(plans):
            own_state, own = jax.tree.map(lambda x, index=index: x[index], (state, figures))
            results = list_results(runs.parts, each._replace(stages=each.stages | share), own_state, own)
            found.append([done._replace(ready=done.ready._replace(halt=halt)) for done in results])
        yield found


def divide_results(
    programs: Generator[list[list[RoundResult]], None, None], progress: Sequence[Progress]
) -> list[Generator[RoundResult, None, None]]:
    """The rounds of each run, which may be asked for in any order, and left. Each run that is not left is charged an
    equal share of the seconds of a program.

    Args:
        programs: see `run_joint_rounds`.
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
