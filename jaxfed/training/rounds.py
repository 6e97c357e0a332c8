"""The rounds of a run, one after the other: what is drawn and packed ahead, compiled once, and counted."""

import dataclasses
import math
import os
import time
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxfed.config.build import RunParts
from jaxfed.config.evaluation_stages import describe_candidates
from jaxfed.config.settings import Evaluation
from jaxfed.core.pairs import count_pairs
from jaxfed.core.parametrization import apply_parametrization
from jaxfed.core.state import State
from jaxfed.core.tree import count_bytes
from jaxfed.core.types import Cohort, Key, Tree
from jaxfed.core.wire import Wire
from jaxfed.data.device_cohorts import bound_held_rows, has_random_rows
from jaxfed.data.packing import empty_cohort, pack_cohort
from jaxfed.evaluation.evaluator import flatten_metrics
from jaxfed.evaluation.split import EvalSplit
from jaxfed.sampling.cohort import sample_cohort
from jaxfed.training.records import is_better
from jaxfed.training.timing import STAGES, time_stage


class RunKeys(NamedTuple):
    """Independent streams of a seed."""

    model: Key
    memory: Key
    rounds: Key
    evaluation: Key


class PreparedRound(NamedTuple):
    """One round's cohort on its devices, and what it downloads."""

    cohort: Cohort
    asked: int
    rows: int  # of the catalogue that the cohort holds
    bytes_down: int
    halt: int  # the signal that came to a process while this was drawn, after which all stop together; 0: none
    time: float | None  # simulated seconds at the end of the round; None: there is no clock
    stages: dict[str, float]  # seconds


@dataclasses.dataclass
class Progress:
    """Where a run stands, beside its arrays. Goes into every checkpoint."""

    round: int = 0
    best_round: int = 0
    best_value: float = -1.0  # once there is a best round
    stale: int = 0  # evaluations since the best
    seconds: float = 0.0  # of rounds, compilation and evaluation apart
    compile_seconds: float = 0.0
    updates: int = 0  # client updates that were sent
    refused: int = 0  # clients whose update was discarded, as it was not finite
    dropped: int = 0  # clients that were asked and dropped out, or came too late
    clipped: int = 0  # client updates that a link scaled down
    asked: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    simulated: float | None = None  # seconds by the clock of the configuration, if it has one
    stages: dict[str, float] = dataclasses.field(default_factory=dict)  # seconds of each; see `stages`
    position: int = 0  # bytes of metrics.jsonl
    finished: bool = False
    extended: list[int] = dataclasses.field(default_factory=list)  # numbers of rounds that were asked for before

    def count_request(self, ready: PreparedRound) -> None:
        """Counts a round that was started: who was asked, and what they download."""
        self.round += 1
        self.spend(ready.stages)
        self.asked += ready.asked
        self.bytes_down += ready.bytes_down
        self.simulated = ready.time

    def record_round(self, wire: Wire, info: dict[str, Any]) -> int:
        """Waits for a round and books what was sent in it; returns how many updates were discarded."""
        rows, reported = np.asarray(info["rows/sent"]), np.asarray(info["clients/present"])
        refused = int(info["clients/refused"])
        self.updates += int(reported.sum())
        self.refused += refused
        self.dropped += int(info["clients/dropped"])
        self.clipped += round(float(info.get("clip/clients", 0)) * int(reported.sum()))
        clients = np.asarray(info["clients/ids"])[reported] if "clients/ids" in info else None
        wire = wire.in_round(info.get("round", 0))
        self.bytes_up += int(wire.up(rows[reported], info.get("rows/union", 0), clients).sum())
        return refused

    def totals(self) -> dict[str, Any]:
        """What was counted so far, by the names of the run's files."""
        counts = {f"clients/{name}_total": getattr(self, name) for name in ("refused", "dropped", "clipped")}
        counts |= {"bytes_up_total": self.bytes_up, "bytes_down_total": self.bytes_down}
        return counts if self.simulated is None else counts | {"simulated_seconds": round(self.simulated, 3)}

    def judge(self, name: str, value: float) -> bool:
        """Whether a metric is better than ever; notes what it was, or that it was not."""
        better = is_better(name, value, self.best_value) if self.best_round else not math.isnan(value)
        self.stale = 0 if better else self.stale + 1
        if better:
            self.best_round, self.best_value = self.round, value
        return better

    def spend(self, stages: dict[str, float]) -> None:
        """Adds seconds to those of the run's stages."""
        for name, seconds in stages.items():
            self.stages[name] = self.stages.get(name, 0.0) + seconds

    def spent(self) -> dict[str, float]:
        """{seconds/STAGE} so far."""
        return {f"seconds/{name}": round(self.stages.get(name, 0.0), 3) for name in STAGES}


