"""What is accounted for: the mechanisms that release something in a run, and who takes part in a round."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from jaxfed.core.types import Mechanism

KINDS = ("gaussian", "skellam", "discrete_gaussian", "correlated", "local")
INTEGER = ("skellam", "discrete_gaussian")  # noise whose divergences are known at whole orders, and bounds there
SAMPLERS = ("poisson", "fixed", "everyone", "cyclic")
RELATIONS = ("add-or-remove", "replace-one")
TINY = 1e-9  # of multipliers and epsilons: 1 / TINY is as good as infinite
PLENTY = 1e6  # multipliers above count as this one: bounds of more noise are lost in rounding
SLACK = 0.1  # share of delta for a client that takes part more often than it should (local mechanisms)


class Sampling(NamedTuple):
    """Who takes part in a round. Drop-outs that do not look at data only help, and are not counted."""

    kind: str  # poisson | fixed (without replacement) | everyone | cyclic
    population: int  # clients
    size: int  # of a cohort; poisson: expected
    cap: int = 0  # poisson: most clients in a round (`Sampler.slots`), the others left out at random; 0: no limit


def check_accounting(mechanisms: Sequence[Mechanism], sampling: Sampling, delta: float, relation: str | None) -> str:
    """The relation that the figures are for. Raises ValueError for what cannot be accounted for."""
    if not 0 < delta < 1:
        raise ValueError(f"delta is {delta:g}: it must lie between 0 and 1 (below 1 / population)")
    kind, population, size, cap = sampling
    if mechanisms and kind not in SAMPLERS:
        raise ValueError(f'no sampler "{kind}" among those with a bound: the accountant knows {", ".join(SAMPLERS)}')
    if not 1 <= size <= population:
        raise ValueError(f"a cohort of {size:,} of {population:,} clients: its size must be 1 to the population's")
    if cap < 0 or (cap and kind != "poisson"):
        raise ValueError(f"cap is {cap}: it must be 0 (none) or more, and only poisson cohorts have one")
    for each in mechanisms:
        if each.kind not in KINDS:
            raise ValueError(f'no mechanism "{each.kind}": the accountant knows {", ".join(KINDS)}')
        if not (0 <= each.multiplier < math.inf and 0 <= each.epsilon < math.inf):
            raise ValueError(f"{each.kind}: noise multiplier {each.multiplier:g}, epsilon {each.epsilon:g}: 0 or more")
        if each.kind == "skellam" and not (each.l1 > 0 and each.l2 > 0):
            raise ValueError("skellam noise needs the L1 and L2 norms of what a client can add, in grid units")
        if each.epsilon and (each.multiplier or each.kind != "local"):
            raise ValueError(f"{each.kind}: an epsilon of its own is for a local mechanism without a noise multiplier")
    if relation not in (None, *RELATIONS):
        raise ValueError(f'no relation "{relation}": give {" or ".join(RELATIONS)}')
    if relation == "add-or-remove" and kind == "fixed":
        raise ValueError("cohorts of a fixed size are accounted under replace-one: where one leaves, another is drawn")
    local = any(each.kind == "local" for each in mechanisms)
    if local and relation == "add-or-remove":
        raise ValueError(
            "noise on each message is accounted under replace-one, as a message shows that its client took part: leave "
            "privacy.relation out"
        )
    return relation or ("replace-one" if kind == "fixed" or local else "add-or-remove")


def round_faint_noise(mechanisms: Sequence[Mechanism]) -> tuple[Mechanism, ...]:
    """The same with multipliers that can be squared, rounded down: next to no noise is none."""

    def rounded_down(multiplier):
        return 0.0 if multiplier < TINY else min(multiplier, PLENTY)

    return tuple(each._replace(multiplier=rounded_down(each.multiplier)) for each in mechanisms)


def joint_multiplier(mechanisms: Sequence[Mechanism]) -> float:
    """The multiplier of several Gaussian releases of one cohort, seen as one; 0 where one has no noise."""
    if not all(each.multiplier for each in mechanisms):
        return 0.0
    return sum(each.multiplier**-2 for each in mechanisms) ** -0.5


def split_by_release(mechanisms: Sequence[Mechanism]) -> tuple[list[Mechanism], list[Mechanism]]:
    """(released once in a run, released in every round)."""
    whole = [each for each in mechanisms if each.kind == "correlated"]
    return whole, [each for each in mechanisms if each.kind != "correlated"]


def crowded_probability(sampling: Sampling) -> float:
    """Probability that a round has so many other clients that the cap counts for one more."""
    from scipy.stats import binom

    if not sampling.cap:
        return 0.0
    return float(binom.sf(sampling.cap - 1, sampling.population - 1, sampling.size / sampling.population))


def count_participations(sampling: Sampling, rounds: int, probability: float) -> tuple[int, float]:
    """(most rounds that one client takes part in, probability of more, at most about `probability`)."""
    from scipy.stats import binom

    if sampling.kind == "everyone":
        return rounds, 0.0
    if sampling.kind == "cyclic":  # rounds * size successive places of the circle
        return -(-rounds * sampling.size // sampling.population), 0.0
    rate = sampling.size / sampling.population
    most = int(binom.isf(probability, rounds, rate))
    return max(most, 1), float(binom.sf(most, rounds, rate))


def is_amplified(mechanisms: Sequence[Mechanism], sampling: Sampling) -> bool:
    """Whether sampling hides who takes part.

    Not beside local messages, which show their senders, nor beside correlated noise, whose figure is for known cohorts.
    """
    hidden = bool(mechanisms) and all(each.kind in ("gaussian", *INTEGER) for each in mechanisms)
    return hidden and sampling.kind in ("poisson", "fixed")
