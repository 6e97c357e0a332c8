"""What a run tells: a progress bar, lines of JSON, TensorBoard."""

import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

console = Console(stderr=True, highlight=False, soft_wrap=True)


def written(value: Any, indent: int | None = None) -> str:
    """JSON, which knows no NaN and no infinity: they are null."""

    def plain(x):
        if isinstance(x, dict):
            return {key: plain(each) for key, each in x.items()}
        if isinstance(x, list | tuple):
            return [plain(each) for each in x]
        return None if isinstance(x, float) and not math.isfinite(x) else x

    return json.dumps(plain(value), indent=indent)


class Journal:
    """metrics.jsonl and TensorBoard events of a run, both cut back to where a checkpoint was when it resumes."""

    def __init__(self, folder: Path, position: int, round: int):
        from tensorboardX import SummaryWriter

        self.path = folder / "metrics.jsonl"
        self.file = open(self.path, "ab")  # noqa: SIM115  closed by `close`
        self.file.truncate(position)
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=round + 1)

    def write(self, row: dict[str, Any]) -> None:
        """One flat line; numbers also go to TensorBoard at `round`."""
        self.file.write(written(row).encode() + b"\n")
        mark = "LEAKY/" if row.get("leaky") else ""
        for name, value in row.items():
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if number and name != "round":
                self.board.add_scalar(mark + name, value, row["round"])

    def position(self) -> int:
        """Bytes written so far, all of them on disk."""
        self.file.flush()
        os.fsync(self.file.fileno())
        return self.file.tell()

    def close(self) -> None:
        """Flushes and closes both."""
        self.position()
        self.file.close()
        self.board.close()


class Silence(NamedTuple):
    """The journal of a process that writes none, as another does."""

    def write(self, row: dict[str, Any]) -> None:
        """Nothing."""

    def position(self) -> int:
        """Nothing is written."""
        return 0

    def close(self) -> None:
        """Nothing."""


def hush() -> None:
    """No word from this process: another one speaks for all."""
    console.quiet = True


@contextmanager
def progress(rounds: int, done: int) -> Iterator[Any]:
    """tick(round, clients_per_second, text): a bar in a terminal, nothing elsewhere."""
    if console.quiet or not sys.stderr.isatty():
        yield lambda round, speed, text: None
        return
    columns = TextColumn("round"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[speed]:,.0f} clients/s")
    with Progress(*columns, TextColumn("{task.fields[text]}"), TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("", total=rounds, completed=done, speed=0, text="")
        yield lambda round, speed, text: bar.update(task, completed=round, speed=speed, text=text)


def say(text: str) -> None:
    """One line to the person who watches."""
    console.print(text, markup=False)
