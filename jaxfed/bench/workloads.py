"""`jaxfed bench`: rounds of a matrix factorisation, end to end, beside what one would write by hand; and rounds of two
larger models beside a loop over their clients.

Cohort sampling, negatives, batching, transfers and compute all count, for jaxfed and for the baselines; `limit` is
the arithmetic of client and server alone, in C on one core. All are timed in turn in one process; the peak memory of
each is that of a process of its own.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxfed.bench.costs import estimate_costs
from jaxfed.bench.runners import METHODS, METHODS_OF_LARGER_MODELS, RATE, SEED, Runner
from jaxfed.config.build import RunParts, build_from_config, load_data
from jaxfed.config.schema import make_config
from jaxfed.data.clients import Clients
from jaxfed.data.preparation import prepare_population
from jaxfed.training.timing import peak_megabytes

PLAIN = ({"name": "weighted_mean"},)


class Workload(NamedTuple):
    """MovieLens-100K, its items spread over a catalogue of `items` (0: as they are), or synthetic users."""

    items: int = 0
    users: int = 0  # 0: those of MovieLens-100K
    cohort: int = 128
    baselines: bool = True  # do they end within minutes?
    model: str = "mf"  # or one of `LARGER_MODELS`


FACTORISATION: dict[str, Any] = {
    "model": {"name": "mf", "dim": 64},
    "work": {"batch_size": 64, "negatives": 4, "optimizer": {"name": "sgd", "learning_rate": RATE}},
}
LARGER_MODELS: dict[str, dict[str, Any]] = {
    "text_lora": {
        "model": {"name": "text_lora", "dim": 32, "trained_layers": 1, "lora_rank": 8, "max_pieces": 8},
        "work": {"batch_size": 64, "negatives": 1, "optimizer": {"name": "sgd", "learning_rate": RATE}},
    },
    "sasrec": {
        "model": {"name": "sasrec", "dim": 64, "length": 50, "blocks": 2, "loss": "sampled_softmax"},
        "work": {"name": "gradient", "negatives": 256, "optimizer": {"name": "sgd"}},
    },
}
WORKLOADS = {
    "W1": Workload(),
    "W1s": Workload(cohort=943, baselines=False),
    "W1f": Workload(cohort=8, baselines=False),
    "W2": Workload(items=100_000),
    "W3": Workload(items=1_000_000, baselines=False),
    "W4": Workload(items=1_000_000, users=1_000_000, cohort=1024, baselines=False),
    "W5": Workload(cohort=16, model="text_lora"),
    "W6": Workload(model="sasrec"),
}


def spread_over_catalogue(data: Clients, items: int) -> Clients:
    """The same clients, the ids of their items remapped at random into a larger catalogue."""
    rows = data.source.interactions
    ids = np.random.default_rng(SEED).permutation(items)[: len(data.source.items)].astype(np.int32)
    source = data.source._replace(
        interactions=rows._replace(item=ids[rows.item]), items=np.arange(items).astype(str), titles=None
    )
    source, population = prepare_population(source)
    return data._replace(source=source, population=population)


def make_bench_experiment(workload: Workload, channel: Sequence[dict[str, Any]] = PLAIN) -> RunParts:
    """Matrix factorisation, d 64, item biases and private user vectors; BCE, 4 negatives per positive; SGD 0.1, batches
    of 64 examples, 1 epoch; or a larger model. A uniform cohort, weighted mean (or other links), server sgd(1.)."""
    synthetic = {"name": "synthetic", "users": workload.users, "items": workload.items, "mean_length": 20.0}
    config = make_config(
        {
            "data": synthetic if workload.users else {"name": "ml-100k"},
            **LARGER_MODELS.get(workload.model, FACTORISATION),
            "channel": list(channel),
            "server": {"name": "sgd", "learning_rate": 1.0},
            "cohort": {"name": "uniform", "size": workload.cohort},
            "evaluation": {"clients": 100},
        }
    )
    data = load_data(config.data)
    if workload.items and not workload.users:
        data = spread_over_catalogue(data, workload.items)
    return build_from_config(config, data)


def list_methods(workload: Workload) -> dict[str, Callable[[RunParts], Runner | None]]:
    """The methods that can run a workload within minutes."""
    if workload.model != "mf":
        return METHODS_OF_LARGER_MODELS
    if workload.baselines:
        return METHODS
    return {
        name: METHODS[name] for name in ("ours", "device_draws", "device_loop", *(() if workload.users else ("limit",)))
    }


def time_rounds(runner: Runner, number: int) -> float:
    """Seconds of a round."""
    begin = time.perf_counter()
    runner.go(number)
    return (time.perf_counter() - begin) / runner.rounds


def measure_in_turn(runners: dict[str, Runner], least: int, budget: float) -> dict[str, list[float]]:
    """Seconds of the rounds of each, in turn: `least` of each, fewer (at least 3) where they take beyond the budget.

    A first pass over the same rounds, not counted, compiles what is not compiled yet; and whoever takes less than a
    second runs a turn that is not counted before each that is: what others left in caches and memory is not theirs.
    """
    times: dict[str, list[float]] = {name: [] for name in runners}
    turns, quick = {}, set()
    for name, runner in runners.items():
        first = time_rounds(runner, 0)
        quick |= {name} if first < 1 else set()
        turns[name] = -(-least // runner.rounds) if first < 1 else int(np.clip(budget / first, 3, least))
        for turn in range(1, turns[name] if first < 1 else 2):
            runner.go(turn * runner.rounds)
    for turn in range(max(turns.values())):
        for name, runner in runners.items():
            if turn < turns[name]:
                if name in quick:
                    runner.go(turn * runner.rounds)
                times[name].append(time_rounds(runner, turn * runner.rounds))
    return times


def measure_peak_memory(name: str, method: str) -> dict[str, float]:
    """What a process of its own says of its memory and its compilation, from an empty compilation cache."""
    command = [sys.executable, "-m", "jaxfed", "bench", name, "--alone", method]
    environment = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise ValueError(f"{name} {method}: {(done.stderr.strip() or 'failed').splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def run_alone(name: str, method: str) -> dict[str, float]:
    """Two turns of one method, for `measure_peak_memory`."""
    runner = list_methods(WORKLOADS[name])[method](make_bench_experiment(WORKLOADS[name]))
    assert runner
    for turn in range(2):
        runner.go(turn * runner.rounds)
    return {"peak_memory_mb": round(peak_megabytes(), 1), "compile_seconds": round(runner.compile_seconds, 2)}


def bench_workload(
    name: str, least: int = 20, budget: float = 100.0, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """The figures of one workload; None where a method cannot run it."""
    workload = WORKLOADS[name]
    methods, memory = dict(list_methods(workload)), {}
    for method in [each for each in methods if each != "limit"]:
        try:
            memory[method] = measure_peak_memory(name, method)
        except ValueError as error:
            if method == "ours":
                raise
            say(f"{error}: left out")  # it does not fit into this machine
            del methods[method]
    say(f"{name}: memory of {', '.join(memory)} measured")
    parts = make_bench_experiment(workload)
    made = {method: make(parts) for method, make in methods.items()}
    runners = {method: runner for method, runner in made.items() if runner}
    times = measure_in_turn(runners, least, budget)
    seconds = {method: statistics.median(each) for method, each in times.items()}
    out: dict[str, Any] = {f"{m}_ms": round(1e3 * seconds[m], 3) if m in seconds else None for m in METHODS}
    out |= {"clients_per_second": round(workload.cohort / seconds["ours"], 1), **memory["ours"]}
    out |= {
        f"{m}_peak_memory_mb": memory[m]["peak_memory_mb"] if m in memory else None
        for m in METHODS
        if m not in ("ours", "limit")
    }
    out["host_ms"] = round(1e3 * statistics.median(runners["ours"].host_seconds), 3)
    if workload.model == "mf":
        out |= estimate_costs(parts, SEED, out["clients_per_second"])
    for method in {"device_draws", "device_loop"} & set(memory):
        out[f"{method}_host_ms"] = round(1e3 * statistics.median(runners[method].host_seconds), 3)
        out[f"{method}_compile_seconds"] = memory[method]["compile_seconds"]
    return out | {f"{m}_rounds": len(times[m]) * runners[m].rounds for m in times}
