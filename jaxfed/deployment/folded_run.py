"""A run with messages from files folded in: a new folder of the usual form."""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import mkdtemp

from jaxfed.config.build import RunParts
from jaxfed.config.config_files import read_config
from jaxfed.config.schema import make_config
from jaxfed.config.settings import Config
from jaxfed.deployment.finished_run import write_finished_run
from jaxfed.deployment.message_files import MODELS, FoldedMessages, fold_messages, pack_models, read_models
from jaxfed.training.best_model import open_run
from jaxfed.training.checkpoint import newest_record
from jaxfed.training.log import log
from jaxfed.training.resume import record_problem
from jaxfed.training.rounds import Progress
from jaxfed.training.run_dir import lock_folder, write_file


def fold_into_run(
    folder: str, files: Sequence[Path], out: Path, exponent: float = 0.5, least: int = 1
) -> FoldedMessages:
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


def write_folded_run(
    folder: Path, out: Path, config: Config, parts: RunParts, folded: FoldedMessages, progress: Progress
) -> None:
    """Writes the run with its new state, and the list of the models that it knows."""
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, out=str(out)))
    rows, ages = (folder / "metrics.jsonl").read_bytes(), sorted(folded.counted.values())
    out.parent.mkdir(parents=True, exist_ok=True)
    made = Path(mkdtemp(prefix=f"{out.name}.", dir=out.parent))  # of a name that nobody has, for its owner alone
    try:
        with lock_folder(made):
            write_finished_run(made, config, parts, folded.state, progress, rows, folded=ages)
            write_file(made / MODELS, pack_models(folded))
        made.rename(out)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    log(f"{out}: {len(folded.counted)} messages, round {int(folded.state.round)}")
