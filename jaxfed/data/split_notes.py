"""What a reader must know of how rows were held out, and of what they are ranked among."""

import numpy as np

from jaxfed.data.interactions import Dataset
from jaxfed.data.population import SAMPLED, Population
from jaxfed.data.splits import PART, TEST, Split, needs_validation

SORTED = 0.95  # share of neighbouring rows in one direction from which items are taken for sorted
HELD_OUT_TIED = 0.9  # share of held-out rows that equal times decide, from which times say nothing


def note_ties(data: Dataset, parts: Split) -> tuple[str, ...]:
    """A note on held-out items that equal times decide, if there are any."""
    rule = (
        "a later row counts as later). Finer times, or rows in the order in which they happened, avoid this"
        if data.ties_in_order
        else "the earliest row counts as the latest, as published)"
    )
    same = "have the same time as another row of that user"
    note = f"{parts.by_ties:,} of {parts.by_order:,} held-out items {same}: the order of rows decided ({rule}"
    return (note,) if parts.by_ties else ()


def is_sorted_by_item(data: Dataset, order: np.ndarray) -> bool:
    """Whether nearly all neighbouring rows of the users are in the order of item ids, or in its reverse.

    order int [n]: row numbers by user, then from the earliest to the latest.
    """
    same_user = np.diff(data.interactions.user[order]) == 0
    words = np.argsort(np.lexsort((data.items, np.char.str_len(data.items))))  # i9 before i10
    for rank in (np.arange(len(data.items)), words):
        step = np.diff(rank[data.interactions.item[order]])[same_user]
        if len(step) and max((step > 0).mean(), (step < 0).mean()) >= SORTED:
            return True
    return False


def describe_file_order(data: Dataset, parts: Split) -> str:
    """What the order of the file stands for: "" where times decide what is held out, "order of the file" where there
    are none or nearly all are equal, or "rows sorted by item id" where that order tells nothing of time."""
    by_file = not data.has_times or parts.by_ties > parts.by_order / 2
    if not parts.by_order or not by_file:
        return ""
    given_test = PART in data.columns and parts.part[parts.order] == TEST  # which come from elsewhere
    if is_sorted_by_item(data, parts.order[~np.broadcast_to(given_test, len(parts.order))]):
        return "rows sorted by item id"
    return "" if data.has_times and parts.by_ties < HELD_OUT_TIED * parts.by_order else "order of the file"


def note_file_order(data: Dataset, protocol: str, order: str) -> tuple[str, ...]:
    """A note on what is held out by the order of the file, if it is. order: see `describe_file_order`."""
    if not order:
        return ()
    chance = "ratio" if protocol.startswith("ratio") else "loo"
    name = {"ratio": "random-ratio", "loo": "random-leave-one-out"}[chance]
    mend = f'data.protocol = "{chance}-random" (split="{name}" in Python) holds out random rows'
    times = "most times are equal" if data.has_times else "there are no times"
    if order == "order of the file":
        return (
            f"{times}: the order of the file stands for time, so that the held-out items are the last in the file. If "
            f"that order means nothing, {mend}",
        )
    return (
        f"CAUTION: {times}, and the rows of each user are sorted by item id: the held-out items have the last "
        f"ids. That is another task than a split by time, and figures do not compare with others: {mend}",
    )


def describe_protocol(data: Dataset, protocol: str, order: str) -> str:
    """How what is held out was chosen, in some words for the summary of a run.

    data: as it was read. order: see `describe_file_order`.
    """
    said = "given" if PART in data.columns else protocol
    if needs_validation(data):
        said = f"given, validation {protocol}"
    elif PART in data.columns and protocol == "compat-pfedrec":
        said = f"given, negatives as in {protocol}"
    return f"{said} ({order})" if order else said


def note_zero_ratings(data: Dataset, label: str) -> tuple[str, ...]:
    """A note on rows whose rating may say that the user did not take the item, if there are any and they count as
    interactions: where label is implicit."""
    zero = int((data.interactions.rating <= 0).sum()) if label == "implicit" else 0
    note = (
        f"{zero:,} of {len(data.interactions.rating):,} rows have a rating of 0 or less, and count as interactions, as "
        "all rows do. If they are items that a user did not take, leave these rows out, or learn labels: data.label = "
        '"click"'
    )
    return (note,) if zero else ()


def note_few_candidates(population: Population) -> tuple[str, ...]:
    """A note on users with fewer items to rank among than a sample has, if there are any."""
    users = np.arange(len(population.user_names))
    num_negatives = [part.counts for part in (population.train, population.valid, population.test)]
    left = population.span(users)[1] - np.sum(num_negatives, 0)
    few = int((left < SAMPLED).sum())
    note = (
        f"{few:,} of {len(users):,} users have fewer than {SAMPLED} items that they never interacted with (the fewest: "
        f"{left.min():,}). Where evaluation.negatives is {SAMPLED}, their `sampled` metrics have fewer and are too high"
    )
    drawn = population.labels is None and population.negatives is None
    return (note,) if few and drawn else ()
