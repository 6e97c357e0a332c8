"""Whether a run goes on, and from where: what its checkpoints say of themselves, against what is asked for now."""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxfed.config.config_files import map_paths, read_config
from jaxfed.config.schema import config_to_table, make_config
from jaxfed.config.sections import reads_rounds
from jaxfed.config.settings import Config
from jaxfed.core.tree import tree_digest, zeros_like
from jaxfed.core.types import Tree
from jaxfed.training import checkpoint
from jaxfed.training.log import log
from jaxfed.training.rounds import Progress
from jaxfed.training.run_dir import check_folder, check_same_config, read_summary
from jaxfed.training.session import Session, epsilon_so_far

KEYS = {"standing", "config", "data", "trace"}
ANEW = "Start a new run with another --out"
FIELDS = {each.name for each in dataclasses.fields(Progress)}


def describe_run(config: Config, data: str, frozen: Tree = ()) -> dict[str, Any]:
    """What a run is, for the records of its checkpoints, in JSON's types.

    Args:
        config: the run's configuration. Where it runs and where its files lie is left out: that may change.
        data: the digest of its data.
        frozen: the frozen part of its model, of which a record has the digest.
    """
    table = map_paths(config_to_table(config), lambda path: "")
    del table["run"]
    known = {"config": table, "data": data, "trace": trace_digest(config)}
    return known | frozen_digest(frozen)


def frozen_digest(frozen: Tree) -> dict[str, str]:
    """{"frozen": the digest of the frozen part of a model}; nothing where there is none."""
    return {"frozen": tree_digest(jax.tree.map(np.asarray, frozen))} if jax.tree.leaves(frozen) else {}


def check_frozen(folder: Path, record: dict[str, Any], frozen: Tree) -> None:
    """Raises ValueError where a checkpoint is of a model whose frozen part has another digest."""
    if record.get("frozen") != frozen_digest(frozen).get("frozen"):
        raise ValueError(f"{folder} was run with other frozen values of its model: restore them, or pass another --out")


def make_checkpoint(session: Session, described_run: dict[str, Any]) -> tuple[dict[str, Tree], dict[str, Any]]:
    """(the arrays of a checkpoint, its record).

    Links with correlated noise keep their noise in their states: where the seed is secret zeros are stored, as such a
    run does not go on from there.

    Args:
        session: the run as it stands.
        described_run: see `describe_run`.
    """
    state, progress = session.state, session.progress
    if session.settings.privacy.seed == "secret":
        state = state._replace(channel=zeros_like(state.channel))
    record = {"standing": dataclasses.asdict(progress), "privacy": epsilon_so_far(session.parts, progress.round)}
    return {"state": state, "best": session.best}, described_run | record


def trace_digest(config: Config) -> str:
    """SHA-256 of the file that a clock reads its times from; "": it reads none."""
    path = os.path.expanduser(getattr(config.clock, "path", ""))
    if not path:
        return ""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def record_problem(record: dict[str, Any]) -> str:
    """What is wrong with the contents of a sound record: another version may have written it; "": nothing is."""
    progress = record.get("standing")
    if not record.keys() >= KEYS or not isinstance(progress, dict) or progress.keys() != FIELDS:
        return "its record was written by another version of jaxfed"
    if progress["round"] != record["step"]:
        return f"its record belongs to round {progress['round']}"
    return ""


def check_record(folder: Path, record: dict[str, Any], config: Config, data: str, frozen: Tree = ()) -> None:
    """Raises ValueError, in one line, where a run cannot go on under a configuration, on data with this digest, and
    with this frozen part of its model."""
    check_config(folder, record, config)
    if config.privacy.seed == "secret":
        raise ValueError(
            f"{folder}: the secret seed is not stored, so this run cannot be resumed: repeating rounds with fresh "
            f"noise would spend privacy that epsilon does not count. Use jaxfed evaluate {folder}, or train again with "
            "another --out"
        )
    if record["data"] != data:
        raise ValueError(f"{folder} was run on other data, or on the same rows in another order: pass another --out")
    check_frozen(folder, record, frozen)
    if record["trace"] != trace_digest(config):
        raise ValueError(f"{folder} was run on other times of its clients (clock.path): pass another --out")


def check_config(folder: Path, record: dict[str, Any], config: Config) -> None:
    """Raises ValueError where a checkpoint is of another configuration, or its number of rounds cannot be changed."""
    old = recorded_config(folder, record, config)
    if old.rounds == config.rounds:
        return
    asked, progress = f"rounds cannot change from {old.rounds} to {config.rounds}", Progress(**record["standing"])
    if reader := reads_rounds(config):
        raise ValueError(f"{folder}: {asked}: {reader} depends on it. {ANEW}")
    if progress.round >= config.rounds:
        raise ValueError(f"{folder}: {asked}: {progress.round} are done. Ask for more, or: {ANEW}")
    patience = config.evaluation.patience
    if patience and progress.finished and on_schedule(progress, config).stale >= patience:
        raise ValueError(f"{folder}: {asked}: evaluation.patience ended the run after round {progress.round}. {ANEW}")


