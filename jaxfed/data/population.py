"""Who owns what: the rows of a data set laid out client by client."""

from typing import Literal, NamedTuple

import numpy as np

from jaxfed.data.features import Features
from jaxfed.data.ragged import Domains, NegativeIndex, Ragged

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
    """When the rows of a population happened: seconds since the first of all, or a longer unit where that does not fit
    32 bits."""

    train: np.ndarray  # int32 [total]: of `Population.train`, in its order
    valid: np.ndarray
    test: np.ndarray


def scale_times(time: np.ndarray) -> np.ndarray:
    """int32 [n]: times since the first one; in tens, hundreds, ... of their unit where 32 bits do not hold them."""
    since, unit = time - time.min(initial=np.iinfo(np.int64).max), 1
    while len(since) and since.max() // unit > np.iinfo(np.int32).max:
        unit *= 10
    return (since // unit).astype(np.int32)


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

    @property
    def num_clients(self) -> int:
        """How many clients there are."""
        return len(self.client_offsets) - 1

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
