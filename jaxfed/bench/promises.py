"""What `jaxfed bench` prints: its figures, and which of the promised ratios hold."""

from collections.abc import Callable
from typing import Any

from rich.console import Console

from jaxfed.training.terminal_table import print_table

JAXFED_TIMES = ("ours_ms", "device_draws_ms", "device_loop_ms")


def find_fastest(row: dict[str, Any]) -> float:
    """Milliseconds of a round: the least of rounds packed on the host, drawn on the device, and in programs."""
    return min(row[name] for name in JAXFED_TIMES if row.get(name) is not None)


def compare_to_fastest(workload: str, other: str) -> Callable[[dict], float]:
    """What computes, from the figures, the time of another method divided by that of the fastest of jaxfed's."""
    return lambda figures: figures[workload][other] / find_fastest(figures[workload])


# what the project promises: a name, ours from the figures, and its bound
PROMISES: tuple[tuple[str, Callable[[dict], float], Callable[[float], bool], str], ...] = (
    ("W1: sequential / fastest", compare_to_fastest("W1", "sequential_ms"), lambda x: x >= 6, ">= 6"),
    ("W1: dense-vmap / fastest", compare_to_fastest("W1", "dense_vmap_ms"), lambda x: x >= 30, ">= 30"),
    ("W2: sequential / fastest", compare_to_fastest("W2", "sequential_ms"), lambda x: x >= 150, ">= 150"),
    ("W2 / W1, time of a round", lambda f: find_fastest(f["W2"]) / find_fastest(f["W1"]), lambda x: x <= 2.5, "<= 2.5"),
    ("W3 / W2, time of a round", lambda f: find_fastest(f["W3"]) / find_fastest(f["W2"]), lambda x: x <= 1.5, "<= 1.5"),
    ("W1: fastest / limit", lambda f: find_fastest(f["W1"]) / f["W1"]["limit_ms"], lambda x: x <= 2.5, "<= 2.5"),
    ("W2: fastest / limit", lambda f: find_fastest(f["W2"]) / f["W2"]["limit_ms"], lambda x: x <= 2, "<= 2"),
    (
        "W3: peak memory, GB over 3 tables",
        lambda f: f["W3"]["peak_memory_mb"] / 1e3 - 3 * 1e6 * 65 * 4 / 1e9,
        lambda x: x <= 1.5,
        "<= 1.5",
    ),
    ("W4: peak memory, GB", lambda f: f["W4"]["peak_memory_mb"] / 1e3, lambda x: x <= 10, "<= 10"),
    ("W4: client updates a second", lambda f: f["W4"]["clients_per_second"], lambda x: x >= 1000, ">= 1000"),
    ("W5: sequential / ours", lambda f: f["W5"]["sequential_ms"] / f["W5"]["ours_ms"], lambda x: x >= 5, ">= 5"),
    ("W6: sequential / ours", lambda f: f["W6"]["sequential_ms"] / f["W6"]["ours_ms"], lambda x: x >= 5, ">= 5"),
)


def check_targets(figures: dict[str, dict[str, Any]]) -> list[tuple[str, float, str, bool]]:
    """(what, its value, the bound, whether it holds) of every promise that these figures tell."""
    checked = []
    for what, value, holds, bound in PROMISES:
        try:
            number = value(figures)
        except (KeyError, TypeError):  # a workload that was not run, a baseline that does not fit
            continue
        checked.append((what, number, bound, holds(number)))
    return checked


def print_report(figures: dict[str, dict[str, Any]]) -> None:
    """Prints a table of the workloads, then what was promised and what was missed."""
    out = Console(highlight=False, soft_wrap=True)
    columns = (
        "ours_ms",
        "host_ms",
        "device_draws_ms",
        "device_draws_host_ms",
        "device_loop_ms",
        "device_loop_host_ms",
        "sequential_ms",
        "dense_vmap_ms",
        "limit_ms",
        "clients_per_second",
        "gigabytes_per_second",
        "gigaflops_per_second",
        "share_of_peak_bandwidth",
        "share_of_peak_flops",
        "compile_seconds",
    )
    heads = [column.replace("_ms", "").replace("_", " ") for column in ("", *columns, "peak_memory_mb")]
    values = {name: [row.get(column) for column in (*columns, "peak_memory_mb")] for name, row in figures.items()}
    lines = [
        [name, *("-" if x is None else f"{x:,.1f}" if x >= 1 or not x else f"{x:.2g}" for x in each)]
        for name, each in values.items()
    ]
    print_table(out, "ms a round, medians", heads, lines)
    for what, value, bound, holds in check_targets(figures):
        out.print(f"{what:>36}  {value:10.2f}  {bound:>8}  {'' if holds else 'MISSED'}")
