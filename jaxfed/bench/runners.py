"""What runs the rounds of a workload: jaxfed in its ways, and what one would write by hand."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from jaxfed.bench.baselines import c_baseline, dense_vmap_baseline, sequential_baseline
from jaxfed.bench.client_loop import begin_client_loop, make_client_loop
from jaxfed.config.build import RunParts
from jaxfed.config.round_stages import build_loop
from jaxfed.core.leaf_paths import list_leaves
from jaxfed.core.tables import unwrap
from jaxfed.core.types import Tree
from jaxfed.data.device_cohorts import make_drawer
from jaxfed.training.looped_rounds import compile_loop, run_looped_rounds
from jaxfed.training.rounds import compile_programs, initial_arrays, make_run_keys, run_rounds

RATE, SEED = 0.1, 0
HOST_STAGES = ("sample", "pack", "transfer")  # see `training.timing`
TOGETHER = 10  # rounds timed at a time, so that each may be packed while another runs; the first one is not


class Runner(NamedTuple):
    """go(number) runs so many rounds from there and waits for them; `rounds` at a time. host_seconds: of the stages of
    the host in each round so far; they pass beside the computation of the round before."""

    go: Callable[[int], None]
    rounds: int
    compile_seconds: float
    params: Callable[[], dict[str, Any]]
    host_seconds: Sequence[float] = ()


def jaxfed_runner(parts: RunParts) -> Runner:
    """Rounds as `jaxfed train` runs them."""
    state = initial_arrays(parts, SEED)["state"]
    seconds, host_seconds = compile_programs(parts, state, make_run_keys(SEED).rounds), []

    def go(number):
        nonlocal state
        for done in run_rounds(parts, state, SEED, number, number + TOGETHER):
            state = done.state
            host_seconds.append(sum(done.ready.stages[stage] for stage in HOST_STAGES))
        jax.block_until_ready(state)

    def params():
        return list_model(state.shared.params, state.client_states.work)

    return Runner(go, TOGETHER, seconds, params, host_seconds)


def list_model(params: Tree, kept: Tree) -> dict[str, Any]:
    """{name: array}, to compare runs: of a factorisation as baselines name its parts, else the shared parameters."""
    if set(params["tables"]) != {"item", "bias"}:
        return list_leaves(unwrap(params))
    return {name: x.rows for name, x in params["tables"].items()} | {"user": kept["private"]["user"][:, 0]}


def client_loop_runner(parts: RunParts) -> Runner:
    """The rounds of any model as a loop over its clients, see `client_loop`."""
    carried, run = begin_client_loop(initial_arrays(parts, SEED)["state"]), make_client_loop(parts, SEED)

    def go(number):
        nonlocal carried
        carried = jax.block_until_ready(run(carried, number))

    return Runner(go, 1, 0.0, lambda: list_model(*carried))


def baseline_runner(make: Callable, parts: RunParts) -> Runner | None:
    """One of `baselines`, a round at a time."""
    if (made := make(parts, RATE, SEED)) is None:
        return None
    own = made.begin(initial_arrays(parts, SEED)["state"])

    def go(number):
        nonlocal own
        own = jax.block_until_ready(made.round(own, number))

    return Runner(go, 1, 0.0, lambda: made.params(own))


def device_draws_runner(parts: RunParts) -> Runner:
    """The same rounds, drawn on the device."""
    return jaxfed_runner(parts._replace(drawer=make_drawer(parts.data.population, parts.batching, parts.shapes)))


def device_loop_runner(parts: RunParts) -> Runner:
    """The same rounds as a program of many."""
    population, batching, shapes = parts.data.population, parts.batching, parts.shapes
    loop = build_loop(parts.algorithm, TOGETHER, population, batching, shapes)
    parts = parts._replace(drawer=make_drawer(population, batching, shapes), loop=loop)
    state, key, host_seconds = initial_arrays(parts, SEED)["state"], make_run_keys(SEED).rounds, []
    begin = time.perf_counter()
    compile_loop(parts, state, key)
    seconds = time.perf_counter() - begin

    def go(number):
        nonlocal state
        for done in run_looped_rounds(parts, state, SEED, range(number, number + TOGETHER), key, ()):
            state = done.state
            if done.ready.stages:
                host_seconds.append(sum(done.ready.stages.get(stage, 0.0) for stage in HOST_STAGES) / TOGETHER)
        jax.block_until_ready(state)

    def params():
        return list_model(state.shared.params, state.client_states.work)

    return Runner(go, TOGETHER, seconds, params, host_seconds)


METHODS: dict[str, Callable[[RunParts], Runner | None]] = {
    "ours": jaxfed_runner,
    "device_draws": device_draws_runner,
    "device_loop": device_loop_runner,
    "limit": lambda parts: baseline_runner(c_baseline, parts),
    "sequential": lambda parts: baseline_runner(sequential_baseline, parts),
    "dense_vmap": lambda parts: baseline_runner(dense_vmap_baseline, parts),
}
METHODS_OF_LARGER_MODELS: dict[str, Callable[[RunParts], Runner | None]] = {
    "ours": jaxfed_runner,
    "sequential": client_loop_runner,
}
