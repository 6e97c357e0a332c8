"""Simulated time: how long a client takes from being asked to its report, and who is awake. In NumPy, functions of
(seed, client, visit) and of sizes, never of the model, so that who comes when is known before a round is run."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxfed.core.excerpt import shorten
from jaxfed.core.recipe import Recipe, named
from jaxfed.core.streams import SetupStream, Stream, setup_rng
from jaxfed.data.batching import client_random_numbers
from jaxfed.data.sources.columns import read_floats, read_ids
from jaxfed.data.sources.tables import read_source

HOUR = 3600.0
DEVICE_SEED = 3  # deals the classes of devices, alike for every seed of a run


class Clock(NamedTuple):
    """trip(seed, clients int [n], visits int [n]) -> float [n]: seconds of download, computation and upload of each. A
    visit is the round in which a client is asked.

    awake(seed, time) -> bool [num_clients]: who can be asked at a time, in seconds; None: everyone, always.
    """

    trip: Callable[[int, np.ndarray, np.ndarray], np.ndarray]
    awake: Callable[[int, float], np.ndarray] | None = None
    recipe: Recipe | None = None  # the call that made it


def draw_uniform(seed: int, stream: Stream, clients: np.ndarray, visits: np.ndarray, count: int) -> np.ndarray:
    """float [n, count] in (0, 1): so many random numbers of each (client, visit)."""
    raw = client_random_numbers(seed, stream, clients, visits, np.full(len(clients), count))
    return ((raw >> np.uint64(12)) + 0.5).reshape(-1, count) * 2.0**-52


def awake_by_hour(num_clients: int, hours: Sequence[float], zones: int) -> Callable | None:
    """`Clock.awake` from the probability that a device can be asked in each hour of its day: one number, or 24.

    A device decides anew every hour. zones: clients live in so many time zones, spread evenly over the day.
    """
    if len(hours) not in (1, 24) or not all(0 <= each <= 1 for each in hours) or max(hours) <= 0:
        raise ValueError("clock.awake: give one probability, or 24 (one an hour), from 0 to 1 and not all 0")
    if not 1 <= zones <= 24:
        raise ValueError(f"clock.zones is {zones}: there are 1 to 24")
    if min(hours) >= 1:
        return None
    chance, every = np.resize(np.asarray(hours, float), 24), np.arange(num_clients)
    shift = every % zones * 24 // zones

    @lru_cache(maxsize=4)
    def during(seed, hour):
        return (
            draw_uniform(seed, Stream.AWAKE, every, np.full(num_clients, hour), 1)[:, 0] < chance[(hour + shift) % 24]
        )

    return lambda seed, time: during(seed, int(time // HOUR))


def check_times(**seconds: float) -> None:
    """Raises ValueError for times that cannot be."""
    for name, value in seconds.items():
        if not (np.isfinite(value) and value >= 0):
            raise ValueError(f"clock.{name} is {value}: seconds must be finite and not negative")
    if not any(seconds.values()):
        raise ValueError("clock: all times are 0: say how long a client takes, or leave [clock] out")


def no_clock() -> None:
    """No clock: rounds are counted, not timed."""


@named("clock", "constant")
def constant_times(
    num_clients: int,
    num_train: np.ndarray,
    download: float = 2.0,
    compute: float = 0.05,
    upload: float = 4.0,
    awake: tuple[float, ...] = (1.0,),
    zones: int = 1,
) -> Clock:
    """Every client alike: the same seconds for a download, an interaction and an upload.

    Args:
        download: Seconds of a download.
        compute: Seconds for each train interaction of a client.
        upload: Seconds of an upload.
        awake: Probability that a device can be asked, anew every hour: one number, or 24, one for each hour of its day.
        zones: In how many time zones clients live, spread evenly over the day.
    """
    check_times(download=download, compute=compute, upload=upload)

    def trip(seed, clients, visits):
        return download + upload + compute * num_train[clients]

    return Clock(trip, awake_by_hour(num_clients, awake, zones))


def draw_slowness(
    spread: float, shares: tuple[float, ...], slowness: tuple[float, ...], num_clients: int
) -> np.ndarray:
    """float [C]: the slowness of each client's class of device, dealt at random. Raises ValueError for what is none."""
    if spread < 0 or len(shares) != len(slowness) or not shares or min(slowness) <= 0 or min(shares) < 0:
        raise ValueError("clock: a share and a slowness for each class, spread not negative, slowness above 0")
    if abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"clock.shares add up to {sum(shares):g}: they must be 1 together")
    bounds = np.round(np.cumsum(shares) * num_clients).astype(int)
    members = np.diff(bounds, prepend=0)
    if not members.all():
        number = int(members.argmin())
        raise ValueError(
            f"clock.shares: nobody is in class {number} ({shares[number]:g} of {num_clients:,} clients): leave it out"
        )
    return np.repeat(np.asarray(slowness, float), members)[
        setup_rng(DEVICE_SEED, SetupStream.DEVICE_CLASSES).permutation(num_clients)
    ]


