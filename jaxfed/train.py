"""A run: rounds, evaluations, checkpoints, and the files that scripts rely on. The only stateful place."""

import dataclasses
import fcntl
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfed import checkpoint
from jaxfed.config import config_of, differences, dumps, near, read
from jaxfed.data.batches import nobody, pack
from jaxfed.evaluate import readable
from jaxfed.experiment import Experiment, assemble, load
from jaxfed.federate import State
from jaxfed.log import Journal, progress, say
from jaxfed.tree import digest, nbytes
from jaxfed.types import Cohort, Key, Tree


class Keys(NamedTuple):
    """Independent streams of a seed."""

    model: Key
    memory: Key
    rounds: Key
    evaluation: Key


class Ready(NamedTuple):
    """One round's cohort on its devices, and what it downloads."""

    cohort: Cohort
    asked: int
    bytes_down: int


@dataclasses.dataclass
class Standing:
    """Where a run stands, beside its arrays. Goes into every checkpoint."""

    round: int = 0
    best_round: int = 0
    best_value: float = -1.0
    stale: int = 0  # evaluations since the best
    seconds: float = 0.0  # of rounds, compilation and evaluation apart
    compile_seconds: float = 0.0
    updates: int = 0  # client updates that were sent
    refused: int = 0  # clients that withdrew because their update was not finite
    asked: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    position: int = 0  # bytes of metrics.jsonl
    finished: bool = False


def keys_of(seed: int) -> Keys:
    """The streams of a seed."""
    return Keys(*jax.random.split(jax.random.key(seed), len(Keys._fields)))


def fresh(experiment: Experiment, seed: int) -> dict[str, Tree]:
    """A run's arrays before its first round: the state, and the best model so far."""
    keys = keys_of(seed)
    state = experiment.algorithm.init(experiment.model.init(keys.model), keys.memory)
    return {"state": state, "best": private_copy(state)}


def private_copy(state: State) -> Tree:
    """(shared parameters, private parts) that the next step cannot consume."""
    return jax.tree.map(jnp.copy, (state.shared.params, state.memory[0]))


def prepare_round(experiment: Experiment, seed: int, round: int) -> Ready:
    """Draws and packs a cohort: a function of (seed, round), so it runs ahead in a thread of its own."""
    population, (one, two) = experiment.data.population, experiment.wire
    ids, present = experiment.sampler.draw(seed, round)
    cohort = pack(population, experiment.batching, experiment.shapes, ids, present, seed, round)
    held = sum(int((block.rows < population.num_items).sum()) for block in cohort.blocks)
    asked = int((ids < population.num_clients).sum())
    placed = cohort._replace(blocks=tuple(map(experiment.placement.block, cohort.blocks)))
    return Ready(placed, asked, traffic(asked, held, one.down, two.down))


def traffic(clients: int, rows: int, one: int, two: int) -> int:
    """Bytes of so many clients that hold so many rows in all, from those of a client with one row and with two."""
    return clients * one + (rows - clients) * (two - one)


def compile_all(experiment: Experiment, state: State, key: Key) -> float:
    """Compiles every program of a round by running nobody through every shape of block; returns seconds."""
    begin = time.perf_counter()
    empty = nobody(experiment.data.population, experiment.batching, experiment.shapes)

    def run(block):
        copy = jax.tree.map(jnp.copy, state)
        alone = empty._replace(blocks=(experiment.placement.block(block),))
        jax.block_until_ready(experiment.algorithm.step(copy, alone, key))

    run(empty.blocks[0])  # the two programs that all shapes share, once
    side_by_side = os.cpu_count() if nbytes(state) < 1e9 else 1  # each has a copy of the state
    with ThreadPoolExecutor(side_by_side) as pool:
        list(pool.map(run, empty.blocks[1:]))
    return time.perf_counter() - begin


def check_folder(folder: Path, config: Any, resume: bool) -> None:
    """Raises ValueError when the folder holds a run that is not to be resumed, or one of another configuration."""
    if not resume and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} already holds a run: pass --resume to go on with it, or another --out")
    known = folder / "config.toml"
    if resume and folder.exists() and not known.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} holds something else than a run (no config.toml): pass another --out")
    if known.exists():
        changed = differences(config_of(read(known)), config)
        if changed:
            raise ValueError(f"{folder} was run with another configuration ({'; '.join(changed)}): pass another --out")


def same_data(folder: Path, meta: dict[str, Any], digest: str) -> None:
    """Raises ValueError when a checkpoint is of a run on other data."""
    if meta["data"] != digest:
        raise ValueError(f"{folder} was run on other data, or on the same rows in another order: pass another --out")


