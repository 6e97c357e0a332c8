"""A run: rounds, evaluations, checkpoints, and the files that scripts rely on. The only stateful place."""

import dataclasses
import json
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from jaxfed.config.build import RunParts, load_data
from jaxfed.config.config_files import config_to_toml, set_draw_place, with_absolute_paths
from jaxfed.config.schema import config_to_table
from jaxfed.core.processes import Processes, agree_on, run_on_first, this_process
from jaxfed.core.types import Tree
from jaxfed.data.clients import Clients
from jaxfed.training import checkpoint
from jaxfed.training.best_model import build_run
from jaxfed.training.joint_rounds import launch_joint_rounds
from jaxfed.training.log import Logger, MetricsWriter, NullWriter, RunLoggers, log, mute, progress_bar, to_json
from jaxfed.training.resume import (
    describe_run,
    finished_summary,
    keep_rounds,
    make_checkpoint,
    read_draw_place,
    restore_run,
)
from jaxfed.training.rounds import (
    Progress,
    initial_arrays,
)
from jaxfed.training.run_dir import PRIVATE, check_folder, disk_full_errors, lock_folder, set_summary_aside, write_file
from jaxfed.training.session import Hooks, Session, check_select, compile_once, round_seed, train_by_programs
from jaxfed.training.summary import LOWER_RATES, privacy_cautions, summarize
from jaxfed.training.timing import time_stage
from jaxfed.training.writers import RunStart, check_writers, open_writers, read_kept_rows


