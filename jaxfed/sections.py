"""From one section of a configuration to the piece that it names."""

import dataclasses
import inspect
from typing import Any

import jax
import numpy as np
import optax

from jaxfed.arrivals import timed
from jaxfed.channel import Channel, chain, link
from jaxfed.cohort import Sampler
from jaxfed.data.batches import Batching
from jaxfed.data.clients import Population
from jaxfed.data.interactions import numbers_of
from jaxfed.evaluate import Past
from jaxfed.models.model import Model
from jaxfed.privacy import Account, Sampling
from jaxfed.registry import BESIDE, REGISTRY, arguments, grouped, scheduled
from jaxfed.work import Work
from jaxfed.works.personal import keep


def call(section: str, config: Any, **given: Any) -> Any:
    """The registry's function with the section's arguments and, of what the program gives, what it asks for."""
    function = REGISTRY[section][config.name]
    asked = inspect.signature(function).parameters
    given = {name: value for name, value in given.items() if name in asked}
    mine = arguments(section, config.name).keys() - BESIDE.get(section, {}).keys()
    return function(**{name: getattr(config, name) for name in mine}, **given)


def optimizer_of(config: Any) -> Any:
    """A client's optimiser from [work.optimizer]."""
    rest = arguments("optimizer", config.name).keys() - BESIDE["optimizer"].keys()
    groups = {name: dataclasses.asdict(getattr(config, name)) for name in ("item", "user")}
    own = {name: getattr(config, name) for name in rest}
    return grouped(REGISTRY["optimizer"][config.name], config.learning_rate, config.weight_decay, **groups, **own)


def links(configs: tuple[Any, ...], items: np.ndarray, where: str, **given: Any) -> Channel:
    """The chain of some links' sections. A section names items, a link knows their rows. Raises ValueError for an item
    that is not in the data."""

    def made(config, number):
        if hasattr(config, "targets"):
            rows = numbers_of(items, config.targets, f"{where}.{number}.targets").tolist()
            config = dataclasses.replace(config, targets=tuple(rows))
        return call("channel", config, **given)

    return chain(*(made(each, number) for number, each in enumerate(configs))) if configs else link()


def loss_of(config: Any) -> str:
    """The loss by which the model learns what the data's rows are labelled with; "": it has none by name.

    Raises ValueError where the two do not go together.
    """
    label, name, loss = config.data.label, config.model.name, getattr(config.model, "loss", "")
    if label == "implicit":
        return loss
    wanted = {"rating": "squared", "click": "bce"}[label]
    if not loss:
        raise ValueError(f'data.label = "{label}": the model "{name}" counts rows, whatever their label: take mf or fm')
    if loss != wanted:
        raise ValueError(f'data.label = "{label}": model.loss must be "{wanted}", not "{loss}"')
    return "rating" if label == "rating" else loss


def model_of(config: Any, population: Population, end: int) -> Model:
    """The model of a configuration, whose tables have `end` rows; it scores the items alone, and knows their features.

    Raises ValueError where it does not go with the data.
    """
    items, loss, known = population.num_items, loss_of(config), (population.user_features, population.item_features)
    chosen = dataclasses.replace(config.model, loss=loss) if loss else config.model
    sizes = {"num_items": end, "num_users": population.users_per_client, "real_items": items}
    model = call("model", chosen, **sizes, vocabulary=tuple(len(side.names) if side else 0 for side in known))
    of_item: tuple = ()
    if model.features:
        of_item = (known[1].rows(np.arange(end)) if known[1] and "item" in model.features else None,)

    def score(*args):  # rows past the items, if any, are nothing to recommend
        return model.score(*args, *of_item)[:items]

    def fold_in(*args):
        return model.fold_in(*args, *of_item)

    return model._replace(score=score, fold_in=model.fold_in and fold_in)


def batching_of(config: Any, model: Model, work: Work) -> Batching:
    """How a configuration's [work] section cuts data into steps; histories are whole and without negatives."""
    asked = {name: getattr(config, name) for name in BESIDE["work"] if name in Batching._fields}
    if work.histories:
        return Batching(**asked | {"negatives": 0, "epochs": 1}, ordered=True)
    return Batching(**asked, pairwise=model.pairwise, features=model.features)


