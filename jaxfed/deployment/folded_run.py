"""A run with messages from files folded in: a new folder of the usual form."""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import mkdtemp

from jaxfed.config.config_files import config_to_toml, read_config, with_absolute_paths
from jaxfed.config.schema import make_config
from jaxfed.core.processes import Processes
from jaxfed.core.types import Tree
from jaxfed.deployment.message_files import MODELS, Folded, fold_messages, pack_models, read_models
from jaxfed.training.best_model import open_run
from jaxfed.training.checkpoint import newest_record, open_checkpoints, save_checkpoint
from jaxfed.training.log import MetricsWriter, log, to_json
from jaxfed.training.resume import describe_run, make_checkpoint, record_problem
from jaxfed.training.rounds import Progress, keep_model
from jaxfed.training.run_dir import lock_folder, write_file
from jaxfed.training.session import Session, round_seed
from jaxfed.training.summary import summarize


def fold_into_run(folder: str, files: Sequence[Path], out: Path, exponent: float = 0.5, least: int = 1) -> Folded:
    """Folds message files into a run, and writes the result as a run of its own.

    Args:
        folder: The folder of the run.
        files: What devices wrote (`train_on_device`), or anything else.
        out: A new folder. Its newest model counts as its best one, and is tested.
        exponent: See `fold_messages`.
        least: Number of messages below which nothing is done: one message moves the model as a whole cohort does.

    Returns:
        What became of each file. Where all are refused nothing is written.

    Raises:
        ValueError: the folder holds no run that messages can be folded into, or `out` is there.
    """
    if out.exists():
        raise ValueError(f"{out} is there already: pass another --out")
    run = open_run(folder)
    config = make_config(read_config(Path(folder) / "config.toml"))
    best = run.arrays["best"][0], run.best_round
    folded = fold_messages(config, run.parts, run.arrays["state"], best, files, read_models(Path(folder)), exponent)
    if 0 < len(folded.counted) < least:
        raise ValueError(f"{len(folded.counted)} messages can be counted, and --least is {least}: nothing is written")
    if folded.counted:
        standing = newest_record(Path(folder) / "checkpoints", record_problem)["standing"]
        write_folded_run(Path(folder), out, config, run.parts, folded, Progress(**standing))
    return folded


def write_folded_run(folder: Path, out: Path, config, parts, folded: Folded, progress: Progress) -> None:
    """Writes the run with its new state: configuration, rows, models, checkpoint and summary."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(mkdtemp(prefix=f"{out.name}.", dir=out.parent))  # of a name that nobody has, for its owner alone
    try:
        write_folder(folder, partial, out, config, parts, folded, progress)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    log(f"{out}: {len(folded.counted)} messages, round {int(folded.state.round)}")


def write_folder(folder: Path, partial: Path, out: Path, config, parts, folded: Folded, progress: Progress) -> None:
    """Writes to `partial` what is to lie at `out`."""
    config = with_absolute_paths(dataclasses.replace(config, run=dataclasses.replace(config.run, out=str(out))))
    with lock_folder(partial):
        rows = (folder / "metrics.jsonl").read_bytes()
        (partial / "metrics.jsonl").write_bytes(rows)
        write_file(partial / "config.toml", config_to_toml(config))
        write_file(partial / MODELS, pack_models(folded))
        progress = dataclasses.replace(progress, round=int(folded.state.round), best_round=int(folded.state.round))
        progress.finished = True
        best: Tree = keep_model(parts, folded.state)
        session = Session(config, parts, folded.state, best, progress, round_seed(config, Processes()))
        writer = MetricsWriter(partial, len(rows))
        try:
            summary = summarize(session, writer.log_row) | {"folded": sorted(folded.counted.values())}
            progress.best_value = float(summary[config.evaluation.select])
            progress.position = writer.position()
        finally:
            writer.close()
        described = describe_run(config, parts.data.digest, parts.frozen)
        with open_checkpoints(partial / "checkpoints", config.run.keep) as checkpoints:
            save_checkpoint(checkpoints, progress.round, *make_checkpoint(session, described))
            checkpoints.wait_until_finished()
        write_file(partial / "summary.json", to_json(summary, 1) + "\n")