@contextmanager
def catch_signals(say: Callable[[str], None], got: list[int]):
    """Adds the signal to `got` once Ctrl-C, SIGTERM or SIGHUP came; a second one but SIGHUP ends the program at once.

    Only the main thread may say what signals do: a run in another thread leaves them as they are.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    hangup = getattr(signal, "SIGHUP", None)  # not on Windows

    def note(number, frame):
        got.append(number)
        if number == hangup:
            mute()  # the terminal is gone
        say(f"{signal.Signals(number).name}: finishing this round, then a checkpoint")
        for each in old:  # shells send SIGHUP twice
            signal.signal(each, signal.SIG_IGN if each == hangup else signal.SIG_DFL)

    kinds = [signal.SIGINT, signal.SIGTERM]
    if hangup and signal.getsignal(hangup) != signal.SIG_IGN:  # as nohup has it
        kinds.append(hangup)
    old = {each: signal.signal(each, note) for each in kinds}
    try:
        yield
    finally:
        for each, handler in old.items():
            signal.signal(each, handler)


def train_run(
    config: Any,
    resume: bool = False,
    load: Callable[[Any], Clients] = load_data,
    assemble: Callable[[Any, Clients], RunParts] = build_run,
    loggers: Sequence[Logger] = (),
    extend: bool = True,
) -> dict[str, Any]:
    """Runs a configuration to its end and returns the summary.

    Args:
        config: what to run, and where (`run.out`).
        resume: go on with the run that is there. Its configuration must be the same, but for [run], and for the number
            of rounds where nothing was made for it (see `resume.check_config`).
        load, assemble: where the data and the pieces come from, for many runs that share them (`runs.shared_runner`).
        loggers: told every row of metrics.jsonl; where a run is resumed, rows since the checkpoint once more.
        extend: a run that is resumed goes on to the rounds of `config`. False: to those that it began with.

    Raises:
        ValueError: what a user can mend.
        SystemExit: with 128 + signal, when stopped; resume then goes on.
    """
    folder, processes = Path(config.run.out), this_process()
    if processes.rank:
        mute()
    agree_on(processes, "configuration", lambda: None, lambda _: config_to_toml(config))
    config = set_draw_place(config, run_on_first(processes, "draws", lambda: read_draw_place(folder)))
    if resume and not extend:
        rounds = run_on_first(processes, "rounds", lambda: str(keep_rounds(folder, config).rounds))
        config = dataclasses.replace(config, rounds=int(rounds))
    if done := run_on_first(processes, "folder", lambda: finished_summary(folder, config, resume)):
        log(f"{folder} is finished ({json.loads(done)['rounds']} rounds){'' if extend else '; --rounds N adds more'}")
        return json.loads(done)
    run_on_first(processes, "writers", partial(check_writers, config.run.writers))
    read = partial(load_first_alone, processes, config.data, load)
    data = agree_on(processes, "data set", read, lambda data: data.digest)
    for note in data.source.notes:
        log(f"data: {note}")
    parts, arrays = agree_on(
        processes, "experiment", lambda: prepare_run(config, data, assemble), lambda made: made[0].batching.draw_on
    )
    with open_run_folder(config, parts, arrays, resume, loggers) as run:
        train_with_checkpoints([run])
        return finish_run(run)


class OpenRun(NamedTuple):
    """A run whose folder is locked, and what it writes there."""

    session: Session
    checkpoints: Any  # of Orbax
    rows: RunLoggers
    closing_rows: ExitStack  # closes them, once


@contextmanager
def open_run_folder(
    config: Any, parts: RunParts, arrays: dict[str, Tree], resume: bool, loggers: Sequence[Logger] = ()
) -> Iterator[OpenRun]:
    """A run in its folder, where it stands. parts, arrays: see `prepare_run`; the others as in `train_run`."""
    folder, processes = Path(config.run.out), parts.processes
    config = set_draw_place(config, parts.batching.draw_on)
    with disk_full_errors(folder), ExitStack() as held:
        run_on_first(processes, "folder", lambda: enter_folder(folder, config, resume, held))
        checkpoints = held.enter_context(checkpoint.open_checkpoints(folder / "checkpoints", config.run.keep))
        arrays, progress, before = agree_on(
            processes,
            "checkpoint",
            lambda: restore_run(folder, config, checkpoints, arrays, parts.data.digest, parts.frozen),
            lambda found: f"round {found[1].round}",
        )
        # only now is anything changed: a run that is refused leaves all as it was
        run_on_first(processes, "folder", lambda: write_config(folder, config, before))
        rows = RunLoggers(NullWriter()) if processes.rank else open_rows(config, progress, loggers)
        closing_rows = held.enter_context(ExitStack())
        closing_rows.callback(rows.close)
        session = Session(config, parts, arrays["state"], arrays["best"], progress, round_seed(config, processes))
        yield OpenRun(session, checkpoints, rows, closing_rows)


def open_rows(config: Any, progress: Progress, loggers: Sequence[Logger]) -> RunLoggers:
    """metrics.jsonl of a run, the writers that its configuration names, and further loggers."""
    folder = Path(config.run.out)
    with ExitStack() as opened:
        files = MetricsWriter(folder, progress.position)
        opened.callback(files.close)
        start = RunStart(folder, config_to_table(config), progress.round, tuple(read_kept_rows(folder)))
        writers = open_writers(config.run.writers, start)
        opened.pop_all()
    return RunLoggers(files, (*writers, *loggers))


def finish_run(run: OpenRun) -> dict[str, Any]:
    """The summary of a run that has ended, once it is written. Raises ValueError where it came to nothing."""
    session, folder = run.session, Path(run.session.settings.run.out)
    check_outcome(folder, session.progress)
    summary = summarize(session, run.rows.log_row)
    run.closing_rows.close()
    if not session.parts.processes.rank:
        write_file(folder / "summary.json", to_json(summary, 1) + "\n")
    return summary


def train_with_checkpoints(runs: Sequence[OpenRun]) -> None:
    """The rounds that are left of a run, or of several of equal standing that share a program, with rows and
    checkpoints, until a signal comes. Raises SystemExit after one."""
    sessions, stopped = [run.session for run in runs], list[int]()
    settings, progress = sessions[0].settings, sessions[0].progress
    rounds_left: list[Any] = [None]
    if len(runs) > 1:
        rounds_left = launch_joint_rounds(sessions, stopped)
    else:
        compile_once(sessions[0])  # before signals wait for the end of a round
    with catch_signals(log, stopped), ExitStack() as held:
        saves = [held.enter_context(save_in_background(run)) for run in runs]
        tick = held.enter_context(progress_bar(settings.rounds, progress.round))
        training = [
            train_by_programs(run.session, Hooks(run.rows.log_row, save, tick, stopped), rounds)
            for run, save, rounds in zip(runs, saves, rounds_left, strict=True)
        ]
        while training:  # each a program, in turn
            training = [each for each in training if next(each, None) is not None]
    unfinished = [session for session in sessions if not session.progress.finished]
    for session in unfinished:
        again = f"go on with: jaxfed train {session.settings.run.out}/config.toml --resume"
        again = "go on with the same jaxfed sweep" if session.label else again
        again = again if settings.privacy.seed == "run" else "its secret seed is not stored, so it cannot be resumed"
        log(f"{session.label}stopped after round {session.progress.round}; {again}")
    if unfinished:
        raise SystemExit(128 + unfinished[0].halt)


@contextmanager
def save_in_background(run: OpenRun) -> Iterator[Callable[[], None]]:
    """Yields what saves a run as it stands."""
    session, progress, parts = run.session, run.session.progress, run.session.parts
    described_run = describe_run(session.settings, parts.data.digest, parts.frozen)
    background = checkpoint.background_saver(run.checkpoints, parts.processes.size > 1, not parts.method.closed)
    with background as write:

        def save():
            with time_stage(progress.stages, "checkpoint"):
                progress.position = run.rows.files.position()
                arrays, record = make_checkpoint(session, described_run)
                write(progress.round, arrays, record)

        yield save


def prepare_run(
    config: Any, data: Clients, assemble: Callable[[Any, Clients], RunParts]
) -> tuple[RunParts, dict[str, Tree]]:
    """(the pieces of a run, its arrays before the first round). Raises ValueError where they do not fit."""
    parts = assemble(config, data)
    if parts.drawer:
        parts.drawer.train_data()  # before anything is written: the device may have no room for it
    for caution in privacy_cautions(config, parts.account, config.rounds):
        log(f"privacy: {caution}")
    arrays = initial_arrays(parts, config.seed)
    check_select(parts, arrays["best"], config.evaluation.select)
    return parts, arrays


def enter_folder(folder: Path, config: Any, resume: bool, held: ExitStack) -> str:
    """Makes a run's folder and locks it until `held` is closed; "". Raises ValueError where it is not to be used."""
    folder.mkdir(PRIVATE, parents=True, exist_ok=True)
    held.enter_context(lock_folder(folder))
    check_folder(folder, config, resume)  # once more: another process may have run since
    return ""