def on_schedule(progress: Progress, config: Config) -> Progress:
    """Where a finished run stands for a longer one, which does not evaluate after its last round if that is off the
    schedule: an evaluation there that was no better is not counted by patience. See `off_schedule` for a better one."""
    extra = progress.finished and progress.round % config.evaluation.every and progress.best_round < progress.round
    return dataclasses.replace(progress, stale=progress.stale - 1) if extra else progress


def recorded_config(folder: Path, record: dict[str, Any], config: Config) -> Config:
    """The configuration that a checkpoint is of, where it is `config` but for its rounds. Raises ValueError if not."""
    try:
        old = make_config({**record["config"], "run": config_to_table(config)["run"]})
    except ValueError as error:
        raise ValueError(f"{folder} was written by another version of jaxfed ({error}): pass another --out") from None
    check_same_config(folder, old, config, paths=False)
    return old


def read_rounds(folder: Path, config: Config) -> int:
    """The number of rounds of the run in a folder; where there is none yet, that of the configuration."""
    if record := checkpoint.newest_record(folder / "checkpoints", record_problem):  # which nobody edits by hand
        return recorded_config(folder, record, config).rounds
    known = folder / "config.toml"
    return make_config(read_config(known)).rounds if known.is_file() else config.rounds


def keep_rounds(folder: Path, config: Config) -> Config:
    """`config` with the number of rounds that the run in its folder has, and a word about it where that is another.

    Raises ValueError, see `train_run`.
    """
    check_folder(folder, config, resume=True)
    rounds = read_rounds(folder, config)
    if rounds != config.rounds:
        log(
            f"{folder} is a run of {rounds} rounds, the configuration says {config.rounds}: it stays at {rounds}; pass "
            f"--rounds N for more of them, for example --rounds {max(config.rounds, rounds + 1)}"
        )
    return dataclasses.replace(config, rounds=rounds)


def read_draw_place(folder: Path) -> str:
    """Where the rounds of the run in a folder are drawn; "auto": there is no run yet."""
    known = folder / "config.toml"
    return make_config(read_config(known)).work.draw_on if known.is_file() else "auto"


def finished_summary(folder: Path, config: Config, resume: bool) -> str:
    """The summary of a run that has ended, as JSON; "": it has not, or is to go on. Raises ValueError, see `train`."""
    checkpoint.check_checkpoint_path(folder)
    check_folder(folder, config, resume)
    if not (folder / "summary.json").exists():
        return ""
    if read_rounds(folder, config) != config.rounds:
        return ""
    try:
        return json.dumps(read_summary(folder, config.evaluation.select))
    except ValueError as error:
        log(str(error))
        return ""


def off_schedule(record: dict[str, Any], config: Config) -> int:
    """The best round of a checkpoint, where a run of as many rounds as `config` says would not have evaluated it; 0: it
    would."""
    best = record["standing"]["best_round"]
    longer = record["config"]["rounds"] < config.rounds
    return best if longer and best % config.evaluation.every else 0


def restore_run(
    folder: Path, config: Config, checkpoints: Any, arrays: Tree, data: str, frozen: Tree = ()
) -> tuple[Tree, Progress, int]:
    """Where a run goes on from.

    Args:
        folder: the run's.
        config: what is asked for now.
        checkpoints: those in the folder.
        arrays: what a run has before its first round.
        data: the digest of its data.
        frozen: the frozen part of its model.

    Returns:
        (arrays, standing, how many rounds were asked for before, where that is another number than now; else 0).

    Raises:
        ValueError: the checkpoint is of another run, or its number of rounds cannot be changed.
    """

    def wrong(record):
        if problem := record_problem(record):
            return problem
        check_record(folder, record, config, data, frozen)
        return ""

    found = checkpoint.restore_newest(checkpoints, arrays, log, wrong)
    # numbers of rounds that were asked for, the last of them in the newest checkpoint
    numbers = [*found[1]["standing"]["extended"], found[1]["config"]["rounds"]] if found else []
    gone_back = False
    while found and (late := off_schedule(found[1], config)):
        log(
            f"the best round, {late}, was evaluated only because the run ended there: going back to the checkpoint "
            "before"
        )
        gone_back = True
        for step in (found[1]["step"], *found[2]):
            checkpoints.delete(step)
        found = checkpoint.restore_newest(checkpoints, arrays, log, wrong)
    if found is None and gone_back:
        log(f"there is none: {folder} starts at round 0 again, and writes its rows anew")
        return arrays, Progress(extended=numbers), numbers[-1]
    if found is None:
        rows = folder / "metrics.jsonl"
        if (folder / "summary.json").exists():
            raise ValueError(f"{folder} is finished and has no checkpoint any more to go on from: pass another --out")
        if rows.exists() and rows.stat().st_size:
            log(f"{folder} has no checkpoint: it starts at round 0 again, and writes its rows anew")
        return arrays, Progress(), 0
    arrays, record, damaged = found
    for step in damaged:  # the run will come to their rounds again
        checkpoints.delete(step)
    progress, asked = Progress(**record["standing"]), numbers[-1]
    if asked == config.rounds:
        log(f"resuming {folder} after round {progress.round}")
        return arrays, progress, 0
    log(f"resuming {folder} after round {progress.round}, to round {config.rounds} instead of {asked}")
    progress = dataclasses.replace(on_schedule(progress, config), extended=numbers, finished=False)
    return arrays, progress, asked
