"""Who is asked in a round: functions of (seed, round), in NumPy, so that the next cohort can be packed ahead."""

import math
from collections.abc import Callable

import numpy as np

from jaxfed.core.recipe import named
from jaxfed.core.streams import Stream, host_rng
from jaxfed.core.types import Sampler

MOST = 8192  # clients of a round where a configuration says `holders`
USUAL = 128  # clients of a round where a configuration does not say how many


def check_dropout(dropout: float) -> None:
    """Raises ValueError for what is no probability."""
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout {dropout}: a probability in [0, 1)")


def draw_present(seed: int, round: int, num_clients: int, dropout: float) -> np.ndarray:
    """bool [num_clients]: who does not drop out of a round, each by itself."""
    return host_rng(seed, Stream.DROPOUT, round).random(num_clients) >= dropout


def make_sampler(
    choose: Callable[[int, int], np.ndarray], slots: int, num_clients: int, dropout: float, kind: str, size: int = 0
) -> Sampler:
    """From choose(seed, round) -> ids; each client then drops out by itself with probability `dropout`.

    Whether a client drops out depends on (seed, round, client) alone. Raises ValueError for a cohort that cannot be.
    """
    check_dropout(dropout)
    if not slots >= 1:
        raise ValueError("cohort.size must be at least 1")

    def draw(seed, round):
        ids = np.full(slots, num_clients, np.int64)
        chosen = choose(seed, round)
        ids[: len(chosen)] = chosen
        if not dropout:  # a million clients need no number each
            return ids, ids < num_clients
        return ids, np.append(draw_present(seed, round, num_clients, dropout), False)[ids]

    return Sampler(slots, draw, kind, size or slots)


def check_cohort_size(size: int, num_clients: int, usual: int = USUAL) -> int:
    """`size`, if there are so many clients; 0: the usual size, or as many as there are. Raises ValueError."""
    if size < 0:
        raise ValueError("cohort.size must be at least 1, or 0 for the usual size")
    if not size:
        return min(usual, num_clients)
    if size > num_clients:
        raise ValueError(
            f"cohort.size {size:,} is larger than the population of {num_clients:,} clients: "
            f'set it to at most {num_clients:,}, or cohort.name = "everyone"'
        )
    return size


@named("cohort", "uniform")
def uniform_cohort(
    num_clients: int, size: int = 0, dropout: float = 0.0, holders: float = 0.0, mean_holders: float | None = None
) -> Sampler:
    """A fixed number of clients, drawn uniformly without replacement.

    Args:
        size: Number of clients in a round. 0: as `holders` says; without it 128, or all where there are fewer.
        dropout: Probability that a client that was asked drops out.
        holders: Where `size` is 0: how many clients of a round have the item of an interaction, on average over
            interactions. The round is as large as that takes, from 128 to 8,192 clients, of as many as there are.
        mean_holders: The same number for the whole population (`Population.mean_holders`).

    Raises ValueError for a size that cannot be, and for negative holders.
    """
    if holders < 0:
        raise ValueError(f"cohort.holders is {holders}: it must not be negative")
    if holders and mean_holders is None:
        raise ValueError("uniform: holders need mean_holders, as an experiment gives them: set size instead")
    wanted = math.ceil(holders / max(mean_holders or 0.0, 1.0) * num_clients)
    size = check_cohort_size(size, num_clients, min(max(USUAL, wanted), MOST))

    def choose(seed, round):
        return np.sort(host_rng(seed, Stream.COHORT, round).choice(num_clients, size, replace=False))

    return make_sampler(choose, size, num_clients, dropout, "fixed")


@named("cohort", "poisson")
def poisson_cohort(num_clients: int, size: int = 0, cap: int = 0, dropout: float = 0.0) -> Sampler:
    """Each client joins independently with the same probability (Poisson sampling). Beyond the cap, clients are left
    out at random.

    Args:
        size: Expected number of clients in a round. 0: 128, or all where there are fewer.
        cap: The largest number of clients in a round. 0: six standard deviations above the mean.
        dropout: Probability that a client that was asked drops out.
    """
    size = check_cohort_size(size, num_clients)
    rate = size / num_clients
    most = math.ceil(size + 6 * math.sqrt(size * (1 - rate)))
    slots = min(cap or most, num_clients)

    def choose(seed, round):
        random = host_rng(seed, Stream.COHORT, round)
        drawn = np.flatnonzero(random.random(num_clients) < rate)
        return drawn if len(drawn) <= slots else np.sort(random.choice(drawn, slots, replace=False))

    return make_sampler(choose, slots, num_clients, dropout, "poisson", size)


@named("cohort", "cyclic")
def cyclic_cohort(num_clients: int, size: int = 0, dropout: float = 0.0) -> Sampler:
    """Clients in a fixed random order, the next `size` of them each round.

    Args:
        size: Number of clients in a round. 0: 128, or all where there are fewer.
        dropout: Probability that a client that was asked drops out.
    """
    size = check_cohort_size(size, num_clients)

    def choose(seed, round):
        circle = host_rng(seed, Stream.CYCLE).permutation(num_clients)
        return np.sort(circle[(round * size + np.arange(size)) % num_clients])

    return make_sampler(choose, size, num_clients, dropout, "cyclic")


@named("cohort", "everyone")
def everyone_cohort(num_clients: int, dropout: float = 0.0) -> Sampler:
    """All clients in every round.

    Args:
        dropout: Probability that a client that was asked drops out.
    """
    return make_sampler(lambda seed, round: np.arange(num_clients), num_clients, num_clients, dropout, "everyone")


def sample_cohort(
    sampler: Sampler, seed: int, round: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, float | None]:
    """(ids, present, ages, simulated seconds at the end) of a round; see `Sampler`. None: the sampler knows of none."""
    ages = sampler.ages(seed, round).astype(np.int32) if sampler.ages else None
    return *sampler.draw(seed, round), ages, sampler.clock(seed, round) if sampler.clock else None
