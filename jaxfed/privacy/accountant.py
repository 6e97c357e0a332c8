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

KINDS = ("gaussian", "skellam", "discrete_gaussian", "correlated", "local")
INTEGER = ("skellam", "discrete_gaussian")  # noise whose divergences are known at whole orders, and bounds there
SAMPLERS = ("poisson", "fixed", "everyone", "cyclic")
RELATIONS = ("add-or-remove", "replace-one")
ACCOUNTANTS = ("rdp", "pld")
TOLERANCE = 1e-3  # of a calibrated multiplier, relative
TINY = 1e-9  # of multipliers and epsilons: 1 / TINY is as good as infinite
PLENTY = 1e6  # multipliers above count as this one: bounds of more noise are lost in rounding
FAINT = 0.2  # noise over what a client can change, below: epsilon is in the hundreds, loss distributions take gigabytes
SLACK = 0.1  # share of delta for a client that takes part more often than it should (local mechanisms)


class Sampling(NamedTuple):
    """Who takes part in a round. Drop-outs that do not look at data only help, and are not counted."""

    kind: str  # poisson | fixed (without replacement) | everyone | cyclic
    population: int  # clients
    size: int  # of a cohort; poisson: expected
    cap: int = 0  # poisson: most clients in a round (`Sampler.slots`), the others left out at random; 0: no limit


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


class RunBound(NamedTuple):
    """One way to bound a run: so many compositions, beside a few runs that count as failures."""

    rdp: np.ndarray  # of one composition, by order
    run: Callable[[int], tuple[int, float]]  # rounds -> (compositions, probability of a run that `rdp` does not cover)


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


def make_ledger(
    mechanisms: Sequence[Mechanism], sampling: Sampling, delta: float, relation: str | None = None
) -> Callable[[int], float]:
    """rounds -> epsilon at `delta` by Renyi divergences: one round's is computed once, and multiplied.

    Orders are those of dp-accounting (integers where there is Skellam noise). Correlated noise is spent with the first
    round. Without mechanisms nothing is private: inf. Raises ValueError for what cannot be accounted for.
    """
    from dp_accounting.rdp import RdpAccountant

    relation = check_accounting(mechanisms, sampling, delta, relation)
    mechanisms = round_faint_noise(mechanisms)
    orders = RdpAccountant().orders
    if any(each.kind in INTEGER for each in mechanisms):
        orders = orders[orders == np.floor(orders)]
    once = unsampled_rdp(split_by_release(mechanisms)[0], orders, 2.0 if relation == "replace-one" else 1.0)
    ways = bound_run(mechanisms, sampling, relation, orders, delta)

    def epsilon(rounds):
        if not rounds or not mechanisms:
            return math.inf if rounds else 0.0
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
    wanted = accountant == "pld" and mechanisms and rounds
    mechanisms = round_faint_noise(mechanisms)
    loss = epsilon_by_loss(mechanisms, sampling, rounds, delta, relation) if wanted else None
    try:
        figure = make_ledger(mechanisms, sampling, delta, relation)(rounds)
    except ValueError:
        if loss is None and not (is_amplified(mechanisms, sampling) and is_faint(mechanisms, relation)):
            raise
        figure = math.inf
    if wanted and loss is None:
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
    from scipy.optimize import brentq

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
    while excess(high) > 0:
        high += step
        if high > -math.log(TINY):
            raise ValueError(f"no noise reaches epsilon {epsilon:g}: the cap, or what is released beside, spends it")
    low = high - step
    while excess(low) <= 0 and low > math.log(TINY):
        low, high = low - step, low
    if excess(low) <= 0:
        return math.exp(low)
    return math.exp(brentq(excess, low, high, xtol=TOLERANCE / 2) + TOLERANCE / 2)


def audit_lower_bound(members: Any, non_members: Any, delta: float, confidence: float = 0.95) -> float:
    """An epsilon that a mechanism has at least, with this confidence: from scores of an attack, higher for members.

    One score for each run of the mechanism, runs independent. Clopper-Pearson intervals of the rates of error, over all
    thresholds at once (Jagielski, Ullman and Oprea 2020; Nasr et al. 2021; Bonferroni's correction is jax-privacy's).
    n runs of each kind show no more than about log(n) - 2.5. Raises ValueError without scores.
    """
    from jax_privacy.auditing import CanaryScoreAuditor

    auditor = CanaryScoreAuditor(np.asarray(members), np.asarray(non_members))
    return float(auditor.epsilon_clopper_pearson(1 - confidence, delta, one_sided=False))


def probe_channel(channel: Any, example: Any, draws: int = 64, rounds: int = 4, seed: int = 0) -> float:
    """The most that one client was found to move what a private chain noises, over what its noise is made for.

    Above 1 the chain is not private as it says; at most 1 proves nothing, as it searches at random (see `sensitivity`).
    example: an update, its tables marked. Raises ValueError for a chain without noise.
    """
    from jaxfed.core.channel_checks import check_order
    from jaxfed.core.link import list_links
    from jaxfed.privacy.sensitivity import search_largest_gain

    if not channel.claims.mechanisms:
        raise ValueError(f"{channel.claims.name}: no link of it is private: there is nothing to probe")
    return search_largest_gain(list_links(channel), check_order(list_links(channel)), example, draws, rounds, seed)


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
