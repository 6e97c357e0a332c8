"""What a run tells: rows of figures to loggers, and lines of text to Python's `logging`.

Text goes to `logging.getLogger("jaxfed")`, whose handler prints it to standard error. To be silent, set its level to
"WARNING"; to send it elsewhere, `logging.getLogger("jaxfed").handlers[:] = [handler]`. Handlers that the logger has
before jaxfed is imported stay alone.
"""

import json
import logging
import math
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from jaxfed.core.excerpt import printable
from jaxfed.data.stages import LOGGER as STAGES

if TYPE_CHECKING:
    from rich.console import Console

LOGGER = logging.getLogger("jaxfed")


class Logger(Protocol):
    """What is told of a run: the rows of metrics.jsonl, as flat dicts by the names of `records`.

    Any object with these two methods is one.

    Example:
        >>> class Printer:
        ...     def log_row(self, row):
        ...         print("round", row["round"])
        ...
        ...     def close(self):
        ...         print("done")
        >>> logger: Logger = Printer()  # for Experiment.train(loggers=[logger])
        >>> logger.log_row({"round": 10})
        round 10
    """

    def log_row(self, row: dict[str, Any]) -> None:
        """Takes a row of figures.

        Args:
            row: {name: number, word or None}, with `round` among the names.
        """

    def close(self) -> None:
        """The run ends, finished or not."""


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON, which knows no NaN and no infinity: they are null."""

    def plain(x):
        if isinstance(x, dict):
            return {key: plain(each) for key, each in x.items()}
        if isinstance(x, list | tuple):
            return [plain(each) for each in x]
        return None if isinstance(x, float) and not math.isfinite(x) else x

    return json.dumps(plain(value), indent=indent)


class MetricsWriter:
    """metrics.jsonl of a run, cut back to where a checkpoint was when it resumes.

    Args:
        folder: the run's.
        position: bytes of metrics.jsonl that belong to the checkpoint.
    """

    def __init__(self, folder: Path, position: int):
        self.path = folder / "metrics.jsonl"
        self.path.touch()
        kept = last_line_end(self.path, position)
        if kept < position:
            log(f"{self.path} lacks {position - kept:,} bytes of earlier rows: they are lost, the run goes on")
        self.file = open(self.path, "r+b")  # noqa: SIM115  closed by `close`
        self.file.truncate(kept)
        self.file.seek(kept)

    def log_row(self, row: dict[str, Any]) -> None:
        """One flat line."""
        self.file.write(to_json(row).encode() + b"\n")

    def position(self) -> int:
        """Bytes written so far, all of them on disk."""
        self.file.flush()
        os.fsync(self.file.fileno())
        return self.file.tell()

    def close(self) -> None:
        """Flushes and closes it."""
        self.position()
        self.file.close()


def last_line_end(path: Path, position: int) -> int:
    """Bytes of a file, at most `position`, up to the end of its last whole line there."""
    with open(path, "rb") as file:
        rows = file.read(min(position, path.stat().st_size))
    return rows.rfind(b"\n") + 1


class NullWriter(NamedTuple):
    """The journal of a process that writes none, as another does."""

    def log_row(self, row: dict[str, Any]) -> None:
        """Nothing."""

    def position(self) -> int:
        """Nothing is written."""
        return 0

    def close(self) -> None:
        """Nothing."""


class RunLoggers(NamedTuple):
    """The files of a run, and the loggers beside them, which are told the same."""

    files: MetricsWriter | NullWriter
    others: tuple[Logger, ...] = ()

    def log_row(self, row: dict[str, Any]) -> None:
        """The row goes to each."""
        for each in (self.files, *self.others):
            each.log_row(row)

    def close(self) -> None:
        """Closes each, also where one of them fails."""
        with ExitStack() as closing:
            for each in (*self.others, self.files):
                closing.callback(each.close)


class TerminalHandler(logging.Handler):
    """Prints records as they are, above a progress bar where there is one. If the terminal is closed, printing stops
    and the run continues."""

    def emit(self, record: logging.LogRecord) -> None:
        """One line."""
        try:
            terminal().print(printable(record.getMessage()), markup=False)
        except BrokenPipeError:
            raise
        except OSError:
            mute()


class StageLine(logging.Handler):
    """Shows in a terminal which stage of reading and preparing data is at work and for how long, in a line that goes
    away (`jaxfed.data.stages`). What is no stage is a line that stays."""

    def __init__(self) -> None:
        super().__init__()
        self.stages: list[str] = []
        self.line: Any = None

    def emit(self, record: logging.LogRecord) -> None:
        """The line of the stage that begins; after one that ends, of the stage around it."""
        if not hasattr(record, "stage_begins"):
            if LOGGER.isEnabledFor(record.levelno):
                LOGGER.callHandlers(record)
            return
        if getattr(record, "stage_begins", False):
            self.stages.append(printable(record.getMessage()))
        elif self.stages:
            self.stages.pop()
        if self.line and not self.stages:
            self.line.stop()
            self.line = None
        elif self.stages and (self.line or is_watched()):
            self.show(self.stages[-1])

    def show(self, text: str) -> None:
        """Shows a text, unless another line that moves is there."""
        from rich.errors import LiveError
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
        self.line = self.line or Progress(*columns, console=terminal(), transient=True)
        with suppress(LiveError):
            self.line.start()
            for task in self.line.task_ids:
                self.line.remove_task(task)
            self.line.add_task(text, total=None)


@cache
def terminal() -> "Console":
    """The console on standard error."""
    from rich.console import Console  # takes long to import

    return Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)


def add_terminal_handler() -> None:
    """Has the logger print to the terminal, if it has no handler yet."""
    if not LOGGER.handlers:
        LOGGER.addHandler(TerminalHandler())
        LOGGER.propagate = False  # or a handler of the root logger would print each line once more
    if LOGGER.level == logging.NOTSET:
        LOGGER.setLevel(logging.INFO)
    if not STAGES.handlers:
        STAGES.addHandler(StageLine())
        STAGES.setLevel(logging.DEBUG)
        STAGES.propagate = False


add_terminal_handler()


def mute() -> None:
    """No word from this process in the terminal: another one speaks for all."""
    terminal().quiet = True


def is_watched() -> bool:
    """Whether somebody sees what moves: lines are shown, and in a terminal."""
    shown = LOGGER.isEnabledFor(logging.INFO) and any(isinstance(each, TerminalHandler) for each in LOGGER.handlers)
    return shown and not terminal().quiet and sys.stderr.isatty()


@contextmanager
def progress_bar(rounds: int, done: int) -> Iterator[Any]:
    """tick(round, clients_per_second, text): a bar in a terminal, nothing elsewhere or where lines are not shown."""
    if not is_watched():
        yield lambda round, speed, text: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("round"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[speed]:,.0f} clients/s")
    with Progress(
        *columns, TextColumn("{task.fields[text]}", markup=False), TimeRemainingColumn(), console=terminal()
    ) as bar:
        task = bar.add_task("", total=rounds, completed=done, speed=0, text="")
        yield lambda round, speed, text: bar.update(task, completed=round, speed=speed, text=printable(text))


def log(text: str) -> None:
    """One line to the person who watches."""
    LOGGER.info("%s", text)
