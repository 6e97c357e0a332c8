"""From one section of a configuration to the piece that it names."""

import dataclasses
import inspect
from typing import Any

import jax
import numpy as np
import optax

from jaxfed.algorithms.group_rates import Rates, group_rates
from jaxfed.algorithms.own_model import keep_own_copy
from jaxfed.config.registry import BESIDE, REGISTRY, section_arguments, server_schedule
from jaxfed.config.schema import NAMED, build_section, config_to_table
from jaxfed.core.channel import chain
from jaxfed.core.link import Channel, link, list_links, list_mechanisms
from jaxfed.core.method import Method
from jaxfed.core.model import Model
from jaxfed.core.parametrization import Parametrization, check_parametrization
from jaxfed.core.streams import SetupStream, setup_rng
from jaxfed.core.types import Sampler
from jaxfed.data.batching import Batching
from jaxfed.data.interactions import item_numbers
from jaxfed.data.population import Population
from jaxfed.evaluation.split import Past
from jaxfed.privacy.accountant import PrivacyAccount
from jaxfed.privacy.releases import Sampling
from jaxfed.sampling.asynchronous import with_clock


def call_registered(section: str, config: Any, **given: Any) -> Any:
    """The registry's function with the section's arguments and, of what the program gives, what it asks for."""
    function = REGISTRY[section][config.name]
    asked = inspect.signature(function).parameters
    given = {name: value for name, value in given.items() if name in asked}
    mine = section_arguments(section, config.name).keys() - BESIDE.get(section, {}).keys()
    return function(**{name: getattr(config, name) for name in mine}, **given)


def make_client_optimizer(config: Any) -> optax.GradientTransformation:
    """A client's optimiser from [work.optimizer]."""
    rest = section_arguments("optimizer", config.name).keys() - BESIDE["optimizer"].keys()
    groups = {name: Rates(**dataclasses.asdict(getattr(config, name))) for name in ("item", "user")}
    own = {name: getattr(config, name) for name in rest}
    return group_rates(REGISTRY["optimizer"][config.name], config.learning_rate, config.weight_decay, **groups, **own)


def make_channel(configs: tuple[Any, ...], items: np.ndarray, where: str, **given: Any) -> Channel:
    """The chain of some links' sections. A section names items, a link knows their rows. Raises ValueError for an item
    that is not in the data."""

    def made(config, number):
        if hasattr(config, "targets"):
            rows = item_numbers(items, config.targets, f"{where}.{number}.targets").tolist()
            config = dataclasses.replace(config, targets=tuple(rows))
        return call_registered("channel", config, **given)

    return chain(*(made(each, number) for number, each in enumerate(configs))) if configs else link()


def choose_loss(config: Any) -> str:
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


def make_model(config: Any, population: Population, end: int) -> Model:
    """The model of a configuration, whose tables have `end` rows; it scores the items alone, and knows their features.

    Raises ValueError where it does not go with the data.
    """
    items, loss, known = population.num_items, choose_loss(config), (population.user_features, population.item_features)
    chosen = dataclasses.replace(config.model, loss=loss) if loss else config.model
    sizes = {"num_items": end, "num_users": population.users_per_client, "real_items": items}
    model = call_registered(
        "model", chosen, **sizes, vocabulary=tuple(len(side.names) if side else 0 for side in known)
    )
    of_item: tuple = ()
    if model.features:
        of_item = (known[1].rows(np.arange(end)) if known[1] and "item" in model.features else None,)

    def score(*args):  # rows past the items, if any, are nothing to recommend
        return model.score(*args, *of_item)[:items]

    def fold_in(*args):
        return model.fold_in(*args, *of_item)

    return model._replace(score=score, fold_in=model.fold_in and fold_in)


def make_batching(config: Any, model: Model, method: Method) -> Batching:
    """How a configuration's [work] section cuts data into steps; histories are whole and without negatives."""
    asked = {name: getattr(config, name) for name in BESIDE["work"] if name in Batching._fields}
    if method.reads_histories:
        return Batching(**asked | {"negatives": 0, "epochs": 1}, ordered=True)
    return Batching(**asked, pairwise=model.pairwise, features=model.features)


def make_account(channel: Channel, sampler: Sampler, num_clients: int, config: Any) -> PrivacyAccount:
    """What the accountant needs of a run, from its channel, its sampler and its [privacy] section."""
    cap = sampler.slots if sampler.kind == "poisson" else 0
    sampling = Sampling(sampler.kind, num_clients, sampler.size, cap)
    return PrivacyAccount(list_mechanisms(channel), sampling, config.delta, config.accountant, config.relation or None)


