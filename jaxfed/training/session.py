"""A run between two rounds, and its rounds up to the next evaluation: what the command line and programs share."""

import math
import secrets
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxfed.config.build import RunParts
from jaxfed.config.schema import suggest
from jaxfed.core.processes import Processes, run_on_first
from jaxfed.core.server import put_solution
from jaxfed.core.state import State
from jaxfed.core.tree import all_finite
from jaxfed.core.types import Tree
from jaxfed.evaluation.evaluator import flatten_metrics
from jaxfed.training.log import log
from jaxfed.training.looped_rounds import compile_loop, list_stops, run_looped_rounds
from jaxfed.training.records import is_better
from jaxfed.training.rounds import (
    Progress,
    RoundResult,
    compile_programs,
    evaluate_model,
    keep_model,
    make_run_keys,
    mark_leaky,
    run_rounds,
    scored_model,
)
from jaxfed.training.timing import profile_rounds, time_stage


class Settings(NamedTuple):
    """What a run is beside its pieces; a configuration has the same fields."""

    seed: int
    rounds: int
    evaluation: Any  # `settings.Evaluation`
    privacy: Any  # `settings.Privacy`
    run: Any  # `settings.Run`


@dataclass
class Session:
    """A run between two rounds. The only thing that changes while it trains."""

    settings: Any  # `Settings`, or a configuration
    parts: RunParts
    state: State
    best: Tree  # the model of the best evaluation so far
    progress: Progress
    seed: int  # of cohorts, batches, noise and rounding
    pending: list[dict[str, Any]] = field(default_factory=list)  # figures of rounds that were started and not counted
    compiled: bool = False
    halt: int = 0  # the signal by which it was stopped; 0: none
    last_value: float | None = None  # of the last evaluation, of the metric that chooses; None: it was none of these
    label: str = ""  # what its lines of the log begin with, where several runs write them

    def log_line(self, text: str) -> None:
        """Logs a line."""
        log(self.label + text)


class Hooks(NamedTuple):
    """What happens beside the rounds of a run."""

    log_row: Callable[[dict[str, Any]], None] = lambda row: None  # an evaluation
    save: Callable[[], None] = lambda: None  # a checkpoint is due
    tick: Callable[[int, float, str], None] = lambda round, speed, text: None  # a round began
    stopped: Sequence[int] = ()  # signals that came


NO_HOOKS = Hooks()


def check_select(parts: RunParts, model: Tree, select: str) -> None:
    """Raises ValueError when validation has no such metric."""
    split = parts.eval_splits["val"]
    one = split._replace(who=split.who[:1], chunks=1)
    sums = jax.eval_shape(lambda *args: parts.evaluator(*args[:2], one, args[2]), *model, make_run_keys(0).evaluation)
    values = flatten_metrics("val", jax.tree.map(lambda x: np.zeros(x.shape), sums))
    names = [name for name in values if "decile" not in name and not name.endswith("_sd")]
    if select not in names:
        raise ValueError(f'evaluation.select: no metric "{select}"{suggest(select, names)}')


def round_seed(config: Any, processes: Processes) -> int:
    """What cohorts, batches and noise are drawn from: `seed`, or a number of the system's that no file holds."""
    if config.privacy.seed == "run":
        return config.seed
    return int(run_on_first(processes, "seed", lambda: str(secrets.randbits(63))))


def compile_once(session: Session) -> None:
    """Compiles the programs of a session's rounds, unless that was done."""
    if session.compiled:
        return
    kept = ": programs are kept for the next run" if getattr(jax.config, "jax_compilation_cache_dir", None) else ""
    log(f"compiling, which takes longest the first time{kept}")
    keys = make_run_keys(session.settings.seed)
    if session.parts.loop:
        begin = time.perf_counter()
        compile_loop(session.parts, session.state, keys.rounds)
        session.progress.compile_seconds += time.perf_counter() - begin
    else:
        session.progress.compile_seconds += compile_programs(session.parts, session.state, keys.rounds)
    session.compiled = True


def train_until_evaluated(session: Session, hooks: Hooks = NO_HOOKS) -> Generator[dict[str, Any], None, None]:
    """Runs the rounds that are left; yields the row of every evaluation, once it is logged and saved.

    The session stands between two rounds whenever a row is out, and may be left there.
    """
    with closing(train_by_programs(session, hooks)) as programs:
        yield from filter(None, programs)


