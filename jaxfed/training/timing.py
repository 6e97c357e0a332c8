"""Where a run's time goes: seconds by stage, and a profiler's trace of a few rounds.

A thread of its own draws, packs and transfers the next cohort while devices compute: these three overlap with
`compute`, and stages add up to more than a run takes. `wait` is the part of them that does not overlap: the loop had
nothing to run. `compute` is the loop's time for starting programs and waiting for their results. `seconds` of a run is
wait + compute and little else; `evaluate` and `checkpoint` hold the loop too, and are counted apart: a checkpoint until
it is copied, it is written beside the next rounds. Where rounds are drawn on the device (`work.draw_on`), `pack` is the
time for starting the programs that draw, and `transfer` waits for them. Of a program of many rounds, `sample` and
`pack` are the time for its plan, and `compute` has its transfer, too.
"""

import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import jax
import psutil

STAGES = ("sample", "pack", "transfer", "wait", "compute", "solve", "evaluate", "checkpoint")
Done = TypeVar("Done")


@contextmanager
def time_stage(stages: dict[str, float], name: str) -> Iterator[None]:
    """Adds the seconds of its body to `stages`, and shows them under that name in a profiler's trace."""
    begin = time.perf_counter()
    try:
        with jax.profiler.TraceAnnotation(name):
            yield
    finally:
        stages[name] = stages.get(name, 0.0) + time.perf_counter() - begin


def peak_megabytes() -> float:
    """The most memory that this process held at a time, in MB."""
    status = Path("/proc/self/status")
    if status.exists():  # what `getrusage` says is inherited from the process that started this one
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 1024
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / (1 << 20)
    import resource  # which Windows does not have

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << (20 if sys.platform == "darwin" else 10))


def profile_rounds(
    rounds: Iterator[Done],
    folder: Path,
    count: int,
    skip: int = 2,
    ends_program: Callable[[Done], bool] = lambda done: True,
) -> Generator[Done, None, None]:
    """The same rounds, some of them traced by the JAX profiler.

    Args:
        rounds: what to run.
        folder: where the trace is written.
        count: how many rounds to trace, or a few more, to the end of a program of many.
        skip: how many rounds are not traced before these, or a few more.
        ends_program: whether a round is the last one of its program.
    """
    skipped, traced, tracing, between = 0, 0, False, True
    try:
        while True:
            if between and not tracing and skipped >= skip and traced < count:
                options = jax.profiler.ProfileOptions()
                options.python_tracer_level = 0  # every call of Python would drown the stages and slow the rounds
                jax.profiler.start_trace(folder, profiler_options=options)
                tracing = True
            if (done := next(rounds, None)) is None:
                break
            skipped, traced, between = skipped + (not tracing), traced + tracing, ends_program(done)
            if tracing and between and traced >= count:
                jax.block_until_ready(done)
                jax.profiler.stop_trace()
                tracing = False
            yield done
    finally:
        if tracing:
            jax.profiler.stop_trace()
