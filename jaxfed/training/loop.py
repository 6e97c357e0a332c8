"""A run: rounds, evaluations, checkpoints, and the files that scripts rely on. The only stateful place."""

import dataclasses
import json
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxfed.config.build import RunParts, build_experiment, load_data
from jaxfed.config.config_files import config_to_toml, with_absolute_paths
from jaxfed.config.schema import suggest
from jaxfed.core.processes import Processes, agree_on, run_on_first, this_process
from jaxfed.core.types import Tree
from jaxfed.data.clients import Clients
from jaxfed.evaluation.evaluator import flatten_metrics
from jaxfed.training import checkpoint
from jaxfed.training.log import Logger, MetricsWriter, NullWriter, RunLoggers, log, mute, progress_bar, to_json
from jaxfed.training.resume import describe_run, finished_summary, keep_rounds, make_checkpoint, restore_run
from jaxfed.training.rounds import (
    Progress,
    initial_arrays,
    make_run_keys,
)
from jaxfed.training.run_dir import PRIVATE, check_folder, disk_full_errors, lock_folder, write_file
from jaxfed.training.session import Hooks, Session, compile_once, round_seed, train_until_evaluated
from jaxfed.training.summary import LOWER_RATES, privacy_cautions, summarize
from jaxfed.training.timing import time_stage


def check_select(experiment: RunParts, model: Tree, select: str) -> None:
    """Raises ValueError when validation has no such metric."""
    exam = experiment.eval_splits["val"]
    one = exam._replace(who=exam.who[:1], chunks=1)
    sums = jax.eval_shape(
        lambda *args: experiment.evaluator(*args[:2], one, args[2]), *model, make_run_keys(0).evaluation
    )
    values = flatten_metrics("val", jax.tree.map(lambda x: np.zeros(x.shape), sums))
    names = [name for name in values if "decile" not in name and not name.endswith("_sd")]
    if select not in names:
        raise ValueError(f'evaluation.select: no metric "{select}"{suggest(select, names)}')


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
    assemble: Callable[[Any, Clients], RunParts] = build_experiment,
    loggers: Sequence[Logger] = (),
    extend: bool = True,
) -> dict[str, Any]:
    """Runs a configuration to its end and returns the summary.

    Args:
        config: what to run, and where (`run.out`).
        resume: go on with the run that is there. Its configuration must be the same, but for [run], and for the number
            of rounds where nothing was made for it (see `resume.check_config`).
        load, assemble: where the data and the pieces come from, for many runs that share them (`runs.shared_runner`).
        loggers: told every row of metrics.jsonl. A run that is resumed tells rows since the checkpoint once more.
        extend: whether a run that is resumed goes on to the number of rounds of `config`. False: it ends where it was
            to end when it began, whatever `config` says.

    Raises:
        ValueError: what a user can mend.
        SystemExit: with 128 + signal, when stopped; resume then goes on.
    """
    folder, every = Path(config.run.out), this_process()
    if every.rank:
        mute()
    agree_on(every, "configuration", lambda: None, lambda _: config_to_toml(config))
    if resume and not extend:
        rounds = run_on_first(every, "rounds", lambda: str(keep_rounds(folder, config).rounds))
        config = dataclasses.replace(config, rounds=int(rounds))
    if done := run_on_first(every, "folder", lambda: finished_summary(folder, config, resume)):
        log(f"{folder} is finished ({json.loads(done)['rounds']} rounds){'' if extend else '; --rounds N adds more'}")
        return json.loads(done)
    data = agree_on(every, "data set", lambda: load_first_alone(every, config.data, load), lambda data: data.digest)
    for note in data.source.notes:
        log(f"data: {note}")
    experiment, arrays = agree_on(every, "experiment", lambda: prepare_run(config, data, assemble), lambda _: "")
    with disk_full_errors(folder), ExitStack() as held:
        run_on_first(every, "folder", lambda: enter_folder(folder, config, resume, held))
        checkpoints = held.enter_context(checkpoint.open_checkpoints(folder / "checkpoints", config.run.keep))
        arrays, standing, before = agree_on(
            every,
            "checkpoint",
            lambda: restore_run(folder, config, checkpoints, arrays, data.digest, experiment.model.frozen),
            lambda found: f"round {found[1].round}",
        )
        # only now is anything changed: a run that is refused leaves all as it was
        run_on_first(every, "folder", lambda: write_config(folder, config, before))
        files = NullWriter() if every.rank else MetricsWriter(folder, standing.position, standing.round)
        rows = RunLoggers(files, () if every.rank else tuple(loggers))
        session = Session(config, experiment, arrays["state"], arrays["best"], standing, round_seed(config, every))
        try:
            train_with_checkpoints(session, checkpoints, rows)
            check_outcome(folder, session.progress)
            summary = summarize(session, rows.log_row)
        finally:
            rows.close()
        if not every.rank:
            write_file(folder / "summary.json", to_json(summary, 1) + "\n")
    return summary


