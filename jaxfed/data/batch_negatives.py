"""Negatives of a batch that are positives of the same batch: `work.negative_sampling = "in_batch"`."""

import numpy as np

from jaxfed.data.popular_negatives import scale_random
from jaxfed.data.ragged import Ragged, concatenate_ranges


def draw_batch_negatives(count: np.ndarray, random32: np.ndarray, each: int, size: int) -> np.ndarray:
    """int64 [n, k]: which positive each negative is: uniform among those of which the batch has an example, up to
    2^-32, but for the one that it is compared with. Where there is no other, it is that one.

    Args:
        count: int [passes]: positives of each pass of a client over its data, which lie end to end, n in all.
        random32: int [n, k]: 32 random bits for each negative.
        each: examples of a positive, one after the other. The last k of them are its negatives.
        size: examples of a batch.
    """
    k = random32.shape[1]
    number = concatenate_ranges(np.zeros_like(count), count)[:, None]  # of each positive, in its pass
    own_count = np.repeat(count, count)[:, None]
    step = (number * each + np.arange(each - k, each)) // size
    first, last = step * size // each, (np.minimum((step + 1) * size, own_count * each) - 1) // each
    other = first + scale_random(random32, np.maximum(last - first, 1))
    other += other >= number
    start = np.repeat(np.cumsum(count) - count, count)[:, None]
    return start + np.where(last > first, other, number)


def mark_excluded_items(lists: Ragged, user: np.ndarray, item: np.ndarray, items: int) -> np.ndarray:
    """bool [n, k]: whether items [n, k] are on the sorted list of their user. user int [n]."""
    owner = np.repeat(np.arange(len(lists.counts)), lists.counts)
    wanted = (user * (items + 1))[:, None] + item
    listed = owner * (items + 1) + lists.values
    place = np.searchsorted(listed, wanted)
    return np.append(listed, -1)[place] == wanted