def train_by_programs(
    session: Session, hooks: Hooks, rounds_left: Generator[RoundResult, None, None] | None = None
) -> Generator[dict[str, Any], None, None]:
    """As `train_until_evaluated`, but yields after each program of many rounds, or each round that the host starts: {}
    where no evaluation was due.

    rounds_left: where they are run together with those of other runs; None: they are run here.
    """
    settings, parts, progress = session.settings, session.parts, session.progress
    compile_once(session)
    text, begin, first, programs = "", time.perf_counter(), progress.round, 0
    with closing(rounds_left or start_rounds(session, hooks.stopped)) as rounds:
        for session.state, info, ready, ends_program in rounds:
            progress.count_request(ready)
            session.pending.append(info | {"clients/ids": ready.cohort.ids, "round": progress.round - 1})
            settle_rounds(session, 1)  # those before: one round ahead of the devices, no more
            hooks.tick(progress.round, progress.updates / (progress.seconds + time.perf_counter() - begin), text)
            if not ends_program:
                continue
            programs += 1
            together = parts.processes.size > 1 or rounds_left  # all stop after the same round
            session.halt = ready.halt if together else sum(hooks.stopped[:1])
            final = progress.round == settings.rounds
            due = final or progress.round % settings.evaluation.every == 0
            keep = session.halt or final or progress.round % settings.run.checkpoint_every == 0
            if not due and not keep:
                progress.seconds += time.perf_counter() - begin
                yield {}
                begin = time.perf_counter()
                continue
            settle_rounds(session, 0)
            with time_stage(progress.stages, "compute"):
                jax.block_until_ready(session.state)
            progress.seconds += time.perf_counter() - begin
            row, text = evaluate_session(session, info) if due else ({}, text)
            if due:
                hooks.log_row(row)
                impatient = 0 < settings.evaluation.patience <= progress.stale
                progress.finished = final or impatient
                if impatient and not final:
                    session.log_line(describe_stop(session))
            if keep or progress.finished:
                hooks.save()
            yield row
            begin = time.perf_counter()
            if progress.finished or session.halt:
                break
    if parts.loop:
        each = "programs: the host was asked after each" if programs > 1 else "program"
        log(f"{progress.round - first:,} rounds ran as {programs:,} {each}")


def start_rounds(session: Session, stopped: Sequence[int]) -> Generator[RoundResult, None, None]:
    """The rounds that are left, some of them traced where the settings ask for a profile."""
    settings, progress = session.settings, session.progress
    todo = range(0) if progress.finished else range(progress.round, settings.rounds)
    if session.parts.loop:
        periods, key = (settings.evaluation.every, settings.run.checkpoint_every), make_run_keys(session.seed).rounds
        rounds = run_looped_rounds(session.parts, session.state, session.seed, todo, key, periods)
        skip = int(len(list_stops(todo, session.parts.loop.length, periods)) > 1)  # the first program
    else:
        rounds = run_rounds(session.parts, session.state, session.seed, todo.start, todo.stop, stopped)
        skip = min(2, len(todo) - 1)
    if settings.run.profile and todo:
        folder = Path(settings.run.out) / "profile"
        return profile_rounds(rounds, folder, settings.run.profile, skip, lambda done: done.ends_program)
    return rounds


def settle_rounds(session: Session, ahead: int) -> None:
    """Waits for the rounds that were started, but for the last `ahead`, and counts what was sent in them; says so the
    first time that updates are discarded."""
    progress = session.progress
    while len(session.pending) > ahead:
        with time_stage(progress.stages, "compute"):
            discarded = progress.record_round(session.parts.wire, session.pending[0])
        session.pending.pop(0)
        if discarded and discarded == progress.refused:
            session.log_line(
                f"round {progress.round - len(session.pending)}: the updates of {discarded} clients were discarded "
                "because they held NaN or infinity; from here on they are only counted"
            )


