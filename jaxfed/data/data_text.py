"""A data set in words."""

from typing import Any

import numpy as np

from jaxfed.data.population import Population
from jaxfed.data.sources.roles import EPOCHS, OPTIONAL, UNITS

QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
TOP = (0.001, 0.01, 0.05, 0.1, 0.2, 0.5)


def describe_ratings(ratings: np.ndarray) -> str:
    """The range of the ratings, or that there are none."""
    if (ratings == 1).all():
        return "no ratings (every row counts 1)"
    return f"ratings {ratings.min():g} to {ratings.max():g}, mean {ratings.mean():.3f}"


def describe_times(times: np.ndarray, notes: tuple[str, ...] = ()) -> str:
    """From when to when: dates where the times can be seconds, or parts of them, since 1970; else the numbers.

    notes: of the data set, which say where it has no times.
    """
    if any(f"no time ({OPTIONAL['time']})" in note for note in notes):
        return "no times, rows in their order"
    low, high = int(times.min()), int(times.max())
    for unit in UNITS:
        if EPOCHS[0] * unit <= low and high <= EPOCHS[1] * unit:
            dates = [np.datetime64(each // unit, "s").item().isoformat(" ") for each in (low, high)]
            return f"times {dates[0]} to {dates[1]} (UTC)"
    return f"times {low} to {high}"


def count_held_out_rows(population: Population) -> str:
    """How many rows train, validate and test."""
    asked = population.asked
    rows = {"train": asked.train, "validation": asked.valid, "test": asked.test}
    return ", ".join(f"{len(lists.values):,} {name} rows" for name, lists in rows.items())


def describe_data(data: Any) -> str:
    """Users, items, density, lengths of clients' histories, the popularity curve. `data`: see `build.Data`."""
    rows, population = data.source.interactions, data.population
    users, items, count = len(data.source.users), len(data.source.items), len(rows.user)
    lengths = np.quantile(population.num_train, QUANTILES)
    by_item = np.sort(np.bincount(rows.item, minlength=items))[::-1]
    curve = np.cumsum(by_item) / count
    most = population.users_per_client
    each = "one user each" if most == 1 else f"at most {most:,} users each"
    lines = [
        f"{users:,} users x {items:,} items, {count:,} interactions, density {count / users / items:.4%}",
        f"{population.num_clients:,} clients, {each}",
        f"protocol {data.protocol}: {count_held_out_rows(population)}",
        f"{describe_ratings(rows.rating)}; {describe_times(rows.time, data.source.notes)}",
        "",
        "train interactions of a client, quantiles",
        "  " + " ".join(f"{q:>6.0%}" for q in QUANTILES),
        "  " + " ".join(f"{length:>6.0f}" for length in lengths),
        "",
        "popularity: the share of all interactions with the most popular items",
    ]
    for share in TOP:
        top = max(1, round(share * items))
        lines.append(f"  {share:>6.1%} {top:>9,} items {curve[top - 1]:>6.1%} {'#' * round(25 * curve[top - 1])}")
    lines += ["", f"rows in their order: sha256 {data.digest}"]
    return "\n".join([*lines, *(f"note: {note}" for note in data.source.notes)])
