"""What is in the folder of a run: its configuration, the rows of its evaluations, and its summary where it ended."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxfed.config.config_files import read_config
from jaxfed.config.schema import make_config, suggest
from jaxfed.config.settings import Config
from jaxfed.core.excerpt import shorten
from jaxfed.training.log import last_line_end
from jaxfed.training.records import ERROR_COLUMNS, HEADLINES
from jaxfed.training.run_dir import locate_run, read_summary


class RunRecord(NamedTuple):
    """A run, as its files tell it."""

    folder: str  # as it was named
    config: Config
    rows: list[dict[str, Any]]  # of its evaluations on validation, in their order
    summary: dict[str, Any]  # empty where it has not ended

    @property
    def leaky(self) -> bool:
        """Whether its figures come from a protocol or a model that leaks."""
        return bool(self.summary.get("leaky") or any(row.get("leaky") for row in self.rows))

    @property
    def label(self) -> str:
        """What tables call it."""
        return f"{self.folder} LEAKY" if self.leaky else self.folder


def read_run_record(folder: str) -> RunRecord:
    """What the files of a run say.

    Args:
        folder: the run's.

    Raises:
        ValueError: there is no run, one of its files is damaged, or no evaluation was done yet.
    """
    path = locate_run(folder)
    config = make_config(read_config(path / "config.toml"))
    rows = [row for row in read_metric_rows(path / "metrics.jsonl") if any(name.startswith("val/") for name in row)]
    done = (path / "summary.json").exists()
    summary = read_summary(path, config.evaluation.select) if done else {}
    if not rows and not summary:
        raise ValueError(f"{folder} has no evaluation yet: jaxfed train {folder}/config.toml --resume")
    return RunRecord(folder, config, rows, summary)


def read_metric_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; one that is being written is left out. Raises ValueError where a line is damaged."""
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_bytes()[: last_line_end(path, path.stat().st_size)].splitlines(), 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or type(row.get("round")) is not int:
            raise ValueError(f"{path} is damaged: line {number} is no row of figures: remove that line, or the run")
        numbers = {name: value for name, value in row.items() if "/" in name}
        if wrong := [name for name, value in numbers.items() if not isinstance(value, int | float | None)]:
            raise ValueError(f"{path} is damaged: {shorten(wrong[0])} in line {number} is no number: remove that line")
        rows.append(row)
    return rows


def has_number(row: dict[str, Any], name: str) -> bool:
    """Whether a row has a finite number of that name."""
    value = row.get(name)
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def require_summaries(records: Sequence[RunRecord]) -> None:
    """Raises ValueError where a run has not ended."""
    for each in records:
        if not each.summary:
            finish = f"jaxfed train {each.folder}/config.toml --resume"
            raise ValueError(f"{each.folder} is not finished, or saved by a program without a summary: {finish}")


def choose_metrics(records: Sequence[RunRecord], part: str, asked: Sequence[str] = ()) -> list[str]:
    """The figures that a table of runs shows.

    Args:
        records: the runs.
        part: the held-out items, "val" or "test".
        asked: names of figures; none for the headlines that there are.

    Raises:
        ValueError: no run has a figure that is asked for.
    """
    names = {name for each in records for name in each.summary if name.startswith(f"{part}/")}
    for name in asked:
        if name not in names:
            raise ValueError(f"--metric {shorten(name)}: no run has it{suggest(name, sorted(names))}")
    if asked:
        return [*dict.fromkeys(asked)]
    usual = [name.replace("test/", f"{part}/", 1) for name in HEADLINES]
    found = [name for name in usual if name in names]
    return found or sorted(name for name in names if name.rpartition("/")[2] in ERROR_COLUMNS)