def check_select(experiment: Experiment, untrained: Tree, select: str) -> None:
    """Raises ValueError when validation has no such metric. Compiles the evaluation as it goes."""
    values = evaluate(experiment, untrained, "val", keys_of(0).evaluation)
    names = [name for name in values if "decile" not in name and not name.endswith("_sd")]
    if select not in names:
        raise ValueError(f'evaluation.select: no metric "{select}"{near(select, names)}')


def write_file(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_text(text)
    partial.replace(path)


@contextmanager
def alone(folder: Path):
    """Raises ValueError while another process runs in this folder."""
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder}: another process is running here; stop it or pass another --out") from None
        yield


@contextmanager
def interrupts(say: Callable[[str], None]):
    """Yields a list that holds the signal once Ctrl-C or SIGTERM came; a second one ends the program at once."""
    got: list[int] = []

    def note(number, frame):
        got.append(number)
        say(f"{signal.Signals(number).name}: finishing this round, then a checkpoint")
        for each in old:
            signal.signal(each, signal.SIG_DFL)

    old = {each: signal.signal(each, note) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield got
    finally:
        for each, handler in old.items():
            signal.signal(each, handler)


def train(config: Any, resume: bool = False) -> dict[str, Any]:
    """Runs a configuration to its end and returns the summary.

    Raises ValueError for what a user can mend, SystemExit(128 + signal) when stopped; --resume then goes on.
    """
    folder = Path(config.run.out)
    check_folder(folder, config, resume)
    if (folder / "summary.json").exists():
        say(f"{folder} is finished")
        return json.loads((folder / "summary.json").read_text())
    data = load(config.data)
    for note in data.source.notes:
        say(f"data: {note}")
    experiment = assemble(config, data)
    arrays, standing = fresh(experiment, config.seed), Standing()
    check_select(experiment, arrays["best"], config.evaluation.select)
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "config.toml", dumps(config))
    with alone(folder), checkpoint.manager(folder / "checkpoints", config.run.keep) as checkpoints:
        found = checkpoint.restore(checkpoints, arrays, say, lambda meta: same_data(folder, meta, data.digest))
        if found:
            arrays, meta, damaged = found
            for step in damaged:  # the run will come to their rounds again
                checkpoints.delete(step)
            standing = Standing(**meta["standing"])
            say(f"resuming {folder} after round {standing.round}")
        journal = Journal(folder, standing.position, standing.round)
        try:
            arrays, standing = loop(config, experiment, arrays, standing, checkpoints, journal)
            summary = close(config, experiment, arrays, standing, journal)
        finally:
            journal.close()
    write_file(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    return summary


def loop(config, experiment, arrays, standing, checkpoints, journal) -> tuple[dict[str, Tree], Standing]:
    """The rounds that are left, with their evaluations and checkpoints."""
    keys, state, best = keys_of(config.seed), arrays["state"], arrays["best"]
    standing.compile_seconds += compile_all(experiment, state, keys.rounds)

    def save():
        standing.position = journal.position()
        meta = {"standing": dataclasses.asdict(standing), "data": experiment.data.digest}
        checkpoint.save(checkpoints, standing.round, {"state": state, "best": best}, meta)

    with (
        interrupts(say) as stopped,
        ThreadPoolExecutor(1) as ahead,
        progress(config.rounds, standing.round) as tick,
    ):
        coming = ahead.submit(prepare_round, experiment, config.seed, standing.round)
        last, text, begin = None, "", time.perf_counter()
        while standing.round < config.rounds and not standing.finished:
            ready = coming.result()
            if standing.round + 1 < config.rounds:
                coming = ahead.submit(prepare_round, experiment, config.seed, standing.round + 1)
            state, info = experiment.algorithm.step(state, ready.cohort, keys.rounds)
            settle(experiment, standing, last)  # one round ahead of the devices, no more
            last = info
            standing.round += 1
            standing.asked += ready.asked
            standing.bytes_down += ready.bytes_down
            tick(standing.round, standing.updates / (standing.seconds + time.perf_counter() - begin), text)
            final = standing.round == config.rounds
            due = final or standing.round % config.evaluation.every == 0
            keep = bool(stopped) or standing.round % config.run.checkpoint_every == 0
            if due or keep:
                settle(experiment, standing, last)
                last = None
            if due:
                jax.block_until_ready(state)
                standing.seconds += time.perf_counter() - begin
                better, text = judge(config, experiment, state, info, standing, journal, keys.evaluation)
                best = private_copy(state) if better else best
                patience = config.evaluation.patience
                standing.finished = final or 0 < patience <= standing.stale
                begin = time.perf_counter()
            if keep or standing.finished:
                standing.seconds += time.perf_counter() - begin
                save()
                begin = time.perf_counter()
            if stopped and not standing.finished:
                checkpoints.wait_until_finished()
                again = f"jaxfed train {config.run.out}/config.toml --resume"
                say(f"stopped after round {standing.round}; go on with: {again}")
                raise SystemExit(128 + stopped[0])
        checkpoints.wait_until_finished()
    return {"state": state, "best": best}, standing


def settle(experiment: Experiment, standing: Standing, info: dict[str, Any] | None) -> None:
    """Waits for a round and books what was sent in it."""
    if info is None:
        return
    one, two = experiment.wire
    sent, refused = int(info["clients/reported"]), int(info["clients/refused"])
    if refused and not standing.refused:
        say(f"round {standing.round}: {refused} clients withdrew, as their update is not finite; counted from here on")
    standing.updates += sent
    standing.refused += refused
    standing.bytes_up += traffic(sent, int(info["rows/sent"]), one.up, two.up)


def evaluate(experiment: Experiment, model: Tree, part: str, key: Key) -> dict[str, float]:
    """Flat metrics of (shared, private) on `val` or `test`."""
    return readable(part, experiment.examine(*model, experiment.exams[part], key))


def marked(experiment: Experiment, row: dict[str, Any]) -> dict[str, Any]:
    """A row that says so when its numbers come from a protocol that leaks."""
    return {**row, "leaky": True, "protocol": "compat-pfedrec (LEAKY)"} if experiment.data.leaky else row


def judge(config, experiment, state, info, standing, journal, key) -> tuple[bool, str]:
    """Evaluates on validation, writes the row; returns (is it the best so far, a word for the progress bar)."""
    values = evaluate(experiment, (state.shared.params, state.memory[0]), "val", key)
    train = {name: float(value) for name, value in info.items()}
    totals = {"clients/refused_total": standing.refused, "bytes_up_total": standing.bytes_up}
    totals |= {"bytes_down_total": standing.bytes_down, "seconds": round(standing.seconds, 3)}
    journal.write(marked(experiment, {"round": standing.round, **train, **values, **totals}))
    value = values[config.evaluation.select]
    better = value > standing.best_value
    standing.stale = 0 if better else standing.stale + 1
    if better:
        standing.best_round, standing.best_value = standing.round, value
    speed = standing.updates / max(standing.seconds, 1e-9)
    text = f"{'LEAKY ' if experiment.data.leaky else ''}{config.evaluation.select} {value:.4f}"
    loss = f"train/loss {train['train/loss']:.4f}  " if "train/loss" in train else ""
    star = " *" if better else ""
    hit = values["val/sampled/hr@10"]
    say(f"round {standing.round:>5}  {loss}{text}  val/sampled/hr@10 {hit:.4f}  {speed:,.0f} clients/s{star}")
    return better, text


def close(config, experiment, arrays, standing, journal) -> dict[str, Any]:
    """Tests the best model once and sums the run up."""
    key = keys_of(config.seed).evaluation
    test = evaluate(experiment, arrays["best"], "test", key)
    val = evaluate(experiment, arrays["best"], "val", key)
    journal.write(marked(experiment, {"round": standing.best_round, **test}))
    state = arrays["state"]
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << (20 if sys.platform == "darwin" else 10))
    summary = {
        "rounds": standing.round,
        "best_round": standing.best_round,
        "seconds": round(standing.seconds, 3),
        "compile_seconds": round(standing.compile_seconds, 3),
        "clients/refused_total": standing.refused,
        "client_updates_per_second": round(standing.updates / max(standing.seconds, 1e-9), 1),
        "peak_memory_mb": round(memory, 1),
        "bytes_up_per_client": round(standing.bytes_up / max(standing.updates, 1)),
        "bytes_down_per_client": round(standing.bytes_down / max(standing.asked, 1)),
        "bytes_up_total": standing.bytes_up,
        "bytes_down_total": standing.bytes_down,
        "server_sees": experiment.wire[0].sees,
        "params_sha256": digest(jax.tree.map(np.asarray, (state.shared.params, state.memory[0]))),
        "data_sha256": experiment.data.digest,
        **val,
        **test,
    }
    return marked(experiment, summary)
