"""What is known of users or items beside their ids: columns of words and numbers as sets of features."""

import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pyarrow as pa

BUCKETS = 10  # of a column of numbers, alike in size; a column with fewer values keeps them
SIDES = ("user", "item")
PARTS = r'[\s|,;"]+'  # blanks, commas, semicolons, bars and quotes part the words of a cell


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


def split_words(column: np.ndarray, parts: str = PARTS) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """(int64 [t]: whose, int64 [t]: which value, [v]: the values, sorted) of cells that hold words, several in a cell
    as a set. parts: what parts them, a regular expression; "": nothing does. An empty cell has the empty word."""
    coded = pa.array(column, pa.large_string()).dictionary_encode()
    cells, cell = coded.dictionary.to_pylist(), np.asarray(coded.indices)
    edge = f"^({parts})|({parts})$"
    sets = [sorted({*re.split(parts, re.sub(edge, "", text))}) if parts else [text] for text in cells]
    values = sorted({word for some in sets for word in some})
    place = {word: i for i, word in enumerate(values)}
    value = np.array([place[word] for some in sets for word in some], np.int64)
    count = np.array([len(some) for some in sets])
    start = np.cumsum(count) - count
    owner = np.repeat(np.arange(len(column)), count[cell])
    at = np.arange(len(owner)) - np.repeat(np.cumsum(count[cell]) - count[cell], count[cell])
    return owner, value[start[cell][owner] + at], values


def quantile_buckets(column: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """The same of numbers, NaN where missing: quantile buckets, named by the least value in them."""
    present = np.isfinite(column)
    values = np.unique(column[present])
    edges = values
    if len(values) > BUCKETS:
        edges = np.unique(np.quantile(column[present], np.arange(BUCKETS) / BUCKETS, method="higher"))
    value = np.where(present, np.searchsorted(edges, column, "right") - 1, len(edges))
    return np.arange(len(column)), value, [f"{edge:g}" for edge in edges] + ([] if present.all() else [""])


def encode_features(columns: dict[str, np.ndarray], parts: Mapping[str, str] | None = None) -> Features | None:
    """Features of columns [n]: words (an empty one is missing) or floats (NaN is missing). None: there is no column.

    parts: what parts the words of a cell, by column, see `words`; `PARTS` where it is not said.
    """
    owners, values, names, at = [], [], [], 0
    for name, column in columns.items():
        owner, value, named = (
            quantile_buckets(column)
            if column.dtype.kind == "f"
            else split_words(column, (parts or {}).get(name, PARTS))
        )
        owners.append(owner)
        values.append(value + at)
        names += [f"{name}={each}" for each in named]
        at += len(named)
    if not columns:
        return None
    owner, value = np.concatenate(owners), np.concatenate(values)
    order, count = np.argsort(owner, kind="stable"), np.bincount(owner)
    numbers = np.full((len(count), count.max()), at, np.int32)
    numbers[owner[order], np.arange(len(owner)) - np.repeat(np.cumsum(count) - count, count)] = value[order]
    return Features(numbers, np.array(names))