@named("clock", "lognormal")
def lognormal_times(
    num_clients: int,
    num_train: np.ndarray,
    download: float = 2.0,
    compute: float = 0.05,
    upload: float = 4.0,
    spread: float = 0.5,
    shares: tuple[float, ...] = (0.5, 0.3, 0.2),
    slowness: tuple[float, ...] = (1.0, 3.0, 10.0),
    awake: tuple[float, ...] = (1.0,),
    zones: int = 1,
) -> Clock:
    """The times of `constant` are medians: each of the three is multiplied by exp(spread * normal), drawn anew every
    visit, and by the slowness of the client's class of device.

    Raises ValueError for a class that nobody is in.

    Args:
        download: Median seconds of a download.
        compute: Median seconds for each train interaction of a client.
        upload: Median seconds of an upload.
        spread: How much times differ from visit to visit: the standard deviation of their logarithm.
        shares: Share of the clients in each class of device, dealt at random.
        slowness: What the times of each class are multiplied by.
        awake: Probability that a device can be asked, anew every hour: one number, or 24, one for each hour of its day.
        zones: In how many time zones clients live, spread evenly over the day.
    """
    check_times(download=download, compute=compute, upload=upload)
    factor = draw_slowness(spread, shares, slowness, num_clients)

    def trip(seed, clients, visits):
        angle, radius = np.split(draw_uniform(seed, Stream.TRIPS, clients, visits, 6), 2, axis=1)
        normal = np.sqrt(-2 * np.log(radius)) * np.cos(2 * np.pi * angle)  # Box and Muller 1958
        medians = np.stack(
            [np.full(len(clients), download), compute * num_train[clients], np.full(len(clients), upload)]
        )
        return factor[clients] * (medians.T * np.exp(spread * normal)).sum(1)

    return Clock(trip, awake_by_hour(num_clients, awake, zones))


@named("clock", "trace")
def trace_times(
    num_clients: int, names: np.ndarray, path: str = "", awake: tuple[float, ...] = (1.0,), zones: int = 1
) -> Clock:
    """Times as they were measured: a csv, tsv or parquet file, gzipped or not, with the columns client, download,
    compute and upload (seconds). Several rows of a client take turns, round by round.

    names [C]: what the clients are called. Raises ValueError for times that cannot be and for clients without a row.

    Args:
        path: The file of measured times.
        awake: Probability that a device can be asked, anew every hour: one number, or 24, one for each hour of its day.
        zones: In how many time zones clients live, spread evenly over the day.
    """
    if not path:
        raise ValueError("clock.path is empty: name the file with columns client, download, compute and upload")
    place = Path(path).expanduser()
    source = read_source(place)
    if missing := [name for name in ("client", "download", "compute", "upload") if name not in source.columns]:
        raise ValueError(f"{place}: no column {missing[0]!r}: a trace has client, download, compute and upload")
    parts = np.stack([read_floats(source, name) for name in ("download", "compute", "upload")])
    if (parts < 0).any():
        row = int((parts < 0).any(0).argmax())
        raise ValueError(f"{place}: row {row + 1:,} has a negative time")
    number = {name: i for i, name in enumerate(names.tolist())}
    which = read_ids(source, "client")
    client = np.array([number.get(name, num_clients) for name in which.names.tolist()])[which.number]
    order = np.argsort(client, kind="stable")
    seconds, counts = parts.sum(0)[order], np.bincount(client, minlength=num_clients)[:num_clients]
    if not counts.all():
        raise ValueError(
            f"{place}: no row for client {shorten(names[counts.argmin()])}: every client of the data needs one"
        )
    start = np.cumsum(counts) - counts
    if not (np.add.reduceat(seconds[: counts.sum()], start) > 0).all():
        raise ValueError(f"{place}: a client takes no time at all: seconds must be above 0")

    def trip(seed, clients, visits):
        return seconds[start[clients] + visits % counts[clients]]

    return Clock(trip, awake_by_hour(num_clients, awake, zones))