def make_run_keys(seed: int) -> RunKeys:
    """The streams of a seed, all of whose bits count: `jax.random.key` alone reads the lower 32."""
    key = jax.random.key(seed % (1 << 32))
    key = jax.random.fold_in(key, seed >> 32) if seed >> 32 else key
    return RunKeys(*jax.random.split(key, len(RunKeys._fields)))


def initial_arrays(parts: RunParts, seed: int) -> dict[str, Tree]:
    """A run's arrays before its first round: the state, and the best model so far."""
    keys = make_run_keys(seed)
    held = parts.method.parametrization or parts.model
    state = parts.algorithm.init(held.init(keys.model), keys.memory)
    return {"state": state, "best": keep_model(parts, state)}


def keep_model(parts: RunParts, state: State) -> tuple[Tree, Tree]:
    """What is evaluated, to outlive a step. The rounds of a closed form consume no model: it is not copied."""
    model = scored_model(parts, state)
    return model if parts.method.closed else jax.tree.map(lambda x: x.copy(), model)


def scored_model(parts: RunParts, state: State) -> tuple[Tree, Tree]:
    """(shared parameters, the clients' private parts): what is evaluated. Copy what must outlive a step."""
    shared = apply_parametrization(parts.method.parametrization, state.shared.params)
    return shared, parts.method.private_part(state.client_states.work)


def prepare_round(parts: RunParts, seed: int, round: int, stopped: Sequence[int] = ()) -> PreparedRound:
    """Draws and packs a cohort: a function of (seed, round), so it runs ahead in a thread of its own.

    Several processes pack each its own clients, and tell each other which rows those hold. stopped: signals that came.
    """
    population, meet = parts.data.population, parts.processes.meet
    stages: dict[str, float] = {}

    def union(there):
        if parts.processes.size == 1:
            return there
        combined = meet("rows", np.packbits(there).tobytes(), union_bits)
        return np.unpackbits(np.frombuffer(combined, np.uint8), count=len(there)).astype(bool)

    with time_stage(stages, "sample"):
        ids, present, ages, time = sample_cohort(parts.sampler, seed, round)
    with time_stage(stages, "pack"):
        cohort = draw_cohort(parts, (ids, present), seed, round, union=union)
    held, rows = count_rows(parts, cohort)
    who = np.concatenate([ids[block.slots[block.slots < len(ids)]] for block in cohort.blocks])
    asked, down = int((ids < population.num_clients).sum()), int(parts.wire.in_round(round).down(held, rows, who).sum())
    combined = meet("facts", np.array([down, *stopped[:1], 0], np.int64)[:2].tobytes(), combine_facts)
    down, halt = np.frombuffer(combined, np.int64).tolist()
    with time_stage(stages, "transfer"):
        placed = cohort._replace(blocks=jax.block_until_ready(parts.placement.block(cohort.blocks)), ages=ages)
    return PreparedRound(placed, asked, rows, down, halt, time, stages)


def draw_cohort(parts: RunParts, who: tuple[np.ndarray, np.ndarray], seed: int, round: int, **union: Any) -> Cohort:
    """A cohort with its data for one round, drawn on the host or on the device. who: its ids, and who is present.
    union: of the rows of several processes, see `pack_cohort`."""
    if parts.drawer:
        return parts.drawer.draw(*who, seed, round, **union)
    return pack_cohort(parts.data.population, parts.batching, parts.shapes, *who, seed, round, **union)


def count_rows(parts: RunParts, cohort: Cohort) -> tuple[np.ndarray, int]:
    """(int [clients]: rows that each client of a cohort holds, rows that they hold together); pairs of rows, where sums
    are over these."""
    shapes, items = parts.shapes, parts.data.population.num_items
    end = shapes.end if cohort.rows is None or shapes.pairs else len(cohort.rows)
    if parts.drawer and not has_random_rows(parts.data.population, parts.batching):
        who = np.concatenate([cohort.ids[block.slots[block.slots < len(cohort.ids)]] for block in cohort.blocks])
        held = bound_held_rows(parts.data.population, parts.batching, who)
    else:
        held = np.concatenate([(block.rows < end).sum(1)[block.slots < len(cohort.ids)] for block in cohort.blocks])
    held, size = (count_pairs(held), count_pairs(items)) if shapes.pairs else (held, items)
    return held, size if cohort.rows is None else int((np.asarray(cohort.rows) < size).sum())


def union_bits(sets: list[bytes]) -> bytes:
    """The union of sets as bits."""
    return np.bitwise_or.reduce([np.frombuffer(each, np.uint8) for each in sets]).tobytes()


