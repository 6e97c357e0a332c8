"""Who reports when: cohorts by a simulated clock. What happens does not depend on the model, so it is played ahead, on
the host, and every round is still one cohort of clients side by side."""

import heapq
import itertools
import threading
from collections.abc import Callable, Iterator
from functools import cache
from typing import NamedTuple, TypeVar

import numpy as np

from jaxfed.core.recipe import named
from jaxfed.core.streams import Stream, host_rng
from jaxfed.core.types import Sampler
from jaxfed.sampling.buffered_rounds import BufferedPlan, OpenRound, fill_round, make_buffered_plan, take_arrival
from jaxfed.sampling.clock import HOUR, Clock
from jaxfed.sampling.cohort import check_cohort_size, check_dropout, draw_present

T = TypeVar("T")
FRUITLESS = 24 * 14  # hours without anybody awake, after which nobody ever will be


class ScheduledRound(NamedTuple):
    """One round, as it was played."""

    ids: np.ndarray  # int [slots]: the number of clients marks an empty slot
    present: np.ndarray  # bool [slots]
    ages: np.ndarray  # int [slots]: rounds since each was sent its model
    time: float  # simulated seconds at the end of the round


def play_schedule(play: Callable[[int], Iterator[T]]) -> Callable[[int, int], T]:
    """at(seed, round): what a play of that seed comes to in a round. What was played is kept: a memo, not a state."""
    lock = threading.Lock()

    @cache
    def begun(seed) -> tuple[Iterator[T], list[T]]:
        return play(seed), []

    def at(seed, round):
        iterator, played = begun(seed)
        with lock:
            while len(played) <= round:
                played.append(next(iterator))
        return played[round]

    return at


def make_scheduled_sampler(
    play: Callable[[int], Iterator[ScheduledRound]], slots: int, kind: str, size: int, history_length: int = 0
) -> Sampler:
    """The sampler of a play."""
    at = play_schedule(play)
    return Sampler(
        slots,
        lambda seed, round: at(seed, round)[:2],
        kind,
        size,
        history_length,
        (lambda seed, round: at(seed, round).ages) if history_length else None,
        lambda seed, round: at(seed, round).time,
    )


def require_clock(clock: Clock | None, name: str) -> Clock:
    """The clock. Raises ValueError where there is none."""
    if clock is None:
        raise ValueError(f'cohort.{name} asks who is quick: say how long clients take, e.g. clock.name = "lognormal"')
    return clock


def with_clock(sampler: Sampler, clock: Clock, num_clients: int) -> Sampler:
    """A sampler that knows of no clock: a round takes as long as the slowest of those asked.

    Raises ValueError where some may be asleep.
    """
    if clock.awake:
        raise ValueError('clock.awake: the cohort must ask who is awake: set cohort.name to "deadline" or "buffered"')

    def play(seed):
        time = 0.0
        for round in itertools.count():
            ids = sampler.draw(seed, round)[0]
            clients = ids[ids < num_clients]
            time += float(clock.trip(seed, clients, np.full(len(clients), round)).max(initial=0.0))
            yield time

    return sampler._replace(clock=play_schedule(play))


def find_ready_clients(clock: Clock, seed: int, time: float, free: np.ndarray) -> np.ndarray:
    """int [m]: who is `free` [C] and awake."""
    return np.flatnonzero(free & clock.awake(seed, time) if clock.awake else free)


