"""Experiments from a configuration or a run's folder, and several seeds of one."""

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxfed.config.config_files import read_config
from jaxfed.config.overrides import override_config
from jaxfed.config.schema import make_config
from jaxfed.training.experiment import Experiment
from jaxfed.training.run_dir import locate_run


def from_config(config: str | Path | dict[str, Any], *overrides: str) -> Experiment:
    """The experiment of a configuration.

    Args:
        config: A TOML file, the name of a configuration that comes with jaxfed, or a table.
        overrides: Words as on the command line: "--rounds", "20", "--model.dim", "16".

    Returns:
        The experiment, before its first round.

    Raises:
        ValueError: the configuration is wrong: one line that says how.

    Example:
        >>> import jaxfed as jf
        >>> table = {"data": {"name": "synthetic", "users": 60, "items": 50}, "model": {"name": "popularity"}}
        >>> jf.from_config(table, "--cohort.name", "everyone").latest.item_ids.size
        50
    """
    table = copy.deepcopy(config) if isinstance(config, dict) else read_config(config)
    return Experiment._from_config(override_config(table, list(overrides)))


def load_run(folder: str | Path) -> Experiment:
    """A run that was saved or trained to a folder, as its newest checkpoint has it.

    Args:
        folder: The folder of `jaxfed train`, or of `Experiment.save`.

    Returns:
        The experiment: it can be evaluated, recommends, and trains on.

    Raises:
        ValueError: there is no run in the folder, or it cannot go on from there.

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
    experiment = Experiment._from_config(make_config(read_config(path / "config.toml")), begins=False)
    experiment.restore(path)
    return experiment


def train_seeds(
    experiment: Experiment, seeds: Sequence[int], rounds: int = 0, evaluate_every: int = 0
) -> Iterator[dict[str, Any]]:
    """Trains an experiment from several seeds, one after the other; all use the same compiled programs.

    Args:
        experiment: The experiment; it is left as it is.
        seeds: The seeds of the runs.
        rounds: See `Experiment.train`.
        evaluate_every: See `Experiment.train`.

    Returns:
        An iterator of rows, as of `Experiment.train`, with "seed". The last row of each seed has the figures of the
        test, too.

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
