"""The last stages of `build_parts`: how a run is evaluated, and its privacy account."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxfed.config.settings import Evaluation
from jaxfed.config.stages import Pieces, Runtime
from jaxfed.core.link import Channel, link, list_mechanisms
from jaxfed.core.method import Method
from jaxfed.core.model import Model
from jaxfed.data.interactions import item_numbers
from jaxfed.data.population import SAMPLED, Population
from jaxfed.evaluation.candidates import SampleOptions, count_train_interactions
from jaxfed.evaluation.evaluator import make_evaluator, make_user_evaluator
from jaxfed.evaluation.metrics import CUTOFFS
from jaxfed.evaluation.split import EvalSplit, Past, make_eval_split, map_to_homes
from jaxfed.privacy.accountant import PrivacyAccount, make_ledger
from jaxfed.privacy.releases import Sampling


def choose_history(settings: Evaluation, model: Model, method: Method, label: str) -> Past:
    """The history that models fold in, where the settings ask for it or no private part is kept; "": none.

    Raises ValueError where a model cannot.
    """

    def parts(key):
        return model.private(key), method.private_part(method.work.init(model.init(key), key)[1])

    needed, kept = (jax.tree.leaves(part) for part in jax.eval_shape(parts, jax.random.key(0)))
    fold = settings.fold_in or model.closed is not None or model.sequence is not None or bool(needed and not kept)
    if fold and label != "implicit":
        raise ValueError(
            f'data.label = "{label}": histories are folded in as clicks: set evaluation.fold_in to false, and take a '
            "work that keeps private parts"
        )
    if fold and model.fold_in is None:
        raise ValueError(
            "evaluation.fold_in: the model has no way from a history to a private part: take a work that keeps it"
        )
    return settings.history if fold else ""


def check_cold_start(model: Model, method: Method) -> None:
    """Raises ValueError where the server's model and a history do not suffice to score a client never seen before."""
    if model.fold_in is None:
        raise ValueError(
            "data.cold: the model has no way from a history to the private part of a new client: take one that has "
            '(mf or neumf with loss = "bce" or "squared", ease, item_knn, transitions, ials)'
        )
    key = jax.random.key(0)
    sent, own = jax.eval_shape(lambda: (method.work.init(model.init(key), key)[0].params, model.init(key)))
    if sent != own:
        raise ValueError("data.cold: with several models side by side new clients have none yet: take another work")


def count_candidates(settings: Evaluation, population: Population) -> tuple[int, int]:
    """(the fewest, the most) negatives of a user in `sampled` figures, unless the catalogue has fewer; 0: there are no
    such figures."""
    if population.labels or not settings.negatives:
        return 0, 0
    given = [each.negatives.counts for each in (population.asked, population.cold) if each and each.negatives]
    if given:
        return min(int(each.min()) for each in given), max(int(each.max()) for each in given)
    return settings.negatives, settings.negatives


def describe_candidates(settings: Evaluation, population: Population) -> str:
    """What held-out items are ranked among in `sampled` figures, in some words; "": there are none."""
    low, high = count_candidates(settings, population)
    if not high:
        return ""
    if population.asked.negatives is not None:
        return f"given, {low:,} to {high:,} a user" if low < high else f"given, {high:,} a user"
    how = {"uniform": "uniform", "popularity": "by popularity"}[settings.negative_sampling]
    return f"{high:,} {how}, {settings.draws} draw{'s' * (settings.draws > 1)}"


def check_cutoffs(settings: Evaluation, population: Population) -> None:
    """Raises ValueError for cut-offs that no ranking reaches, and samples beyond the catalogue. The defaults are asked
    of every catalogue."""
    items, (_, most) = population.num_items, count_candidates(settings, population)
    if not settings.at or min(settings.at) < 1:
        raise ValueError(f"evaluation.at is {list(settings.at)}: cut-offs are whole numbers from 1, such as [10, 20]")
    if len(set(settings.at)) < len(settings.at):
        raise ValueError(f"evaluation.at is {list(settings.at)}: a cut-off comes twice, name each once")
    if settings.at != CUTOFFS and max(settings.at) > items:
        raise ValueError(f"evaluation.at: {max(settings.at):,} is beyond the catalogue of {items:,} items: lower it")
    if most and max(settings.at) > most + 1:
        more = ", raise evaluation.negatives," * (population.asked.negatives is None)
        raise ValueError(
            f"evaluation.at: {max(settings.at):,} is beyond the {most + 1:,} candidates of `sampled` figures: lower "
            f"it{more} or leave these figures out (evaluation.negatives = 0)"
        )
    if most != SAMPLED and most >= items:
        raise ValueError(
            f"evaluation.negatives is {most:,}, the catalogue has {items:,} items: lower it; `full` figures rank all"
        )


