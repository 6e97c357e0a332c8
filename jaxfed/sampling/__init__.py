"""Who takes part in a round, and when. Each gives a function of the clients, which an experiment calls."""

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
