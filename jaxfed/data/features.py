"""What is known of users or items beside their ids: columns of words and numbers as sets of features."""

import re
from typing import NamedTuple

import numpy as np

BUCKETS = 10  # of a column of numbers, alike in size; a column with fewer values keeps them
SIDES = ("user", "item")


class Features(NamedTuple):
    """The features that each of n users or items has: numbers in one vocabulary of V."""

    numbers: np.ndarray  # int32 [n, F]: distinct; V, one past the end, where unused
    names: np.ndarray  # str [V]: `column=value`; a value that is missing is a value, the empty one

    def some(self, index: np.ndarray) -> "Features":
        """Those of the users or items `index`, in that order."""
        return self._replace(numbers=self.numbers[index])

    def rows(self, index: np.ndarray) -> np.ndarray:
        """int32 [..., F]: the features of users or items `index`; past the end: none."""
        none = np.full((1, self.width), len(self.names), np.int32)
        return np.concatenate([self.numbers, none])[np.minimum(index, len(self.numbers))]

    @property
    def width(self) -> int:
        """F: the most that one has."""
        return self.numbers.shape[1]


def words(column: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(int64 [t]: whose, int64 [t]: which value, str [v]: the values) of cells that hold words, several in a cell as a
    set: blanks, commas, semicolons and bars part them. An empty cell has the empty word."""
    cells, cell = np.unique(column.astype(str), return_inverse=True)
    sets = [sorted(set(re.split(r"[\s|,;]+", text.strip(" \t|,;")))) for text in cells.tolist()]
    values, value = np.unique(np.array([word for some in sets for word in some], str), return_inverse=True)
    count = np.array([len(some) for some in sets])
    start = np.cumsum(count) - count
    owner = np.repeat(np.arange(len(column)), count[cell])
    place = np.arange(len(owner)) - np.repeat(np.cumsum(count[cell]) - count[cell], count[cell])
    return owner, value[start[cell][owner] + place], values


def buckets(column: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same of numbers, NaN where missing: quantile buckets, named by the least value in them."""
    there = np.isfinite(column)
    values = np.unique(column[there])
    edges = values
    if len(values) > BUCKETS:
        edges = np.unique(np.quantile(column[there], np.arange(BUCKETS) / BUCKETS, method="higher"))
    value = np.where(there, np.searchsorted(edges, column, "right") - 1, len(edges))
    named = np.array([f"{edge:g}" for edge in edges] + ([] if there.all() else [""]), str)
    return np.arange(len(column)), value, named


def encoded(columns: dict[str, np.ndarray]) -> Features | None:
    """Features of columns [n]: words (an empty one is missing) or floats (NaN is missing). None: there is no column."""
    owners, values, names, at = [], [], [], 0
    for name, column in columns.items():
        owner, value, named = buckets(column) if column.dtype.kind == "f" else words(column)
        owners.append(owner)
        values.append(value + at)
        names += [f"{name}={each}" for each in named.tolist()]
        at += len(named)
    if not columns:
        return None
    owner, value = np.concatenate(owners), np.concatenate(values)
    order, count = np.argsort(owner, kind="stable"), np.bincount(owner)
    numbers = np.full((len(count), count.max()), at, np.int32)
    numbers[owner[order], np.arange(len(owner)) - np.repeat(np.cumsum(count) - count, count)] = value[order]
    return Features(numbers, np.array(names))