def choose_history(config: Any, model: Model, method: Method, label: str) -> Past:
    """What the [evaluation] section has models fold in: a history where asked to, or where nothing private is kept.

    Raises ValueError where a model cannot.
    """

    def parts(key):
        return model.private(key), method.private_part(method.work.init(model.init(key), key)[1])

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


def averages_by_row(channel: Channel) -> bool:
    """Whether rows are averaged over those who hold them: then edges do so too."""
    return any(each.claims.name == "per_row_mean" for each in list_links(channel))


def assign_edges(config: Any, clients: int, sampler: Sampler) -> np.ndarray | None:
    """int64 [clients]: the edge of each, dealt at random by the seed of the data; None: there are none.

    Raises ValueError for what does not go with edges.
    """
    edges = config.server.edges
    if not edges:
        return None
    if config.download:
        raise ValueError("server.edges: there are no codes of the download between edges and clients: leave it out")
    if sampler.history_length:
        raise ValueError("server.edges: edges go on in rounds, clients of this cohort at their own pace: take another")
    if config.run.client_store == "host":
        raise ValueError("run.client_store: the store of clients of edges lies on the device: leave it out")
    if edges > clients:
        raise ValueError(f"server.edges: edge {clients} has no clients: there are {clients:,}, lower it to that")
    return setup_rng(config.data.deal, SetupStream.EDGES, edges).permutation(clients) % edges


def choose_sampler(config: Any, population: Population) -> Sampler:
    """The sampler of a configuration, by its clock if it has one."""
    everyone = {"num_clients": population.num_clients, "num_train": population.num_train, "names": population.names}
    clock = call_registered("clock", config.clock, **everyone)
    sampler = call_registered("cohort", config.cohort, clock=clock, **everyone)
    return with_clock(sampler, clock, population.num_clients) if clock and not sampler.clock else sampler


def known_arguments(config: Any, population: Population, sampler: Sampler) -> dict[str, Any]:
    """What works and links may ask of a run, by the names of their arguments."""
    return {
        "slots": sampler.slots,
        "sampler": sampler,
        "num_clients": -(-population.num_clients // max(config.server.edges, 1)),  # that one server hears
        "rounds": config.rounds,
        "num_train": population.num_train,
    }


def make_method(config: Any, model: Model, **known: Any) -> Method:
    """The method of a configuration, which trains the model. Raises ValueError."""
    check_method_sections(config)
    optimizer = make_client_optimizer(config.work.optimizer)
    taught = known | {"model": model, "client_optimizer": optimizer}
    spelled_out = call_registered("work", config.work, **taught)
    method = call_registered("algorithm", config.algorithm, **taught, spelled_out=spelled_out)
    method = keep_own_copy(method) if config.work.keep_copy else method
    method = method._replace(parametrization=make_parametrization(config, model, method))
    if config.algorithm.name == "custom" or not method.reads_histories:
        return method._replace(server=make_server_optimizer(config, model))
    if config_to_table(config.server) != config_to_table(build_section("server", {}, "server")):
        raise ValueError(f'server: with algorithm.name = "{config.algorithm.name}" the server solves: leave it out')
    return method


def make_parametrization(config: Any, model: Model, method: Method) -> Parametrization | None:
    """What the [parametrization] section names; None: the server holds the model's parameters themselves.

    Raises ValueError where it does not go with the model or the method.
    """
    made = call_registered("parametrization", config.parametrization, model=model)
    if made is None:
        return None
    if method.reads_histories:
        raise ValueError("parametrization: a closed form is solved for the tables themselves: leave it out")
    check_parametrization(made, model)
    return made


def check_method_sections(config: Any) -> None:
    """Raises ValueError where [algorithm] and [work] do not go together."""
    algorithm, work = config.algorithm.name, config.work.name
    if (algorithm == "fedrecon" or work == "reconstruct") and config.work.epochs > 1:
        raise ValueError(
            "work.epochs: reconstruction parts the steps of one pass into two halves: leave it at 1, and set passes"
        )
    if algorithm == "custom":
        return
    if work != NAMED["work"]:
        raise ValueError(
            f'algorithm.name = "{algorithm}" says what clients compute: leave work.name out, or set '
            'algorithm.name = "custom"'
        )
    for key, default in section_arguments("work", work).items() - BESIDE["work"].items():
        if getattr(config.work, key) != default:
            raise ValueError(f'work.{key}: with algorithm.name = "{algorithm}" it is algorithm.{key}')


def make_server_optimizer(config: Any, model: Model) -> optax.GradientTransformation:
    """The server optimiser of a configuration."""
    pace = config.server
    rate = server_schedule(pace.learning_rate, config.rounds, pace.schedule, pace.warmup, pace.final)
    return call_registered("server", pace, learning_rate=rate, closed=model.closed)