def evaluate_session(session: Session, info: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """(the row of an evaluation on validation, a word for the progress bar); keeps the model if it is the best so far.

    info: of the last round.
    """
    settings, parts, progress = session.settings, session.parts, session.progress
    key = make_run_keys(settings.seed).evaluation
    if "sums" in info:
        values, chosen = choose_candidate(session, info.pop("sums"))
        info["solve/candidate"] = chosen
    else:
        with time_stage(progress.stages, "evaluate"):
            values = evaluate_model(parts, scored_model(parts, session.state), "val", key)
    train = {name: float(np.sum(value)) for name, value in info.items() if name != "clients/present"}
    # all but counts are means over those who reported: without reports there is no mean
    if not train["clients/reported"]:
        train |= {name: math.nan for name in train if not name.startswith(("clients/", "rows/"))}
    totals = progress.totals() | epsilon_so_far(parts, progress.round) | {"server_sees": parts.wire.sees}
    totals |= {"seconds": round(progress.seconds, 3), **progress.spent()}
    row = mark_leaky(parts, {"round": progress.round, **train, **values, **totals})
    # NaN scores can still be ranked, so a model that holds NaN must never count as the best
    value = values[settings.evaluation.select]
    value = value if math.isfinite(value) and all_finite(scored_model(parts, session.state)[0]) else math.nan
    session.last_value = value
    parametrization = parts.method.parametrization
    pruning = parametrization.pruning if parametrization else None
    # a model with more weights than the schedule ends with is not what was asked for
    better = not (pruning and progress.round < pruning.end) and progress.judge(settings.evaluation.select, value)
    if better:
        session.best = keep_model(parts, session.state)
    return row, describe_evaluation(session, row, value, better)


def choose_candidate(session: Session, sums: Tree) -> tuple[dict[str, float], float]:
    """Solves for the model with every candidate of a closed form, from the sums of one round, and keeps the best by
    validation. Returns (its figures, the candidate)."""
    settings, parts, stages = session.settings, session.parts, session.progress.stages
    closed, select, before = parts.method.closed, settings.evaluation.select, session.state
    assert closed
    found: tuple[dict[str, float], float] | None = None
    for candidate in closed.candidates:
        with time_stage(stages, "solve"):
            params = put_solution(parts.placement, closed.solve(sums, before.shared.params, candidate))
        state = before._replace(shared=before.shared._replace(params=params))
        with time_stage(stages, "evaluate"):
            key = make_run_keys(settings.seed).evaluation
            values = evaluate_model(parts, scored_model(parts, state), "val", key)
        log(f"candidate {candidate:g}: {select} {values[select]:.4f}")
        if found is None or is_better(select, values[select], found[0][select]):
            found, session.state = (values, candidate), state
        del params, state  # no worse model is kept while the next one is solved for
    assert found
    for end, word in ((min, "smaller"), (max, "larger")):
        if len(closed.candidates) > 1 and found[1] == end(closed.candidates):
            log(f"candidate {found[1]:g} was the best, at the end of the list: {word} ones may be better")
    return found


def describe_stop(session: Session) -> str:
    """Why a run ends before its last round, and how to go on."""
    settings, progress = session.settings, session.progress
    select = "LEAKY " * session.parts.leaky + settings.evaluation.select
    return (
        f"stopped after round {progress.round} of {settings.rounds}: {select} was best at round "
        f"{progress.best_round} ({progress.best_value:.4f}), and {progress.stale} evaluations since were no better; "
        "--evaluation.patience 0 turns this off"
    )


def describe_evaluation(session: Session, row: dict[str, Any], value: float, better: bool) -> str:
    """Logs an evaluation in a line, and what is wrong with it; returns a word for the progress bar."""
    settings, progress = session.settings, session.progress
    text = f"{'LEAKY ' if session.parts.leaky else ''}{settings.evaluation.select} {value:.4f}"
    if row.get("ring/cut"):
        session.log_line(
            f"round {progress.round}: the link ring clipped values of {row['ring/cut']:.0%} of the clients to its "
            'bound: raise its `bound`, or set `by` of the mean to "uniform" if its weights are too large'
        )
    first = progress.best_round == progress.round <= settings.evaluation.every
    star = (" * best so far" if first else " *") if better else ""
    hit = f"val/sampled/hr@10 {row['val/sampled/hr@10']:.4f}  " if "val/sampled/hr@10" in row else ""
    speed = progress.updates / max(progress.seconds, 1e-9)
    loss = f"train/loss {row['train/loss']:.4f}  " if "train/loss" in row else ""
    session.log_line(f"round {progress.round:>5}  {loss}{text}  {hit}{speed:,.0f} clients/s{star}")
    return text


def epsilon_so_far(parts: RunParts, rounds: int) -> dict[str, float | None]:
    """epsilon and delta after so many rounds; nothing (null) where no link is private."""
    account, noised = parts.account, bool(parts.account.mechanisms)
    return {"epsilon": parts.epsilon(rounds) if noised else None, "delta": account.delta if noised else None}
