"""Programs of many rounds: what the host plans of them, and what it reads when they have run."""

import math
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxfed.config.build import RunParts
from jaxfed.core.round_loop import PlannedRound
from jaxfed.core.state import State
from jaxfed.core.types import Cohort, Key
from jaxfed.data.device_rounds import choose_room, plan_device_round
from jaxfed.sampling.cohort import sample_cohort
from jaxfed.training.rounds import PreparedRound, RoundResult
from jaxfed.training.timing import time_stage


class ProgramPlan(NamedTuple):
    """Rounds that run as one program."""

    start: int
    stop: int
    rounds: PlannedRound  # [R, ...], as many as any program has; those past `stop` do not run
    times: list[float | None]  # simulated seconds at the end of each
    room: int  # rows that a cohort may hold; with another number the program is compiled again
    stages: dict[str, float]  # seconds


def plan_rounds(parts: RunParts, seed: int, start: int, stop: int) -> ProgramPlan:
    """What the program of some rounds is told."""
    assert parts.loop
    population, stages = parts.data.population, dict[str, float]()
    with time_stage(stages, "sample"):
        sampled = [sample_cohort(parts.sampler, seed, number) for number in range(start, stop)]
    with time_stage(stages, "pack"):
        rounds = [
            plan_device_round(population, parts.batching, parts.loop.shapes, ids, present, ages, seed, number)
            for number, (ids, present, ages, _) in enumerate(sampled, start)
        ]
        rounds += rounds[-1:] * (parts.loop.length - len(rounds))
        room = choose_room(population, parts.batching, parts.loop.room, [ids for ids, *_ in sampled])
    stacked = jax.tree.map(lambda *x: np.stack(x), *rounds)
    return ProgramPlan(start, stop, stacked, [time for *_, time in sampled], room, stages)


def find_stop(start: int, stop: int, length: int, periods: Sequence[int]) -> int:
    """The round before which a program ends: the host is asked after so many rounds, and at each multiple of a
    period."""
    return min(stop, start + length, *(start - start % period + period for period in periods))


def list_stops(rounds: range, length: int, periods: Sequence[int]) -> list[tuple[int, int]]:
    """(first round, round before which it ends) of each program of some rounds, see `find_stop`."""
    stops, start = [], rounds.start
    while start < rounds.stop:
        stops.append((start, find_stop(start, rounds.stop, length, periods)))
        start = stops[-1][1]
    return stops


def compile_loop(parts: RunParts, state: State, key: Key) -> None:
    """Compiles the program of rounds by running none of them."""
    assert parts.loop
    assert parts.drawer
    empty = plan_rounds(parts, 0, 0, 1)
    copy = jax.tree.map(lambda x: x.copy(), state)
    jax.block_until_ready(
        parts.loop.program(empty.room, copy, parts.drawer.train_data(), empty.rounds, np.int32(0), key)
    )


def run_looped_rounds(
    parts: RunParts, state: State, seed: int, rounds: range, key: Key, periods: Sequence[int]
) -> Generator[RoundResult, None, None]:
    """As `run_rounds`; the state of each result is that after the last round of its program. periods: numbers of
    rounds; a program ends at each multiple of one."""
    loop, drawer = parts.loop, parts.drawer
    assert loop
    assert drawer
    data = drawer.train_data()

    def launch(ready):
        nonlocal state
        num_rounds = np.int32(ready.stop - ready.start)
        state, figures = loop.program(ready.room, state, data, ready.rounds, num_rounds, key)
        return figures

    stops = list_stops(rounds, loop.length, periods)
    for ready, figures, waited in run_programs(partial(plan_rounds, parts, seed), launch, stops):
        yield from list_results(parts, ready._replace(stages=ready.stages | waited), state, figures)


def run_programs(
    plan: Callable[[int, int], Any], launch: Callable[[Any], Any], stops: Sequence[tuple[int, int]]
) -> Generator[tuple[Any, Any, dict[str, float]], None, None]:
    """(its plan, its figures on the host, seconds by stage) of one program after the other. A program is planned in a
    thread while the devices run the one before.

    Args:
        plan: plan(start, stop) -> what the program of these rounds is told.
        launch: launch(plan) -> its figures, on the device.
        stops: see `list_stops`.
    """
    with ThreadPoolExecutor(1) as ahead:
        coming = [ahead.submit(plan, *program) for program in stops[:1]]
        for number in range(len(stops)):
            waited: dict[str, float] = {}
            with time_stage(waited, "wait"):
                ready = coming.pop().result()
            with time_stage(waited, "compute"):
                figures = launch(ready)
            coming = [ahead.submit(plan, *program) for program in stops[number + 1 : number + 2]]
            with time_stage(waited, "compute"):
                figures = jax.device_get(figures)
            yield ready, figures, waited


def list_results(
    parts: RunParts, done: ProgramPlan, state: State, figures: dict[str, Any]
) -> Generator[RoundResult, None, None]:
    """The rounds of a program that has run, one after the other."""
    population = parts.data.population
    for index, time in enumerate(done.times):
        ids, present = (np.asarray(x[index]) for x in (done.rounds.ids, done.rounds.present))
        ages = None if done.rounds.ages is None else np.asarray(done.rounds.ages[index])
        info, clients = {name: x[index] for name, x in figures.items()}, ids[ids < population.num_clients]
        if not done.room:  # the tables may be longer: see `padded_table_rows`
            info["rows/union"] = population.num_items
        held, rows = info.pop("rows/held")[ids < population.num_clients], int(info["rows/union"])
        down = int(parts.wire.in_round(done.start + index).down(held, rows, clients).sum())
        if ages is not None:
            info["clients/age"] = float(ages[present].mean()) if present.any() else math.nan
        stages = {} if index else done.stages
        ready = PreparedRound(Cohort(ids, present, (), None, ages), len(clients), rows, down, 0, time, stages)
        yield RoundResult(state, info, ready, index == len(done.times) - 1)
