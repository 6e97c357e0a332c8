"""The best model of a run, out of the run's folder."""

from collections.abc import Callable
from typing import Any

from jaxfed.config.build import RunParts, build_from_config, load_data
from jaxfed.config.config_files import read_config
from jaxfed.config.schema import make_config
from jaxfed.core.types import Tree
from jaxfed.data.clients import Clients
from jaxfed.training import checkpoint
from jaxfed.training.log import log
from jaxfed.training.loop import LOWER_RATES
from jaxfed.training.resume import check_frozen, record_problem, recorded_config
from jaxfed.training.rounds import RunKeys, initial_arrays, make_run_keys
from jaxfed.training.run_dir import locate_run


def open_best_model(
    folder: str, load: Callable[[Any], Clients] = load_data
) -> tuple[RunParts, RunKeys, tuple[Tree, Tree]]:
    """(what the run is made of, its seed's keys, (shared, private) of the best round) of a run.

    load: reads the data of a [data] section.
    Raises ValueError where the folder holds no model, or the data are other ones.
    """
    path = locate_run(folder)
    if not (path / "checkpoints").is_dir():
        raise ValueError(f"{folder} has no checkpoint yet: train it first")
    config = make_config(read_config(path / "config.toml"))
    record = checkpoint.newest_record(path / "checkpoints", record_problem)
    if record:
        recorded_config(path, record, config)
    data = load(config.data)
    if record and record["data"] != data.digest:
        raise ValueError(
            f"{folder}: the data (or the order of their rows) differ from those of the run: restore the original files"
        )
    if record and not record["standing"]["best_round"]:
        ended, rounds = record["standing"]["finished"], record["standing"]["round"]
        raise ValueError(
            f"the run in {folder} diverged: train again in another folder, and {LOWER_RATES}"
            if ended
            else f"{folder} has no evaluation yet (it stopped after round {rounds}): jaxfed train "
            f"{folder}/config.toml --resume"
        )
    parts = build_from_config(config, data)
    if record:
        check_frozen(path, record, parts.frozen)
    with checkpoint.open_checkpoints(path / "checkpoints") as checkpoints:
        found = checkpoint.restore_newest(checkpoints, initial_arrays(parts, config.seed), log, record_problem)
    if not found:
        raise ValueError(f"{folder} has no checkpoint yet: train it first")
    return parts, make_run_keys(config.seed), found[0]["best"]
