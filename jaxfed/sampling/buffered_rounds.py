"""Buffered rounds (FedBuff: Nguyen et al. 2022): who is sent out next, and when a round is full. Arrivals are those of
a simulated clock (`asynchronous`), or of a network (`jaxfed.deployment.arrivals`)."""

import dataclasses
from typing import NamedTuple

import numpy as np

from jaxfed.sampling.cohort import USUAL, check_cohort_size, check_dropout

BUFFER = 32  # reports after which the server moves, where a configuration does not say how many


class BufferedPlan(NamedTuple):
    """What buffered rounds are played by; see `buffered_cohort`."""

    num_clients: int
    size: int
    concurrency: int
    max_age: int
    dropout: float

    @property
    def slots(self) -> int:
        """Slots of a cohort: as many again for those who are lost."""
        return 2 * self.size


class FilledRound(NamedTuple):
    """The cohort of a round at its end."""

    ids: np.ndarray  # int [slots]: the number of clients marks an empty slot
    present: np.ndarray  # bool [slots]
    ages: np.ndarray  # int [slots]: rounds since each was sent its model


@dataclasses.dataclass
class OpenRound:
    """A round that fills. `take_arrival` and `fill_round` change it."""

    idle: np.ndarray  # bool [clients]: who is neither under way nor in this round
    version: int = 0  # of the model
    arrived: list[tuple[int, int]] = dataclasses.field(default_factory=list)  # client, age
    lost: list[tuple[int, int]] = dataclasses.field(default_factory=list)


def make_buffered_plan(
    num_clients: int, size: int = 0, concurrency: int = 0, max_age: int = 20, dropout: float = 0.0
) -> BufferedPlan:
    """The plan of buffered rounds. Raises ValueError for numbers that do not go together. See `buffered_cohort`."""
    size = check_cohort_size(size, num_clients, max(1, min(BUFFER, num_clients // 6)))
    concurrency = concurrency or max(1, min(USUAL, num_clients - 2 * size))
    if 2 * size + concurrency > num_clients:
        raise ValueError(
            f"cohort: 2 size + concurrency is {2 * size + concurrency:,}, there are {num_clients:,} clients: lower one"
        )
    check_dropout(dropout)
    if concurrency < 0 or max_age < 0:
        raise ValueError("cohort.concurrency and cohort.max_age must not be negative")
    return BufferedPlan(num_clients, size, concurrency, max_age, dropout)


def take_arrival(plan: BufferedPlan, open_round: OpenRound, client: int, sent: int, is_lost: bool) -> bool:
    """Takes a client that comes in, or is lost. Of those who are lost at most `size` a round are counted.

    Args:
        plan: What the rounds are played by.
        open_round: The round that fills; it is changed.
        client: Who.
        sent: The version of the model that it was sent. More than `max_age` rounds old, its update is lost.
        is_lost: Whether nothing came.

    Returns:
        Whether its update counts.
    """
    age = open_round.version - sent
    if is_lost or age > plan.max_age:
        open_round.idle[client] = len(open_round.lost) == plan.size
        if not open_round.idle[client]:
            open_round.lost.append((client, min(age, plan.max_age)))
        return False
    open_round.arrived.append((client, age))
    return True


def fill_round(plan: BufferedPlan, open_round: OpenRound) -> FilledRound:
    """Ends a round with those who came in; the next one is open."""
    reported = open_round.arrived + open_round.lost
    ids, ages = np.full(plan.slots, plan.num_clients), np.zeros(plan.slots, int)
    if reported:
        ids[: len(reported)], ages[: len(reported)] = np.array(reported).T
        open_round.idle[ids[: len(reported)]] = True
    present = np.arange(plan.slots) < len(open_round.arrived)
    open_round.arrived, open_round.lost, open_round.version = [], [], open_round.version + 1
    return FilledRound(ids, present, ages)
