"""Data of malicious clients."""

import numpy as np

from jaxfed.core.malicious import is_malicious
from jaxfed.data.interactions import CLIENT, Dataset, item_numbers
from jaxfed.data.splits import PART, TRAIN


def poison_histories(data: Dataset, promoted: tuple[str, ...], fraction: float, seed: int) -> Dataset:
    """Adds the promoted items, by the source's ids, to the histories of the malicious clients' users who lack them.

    The classical promotion by data: explicit positives beside a real history. In this simulator it is also how a
    malicious client comes to hold the targets' rows, as it sends the rows of what it has: shapes stay those of honest
    clients and no link needs room of its own. The new rows are earlier than a user's others, so they train, and what is
    held out of the history stays as it was (leave one out). `data` has the column `CLIENT` (`split_shared_users`).

    Raises ValueError for items that are not there.
    """
    user, item, rating, time = data.interactions
    targets = item_numbers(data.items, promoted, "data.promoted")
    client = np.unique(data.columns[CLIENT], return_inverse=True)[1]  # numbered as in the population
    bad = is_malicious(np.arange(client.max() + 1), fraction, seed)
    first = np.unique(user, return_index=True)[1]  # a row of each user
    least = np.full(len(data.users), np.iinfo(np.int64).max)
    np.minimum.at(least, user, time)

    of = np.repeat(first[bad[client[first]]], len(targets))
    new = np.tile(targets, len(of) // max(len(targets), 1))
    is_missing = ~np.isin(
        user[of].astype(np.int64) * len(data.items) + new, user.astype(np.int64) * len(data.items) + item
    )
    of, new = of[is_missing], new[is_missing]
    added = user[of], new.astype(item.dtype), np.full(len(of), rating.max()), least[user[of]] - 1
    rows = [np.concatenate([old, more]).astype(old.dtype) for old, more in zip(data.interactions, added, strict=True)]
    columns = {name: np.concatenate([column, column[of]]) for name, column in data.columns.items()}
    if PART in columns:
        columns[PART][len(user) :] = TRAIN
    note = f"{int(bad.sum()):,} of {len(bad):,} clients are malicious, with {len(of):,} rows of promoted items more"
    return data._replace(interactions=type(data.interactions)(*rows), columns=columns, notes=(*data.notes, note))
