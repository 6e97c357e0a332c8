"""Where the rows of a run go beside metrics.jsonl: the writers that `run.writers` names.

A writer is a function that is told of a run before its first row, and returns a `Logger`. A package offers one to all
configurations by an entry point in its pyproject.toml:

    [project.entry-points."jaxfed.writers"]
    mine = "my_package.my_module:my_writer"

and a module that `run.imports` names does so by `jaxfed.register("writer", "mine", my_writer)`.
"""

import csv
import importlib
import io
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from jaxfed.config.plugins import describe_error
from jaxfed.config.registry import WRITERS
from jaxfed.config.schema import suggest
from jaxfed.core.excerpt import shorten
from jaxfed.training.log import Logger, to_json
from jaxfed.training.records import describe_figure
from jaxfed.training.run_dir import write_file

GROUP = "jaxfed.writers"


class RunStart(NamedTuple):
    """What a writer is told of a run.

    folder: the run's. config: its configuration as a table. round: rounds that were done before, 0 where it begins.
    rows: those that were written before, up to the checkpoint that the run goes on from. A row after that is told once
    more, so a writer that keeps files begins with these rows.
    """

    folder: Path
    config: dict[str, Any]
    round: int
    rows: tuple[dict[str, Any], ...]


Writer = Callable[[RunStart], Logger]


def list_numbers(row: dict[str, Any]) -> dict[str, float]:
    """The finite numbers of a row but its round, by their names; those that leak begin with LEAKY/."""
    mark = "LEAKY/" if row.get("leaky") else ""
    numbers = {name: value for name, value in row.items() if isinstance(value, int | float) and name != "round"}
    return {mark + name: x for name, x in numbers.items() if not isinstance(x, bool) and math.isfinite(x)}


def is_test_row(row: dict[str, Any]) -> bool:
    """Whether a row has the figures of the test, which is of the best round and comes last."""
    return any(name.startswith("test/") for name in row)


