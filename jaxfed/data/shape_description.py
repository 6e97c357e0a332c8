"""The description of data: what they are like in numbers, from which others of the same shape can be made."""

from typing import Any

import numpy as np

from jaxfed.data.interactions import Dataset, drop_repeats
from jaxfed.data.shape_estimates import estimate_strengths, measure_ties
from jaxfed.data.sources.shapes import DERIVED, Shape, quantiles_of_lengths, shares_of_items

ALL_TIED = 0.9  # share of a user's rows with the time of the row before, from which times mean nothing
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)


def describe(data: Dataset, seed: int = 0) -> dict[str, Any]:
    """What data are like, in numbers that say nothing of a single person: no ids, no rows.

    Lengths are means over at least ten users. How strong order and groups of taste are is estimated from some
    100,000 rows: it is the strength at which made data look the same (`jaxfed.data.shape_estimates`).

    Args:
        data: A data set. A repeated (user, item) pair counts once.
        seed: Random seed of the estimates.

    Returns:
        The fields of `jaxfed.data.sources.shapes.Shape` by name, in JSON's types; and `derived`, what follows from
        them: `density`, `mean_length`, and `holders`, in how many histories an item is (mean and quantiles over items).

    Example:
        >>> import jaxfed as jf
        >>> description = jf.data.describe(jf.data.load("shape", description="small"))
        >>> description["users"], description["items"], description["rows"]
        (1336, 2068, 33000)
    """
    rows = drop_repeats(data._replace(notes=())).interactions
    user, item = (np.unique(column, return_inverse=True)[1].astype(np.int32) for column in (rows.user, rows.item))
    rows = rows._replace(user=user, item=item)
    length, count = np.bincount(user), np.bincount(item)
    ties = measure_ties(rows)
    times = data.has_times and ties < ALL_TIED
    shape = Shape(
        users=len(length),
        items=len(count),
        rows=len(user),
        lengths=quantiles_of_lengths(length),
        popularity=shares_of_items(count),
        times=times,
        ties=round(ties, 3) if times else 0.0,
    )
    strengths = estimate_strengths(rows, shape.users, times, seed)
    order, groups, loyalty = round(strengths.order, 3), strengths.groups, round(strengths.loyalty, 3)
    return describe_shape(shape._replace(order=order, groups=groups, loyalty=loyalty)) | {
        DERIVED: derive_figures(count, shape)
    }


def describe_shape(shape: Shape) -> dict[str, Any]:
    """A shape in JSON's types, as `parse_shape` reads it."""
    return {
        key: [list(pair) for pair in value] if isinstance(value, tuple) else value
        for key, value in shape._asdict().items()
    }


def derive_figures(count: np.ndarray, shape: Shape) -> dict[str, Any]:
    """What follows from a shape and is good to know."""
    quantiles = {
        f"{level:.0%}": float(value) for level, value in zip(QUANTILES, np.quantile(count, QUANTILES), strict=True)
    }
    return {
        "density": float(f"{shape.rows / shape.users / shape.items:.3g}"),
        "mean_length": round(shape.rows / shape.users, 2),
        "holders": {"mean": round(shape.rows / shape.items, 2), **quantiles},
    }
