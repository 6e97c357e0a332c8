"""The accountant: what a reader of a run learns about one client, as (epsilon, delta).

A client is the unit: all that it sends in all rounds. `add-or-remove` compares a run with the run without it, where
Poisson sampling amplifies, and else with that in which it keeps its place and sends nothing; `replace-one` with another
one in its place, and so doubles every sensitivity. The size of the population and of cohorts, or the rate, are public.

Several mechanisms of one round see one cohort. Their joint release is bounded first and sampling amplifies it once:
two sampled releases, composed, would be those of two cohorts, and too small.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from jaxfed.core.types import Mechanism
from jaxfed.privacy import loss, renyi
from jaxfed.privacy.releases import (
    INTEGER,
    SLACK,
    TINY,
    Sampling,
    check_accounting,
    count_participations,
    crowded_probability,
    is_amplified,
    joint_multiplier,
    round_faint_noise,
    split_by_release,
)
from jaxfed.privacy.run_bounds import bound_run, unsampled_rdp

ACCOUNTANTS = ("rdp", "pld")
TOLERANCE = 1e-3  # of a calibrated multiplier, relative
FAINT = 0.2  # noise over what a client can change, below: epsilon is in the hundreds, loss distributions take gigabytes


class PrivacyAccount(NamedTuple):
    """The differential privacy of a run whose links release these, and how it is to be told. No mechanism: none."""

    mechanisms: tuple[Mechanism, ...]
    sampling: Sampling
    delta: float = 1e-5
    accountant: str = "rdp"
    relation: str | None = None


class PrivacySpent(NamedTuple):
    """(epsilon, delta)-differential privacy of one client, and what was assumed for it."""

    epsilon: float
    delta: float
    accountant: str  # the one that gave the figure, not the one asked for
    relation: str
    note: str = ""  # sentences, joined by "; "


def make_ledger(
    mechanisms: Sequence[Mechanism], sampling: Sampling, delta: float, relation: str | None = None
) -> Callable[[int], float]:
    """rounds -> epsilon at `delta` by Renyi divergences: one round's is computed once, and multiplied.

    Orders are those of dp-accounting (integers where there is Skellam noise). Correlated noise is spent with the first
    round. Without mechanisms nothing is private: inf. Raises ValueError for what cannot be accounted for.
    """
    relation = check_accounting(mechanisms, sampling, delta, relation)
    if not mechanisms:  # dp-accounting takes half a second to import
        return lambda rounds: math.inf if rounds else 0.0
    from dp_accounting.rdp import RdpAccountant

    mechanisms = round_faint_noise(mechanisms)
    orders = RdpAccountant().orders
    if any(each.kind in INTEGER for each in mechanisms):
        orders = orders[orders == np.floor(orders)]
    once = unsampled_rdp(split_by_release(mechanisms)[0], orders, 2.0 if relation == "replace-one" else 1.0)
    ways = bound_run(mechanisms, sampling, relation, orders, delta)

    def epsilon(rounds):
        if not rounds:
            return 0.0
        spent = [(bound.rdp, *bound.run(rounds)) for bound in ways]
        return min(renyi.rdp_epsilon(orders, once + times * rdp, delta - outside) for rdp, times, outside in spent)

    return epsilon


def is_faint(mechanisms: Sequence[Mechanism], relation: str) -> bool:
    """Whether a round has so little noise that its loss distribution is not worth its memory: replacing a client can
    change a sum by twice the bound."""
    return joint_multiplier(mechanisms) / (2 if relation == "replace-one" else 1) < FAINT


def epsilon_by_loss(
    mechanisms: Sequence[Mechanism], sampling: Sampling, rounds: int, delta: float, relation: str
) -> float | None:
    """epsilon by privacy loss distributions; None where dp-accounting has none.

    Truncated Poisson cohorts: Ganesh 2025, arXiv:2508.15089. Fixed cohorts: see `privacy.loss`. Without amplification
    Gaussian noise has a formula (Balle and Wang 2018).
    """
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    if not all(each.multiplier and each.kind not in INTEGER for each in mechanisms):
        return None
    if not is_amplified(mechanisms, sampling):
        times, outside = count_participations(sampling, rounds, SLACK * delta)
        whole, repeated = split_by_release(mechanisms)
        all_of_it = joint_multiplier(
            [*whole, *[each._replace(multiplier=each.multiplier / times**0.5) for each in repeated]]
        )
        all_of_it /= 2.0 if relation == "replace-one" else 1.0
        return float(dp_accounting.get_epsilon_gaussian(all_of_it, delta - outside))
    relations = dp_accounting.NeighboringRelation
    neighbours = relations.REPLACE_ONE if relation == "replace-one" else relations.REPLACE_SPECIAL
    noise, rate = joint_multiplier(mechanisms), sampling.size / sampling.population
    if is_faint(mechanisms, relation):
        return None
    if sampling.kind == "fixed":
        return loss.fixed_cohort_epsilon(noise / 2, rate, rounds, delta)
    one: Any = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise))
    if crowded_probability(sampling):
        one = dp_accounting.TruncatedSubsampledGaussianDpEvent(sampling.population, rate, sampling.cap, noise)
    with renyi.quiet_absl():
        return float(PLDAccountant(neighbours).compose(one, rounds).get_epsilon(delta))


def compute_spent(
    mechanisms: Sequence[Mechanism],
    sampling: Sampling,
    rounds: int,
    delta: float,
    accountant: str = "rdp",
    relation: str | None = None,
) -> PrivacySpent:
    """What `rounds` rounds cost one client.

    accountant: pld: epsilon is lower than with rdp, by 5 to 50 per cent; slower. Where no loss distribution is known,
    the figure is that of rdp and says so. relation None: replace-one for fixed cohorts and local
    mechanisms, add-or-remove for the others. Raises ValueError for what cannot be accounted for.
    """
    relation = check_accounting(mechanisms, sampling, delta, relation)
    if rounds < 0:
        raise ValueError(f"rounds is {rounds}: it must not be negative")
    if accountant not in ACCOUNTANTS:
        raise ValueError(f'no accountant "{accountant}": give {" or ".join(ACCOUNTANTS)}')
    notes = list_remarks(mechanisms, sampling, rounds, delta)
    by_loss = accountant == "pld" and mechanisms and rounds
    mechanisms = round_faint_noise(mechanisms)
    loss = epsilon_by_loss(mechanisms, sampling, rounds, delta, relation) if by_loss else None
    try:
        figure = make_ledger(mechanisms, sampling, delta, relation)(rounds)
    except ValueError:
        if loss is None and not (is_amplified(mechanisms, sampling) and is_faint(mechanisms, relation)):
            raise
        figure = math.inf
    if by_loss and loss is None:
        notes.append("no privacy loss distribution is known for this: the figure is that of RDP")
    if loss is not None and loss <= figure:
        return PrivacySpent(loss, delta, "pld", relation, "; ".join(notes))
    return PrivacySpent(figure, delta, "rdp", relation, "; ".join(notes))


def list_remarks(mechanisms: Sequence[Mechanism], sampling: Sampling, rounds: int, delta: float) -> list[str]:
    """What a figure assumes and a reader may not expect."""
    found = []
    kinds = {each.kind for each in mechanisms}
    if not mechanisms:
        return ["nothing is noised: nothing is private"]
    if delta >= 1 / sampling.population:
        found.append(f"delta {delta:g} is not below 1/{sampling.population}: it would allow to publish a client whole")
    if is_amplified(mechanisms, sampling):
        found.append("amplified by sampling, for readers who do not know the cohorts")
        if rounds * crowded_probability(sampling) > delta:
            found.append(f"cap {sampling.cap} is often too few slots, which costs epsilon: a higher one may lower it")
    elif kinds - {"correlated"}:
        most, more = count_participations(sampling, rounds, SLACK * delta)
        beyond = f", beyond which it gets with probability {more:.0e}, a part of delta" if more else ""
        found.append(f"not amplified: composed over the {most} rounds that a client takes part in at most{beyond}")
    if "correlated" in kinds:
        found.append("correlated noise: the figure of the whole run, for the participations its matrix was made for")
    return found


def calibrate_noise(
    epsilon: float,
    delta: float,
    sampling: Sampling,
    rounds: int,
    kind: str = "gaussian",
    accountant: str = "rdp",
    relation: str | None = None,
    beside: Sequence[Mechanism] = (),
    l1: float = 0.0,
    l2: float = 0.0,
) -> float:
    """The least noise multiplier, to a thousandth, with which `rounds` rounds spend at most `epsilon` at `delta`.

    beside: what else each round releases. l1, l2: sensitivities of Skellam noise in grid units. Raises ValueError where
    there is none.
    """
    if not 0 < epsilon < math.inf:
        raise ValueError(f"epsilon is {epsilon:g}: it must be positive and finite")
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}: it must be at least 1")

    @cache
    def excess(x):  # nearly a line in the logarithm of the multiplier
        mechanisms = (Mechanism(kind, math.exp(x), l1, l2), *beside)
        found = compute_spent(mechanisms, sampling, rounds, delta, accountant, relation).epsilon
        return math.log(min(max(found, TINY), 1 / TINY) / epsilon)

    step, high = math.log(2), 0.0
    if accountant == "pld" and not (sampling.kind == "poisson" and relation == "replace-one"):
        # loss distributions of little noise are slow: come from above, and not from far
        more = calibrate_noise(epsilon, delta, sampling, rounds, kind, "rdp", relation, beside, l1, l2)
        step, high = math.log(1.2), math.log(more)
    return math.exp(search_least_noise(excess, high, step, epsilon))


def search_least_noise(excess: Callable[[float], float], high: float, step: float, epsilon: float) -> float:
    """The least logarithm of a multiplier with an excess of at most 0, searched in steps from `high`, then by roots.

    Raises ValueError where there is none; epsilon: for its message.
    """
    from scipy.optimize import brentq

    while excess(high) > 0:
        high += step
        if high > -math.log(TINY):
            raise ValueError(f"no noise reaches epsilon {epsilon:g}: the cap, or what is released beside, spends it")
    low = high - step
    while excess(low) <= 0 and low > math.log(TINY):
        low, high = low - step, low
    if excess(low) <= 0:
        return low
    return brentq(excess, low, high, xtol=TOLERANCE / 2) + TOLERANCE / 2


def spent_to_dict(
    mechanisms: Sequence[Mechanism], sampling: Sampling, rounds: int, spent: PrivacySpent
) -> dict[str, Any]:
    """What a run's summary holds under `privacy`, in JSON's types."""
    entries = [{key: value for key, value in each._asdict().items() if value} for each in mechanisms]
    return {"mechanisms": entries, "sampling": sampling._asdict(), "rounds": rounds, **spent._asdict()}


def spent_from_dict(privacy: dict[str, Any]) -> tuple[tuple[Mechanism, ...], Sampling, int, PrivacySpent]:
    """The way back. Raises ValueError for what is not of that form."""
    try:
        mechanisms, sampling = (
            tuple(Mechanism(**each) for each in privacy["mechanisms"]),
            Sampling(**privacy["sampling"]),
        )
        spent, rounds = PrivacySpent(**{key: privacy[key] for key in PrivacySpent._fields}), int(privacy["rounds"])
        check_accounting(mechanisms, sampling, spent.delta, spent.relation)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the record of the run's privacy is damaged or of another version ({error})") from None
    return mechanisms, sampling, rounds, spent
