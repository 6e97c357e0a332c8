"""Experiments on disk: saved, restored, opened from a run's folder or a configuration, and several seeds of one."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxfed.config.overrides import override_config
from jaxfed.config.recipes import UnnamedError
from jaxfed.config.schema import config_to_toml, make_config, read_config, with_absolute_paths
from jaxfed.core.types import Tree
from jaxfed.training import checkpoint
from jaxfed.training.experiment import Experiment
from jaxfed.training.log import MetricsWriter, log
from jaxfed.training.resume import (
    check_frozen,
    describe_run,
    frozen_digest,
    make_checkpoint,
    record_problem,
    restore_run,
)
from jaxfed.training.rounds import Progress, initial_arrays
from jaxfed.training.run_dir import PRIVATE, locate_run, lock_folder, write_file


def from_config(config: str | Path | dict[str, Any], *overrides: str) -> Experiment:
    """The experiment of a configuration.

    Args:
        config: a TOML file, the name of a configuration that comes with jaxfed, or a table.
        overrides: words as on the command line: "--rounds", "20", "--model.dim", "16".

    Returns:
        The experiment, before its first round.

    Raises:
        ValueError: the configuration is wrong: one line that says how.

    Example:
        >>> import jaxfed as jf
        >>> table = {"data": {"name": "synthetic", "users": 60, "items": 50}, "model": {"name": "popularity"}}
        >>> jf.from_config(table, "--cohort.name", "everyone").item_ids.size
        50
    """
    table = dict(config) if isinstance(config, dict) else read_config(config)
    return Experiment._from_config(override_config(table, list(overrides)))


def load_run(folder: str | Path) -> Experiment:
    """A run that was saved or trained to a folder, where its newest checkpoint stands.

    Args:
        folder: of `jaxfed train`, or of `Experiment.save`.

    Returns:
        The experiment: it can be evaluated, recommends, and trains on.

    Raises:
        ValueError: there is no run, or it cannot go on from there.

    Example:
        >>> import jaxfed as jf, tempfile
        >>> table = {"data": {"name": "synthetic", "users": 60, "items": 50}}
        >>> run = jf.from_config(table)
        >>> _ = list(run.train(rounds=2))
        >>> folder = tempfile.mkdtemp()
        >>> run.save(folder)
        >>> jf.load_run(folder).round
        2
    """
    path = locate_run(str(folder))
    experiment = Experiment._from_config(make_config(read_config(path / "config.toml")))
    experiment.restore(path)
    return experiment


def save_session(experiment: Experiment, folder: Path) -> None:
    """See `Experiment.save`."""
    session = experiment._session
    folder.mkdir(PRIVATE, parents=True, exist_ok=True)
    check_save_folder(experiment, folder)
    with lock_folder(folder):
        config = write_config(experiment, folder)
        digest, frozen = session.parts.data.digest, session.parts.model.frozen
        described = {"config": {}, "data": digest, "trace": ""} | frozen_digest(frozen)
        described = described if config is None else describe_run(config, digest, frozen)
        writer = MetricsWriter(folder, 0, session.progress.round)
        try:
            for row in experiment.rows:
                writer.log_row(row)
            session.progress.position = writer.position()
        finally:
            writer.close()
        with checkpoint.open_checkpoints(folder / "checkpoints", session.settings.run.keep) as checkpoints:
            if session.progress.round in checkpoint.checkpoint_steps(folder / "checkpoints"):
                checkpoints.delete(session.progress.round)
            arrays, record = make_checkpoint(session, described)
            checkpoint.save_checkpoint(checkpoints, session.progress.round, arrays, record)
            checkpoints.wait_until_finished()
    experiment._folder = folder.absolute()


def check_save_folder(experiment: Experiment, folder: Path) -> None:
    """Raises ValueError where a folder holds something that this run did not save there."""
    own = experiment._folder == folder.absolute()
    strangers = [entry.name for entry in folder.iterdir() if entry.name != ".lock"]
    if strangers and not own:
        raise ValueError(f"{folder} is not empty ({strangers[0]}): save to another folder")


def write_config(experiment: Experiment, folder: Path) -> Any:
    """The configuration of a run, written to its folder; None where a piece has no name, and a line says so."""
    try:
        table = experiment.to_table(folder)
    except UnnamedError as error:
        log(f"{folder} gets no config.toml, and is read by Experiment.restore alone: {error}")
        return None
    table["run"] = {**table["run"], "out": str(folder.absolute())}
    config = with_absolute_paths(make_config(table))
    write_file(folder / "config.toml", config_to_toml(config))
    return config


def restore_session(experiment: Experiment, folder: Path) -> None:
    """See `Experiment.restore`."""
    session = experiment._session
    parts, settings = session.parts, session.settings
    fresh = initial_arrays(parts, settings.seed)
    config = make_config(read_config(folder / "config.toml")) if (folder / "config.toml").is_file() else None
    with checkpoint.open_checkpoints(folder / "checkpoints") as checkpoints:
        if config is not None:
            arrays, progress, _ = restore_run(folder, config, checkpoints, fresh, parts.data.digest, parts.model.frozen)
        else:
            arrays, progress = restore_unnamed(folder, checkpoints, fresh, parts.data.digest, parts.model.frozen)
    if progress.round == 0:
        raise ValueError(f"{folder}: no sound checkpoint to go on from")
    session.state, session.best, session.progress = arrays["state"], arrays["best"], progress
    rows = (folder / "metrics.jsonl").read_bytes()[: progress.position] if progress.position else b""
    experiment.rows[:] = [json.loads(line) for line in rows.splitlines()]
    experiment._folder = folder.absolute()


def restore_unnamed(folder: Path, checkpoints: Any, fresh: Any, data: str, frozen: Tree = ()) -> tuple[Any, Progress]:
    """(arrays, progress) of a run of pieces without names. Raises ValueError where it is of other pieces or data."""

    def problem(record):
        wrong = record_problem(record)
        if not wrong and record["data"] != data:
            raise ValueError(f"{folder} was run on other data, or on the same rows in another order")
        if not wrong:
            check_frozen(folder, record, frozen)
        return wrong

    found = checkpoint.restore_newest(checkpoints, fresh, log, problem)
    if found is None:
        raise ValueError(f"{folder}: no sound checkpoint of a run of these pieces")
    return found[0], Progress(**found[1]["standing"])


def train_seeds(
    experiment: Experiment, seeds: Sequence[int], rounds: int = 0, evaluate_every: int = 0
) -> Iterator[dict[str, Any]]:
    """Trains an experiment from several seeds, one after the other; all use the same compiled programs.

    Args:
        experiment: it is left as it is.
        seeds: of the runs.
        rounds: see `Experiment.train`.
        evaluate_every: see `Experiment.train`.

    Returns:
        An iterator of rows as of `Experiment.train`, with "seed"; the last row of each seed has the figures of
        the test, too.

    Example:
        >>> import jaxfed as jf
        >>> run = jf.from_config({"data": {"name": "synthetic", "users": 60, "items": 50}})
        >>> [row["seed"] for row in jf.train_seeds(run, [0, 1], rounds=1)]
        [0, 1]
    """
    for seed in seeds:
        run = experiment.with_seed(seed)
        last: dict[str, Any] = {}
        for row in run.train(rounds, evaluate_every):
            if last:
                yield last
            last = {"seed": seed, **row}
        yield last | run.evaluate("test")
        experiment._session.compiled = True  # the next seed finds the programs
