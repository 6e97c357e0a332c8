"""A data set in words."""

from typing import Any

import numpy as np

QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
TOP = (0.001, 0.01, 0.05, 0.1, 0.2, 0.5)


def describe_data(data: Any) -> str:
    """Users, items, density, lengths of clients' histories, the popularity curve. `data`: see `experiment.Data`."""
    rows, population = data.source.interactions, data.population
    users, items, count = len(data.source.users), len(data.source.items), len(rows.user)
    lengths = np.quantile(population.activity, QUANTILES)
    by_item = np.sort(np.bincount(rows.item, minlength=items))[::-1]
    curve = np.cumsum(by_item) / count
    most = population.users_per_client
    each = "one user each" if most == 1 else f"at most {most:,} users each"
    lines = [
        f"{users:,} users x {items:,} items, {count:,} interactions, density {count / users / items:.4%}",
        f"{population.num_clients:,} clients, {each}",
        f"ratings {rows.rating.min():g} to {rows.rating.max():g}, mean {rows.rating.mean():.3f}; "
        f"times {rows.time.min()} to {rows.time.max()}",
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
