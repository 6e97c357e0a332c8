"""A run in a program, on disk: saved as the command line saves its runs, and restored."""

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from jaxfed.config.config_files import config_to_toml, read_config, with_absolute_paths
from jaxfed.config.recipes import TABLES
from jaxfed.config.schema import config_to_table, make_config
from jaxfed.core.types import Tree
from jaxfed.training import checkpoint
from jaxfed.training.log import MetricsWriter, RunLoggers, log
from jaxfed.training.resume import (
    check_frozen,
    describe_run,
    frozen_digest,
    make_checkpoint,
    record_problem,
    restore_run,
)
from jaxfed.training.rounds import Progress, initial_arrays
from jaxfed.training.run_dir import PRIVATE, check_same_config, lock_folder, read_summary, set_summary_aside, write_file
from jaxfed.training.session import Session
from jaxfed.training.writers import RunStart, open_writers


class RunTables(NamedTuple):
    """What a run is, for its folder.

    Args:
        make_table: make_table(folder) -> its configuration. It may write files of data to the folder. Raises ValueError
            where a piece has no name.
        settings: what is known of a run whose pieces have no names, in JSON's types.
    """

    make_table: Callable[[Path], dict[str, Any]]
    settings: dict[str, Any]


def save_session(
    session: Session, rows: Sequence[dict[str, Any]], tables: RunTables, folder: Path, saved_to: Path | None
) -> None:
    """Writes a run to a folder, see `Experiment.save`.

    Args:
        session: the run as it stands.
        rows: of its evaluations.
        tables: what the run is.
        folder: where to write.
        saved_to: where it was saved before.

    Raises:
        ValueError: the folder holds something else.
    """
    folder.mkdir(PRIVATE, parents=True, exist_ok=True)
    check_save_folder(folder, saved_to)
    with lock_folder(folder):
        config = write_run_config(tables.make_table, folder)
        digest, frozen = session.parts.data.digest, session.parts.frozen
        described = {"config": tables.settings, "data": digest, "trace": ""} | frozen_digest(frozen)
        described = described if config is None else describe_run(config, digest, frozen)
        if config is not None and session.progress.round < config.rounds:
            session.progress.finished = False  # the run is paused on its way to these
        finished = summary_rounds(folder)
        if finished is not None and finished != session.progress.round:
            set_summary_aside(folder, finished)
        session.progress.position = save_rows(folder, rows, session, config)
        with checkpoint.open_checkpoints(folder / "checkpoints", session.settings.run.keep) as checkpoints:
            if session.progress.round in checkpoint.checkpoint_steps(folder / "checkpoints"):
                checkpoints.delete(session.progress.round)
            arrays, record = make_checkpoint(session, described)
            checkpoint.save_checkpoint(checkpoints, session.progress.round, arrays, record)
            checkpoints.wait_until_finished()


def save_rows(folder: Path, rows: Sequence[dict[str, Any]], session: Session, config: Any) -> int:
    """Writes the rows of a run to metrics.jsonl and to the writers that its settings name; returns the bytes of the
    former. config: the run's; None: a piece has no name."""
    files = MetricsWriter(folder, 0)
    start = RunStart(folder, {} if config is None else config_to_table(config), 0, ())
    with ExitStack() as closing:
        closing.callback(files.close)
        loggers = RunLoggers(files, open_writers(session.settings.run.writers, start))
        for each in loggers.others:
            closing.callback(each.close)
        for row in rows:
            loggers.log_row(row)
        return files.position()


def summary_rounds(folder: Path) -> int | None:
    """The number of rounds that the summary in a folder is of; None: there is none that can be read."""
    try:
        return read_summary(folder)["rounds"]
    except (OSError, ValueError):
        return None


def check_save_folder(folder: Path, saved_to: Path | None) -> None:
    """Raises ValueError where a folder holds something that this run did not save there."""
    strangers = [entry.name for entry in folder.iterdir() if entry.name != ".lock"]
    if strangers and saved_to != folder.absolute():
        what = "already holds a run" if "metrics.jsonl" in strangers else f"is not empty ({strangers[0]})"
        raise ValueError(f"{folder} {what}: save to another folder")


