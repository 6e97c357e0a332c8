"""Who takes part in a round, and when. Each waits for the clients: `uniform(128)` is a cohort of any of them."""

from jaxfed.sampling.choices import (
    buffered,
    constant_clock,
    cyclic,
    deadline,
    everyone,
    lognormal_clock,
    poisson,
    trace_clock,
    uniform,
)

__all__ = [
    "buffered",
    "constant_clock",
    "cyclic",
    "deadline",
    "everyone",
    "lognormal_clock",
    "poisson",
    "trace_clock",
    "uniform",
]
