"""Cohorts and clocks that are chosen before the clients are known: an experiment gives each its clients."""

from collections.abc import Callable
from functools import partial
from typing import Any

from jaxfed.core.types import Sampler
from jaxfed.sampling import asynchronous, clock, cohort
from jaxfed.sampling.clock import Clock

MakeSampler = Callable[..., Sampler]
MakeClock = Callable[..., Clock]


def uniform(size: int = 0, dropout: float = 0.0) -> MakeSampler:
    """A fixed number of clients, drawn uniformly without replacement.

    Args:
        size: number of clients in a round. 0: 128, or all where there are fewer.
        dropout: probability that a client that was asked drops out.

    Returns:
        A function of the clients (num_clients) that gives the sampler.

    Example:
        >>> uniform(3)(num_clients=10).size
        3
    """
    return partial(cohort.uniform_cohort, size=size, dropout=dropout)


def poisson(size: int = 0, cap: int = 0, dropout: float = 0.0) -> MakeSampler:
    """Each client joins independently with the same probability.

    Args:
        size: expected number of clients in a round. 0: 128, or all where there are fewer.
        cap: the largest number of clients in a round. 0: six standard deviations above the mean.
        dropout: probability that a client that was asked drops out.

    Returns:
        A function of the clients that gives the sampler.

    Example:
        >>> poisson(3)(num_clients=10).kind
        'poisson'
    """
    return partial(cohort.poisson_cohort, size=size, cap=cap, dropout=dropout)


def cyclic(size: int = 0, dropout: float = 0.0) -> MakeSampler:
    """Clients in a fixed random order, the next `size` of them each round.

    Args:
        size: number of clients in a round. 0: 128, or all where there are fewer.
        dropout: probability that a client that was asked drops out.

    Returns:
        A function of the clients that gives the sampler.

    Example:
        >>> cyclic(3)(num_clients=10).kind
        'cyclic'
    """
    return partial(cohort.cyclic_cohort, size=size, dropout=dropout)


def everyone(dropout: float = 0.0) -> MakeSampler:
    """All clients in every round.

    Args:
        dropout: probability that a client that was asked drops out.

    Returns:
        A function of the clients that gives the sampler.

    Example:
        >>> everyone()(num_clients=10).size
        10
    """
    return partial(cohort.everyone_cohort, dropout=dropout)


def deadline(size: int = 0, over: float = 1.0, seconds: float = 0.0, dropout: float = 0.0) -> MakeSampler:
    """Synchronous rounds by a clock (Bonawitz et al. 2019): more clients than needed are asked, and the round ends when
    enough have reported, or at its deadline.

    Args:
        size: number of reports that end a round. 0: 128, or all where there are fewer.
        over: over x size clients are asked.
        seconds: the deadline, in seconds after the round's start. 0: none.
        dropout: probability that a client that was asked drops out.

    Returns:
        A function of the clients and a clock that gives the sampler.

    Example:
        >>> cohort = deadline(size=32, over=1.3)
    """
    return partial(asynchronous.deadline_cohort, size=size, over=over, seconds=seconds, dropout=dropout)


def buffered(size: int = 0, concurrency: int = 0, max_age: int = 20, dropout: float = 0.0) -> MakeSampler:
    """Asynchronous rounds by a clock (FedBuff: Nguyen et al. 2022): the server moves whenever `size` clients have come
    in.

    Args:
        size: number of reports after which the server moves. 0: 32, or a sixth of the clients if that is fewer.
        concurrency: clients that train at the same time. 0: 128, or number of clients - 2 x size if that is fewer.
        max_age: number of rounds after which an update is too old and is discarded.
        dropout: probability that a client that was asked drops out.

    Returns:
        A function of the clients and a clock that gives the sampler.

    Example:
        >>> cohort = buffered(size=16, concurrency=64)
    """
    return partial(asynchronous.buffered_cohort, size=size, concurrency=concurrency, max_age=max_age, dropout=dropout)


def constant_clock(**options: Any) -> MakeClock:
    """Every client takes the same seconds for a download, an interaction and an upload.

    Args:
        options: `download`, `compute`, `upload` (seconds), `awake`, `zones`, as in `constant_times`.

    Returns:
        A function of the clients that gives the clock.

    Example:
        >>> clock = constant_clock(download=1.0)
    """
    return partial(clock.constant_times, **options)


def lognormal_clock(**options: Any) -> MakeClock:
    """Clients whose times differ from visit to visit and by the class of their device.

    Args:
        options: of `lognormal_times`: the medians, `spread`, `shares`, `slowness`, ...

    Returns:
        A function of the clients that gives the clock.

    Example:
        >>> clock = lognormal_clock(spread=0.3)
    """
    return partial(clock.lognormal_times, **options)


def trace_clock(path: str, **options: Any) -> MakeClock:
    """Times as they were measured.

    Args:
        path: a file with the columns client, download, compute and upload (seconds).
        options: `awake` and `zones`.

    Returns:
        A function of the clients that gives the clock.

    Example:
        >>> clock = trace_clock("times.csv")
    """
    return partial(clock.trace_times, path=path, **options)
