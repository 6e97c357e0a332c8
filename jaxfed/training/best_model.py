"""The best model of a run, read from the run's folder; and a run that starts from another run."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax

from jaxfed.config.build import RunParts, build_from_config, load_data
from jaxfed.config.config_files import read_config
from jaxfed.config.schema import make_config
from jaxfed.config.start import SavedModel
from jaxfed.core.model import with_frozen
from jaxfed.core.types import Tree
from jaxfed.data.clients import Clients
from jaxfed.data.item_descriptions import item_texts
from jaxfed.models.distillation import score_by_history
from jaxfed.models.freezing import join_frozen
from jaxfed.training import checkpoint
from jaxfed.training.log import log
from jaxfed.training.resume import check_frozen, record_problem, recorded_config
from jaxfed.training.rounds import RunKeys, initial_arrays, make_run_keys
from jaxfed.training.run_dir import locate_run
from jaxfed.training.summary import LOWER_RATES


class OpenedRun(NamedTuple):
    """A run, read from its folder."""

    parts: RunParts
    keys: RunKeys  # of its seed
    arrays: dict[str, Tree]  # of its newest checkpoint: the state, and the best model
    finished: bool
    best_round: int = 0


def open_run(folder: str, load: Callable[[Any], Clients] = load_data) -> OpenedRun:
    """A run, as its newest checkpoint has it.

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
    parts = build_run(config, data, begins=False)
    if record:
        check_frozen(path, record, parts.frozen)
    with checkpoint.open_checkpoints(path / "checkpoints") as checkpoints:
        found = checkpoint.restore_newest(checkpoints, initial_arrays(parts, config.seed), log, record_problem)
    if not found:
        raise ValueError(f"{folder} has no checkpoint yet: train it first")
    standing = found[1]["standing"]
    return OpenedRun(parts, make_run_keys(config.seed), found[0], standing["finished"], standing["best_round"])


def open_best_model(
    folder: str, load: Callable[[Any], Clients] = load_data
) -> tuple[RunParts, RunKeys, tuple[Tree, Tree]]:
    """(what the run is made of, its seed's keys, (shared, private) of the best round) of a run.

    load: reads the data of a [data] section.
    Raises ValueError where the folder holds no model, or the data are other ones.
    """
    run = open_run(folder, load)
    return run.parts, run.keys, run.arrays["best"]


def read_start(config: Any, begins: bool = True) -> SavedModel | None:
    """The model that a run starts from. None: it starts with random parameters, or the model is not needed any more.

    begins: whether the run is before its first round. A run that is read from its checkpoint needs only what is frozen.

    Raises ValueError where there is no finished run.
    """
    folder = config.start.run
    if not folder or not (begins or config.work.freeze):
        return None
    try:
        run = open_run(folder)
    except ValueError as error:
        raise ValueError(f"start.run: {error}") from None
    if not run.finished:
        raise ValueError(f"start.run: {folder} is not finished: jaxfed train {folder}/config.toml --resume")
    shared, private = run.arrays["best"]
    whole = join_frozen(with_frozen(shared, run.parts.model.frozen))
    theta = run.arrays["state"].shared.params if run.parts.method.parametrization else None
    whole, theta, private = jax.device_get((whole, theta, private))
    source, names = run.parts.data.source, run.parts.data.population.names
    model = run.parts.model
    by_history = model.closed or (model.sequence and model.sequence.times == "none")
    score = partial(score_by_history, model, shared) if by_history else None
    return SavedModel(folder, whole, theta, source.items, item_texts(source), private, names, score)


def build_run(config: Any, data: Clients, begins: bool = True) -> RunParts:
    """What a run is made of. It starts from another run where its configuration says so; see `build_from_config`.

    begins: see `read_start`. Raises ValueError.
    """
    saved = read_start(config, begins)
    return build_from_config(config, data, saved=saved) if saved else build_from_config(config, data)
