"""Who owns what: the rows of a data set laid out client by client."""

from typing import Literal, NamedTuple

import numpy as np

from jaxfed.data.features import Features
from jaxfed.data.popular_negatives import PopularityIndex
from jaxfed.data.ragged import Domains, NegativeIndex, Ragged

SAMPLED_TIMES = 1 << 12  # rows whose median time is taken for that of all
TIME_UNITS = ((10**17, 10**9), (10**14, 10**6), (10**11, 10**3))  # (numbers from here on, are so many a second)
NO_TIMES = (
    "the model reads times, and the rows have none, not all of them, or only an order (times with fractions): write "
    'times of all rows as whole numbers or dates, or set model.time_bias = "none"'
)
SAMPLED = 99  # items that a held-out one is ranked among, in figures of a sample


class ProcessShare(NamedTuple):
    """Which process this is, of how many. A client belongs to one of them throughout, its data are read by no other."""

    rank: int = 0
    size: int = 1

    def owner(self, clients: np.ndarray, of: int) -> np.ndarray:
        """The process of each client: equal ranges, as data lie on disk client by client."""
        return clients.astype(np.int64) * self.size // of


ALONE = ProcessShare()


Label = Literal["implicit", "rating", "click"]


class Labels(NamedTuple):
    """What the rows of a population are labelled with; a label is a rating, or whether that is a click (0 or 1)."""

    kind: Label
    train: np.ndarray  # float32 [total]: of `Population.train`, in its order
    valid: np.ndarray
    test: np.ndarray


class Times(NamedTuple):
    """When the rows of a population happened: seconds by one clock, before or after a time that is the same for all."""

    train: np.ndarray  # int32 [total]: of `Population.train`, in its order
    valid: np.ndarray
    test: np.ndarray


def scale_times(time: np.ndarray) -> np.ndarray | None:
    """int32 [n]: times int64 [n] as seconds before or after a common time, cut at 34 years; None: they are ranks.

    Numbers as large as today's in milliseconds, microseconds or nanoseconds since 1970 are taken for such. Times that
    are 0, 1, 2, ... without a gap are an order, as where they were written with fractions.
    """
    if not len(time) or (time.min() == 0 and time.max() < len(time) and np.bincount(time).all()):
        return None
    typical = int(np.median(time[:: len(time) // SAMPLED_TIMES + 1]))
    unit = next((unit for least, unit in TIME_UNITS if abs(typical) >= least), 1)
    return np.clip((time - typical) // unit, 1 - (1 << 30), (1 << 30) - 1).astype(np.int32)


class Population(NamedTuple):
    """The clients and their data. Users are numbered client by client; a client's users are a range."""

    num_items: int
    names: np.ndarray  # str [C]: what the clients are called
    client_offsets: np.ndarray  # int64 [C + 1]: client c holds users client_offsets[c] to client_offsets[c + 1]
    train: Ragged  # items of each user, earliest first
    excluded: Ragged  # items that are no negatives of each user, sorted and distinct
    negative_index: NegativeIndex  # of `excluded`
    valid: Ragged  # held-out items of each user
    test: Ragged
    user_names: np.ndarray  # str [U]: the source's ids, in this numbering
    num_train: np.ndarray  # int64 [C]: train interactions of each client
    users_per_client: int  # the most users that one client holds; 1 when every user is a client
    label_flipped: np.ndarray | None = None  # bool [C]: trains with positives and negatives exchanged; None: nobody
    cold: "Population | None" = None  # clients that never take part, numbered by themselves, to be tested apart
    owner: np.ndarray | None = None  # int64 [C]: who has a private part in common, ascending; None: nobody
    people: "Population | None" = None  # the owners with all that they did, who are asked in place of clients
    labels: Labels | None = None  # None: every row is a click, and negatives are drawn
    user_features: Features | None = None  # [U]
    item_features: Features | None = None  # [N]
    domains: Domains | None = None  # each user is of one, that of its items, and offered no others; None: one catalogue
    protocol: str = "loo-clean"  # how what is held out was chosen
    negatives: Ragged | None = None  # what each user's held-out items are ranked among; None: what is drawn
    cold_items: np.ndarray | None = None  # int32: items that are nobody's negatives; None: there are none
    times: Times | None = None  # None: the source has none
    popularity: PopularityIndex | None = None  # of train interactions; None: negatives are uniform

    @property
    def num_clients(self) -> int:
        """How many clients there are."""
        return len(self.client_offsets) - 1

    @property
    def time_lists(self) -> tuple[Ragged, Ragged, Ragged]:
        """When each user met the items of `train`, `valid` and `test`. Raises ValueError where that is unknown."""
        if self.times is None:
            raise ValueError(NO_TIMES)
        train, valid, test = self.times
        return Ragged(train, self.train.start), Ragged(valid, self.valid.start), Ragged(test, self.test.start)

    @property
    def mean_holders(self) -> float:
        """How many users have the item of a train interaction, on average over interactions."""
        count = np.bincount(self.train.values).astype(np.float64)
        return float(np.square(count).sum() / max(count.sum(), 1))

    @property
    def client_of(self) -> np.ndarray:
        """int64 [U]: the client of each user."""
        return np.repeat(np.arange(self.num_clients), np.diff(self.client_offsets))

    def span(self, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(where the items of each user's domain begin in `domains.items`, how many they are)."""
        if self.domains is None:
            return np.zeros(len(users), np.int64), np.full(len(users), self.num_items)
        of, start = self.domains.of[self.train.values[self.train.start[users]]], self.domains.start
        return start[of], start[of + 1] - start[of]

    @property
    def asked(self) -> "Population":
        """Who is asked in evaluations."""
        return self.people or self

    @property
    def homes(self) -> np.ndarray:
        """int32: the client that holds the private part of each user who is asked: itself, or the first device."""
        if self.people is None or self.owner is None:
            return np.arange(self.num_clients, dtype=np.int32)
        return np.searchsorted(self.owner, np.arange(self.people.num_clients)).astype(np.int32)