def write_config(folder: Path, config: Any, before: int) -> str:
    """Writes config.toml, and sets the summary of a run that is extended after `before` rounds aside; ""."""
    if before:
        set_summary_aside(folder, before)
    write_file(folder / "config.toml", config_to_toml(with_absolute_paths(config)))
    return ""


def check_outcome(folder: Path, progress: Progress) -> None:
    """Raises ValueError where a run has come to its end and to nothing."""
    if not progress.updates:
        raise ValueError(
            f"{folder}: no client ever reported an update: of {progress.asked:,} clients asked, {progress.dropped:,} "
            f"dropped out (cohort.dropout) or came too late, and the updates of {progress.refused:,} were discarded "
            f"because they held NaN or infinity: lower cohort.dropout, or {LOWER_RATES}"
        )
    if not progress.best_round:
        raise ValueError(f"{folder}: the run diverged, no evaluation found numbers: {LOWER_RATES}")


def load_first_alone(processes: Processes, section: Any, load: Callable[[Any], Clients]) -> Clients:
    """The data, which process 0 reads first: what it has to fetch, the others find."""
    if processes.rank:
        processes.meet("fetched", b"", lambda _: b"")
    try:
        return load(section)
    finally:
        if not processes.rank:
            processes.meet("fetched", b"", lambda _: b"")
