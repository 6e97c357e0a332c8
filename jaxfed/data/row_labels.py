"""The labels of rows: clicks, or ratings as they are."""

import numpy as np

from jaxfed.data.population import Label


def row_labels(rating: np.ndarray, label: Label, threshold: float) -> np.ndarray:
    """float32 [n]: the label of each row. Raises ValueError where ratings say nothing."""
    low, high = rating.min(), rating.max()
    if low == high:
        raise ValueError(
            f'data.label is "{label}", but every rating is {low:g}: the data have none; name the column '
            '(--data.rating) or take data.label = "implicit"'
        )
    if label == "rating":
        return rating
    if not low < threshold <= high:
        raise ValueError(
            f"data.threshold is {threshold:g}, ratings are {low:g} to {high:g}: all would be one class; choose a "
            f"threshold above {low:g} and at most {high:g}"
        )
    return (rating >= threshold).astype(np.float32)