def choose_samples(settings: Evaluation, population: Population, runtime: Runtime) -> SampleOptions:
    """How candidates are drawn. Raises ValueError where they cannot be."""
    if settings.negative_sampling == "uniform":
        return SampleOptions(settings.negatives, settings.draws)
    if runtime.share.size > 1:
        raise ValueError(
            "evaluation.negative_sampling: popularity is counted over all clients, and of several processes each knows "
            "its own: take uniform, or one process"
        )
    if population.asked.negatives is not None:
        raise ValueError("evaluation.negative_sampling: data.negatives gives the negatives: leave one of both out")
    return SampleOptions(settings.negatives, settings.draws, count_train_interactions(population.asked))


def make_eval_splits(pieces: Pieces, model: Model, method: Method, runtime: Runtime) -> dict[str, EvalSplit]:
    """What clients are asked: `val` and `test`, and `test/cold` of clients that never take part, if there are any.

    Raises ValueError where private parts would be folded in, and cannot be.
    """
    population, settings = pieces.clients.population, pieces.evaluation
    label = population.labels.kind if population.labels else "implicit"
    past = choose_history(settings, model, method, label)
    if past and population.domains:
        raise ValueError(
            "data.merge: a private part is folded in from one catalogue, not from domains: keep it instead"
        )

    candidates = choose_samples(settings, population, runtime)

    def make_split(who, part, history):
        asked = settings.seed, settings.clients, runtime.placement.client_devices, runtime.share
        times = model.sequence.times if model.sequence else "none"
        return make_eval_split(
            who, part, *asked, history=history, features=model.features, candidates=candidates, times=times
        )

    splits = {part: map_to_homes(make_split(population.asked, part, past), population) for part in ("val", "test")}
    return splits | ({"test/cold": make_split(population.cold, "test", settings.history)} if population.cold else {})


class Evaluators(NamedTuple):
    """How a run is evaluated."""

    evaluator: Any  # see `make_evaluator`
    cold_evaluator: Any  # for clients of which nothing is kept; None: there are none
    user_evaluator: Any  # of each user, by the server's model; see `make_user_evaluator`
    eval_splits: dict[str, EvalSplit]


def make_evaluators(pieces: Pieces, model: Model, method: Method, runtime: Runtime) -> Evaluators:
    """The evaluators of a run, and what they ask. Raises ValueError for what cannot be evaluated."""
    population, settings, through = pieces.clients.population, pieces.evaluation, pieces.evaluation_channel or link()
    if through.claims.mechanisms and pieces.privacy.seed == "secret":
        raise ValueError(
            "evaluation.channel: its noise would come from the seed that config.toml holds, not from the secret one: "
            "leave the noise out, or privacy.seed"
        )
    check_cutoffs(settings, population)
    splits = make_eval_splits(pieces, model, method, runtime)
    promoted = item_numbers(pieces.clients.source.items, settings.targets, "evaluation.targets").tolist()
    evaluator, cold = make_evaluator(model, through, runtime.placement, promoted, method.work.views, settings.at), None
    if population.cold:
        check_cold_start(model, method)
        cold = make_evaluator(model, through, runtime.placement, promoted, cutoffs=settings.at)
    each = make_user_evaluator(model, runtime.placement, method.work.views[""], settings.at)
    return Evaluators(evaluator, cold, each, splits)


def make_account(pieces: Pieces, channel: Channel) -> tuple[PrivacyAccount, Callable[[int], float]]:
    """(what the accountant needs of a run, rounds -> the epsilon spent). Raises ValueError where epsilon does not cover
    what clients know."""
    sampler, settings = pieces.sampler, pieces.privacy
    cap = sampler.slots if sampler.kind == "poisson" else 0
    sampling = Sampling(sampler.kind, pieces.clients.num_clients, sampler.size, cap)
    relation = settings.relation or None
    account = PrivacyAccount(list_mechanisms(channel), sampling, settings.delta, settings.accountant, relation)
    if account.mechanisms and pieces.clients.population.popularity:
        raise ValueError(
            "work.negative_sampling: popularity is counted without noise, which epsilon does not cover: take uniform"
        )
    return account, make_ledger(account.mechanisms, account.sampling, account.delta, account.relation)