def write_run_config(make_table: Callable[[Path], dict[str, Any]], folder: Path) -> Any:
    """The configuration of a run, written to its folder; None where a piece has no name, and a line says so."""
    try:
        table = make_table(folder)
        table["run"] = {**table["run"], "out": str(folder.absolute())}
        config = with_absolute_paths(make_config(table))
    except ValueError as error:
        for name in TABLES:  # data that no configuration would read
            (folder / f"{name}.parquet").unlink(missing_ok=True)
        log(
            f"{folder} gets no config.toml, and is read by Experiment.restore alone: {error}; jaxfed.register gives a "
            "piece of your own a name"
        )
        return None
    write_file(folder / "config.toml", config_to_toml(config))
    return config


def check_same_run(folder: Path, saved: Any, tables: RunTables) -> None:
    """Raises ValueError where a run's configuration is not that of the folder; rounds and [run] may differ."""
    with TemporaryDirectory() as elsewhere:
        try:
            own = make_config(tables.make_table(Path(elsewhere)))
        except ValueError as error:
            raise ValueError(f"{folder} was saved with a configuration, this run has none: {error}") from None
    if saved.work.draw_on != own.work.draw_on:
        raise ValueError(
            f"{folder} was drawn on the {saved.work.draw_on}, this run on the {own.work.draw_on}: make it with "
            f'Batching(draw_on="{saved.work.draw_on}")'
        )
    check_same_config(folder, saved, own, paths=False)


def restore_session(session: Session, tables: RunTables, folder: Path) -> list[dict[str, Any]]:
    """Puts a session where a run of the same pieces was saved; returns the rows until then.

    Raises ValueError where there is no sound checkpoint, or it is of other pieces or data.
    """
    parts, settings = session.parts, session.settings
    if settings.privacy.seed == "secret":
        raise ValueError(f"{folder}: the secret seed is not stored, so this run cannot be resumed: train it again")
    fresh = initial_arrays(parts, settings.seed)
    config = make_config(read_config(folder / "config.toml")) if (folder / "config.toml").is_file() else None
    with checkpoint.open_checkpoints(folder / "checkpoints") as checkpoints:
        if config is not None:
            check_same_run(folder, config, tables)
            arrays, progress, _ = restore_run(folder, config, checkpoints, fresh, parts.data.digest, parts.frozen)
        else:
            known = tables.settings, parts.data.digest, parts.frozen
            arrays, progress = restore_unnamed(folder, checkpoints, fresh, *known)
    if progress.round == 0 and 0 not in checkpoint.checkpoint_steps(folder / "checkpoints"):
        raise ValueError(f"{folder}: no sound checkpoint to go on from")
    session.state, session.best, session.progress = arrays["state"], arrays["best"], progress
    session.pending.clear()
    rows = (folder / "metrics.jsonl").read_bytes()[: progress.position] if progress.position else b""
    return [json.loads(line) for line in rows.splitlines()]


def restore_unnamed(
    folder: Path, checkpoints: Any, fresh: Any, settings: dict[str, Any], data: str, frozen: Tree
) -> tuple[Any, Progress]:
    """(arrays, progress) of a run of pieces without names. Raises ValueError where it is of other pieces or data."""

    def problem(record):
        wrong = record_problem(record)
        if not wrong and record["data"] != data:
            raise ValueError(f"{folder} was run on other data, or on the same rows in another order")
        if not wrong and record["config"] != settings:
            other = [key for key, value in settings.items() if record["config"].get(key) != value]
            raise ValueError(f"{folder} was run with another {other[0] if other else 'configuration'}")
        if not wrong:
            check_frozen(folder, record, frozen)
        return wrong

    found = checkpoint.restore_newest(checkpoints, fresh, log, problem)
    if found is None:
        raise ValueError(f"{folder}: no sound checkpoint of a run of these pieces")
    return found[0], Progress(**found[1]["standing"])