def account_of(channel: Channel, sampler: Sampler, num_clients: int, config: Any) -> Account:
    """What the accountant needs of a run, from its channel, its sampler and its [privacy] section."""
    cap = sampler.slots if sampler.kind == "poisson" else 0
    sampling = Sampling(sampler.kind, num_clients, sampler.size, cap)
    return Account(channel.private, sampling, config.delta, config.accountant, config.relation or None)


def history_of(config: Any, model: Model, work: Work, label: str) -> Past:
    """What the [evaluation] section has models fold in: a history where asked to, or where nothing private is kept.

    Raises ValueError where a model cannot.
    """

    def parts(key):
        return model.private(key), work.private(work.init(model.init(key), key)[1])

    needed, kept = (jax.tree.leaves(part) for part in jax.eval_shape(parts, jax.random.key(0)))
    fold = config.fold_in or model.closed is not None or bool(needed and not kept)
    if fold and label != "implicit":
        raise ValueError(
            f'data.label = "{label}": histories are folded in as clicks: set evaluation.fold_in to false, and take a '
            "work that keeps private parts"
        )
    if fold and model.fold_in is None:
        raise ValueError(
            "evaluation.fold_in: the model has no way from a history to a private part: take a work that keeps it"
        )
    return config.history if fold else ""


def by_row(channel: Channel) -> bool:
    """Whether rows are averaged over those who hold them: then edges do so too."""
    return any(each.name == "per_row_mean" for each in channel.links)


def edges_of(config: Any, clients: int, sampler: Sampler) -> np.ndarray | None:
    """int64 [clients]: the edge of each, dealt at random by the seed of the data; None: there are none.

    Raises ValueError for what does not go with edges.
    """
    edges = config.server.edges
    if not edges:
        return None
    if config.download:
        raise ValueError("server.edges: there are no codes of the download between edges and clients: leave it out")
    if sampler.versions:
        raise ValueError("server.edges: edges go on in rounds, clients of this cohort at their own pace: take another")
    if config.run.client_store == "host":
        raise ValueError("run.client_store: the store of clients of edges lies on the device: leave it out")
    if edges > clients:
        raise ValueError(f"server.edges: edge {clients} has no clients: there are {clients:,}, lower it to that")
    return np.random.default_rng([config.data.deal, edges, 13]).permutation(clients) % edges


def sampler_of(config: Any, population: Population) -> Sampler:
    """The sampler of a configuration, by its clock if it has one."""
    everyone = {"num_clients": population.num_clients, "activity": population.activity, "names": population.names}
    clock = call("clock", config.clock, **everyone)
    sampler = call("cohort", config.cohort, clock=clock, **everyone)
    return timed(sampler, clock, population.num_clients) if clock and not sampler.clock else sampler


def known_of(config: Any, population: Population, sampler: Sampler) -> dict[str, Any]:
    """What works and links may ask of a run, by the names of their arguments."""
    return {
        "slots": sampler.slots,
        "sampler": sampler,
        "population": -(-population.num_clients // max(config.server.edges, 1)),  # that one server hears
        "rounds": config.rounds,
        "activity": population.activity,
    }


def work_of(config: Any, model: Model, **known: Any) -> Work:
    """The work of a configuration, which trains the model. Raises ValueError."""
    if config.work.name == "reconstruct" and config.work.epochs > 1:
        raise ValueError(
            "work.epochs: reconstruct parts the steps of one pass into two halves: leave it at 1, and set work.passes"
        )
    optimizer = optimizer_of(config.work.optimizer)
    taught = {"initial": model.init, "loss": model.loss, "optimizer": optimizer, "private": model.private}
    work = call("work", config.work, **taught, **known, closed=model.closed)
    return keep(work) if config.work.keep_copy else work


def server_of(config: Any, model: Model) -> optax.GradientTransformation:
    """The server optimiser of a configuration."""
    pace = config.server
    rate = scheduled(pace.learning_rate, config.rounds, pace.schedule, pace.warmup, pace.final)
    return call("server", pace, learning_rate=rate, closed=model.closed)
