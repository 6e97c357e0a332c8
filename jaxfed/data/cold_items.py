"""Items that nobody trains on: all rows with them are test rows, and what is known of them ranks them."""

import numpy as np

from jaxfed.core.streams import SetupStream, setup_rng
from jaxfed.data.given_parts import drop_untrained_users
from jaxfed.data.interactions import Dataset
from jaxfed.data.population import Population
from jaxfed.data.ragged import make_negative_index, make_ragged
from jaxfed.data.splits import PART, TEST, TRAIN, Protocol, assign_parts


def hold_out_items(data: Dataset, share: float, protocol: Protocol, ratio: tuple[float, float], seed: int) -> Dataset:
    """The data set with a column `PART` by which all rows with some items test. Users with no other rows are left out.

    Args:
        data: a data set that does not say itself which rows test.
        share: of the items, drawn at random.
        protocol: how validation rows are then taken from the train rows.
        ratio: the share of validation is ratio[0], where the protocol has one.
        seed: of what is drawn, which is by the order of the items' ids.

    Raises:
        ValueError: the share is not between 0 and 1 or leaves no item on a side, or the data or the protocol say
            otherwise.
    """
    items, count = len(data.items), round(share * len(data.items))
    if not 0 < share < 1 or not 0 < count < items:
        raise ValueError(f"data.cold_items is {share:g}: a share of {items:,} items, set it above 0 and below 1")
    if PART in data.columns or data.negatives is not None:
        raise ValueError("data.cold_items: the data say which rows test or what they are ranked among: set it to 0")
    if protocol.startswith("global") or protocol == "compat-pfedrec":
        raise ValueError(
            f'data.cold_items does not go with data.protocol = "{protocol}": choose loo-clean, ratio-clean, loo-random '
            "or ratio-random, which take validation rows from each user's train rows"
        )
    cold = np.zeros(items, bool)
    cold[setup_rng(seed, SetupStream.COLD_ITEMS, items).permutation(items)[:count]] = True
    part = np.where(cold[data.interactions.item], TEST, TRAIN).astype(np.int8)
    note = f"{count:,} of {items:,} items are cold: nobody trains on them, and all rows with them are test rows"
    data = data._replace(columns={**data.columns, PART: part}, notes=(*data.notes, note))
    return assign_parts(drop_untrained_users(data, 0.5), protocol, ratio, seed)


def exclude_untrained_items(population: Population) -> Population:
    """The population, of which nobody draws an item without a train row as a negative."""
    users, items = len(population.user_names), population.num_items
    unknown = np.flatnonzero(np.bincount(population.train.values, minlength=items) == 0).astype(np.int32)
    excluded = population.excluded
    owner = np.concatenate([np.repeat(np.arange(users), excluded.counts), np.repeat(np.arange(users), len(unknown))])
    value = np.concatenate([excluded.values, np.tile(unknown, users)])
    order = np.lexsort((value, owner))
    widened = make_ragged(value[order], owner[order], users).distinct(items)
    return population._replace(excluded=widened, negative_index=make_negative_index(widened, items), cold_items=unknown)
