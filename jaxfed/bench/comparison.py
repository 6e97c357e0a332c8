"""Figures of `jaxfed bench` beside those that were kept of another run of it."""

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from jaxfed.bench.workloads import WORKLOADS
from jaxfed.training.terminal_table import print_table

TIMES = ("ours_ms", "device_draws_ms", "device_loop_ms", "sequential_ms", "dense_vmap_ms", "limit_ms")
RATE = "clients_per_second"
COMPARED = (*TIMES, RATE, "compile_seconds", "peak_memory_mb")
LARGEST = 1e15  # no figure comes near to it


def read_figures(path: str, workloads: Collection[str] = ()) -> dict[str, dict[str, Any]]:
    """Reads what `jaxfed bench --json` wrote.

    Args:
        path: the file.
        workloads: those that are wanted; none: all that are there.

    Returns:
        {workload: {name: figure}}, in the order of the file.

    Raises:
        ValueError: there is no such file, or it is not one of these: one line that says what to do.
    """
    make = f"make it by jaxfed bench --json {path}"
    try:
        figures = json.loads(Path(path).read_text("utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file: {make}") from None
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}: {make}") from None
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: it is not JSON: {make}") from None
    rows = figures.values() if isinstance(figures, dict) else ()
    if not rows or not all(isinstance(row, dict) and "ours_ms" in row for row in rows):
        raise ValueError(f"{path}: it has no figures of a benchmark: {make}")
    if unknown := [name for name in figures if name not in WORKLOADS]:
        raise ValueError(f"{path}: there is no workload {unknown[0]!r:.40}: take it out of the file, or {make}")
    for workload, row in figures.items():
        for name, value in row.items():
            check_figure(path, workload, name, value)
    if missing := [name for name in workloads if name not in figures]:
        raise ValueError(f"{path} has no {missing[0]}, but {', '.join(figures)}: name one of these")
    return {name: row for name, row in figures.items() if name in (workloads or figures)}


def check_figure(path: str, workload: str, name: str, value: Any) -> None:
    """Raises ValueError for what no run measures. None is what could not be measured."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    least = "above 0" if name in COMPARED else "of at least 0"
    if value is None and name != "ours_ms":
        return
    if not number or not 0 <= value < LARGEST or (value == 0 and name in COMPARED):
        raise ValueError(
            f"{path}: {name} of {workload} is {value!r:.40}: it must be a finite number {least}; measure it again by "
            f"jaxfed bench {workload} --json FILE"
        )


def check_common(path: str, other: dict[str, dict[str, Any]], workloads: Sequence[str]) -> None:
    """Raises ValueError where the other run has none of these workloads. path: of its figures."""
    if not set(other) & set(workloads):
        raise ValueError(
            f"{path} has {', '.join(other)}, and none of {', '.join(workloads)}: there is nothing to compare, name a "
            "workload that it has"
        )


def compare_figures(this: dict[str, Any], other: dict[str, Any]) -> list[float | None]:
    """How many times better a workload's figures are than those of another run, in the order of `COMPARED`.

    Args:
        this: the figures of this run.
        other: those of the other one.

    Returns:
        other / this of times and memory, this / other of rates. None: one of the runs lacks the figure.
    """
    ratios: list[float | None] = []
    for name in COMPARED:
        ours, theirs = this.get(name), other.get(name)
        if not ours or not theirs:
            ratios.append(None)
        else:
            ratios.append(ours / theirs if name == RATE else theirs / ours)
    return ratios


def print_comparison(path: str, this: dict[str, dict[str, Any]], other: dict[str, dict[str, Any]]) -> None:
    """Prints a table with a line of ratios for each workload that both runs have.

    Args:
        path: the file of the other run, for the title.
        this: the figures of this run, by workload.
        other: those of the other one.
    """
    lines = [
        [name, *("-" if x is None else f"{x:.2f}" for x in compare_figures(row, other[name]))]
        for name, row in this.items()
        if name in other
    ]
    out = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    heads = ["", *(name.removesuffix("_ms").replace("_", " ") for name in COMPARED)]
    title = f"{path} / this run (clients per second: this run / {path}); above 1: this run is better"
    print_table(out, title, heads, lines)