class TensorBoardWriter:
    """Events of TensorBoard in RUN/tensorboard: every number at its round, with what it means the first time."""

    def __init__(self, start: RunStart):
        # events are written here and now: the thread of `SummaryWriter` dies of a full disk, and its queue then blocks
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        (start.folder / "tensorboard").mkdir(exist_ok=True)
        self.described: set[str] = set()
        self.board = EventsWriter(str(start.folder / "tensorboard" / "events"), f".{os.getpid()}.{start.round}")
        begin = SessionLog(status=SessionLog.START)  # tells TensorBoard to forget events of later rounds
        self.board.write_event(Event(session_log=begin, step=start.round + 1, wall_time=time.time()))

    def log_row(self, row: dict[str, Any]) -> None:
        """Writes its numbers."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        for name, value in list_numbers(row).items():
            meaning = "" if name in self.described else describe_figure(name.removeprefix("LEAKY/"))
            self.described.add(name)
            summary = scalar(name, value, summary_description=meaning)
            self.board.write_event(Event(summary=summary, step=row["round"], wall_time=time.time()))
        self.board.flush()

    def close(self) -> None:
        """Closes the file."""
        self.board.close()


class CsvWriter:
    """RUN/metrics.csv: a line for each row, a column for each figure. A row with further figures widens the table."""

    def __init__(self, start: RunStart):
        self.path = start.folder / "metrics.csv"
        self.rows = [*start.rows]
        self.names = [*dict.fromkeys(name for row in self.rows for name in row)]
        write_file(self.path, self.table_text())

    def table_text(self) -> str:
        """The whole table."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerows([self.names] * bool(self.names) + [*map(self.cells, self.rows)])
        return out.getvalue()

    def cells(self, row: dict[str, Any]) -> list[Any]:
        """The cells of a row."""
        return [format_csv_cell(row.get(name)) for name in self.names]

    def log_row(self, row: dict[str, Any]) -> None:
        """Writes the row to the end, or the table anew where the row has another figure."""
        self.rows.append(row)
        further = [name for name in row if name not in self.names]
        if further:
            self.names += further
            write_file(self.path, self.table_text())
            return
        with open(self.path, "a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(self.cells(row))

    def close(self) -> None:
        """Nothing is open between rows."""


def format_csv_cell(value: Any) -> str:
    """A value in a cell: text as it is, anything else as metrics.jsonl has it, and nothing where that is null."""
    return value if isinstance(value, str) else to_json(value).replace("null", "")


class WandbWriter(NamedTuple):
    """Rows to a run of Weights & Biases."""

    run: Any

    def log_row(self, row: dict[str, Any]) -> None:
        """Numbers at their round, which W&B takes once; those of the test to the run's summary."""
        if is_test_row(row):
            self.run.summary.update(list_numbers(row))
        else:
            self.run.log(list_numbers(row), step=row["round"])

    def close(self) -> None:
        """Ends the run."""
        self.run.finish()


def open_wandb(start: RunStart) -> Logger:
    """Rows to Weights & Biases; the project and the rest are set by its own variables, such as WANDB_PROJECT."""
    wandb, kept = import_package("wandb"), start.folder / "wandb_run.txt"
    known = kept.read_text().strip() if start.round and kept.exists() else None
    more = {"id": known, "resume": "allow"} if known else {}
    name, config = start.folder.name, start.config
    run = wandb.init(dir=str(start.folder), name=name, config=config, reinit="create_new", **more)
    write_file(kept, run.id)
    return WandbWriter(run)


class MlflowWriter(NamedTuple):
    """Rows to a run of MLflow."""

    client: Any
    entities: Any  # mlflow.entities
    run: str  # its id
    done: int  # the last round that MLflow has; rows up to it were sent before

    def log_row(self, row: dict[str, Any]) -> None:
        """Numbers at their round. MLflow allows no @ in names: hr@10 is hr_at_10 there."""
        if row["round"] <= self.done and not is_test_row(row):
            return
        now, step = int(time.time() * 1000), row["round"]
        numbers = {} if is_test_row(row) else {"round": step}
        numbers |= {name.replace("@", "_at_"): value for name, value in list_numbers(row).items()}
        metrics = [self.entities.Metric(name, value, now, step) for name, value in numbers.items()]
        self.client.log_batch(self.run, metrics=metrics)

    def close(self) -> None:
        """Ends the run."""
        self.client.set_terminated(self.run)


def open_mlflow(start: RunStart) -> Logger:
    """Rows to MLflow; where it is says its own variable MLFLOW_TRACKING_URI. The configuration goes to config.json."""
    mlflow, kept = import_package("mlflow"), start.folder / "mlflow_run.txt"
    entities = importlib.import_module("mlflow.entities")
    client, done = mlflow.MlflowClient(), 0
    if start.round and kept.exists():
        run = kept.read_text().strip()
        done = int(client.get_run(run).data.metrics.get("round", 0))
    else:
        experiment = mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", "jaxfed")).experiment_id
        run = client.create_run(experiment, run_name=start.folder.name).info.run_id
        client.log_dict(run, start.config, "config.json")
        write_file(kept, run)
    return MlflowWriter(client, entities, run, done)


def import_package(name: str) -> Any:
    """A package that a writer needs. Raises ValueError where it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(f'run.writers: "{name}" needs the package {name}: pip install {name}') from None


BUILT_IN: dict[str, Writer] = {
    "tensorboard": TensorBoardWriter,
    "csv": CsvWriter,
    "wandb": open_wandb,
    "mlflow": open_mlflow,
}
PACKAGES = ("wandb", "mlflow")  # of writers of the same name


def find_writer(name: str) -> Writer:
    """A writer by its name: a registered one, one that comes with jaxfed, or one of an installed package.

    Raises ValueError where there is none, or what it needs is missing.
    """
    if name in WRITERS or name in BUILT_IN:
        if name in PACKAGES and name not in WRITERS:
            import_package(name)
        return WRITERS.get(name) or BUILT_IN[name]
    offered = {each.name: each for each in metadata.entry_points(group=GROUP)}
    if name not in offered:
        raise ValueError(f'run.writers: no writer "{shorten(name)}"{suggest(name, [*BUILT_IN, *WRITERS, *offered])}')
    try:
        return offered[name].load()
    except Exception as error:  # of somebody else's code: whatever it is
        raise ValueError(
            f"run.writers: {name} ({offered[name].value}) of an installed package cannot be imported: "
            f"{describe_error(error)}"
        ) from error


def check_writers(names: Sequence[str]) -> str:
    """ "". Raises ValueError where one of the writers is not there."""
    for name in names:
        find_writer(name)
    return ""


def open_writers(names: Sequence[str], start: RunStart) -> tuple[Logger, ...]:
    """The writers of a run, open. Raises ValueError where one cannot begin; those before it are closed."""
    with ExitStack() as opened:
        made = []
        for name in dict.fromkeys(names):
            made.append(find_writer(name)(start))
            opened.callback(made[-1].close)
        opened.pop_all()
    return tuple(made)


def read_kept_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """The rows that metrics.jsonl holds; a damaged line is left out."""
    for line in (folder / "metrics.jsonl").read_bytes().splitlines():
        with suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict):
                yield row