def combine_facts(facts: list[bytes]) -> bytes:
    """(sum of bytes down, largest signal) of (bytes down, signal) of each process."""
    down, signals = np.array([np.frombuffer(each, np.int64) for each in facts]).T
    return np.array([down.sum(), signals.max()]).tobytes()


def compile_programs(parts: RunParts, state: State, key: Key) -> float:
    """Compiles every program of a round by running nobody through every shape of block; returns seconds. A closed form
    is not solved where nobody reports."""
    begin = time.perf_counter()
    if parts.drawer:
        parts.drawer.compile()
    empty = empty_cohort(parts.data.population, parts.batching, parts.shapes)
    empty = empty._replace(ages=np.zeros(len(empty.ids), np.int32) if parts.sampler.history_length else None)

    def run(block):
        copy = state
        if not parts.method.closed:
            copy = jax.tree.map(lambda x: x.copy() if isinstance(x, jax.Array) else x, state)
        alone = empty._replace(blocks=(parts.placement.block(block),))
        jax.block_until_ready(parts.algorithm.step(copy, alone, key))

    run(empty.blocks[0])  # the programs that all shapes share, once
    # each has a copy of the state; and what spans processes must be launched in one order everywhere
    side_by_side = os.cpu_count() if count_bytes(state) < 1e9 and parts.processes.size == 1 else 1
    with ThreadPoolExecutor(side_by_side) as pool:
        list(pool.map(run, empty.blocks[1:]))
    return time.perf_counter() - begin


class RoundResult(NamedTuple):
    """What a round leaves."""

    state: State
    info: dict[str, Any]
    ready: PreparedRound  # who was asked
    ends_program: bool = True  # whether the state is that after this round; else after a later one of its program


def run_rounds(
    parts: RunParts, state: State, seed: int, start: int, stop: int, stopped: Sequence[int] = ()
) -> Generator[RoundResult, None, None]:
    """Runs from round `start` to before `stop`; consumes the state it is given, and each it gave.

    seed: of cohorts, batches, noise and rounding. stopped: signals that came, see `PreparedRound.halt`. The next
    cohort is packed in a thread while devices are at work.
    """
    key = make_run_keys(seed).rounds
    with ThreadPoolExecutor(1) as ahead:
        coming = ahead.submit(prepare_round, parts, seed, start, stopped)
        for number in range(start, stop):
            waited: dict[str, float] = {}
            with time_stage(waited, "wait"):
                ready = coming.result()
            if number + 1 < stop:
                coming = ahead.submit(prepare_round, parts, seed, number + 1, stopped)
            with time_stage(waited, "compute"):
                state, info = parts.algorithm.step(state, ready.cohort, key)
            known: dict[str, Any] = {"rows/union": ready.rows}
            if ready.cohort.ages is not None:
                ages = ready.cohort.ages[np.asarray(ready.cohort.present)]
                known["clients/age"] = float(ages.mean()) if len(ages) else math.nan
            yield RoundResult(state, info | known, ready._replace(stages=ready.stages | waited))


def evaluate_model(parts: RunParts, model: Tree, part: str, key: Key) -> dict[str, float]:
    """Flat metrics of (shared, private) on `val` or `test`; `test/cold/...` are those of clients that never take part,
    from the shared model and their histories."""
    values = flatten_metrics(part, parts.evaluator(*model, parts.eval_splits[part], key))
    if cold := parts.eval_splits.get(f"{part}/cold"):
        values |= flatten_metrics(f"{part}/cold", parts.cold_evaluator(model[0], (), cold, key))
    return values


def count_negatives(split: EvalSplit) -> dict[str, int]:
    """{"sampled_negatives": the most among which a held-out item is ranked}, where some users have fewer candidates
    than figures of a sample want; else nothing."""
    here, wanted = (split.sampled < split.num_items).sum(-1), split.sampled.shape[-1]
    return {"sampled_negatives": int(here.max())} if here.size and here.min() < wanted else {}


def evaluation_facts(parts: RunParts, settings: Evaluation) -> dict[str, str]:
    """{"protocol": how the held-out rows were chosen, "history": what a test knows of a user beside train items, if it
    knows more, "negatives": what they are ranked among in `sampled` figures, if there are any}."""
    population = parts.data.population
    negatives = describe_candidates(settings, population)
    reads_more = settings.history == "all" and parts.eval_splits["test"].history.values.size > 0
    history = {"history": "train and validation items"} if reads_more else {}
    return {"protocol": population.protocol, **history, **({"negatives": negatives} if negatives else {})}


def mark_leaky(parts: RunParts, row: dict[str, Any]) -> dict[str, Any]:
    """A row that says so when its numbers come from a protocol or a model that leaks."""
    return {**row, "leaky": True, "protocol": parts.protocol} if parts.leaky else row
