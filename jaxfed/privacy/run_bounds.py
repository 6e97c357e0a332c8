"""Bounds of the Renyi divergences of a run: one round, amplified by sampling or not, and how often it counts."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jaxfed.core.types import Mechanism
from jaxfed.privacy import renyi
from jaxfed.privacy.releases import (
    INTEGER,
    SLACK,
    Sampling,
    count_participations,
    crowded_probability,
    is_amplified,
    joint_multiplier,
    split_by_release,
)


class RunBound(NamedTuple):
    """One way to bound a run: so many compositions, beside a few runs that count as failures."""

    rdp: np.ndarray  # of one composition, by order
    run: Callable[[int], tuple[int, float]]  # rounds -> (compositions, probability of a run that `rdp` does not cover)


def unsampled_rdp(mechanisms: Sequence[Mechanism], orders: np.ndarray, times: float) -> np.ndarray:
    """RDP of one joint release without sampling, of sensitivities `times` as large."""
    total = np.zeros(len(orders))
    for each in mechanisms:
        if each.epsilon:
            total = total + renyi.pure_rdp(orders, each.epsilon)
        elif each.kind == "skellam":
            total = total + renyi.skellam_rdp(orders, each.multiplier / times, times * each.l1, times * each.l2)
        else:
            total = total + renyi.gaussian_rdp(orders, each.multiplier / times)
    return total


def sampled_rdp(mechanisms: Sequence[Mechanism], sampling: Sampling, orders: np.ndarray, times: float) -> np.ndarray:
    """RDP of one round, amplified: Poisson cohorts, or fixed ones and replacement; sensitivities `times` as large."""
    replaced, rate = sampling.kind == "fixed", sampling.size / sampling.population
    unsampled = unsampled_rdp(mechanisms, orders, times)
    if not np.isfinite(unsampled).all():
        return unsampled
    if any(each.kind in INTEGER for each in mechanisms):
        amplify = renyi.fixed_rdp if replaced else renyi.poisson_rdp
        found = np.array([amplify(lambda j: unsampled_rdp(mechanisms, j, times), int(each), rate) for each in orders])
    else:
        noise = joint_multiplier(mechanisms) / times
        found = renyi.sampled_gaussian_rdp(orders, noise, sampling.population, sampling.size, replaced)
    return np.minimum(found, unsampled)  # some bounds of sampled releases are worse than that of the whole


def bound_run(
    mechanisms: Sequence[Mechanism], sampling: Sampling, relation: str, orders: np.ndarray, delta: float
) -> list[RunBound]:
    """The ways to bound a run of what is released in every round. Each is valid: the least counts."""
    repeated = split_by_release(mechanisms)[1]
    if not is_amplified(mechanisms, sampling):
        one = unsampled_rdp(repeated, orders, 2.0 if relation == "replace-one" else 1.0)
        return [
            RunBound(one, lambda rounds: count_participations(sampling, rounds, SLACK * delta)),
            RunBound(one, count_all_rounds),
        ]
    if sampling.kind == "poisson" and relation == "replace-one":
        raise ValueError("poisson cohorts have no RDP under replace-one: take add-or-remove, or the accountant pld")
    one, lost = (
        sampled_rdp(mechanisms, sampling, orders, 2.0 if sampling.kind == "fixed" else 1.0),
        crowded_probability(sampling),
    )
    if not lost:
        return [RunBound(one, count_all_rounds)]
    # That a round is crowded depends on the others alone. If it is not, nobody is left out, with the client or without.
    # If it is, the client, drawn, may take the place of one of them: twice the sensitivity, at no higher a rate. So
    # crowded rounds count as failures, or as rounds of that cost.
    costly = renyi.mixture_rdp(orders, one, sampled_rdp(mechanisms, sampling, orders, 2.0), lost)
    return [RunBound(one, lambda rounds: (rounds, rounds * lost)), RunBound(costly, count_all_rounds)]


def count_all_rounds(rounds: int) -> tuple[int, float]:
    """Every round counts, and no run is left out."""
    return rounds, 0.0