def wait_until_ready(clock: Clock, seed: int, time: float, free: np.ndarray) -> tuple[float, np.ndarray]:
    """(the first time from `time` on at which somebody is ready, who: int [m]). Raises ValueError if nobody will be."""
    for _ in range(FRUITLESS):
        if len(ready := find_ready_clients(clock, seed, time, free)):
            return time, ready
        time = (time // HOUR + 1) * HOUR
    raise ValueError("clock.awake: nobody has been awake for two weeks: raise its probabilities")


def select_ready_clients(
    clock: Clock, seed: int, round: int, time: float, num_clients: int, slots: int
) -> tuple[float, np.ndarray, np.ndarray]:
    """(when a round begins, up to `slots` clients of those awake then, the seconds that each will take)."""
    time, ready = wait_until_ready(clock, seed, time, np.ones(num_clients, bool))
    chosen = np.sort(host_rng(seed, Stream.COHORT, round).choice(ready, min(slots, len(ready)), replace=False))
    return time, chosen, clock.trip(seed, chosen, np.full(len(chosen), round))


@named("cohort", "deadline")
def deadline_cohort(
    num_clients: int,
    clock: Clock | None = None,
    size: int = 0,
    over: float = 1.0,
    seconds: float = 0.0,
    dropout: float = 0.0,
) -> Sampler:
    """Synchronous rounds (Bonawitz et al. 2019): more clients than needed are asked, uniformly among those awake; the
    round ends when enough have reported, or at its deadline.

    Reports that come too late are discarded. Clients differ in speed, so cohorts are not uniform: no amplification is
    claimed.

    Args:
        size: Number of reports that end a round. 0: 128, or all where there are fewer.
        over: Over-selection: over x size clients are asked.
        seconds: Deadline in seconds after the round's start. 0: wait for all that were asked, where fewer than `size`
            report.
        dropout: Probability that a client that was asked drops out.
    """
    size = check_cohort_size(size, num_clients)
    check_dropout(dropout)
    if over < 1 or seconds < 0:
        raise ValueError("cohort.over must be at least 1, cohort.seconds not negative")
    slots, times = min(int(np.ceil(round(over * size, 6))), num_clients), require_clock(clock, "deadline")

    def play(seed):
        time = 0.0
        for round in itertools.count():
            time, chosen, trip = select_ready_clients(times, seed, round, time, num_clients, slots)
            last = seconds or float(trip.max())
            in_time = np.flatnonzero(draw_present(seed, round, num_clients, dropout)[chosen] & (trip <= last))
            first = in_time[np.argsort(trip[in_time], kind="stable")][:size]
            ids, present = np.full(slots, num_clients), np.zeros(slots, bool)
            ids[: len(chosen)], present[first] = chosen, True
            time += float(trip[first[-1]]) if len(first) == size else last
            yield ScheduledRound(ids, present, np.zeros(slots, int), time)

    return make_scheduled_sampler(play, slots, "deadline", size)


class Trip(NamedTuple):
    """A client under way. Trips are ordered by when they end, and those that end together by when they began."""

    arrival: float  # simulated seconds
    order: int
    client: int
    version: int  # of the model that it was sent
    drops_out: bool


def play_buffered_rounds(plan: BufferedPlan, clock: Clock, seed: int) -> Iterator[ScheduledRound]:
    """The rounds of `buffered_cohort`, one after the other."""
    random, order, time = host_rng(seed, Stream.ARRIVALS), itertools.count(), 0.0
    open_round = OpenRound(np.ones(plan.num_clients, bool))
    under_way: list[Trip] = []

    def send_clients(now):
        """Sends clients out until enough are under way or nobody is ready."""
        while len(under_way) < plan.concurrency:
            if under_way and under_way[0].arrival <= now:  # who comes now is heard first
                break
            if under_way:
                ready = find_ready_clients(clock, seed, now, open_round.idle)
            else:
                now, ready = wait_until_ready(clock, seed, now, open_round.idle)
            if not len(ready):  # they sleep: those who are under way go on
                break
            client = int(random.choice(ready))
            seconds = clock.trip(seed, np.array([client]), np.array([open_round.version]))[0]
            drops_out = random.random() < plan.dropout
            heapq.heappush(under_way, Trip(now + float(seconds), next(order), client, open_round.version, drops_out))
            open_round.idle[client] = False

    while True:
        send_clients(time)
        time, _, client, sent, drops_out = heapq.heappop(under_way)
        if take_arrival(plan, open_round, client, sent, drops_out) and len(open_round.arrived) == plan.size:
            yield ScheduledRound(*fill_round(plan, open_round), time)


@named("cohort", "buffered")
def buffered_cohort(
    num_clients: int,
    clock: Clock | None = None,
    size: int = 0,
    concurrency: int = 0,
    max_age: int = 20,
    dropout: float = 0.0,
) -> Sampler:
    """Asynchronous rounds: `concurrency` clients are always under way, and the server moves whenever `size` have come
    in (FedBuff: Nguyen et al. 2022; size 1, FedAsync: Xie et al. 2019), each with an update of the model it was sent.

    Whoever comes in is replaced by one drawn uniformly among those awake and idle, who is sent the model of then (of
    those who come at one moment, once all were heard).
    An update of a model more than `max_age` rounds old is discarded. No client is under way twice, or twice in a
    buffer, so what it keeps to itself is what it left there. Of those who are lost at most `size` a round are counted.

    Args:
        size: Number of reports after which the server updates the model. 0: 32, or a sixth of the clients where there
            are fewer than 192.
        concurrency: Clients that train at the same time. 0: 128, or number of clients - 2 x size if that is fewer.
        max_age: Number of rounds after which an update is too old and is discarded.
        dropout: Probability that a client that was asked drops out.
    """
    plan = make_buffered_plan(num_clients, size, concurrency, max_age, dropout)
    times = require_clock(clock, "buffered")

    def play(seed):
        return play_buffered_rounds(plan, times, seed)

    return make_scheduled_sampler(play, plan.slots, "buffered", plan.size, max_age + 1)
