"""Cohorts and clocks that are chosen before the clients are known: an experiment gives each its clients."""

from collections.abc import Callable
from functools import partial
from typing import Any

from jaxfed.core.types import Sampler
from jaxfed.sampling import asynchronous, clock, cohort
from jaxfed.sampling.clock import Clock

MakeSampler = Callable[..., Sampler]
MakeClock = Callable[..., Clock]


def uniform(size: int = 0, dropout: float = 0.0, holders: float = 0.0) -> MakeSampler:
    """A fixed number of clients, drawn uniformly without replacement.

    Args:
        size: Number of clients in a round. 0: as `holders` says; without it 128, or all where there are fewer.
        dropout: Probability that a client that was asked drops out.
        holders: Where `size` is 0: how many clients of a round have the item of an interaction, on average over
            interactions. The round is as large as that takes, from 128 to 8,192 clients, of as many as there are.

    Returns:
        A function of the clients (num_clients, mean_holders) that gives the sampler.

    Example:
        >>> uniform(3)(num_clients=10).size
        3
    """
    return partial(cohort.uniform_cohort, size=size, dropout=dropout, holders=holders)


def poisson(size: int = 0, cap: int = 0, dropout: float = 0.0) -> MakeSampler:
    """Each client joins independently with the same probability.

    Args:
        size: Expected number of clients in a round. 0: 128, or all where there are fewer.
        cap: The largest number of clients in a round. 0: six standard deviations above the mean.
        dropout: Probability that a client that was asked drops out.

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
        size: Number of clients in a round. 0: 128, or all where there are fewer.
        dropout: Probability that a client that was asked drops out.

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
        dropout: Probability that a client that was asked drops out.

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
        size: Number of reports that end a round. 0: 128, or all where there are fewer.
        over: `over` x `size` clients are asked.
        seconds: The deadline, in seconds after the start of the round. 0: none.
        dropout: Probability that a client that was asked drops out.

    Returns:
        A function of the clients and a clock that gives the sampler.

    Example:
        >>> import numpy as np
        >>> clock = constant_clock()(num_clients=10, num_train=np.full(10, 5))
        >>> deadline(size=4, over=1.5)(num_clients=10, clock=clock).slots  # so many are asked
        6
    """
    return partial(asynchronous.deadline_cohort, size=size, over=over, seconds=seconds, dropout=dropout)


def buffered(size: int = 0, concurrency: int = 0, max_age: int = 20, dropout: float = 0.0) -> MakeSampler:
    """Asynchronous rounds by a clock (FedBuff: Nguyen et al. 2022): the server moves whenever `size` clients have
    reported.

    Args:
        size: Number of reports after which the server moves. 0: 32, or a sixth of the clients if that is fewer.
        concurrency: Number of clients that train at the same time. 0: 128, or the number of clients less 2 x size
            if that is fewer.
        max_age: Number of rounds after which an update is too old and is discarded.
        dropout: Probability that a client that was asked drops out.

    Returns:
        A function of the clients and a clock that gives the sampler.

    Example:
        >>> import numpy as np
        >>> clock = constant_clock()(num_clients=10, num_train=np.full(10, 5))
        >>> buffered(size=2, concurrency=4)(num_clients=10, clock=clock).size
        2
    """
    return partial(asynchronous.buffered_cohort, size=size, concurrency=concurrency, max_age=max_age, dropout=dropout)


def constant_clock(**options: Any) -> MakeClock:
    """Every client takes the same seconds for a download, an interaction and an upload.

    Args:
        options: Arguments of `constant_times`: `download`, `compute`, `upload` (seconds), `awake`, `zones`.

    Returns:
        A function of the clients that gives the clock.

    Example:
        >>> import numpy as np
        >>> clock = constant_clock(download=1.0, compute=0.5, upload=2.0)(num_clients=2, num_train=np.array([4, 8]))
        >>> clock.trip(0, np.array([0, 1]), np.array([0, 0])).tolist()  # seconds
        [5.0, 7.0]
    """
    return partial(clock.constant_times, **options)


def lognormal_clock(**options: Any) -> MakeClock:
    """Clients whose times differ from visit to visit and by the class of their device.

    Args:
        options: Arguments of `lognormal_times`: the medians, `spread`, `shares`, `slowness`, ...

    Returns:
        A function of the clients that gives the clock.

    Example:
        >>> import numpy as np
        >>> clock = lognormal_clock(spread=0.0, shares=(1.0,), slowness=(1.0,))(num_clients=1, num_train=np.array([0]))
        >>> clock.trip(0, np.array([0]), np.array([0])).tolist()  # seconds; with a spread they would differ
        [6.0]
    """
    return partial(clock.lognormal_times, **options)


def trace_clock(path: str, **options: Any) -> MakeClock:
    """Times as they were measured.

    Args:
        path: A file with the columns client, download, compute and upload (seconds).
        options: Arguments of `trace_times`: `awake` and `zones`.

    Returns:
        A function of the clients that gives the clock.

    Example:
        >>> clock = trace_clock("times.csv")
    """
    return partial(clock.trace_times, path=path, **options)