def train_with_checkpoints(session: Session, checkpoints: Any, rows: RunLoggers) -> None:
    """The rounds that are left, with rows and checkpoints, until a signal comes. Raises SystemExit after one."""
    settings, parts, progress = session.settings, session.parts, session.progress
    described_run = describe_run(settings, parts.data.digest, parts.model.frozen)
    stopped: list[int] = []

    def save():
        with time_stage(progress.stages, "checkpoint"):
            progress.position = rows.files.position()
            arrays, record = make_checkpoint(session, described_run)
            write(progress.round, arrays, record)

    compile_once(session)  # before signals wait for the end of a round
    background = checkpoint.background_saver(checkpoints, parts.processes.size > 1)
    with catch_signals(log, stopped), background as write, progress_bar(settings.rounds, progress.round) as tick:
        for _ in train_until_evaluated(session, Hooks(rows.log_row, save, tick, stopped)):
            pass
    if not progress.finished:
        again = f"go on with: jaxfed train {settings.run.out}/config.toml --resume"
        again = again if settings.privacy.seed == "run" else "its secret seed is not stored, so it cannot be resumed"
        log(f"stopped after round {progress.round}; {again}")
        raise SystemExit(128 + session.halt)


def prepare_run(
    config: Any, data: Clients, assemble: Callable[[Any, Clients], RunParts]
) -> tuple[RunParts, dict[str, Tree]]:
    """(the pieces of a run, its arrays before the first round). Raises ValueError where they do not fit."""
    experiment = assemble(config, data)
    for caution in privacy_cautions(config, experiment.account, config.rounds):
        log(f"privacy: {caution}")
    arrays = initial_arrays(experiment, config.seed)
    check_select(experiment, arrays["best"], config.evaluation.select)
    return experiment, arrays


def enter_folder(folder: Path, config: Any, resume: bool, held: ExitStack) -> str:
    """Makes a run's folder and locks it until `held` is closed; "". Raises ValueError where it is not to be used."""
    folder.mkdir(PRIVATE, parents=True, exist_ok=True)
    held.enter_context(lock_folder(folder))
    check_folder(folder, config, resume)  # once more: another process may have run since
    return ""


def write_config(folder: Path, config: Any, before: int) -> str:
    """Writes config.toml, and sets the summary of a run that is extended after `before` rounds aside; ""."""
    if before and (folder / "summary.json").exists():
        (folder / "summary.json").replace(folder / f"summary_{before}.json")
    write_file(folder / "config.toml", config_to_toml(with_absolute_paths(config)))
    return ""


def check_outcome(folder: Path, standing: Progress) -> None:
    """Raises ValueError where a run has come to its end and to nothing."""
    if not standing.updates:
        raise ValueError(
            f"{folder}: no client ever reported an update: of {standing.asked:,} clients asked, {standing.dropped:,} "
            f"dropped out (cohort.dropout) or came too late, and the updates of {standing.refused:,} were discarded "
            f"because they held NaN or infinity: lower cohort.dropout, or {LOWER_RATES}"
        )
    if not standing.best_round:
        raise ValueError(f"{folder}: the run diverged, no evaluation found numbers: {LOWER_RATES}")


def load_first_alone(every: Processes, section: Any, load: Callable[[Any], Clients]) -> Clients:
    """The data, which process 0 reads first: what it has to fetch, the others find."""
    if every.rank:
        every.meet("fetched", b"", lambda _: b"")
    try:
        return load(section)
    finally:
        if not every.rank:
            every.meet("fetched", b"", lambda _: b"")
