"""The folder of a run whose rounds no loop of the simulator has run: it is tested, and written in the usual form."""

from pathlib import Path
from typing import Any

from jaxfed.config.build import RunParts
from jaxfed.config.config_files import config_to_toml, with_absolute_paths
from jaxfed.config.settings import Config
from jaxfed.core.processes import Processes
from jaxfed.core.state import State
from jaxfed.training.checkpoint import checkpoint_steps, open_checkpoints, save_checkpoint
from jaxfed.training.log import MetricsWriter, to_json
from jaxfed.training.resume import describe_run, make_checkpoint
from jaxfed.training.rounds import Progress, keep_model
from jaxfed.training.run_dir import write_file
from jaxfed.training.session import Session, round_seed
from jaxfed.training.summary import summarize


def write_finished_run(
    folder: Path, config: Config, parts: RunParts, state: State, progress: Progress, rows: bytes, **known: Any
) -> dict[str, Any]:
    """Writes configuration, rows, checkpoint and summary of a run that ends with this state, and returns the summary.

    Args:
        folder: Where to write.
        config: The configuration.
        parts: What it makes.
        state: After the last round. Its model counts as the best one: there were no evaluations between rounds.
        progress: Where the run stands; it is changed.
        rows: The rows of metrics.jsonl so far.
        known: What the summary says beside its figures.
    """
    config = with_absolute_paths(config)
    progress.round = progress.best_round = int(state.round)
    progress.finished = True
    session = Session(config, parts, state, keep_model(parts, state), progress, round_seed(config, Processes()))
    write_file(folder / "config.toml", config_to_toml(config))
    (folder / "metrics.jsonl").write_bytes(rows)
    writer = MetricsWriter(folder, len(rows))
    try:
        summary = summarize(session, writer.log_row) | known
        progress.best_value = float(summary[config.evaluation.select])
        progress.position = writer.position()
    finally:
        writer.close()
    described = describe_run(config, parts.data.digest, parts.frozen)
    with open_checkpoints(folder / "checkpoints", config.run.keep) as checkpoints:
        if progress.round not in checkpoint_steps(folder / "checkpoints"):
            save_checkpoint(checkpoints, progress.round, *make_checkpoint(session, described))
            checkpoints.wait_until_finished()
    write_file(folder / "summary.json", to_json(summary, 1) + "\n")
    return summary
