"""A part of a catalogue (a domain), chosen by features of items."""

from collections.abc import Sequence

import numpy as np

from jaxfed.core.excerpt import shorten, shorten_list
from jaxfed.data.interactions import Dataset, select_rows


def find_items(data: Dataset, names: Sequence[str], where: str) -> np.ndarray:
    """bool [items]: which items have one of some features. Raises ValueError for a feature that is not there."""
    known = data.item_features
    if known is None:
        raise ValueError(f"{where}: the data have no features of items: name a file of them (data.item_features)")
    places = {name: place for place, name in enumerate(known.names.tolist())}
    for name in names:
        if name not in places:
            raise ValueError(f'{where}: no item has "{shorten(name)}"; there are {shorten_list(known.names.tolist())}')
    found: np.ndarray = np.isin(known.numbers, [places[name] for name in names])
    return np.any(found, axis=1)


def select_domain(data: Dataset, wanted: Sequence[str], unwanted: Sequence[str]) -> Dataset:
    """The rows of items that have one of the wanted features, if any are named, and none of the unwanted ones.

    Raises ValueError where a feature is not there, or no row is left.
    """
    if not wanted and not unwanted:
        return data
    kept = find_items(data, wanted, "data.items_with") if wanted else np.ones(len(data.items), bool)
    if unwanted:
        kept &= ~find_items(data, unwanted, "data.items_without")
    rows = kept[data.interactions.item]
    if not rows.any():
        raise ValueError("data.items_with, data.items_without: no row is left: name other features")
    note = f"{int(kept.sum()):,} of {len(kept):,} items are in the domain, with {int(rows.sum()):,} rows"
    return select_rows(data, rows, note)
