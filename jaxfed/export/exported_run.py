"""A run's best model, ready to be exported."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxfed.config.build import RunParts
from jaxfed.config.config_files import read_config
from jaxfed.config.schema import make_config
from jaxfed.core.model import with_frozen
from jaxfed.core.tree import all_finite
from jaxfed.core.types import Tree
from jaxfed.export.functions import NamedTree, name_leaves
from jaxfed.training.best_model import open_run
from jaxfed.training.recommend import UserPlace, score_items, selected_view
from jaxfed.training.run_dir import locate_run
from jaxfed.training.summary import LOWER_RATES

LONGEST_HISTORY = 4096  # of models that read no order: what is longer loses its earliest items


class ExportedRun(NamedTuple):
    """A run's best model, ready to be exported."""

    parts: RunParts
    shared: NamedTree
    private: Tree  # the private part of the model, of all clients [clients, ...]
    history_length: int
    round: int  # after which the model was
    view: str = ""  # whose model the run was chosen by, see `selected_view`


def open_exported_run(folder: str, load: Callable[[Any], Any]) -> tuple[ExportedRun, Any]:
    """(a run's best model, its configuration). Raises ValueError where there is none, or it cannot be exported."""
    locate_run(folder)
    opened = open_run(folder, load)
    parts, (shared, kept) = opened.parts, opened.arrays["best"]
    config = make_config(read_config(Path(folder) / "config.toml"))
    if parts.data.population.domains:
        raise ValueError("export: a run over several catalogues (data.merge) is not built: export a run of each")
    view = selected_view(parts, config.evaluation.select)
    check_scores(parts, (shared, kept), folder)
    private = jax.vmap(lambda one: parts.method.work.views[""](shared, one)[1])(kept) if jax.tree.leaves(kept) else ()
    weights = name_leaves(with_frozen(shared, parts.model.frozen))
    return ExportedRun(parts, weights, private, find_history_length(parts), opened.best_round, view), config


def check_scores(parts: RunParts, best: tuple[Tree, Tree], folder: str) -> None:
    """Raises ValueError where parameters, or the scores of the first, a middle and the last user, are not numbers."""
    people, homes = parts.data.population.asked, parts.data.population.homes
    sound = bool(all_finite(best))
    for user in {0, len(people.user_names) // 2, len(people.user_names) - 1} if sound else ():
        client = int(people.client_of[user])
        seat = UserPlace(people, user, client, int(homes[client]))
        sound = sound and not np.isnan(score_items(parts, best, seat)).any()
    if not sound:
        raise ValueError(f"the run in {folder} diverged: train again in another folder, and {LOWER_RATES}")


def find_history_length(parts: RunParts) -> int:
    """The most items of a history that scores are computed from: what a model of sequences reads; else a power of two
    that no history of the data is longer than, or `LONGEST_HISTORY`."""
    if parts.model.sequence:
        return parts.model.sequence.length
    people = parts.data.population.asked
    longest = int((people.train.counts + people.valid.counts + people.test.counts).max())
    return min(max(16, 1 << (longest - 1).bit_length()), LONGEST_HISTORY)


def find_vectors(run: ExportedRun) -> np.ndarray | None:
    """float32 [N, d]: the vectors of items; None: the model has none. A number for each pair of items is no vector."""
    table = run.shared.leaves.get("tables/item")
    if table is None or table.ndim != 2 or table.shape[1] >= table.shape[0]:
        return None
    return np.asarray(table[: run.parts.data.num_items], np.float32)
