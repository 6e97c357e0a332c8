"""From one section of a configuration to the piece that it names."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
import optax

from jaxfed.algorithms.group_rates import Layers, Rates, group_rates
from jaxfed.algorithms.own_model import keep_own_copy
from jaxfed.config.distilled_start import with_distilled
from jaxfed.config.hyperparameters import set_hyperparameters
from jaxfed.config.optax_functions import server_schedule
from jaxfed.config.options import BESIDE, FROM_DATA, list_batching_keys, section_arguments
from jaxfed.config.registry import REGISTRY
from jaxfed.config.schema import NAMED, build_section, config_to_table
from jaxfed.config.settings import Config, Section, replace_arguments
from jaxfed.config.stages import Edges, Pieces, make_runtime
from jaxfed.config.start import SavedModel, check_one_model, find_start, with_private, with_start
from jaxfed.core.channel import chain
from jaxfed.core.leaf_paths import list_leaves
from jaxfed.core.link import Channel, link
from jaxfed.core.method import Method
from jaxfed.core.model import Model
from jaxfed.core.parametrization import Parametrization
from jaxfed.core.types import Sampler
from jaxfed.data.batching import Batching
from jaxfed.data.clients import Clients
from jaxfed.data.interactions import item_numbers
from jaxfed.data.item_descriptions import item_texts
from jaxfed.data.population import Population
from jaxfed.models.freezing import freeze_leaves
from jaxfed.sampling.asynchronous import with_clock


def call_registered(section: str, config: Section, **given: Any) -> Any:
    """Calls the registry's function with the section's arguments, and with what it asks of what the program gives."""
    keys = section_arguments(section, config.name).keys() - BESIDE.get(section, {}).keys()
    return call_with(REGISTRY[section][config.name], given | {name: getattr(config, name) for name in keys})


def call_with(function: Callable[..., Any], known: dict[str, Any]) -> Any:
    """Calls a function with those of the known values that are among its arguments."""
    asked = inspect.signature(function).parameters
    return function(**{name: value for name, value in known.items() if name in asked})


def make_client_optimizer(config: Section) -> optax.GradientTransformation:
    """A client's optimiser from [work.optimizer]. Raises ValueError."""
    rest = section_arguments("optimizer", config.name).keys() - BESIDE["optimizer"].keys()
    groups: dict[str, Any] = {name: Rates(**vars(getattr(config, name))) for name in ("item", "user")}
    own: dict[str, Any] = {name: getattr(config, name) for name in rest}
    own |= {"layers": Layers(config.layers, config.layer_decay)} if config.layers else {}
    return group_rates(REGISTRY["optimizer"][config.name], config.learning_rate, config.weight_decay, **groups, **own)


def make_channel(configs: tuple[Section, ...], items: np.ndarray, where: str, **given: Any) -> Channel:
    """The chain of some links' sections. A section names items, a link knows their rows. Raises ValueError for an item
    that is not in the data."""

    def made(config, number):
        if hasattr(config, "targets"):
            rows = item_numbers(items, config.targets, f"{where}.{number}.targets").tolist()
            config = replace_arguments(config, targets=tuple(rows))
        return call_registered("channel", config, **given)

    return chain(*(made(each, number) for number, each in enumerate(configs))) if configs else link()


def choose_loss(config: Config) -> str:
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


def make_model(config: Config, data: Clients, table_rows: int) -> Model:
    """The model of a configuration, whose tables have `table_rows` rows. Raises ValueError where it does not go with
    the data."""
    loss = choose_loss(config)
    chosen = replace_arguments(config.model, loss=loss) if loss else config.model
    sizes: dict[str, Any] = {"num_items": table_rows, "num_users": data.users_per_client, "real_items": data.num_items}
    if getattr(chosen, "density", None) == FROM_DATA["density"]:
        chosen = replace_arguments(chosen, density=data.density)
    sizes |= given_texts("model", chosen.name, data)
    return call_registered("model", chosen, **sizes, vocabulary=data.vocabulary)


def list_client_facts(population: Population) -> dict[str, Any]:
    """What cohorts and clocks may ask of the clients, by the names of their arguments."""
    return {
        "num_clients": population.num_clients,
        "num_train": population.num_train,
        "names": population.names,
        "mean_holders": population.mean_holders,
    }


def choose_sampler(config: Config, population: Population) -> Sampler:
    """The sampler of a configuration, by its clock if it has one."""
    everyone = list_client_facts(population)
    clock = call_registered("clock", config.clock, **everyone)
    sampler = call_registered("cohort", config.cohort, clock=clock, **everyone)
    return with_clock(sampler, clock, population.num_clients) if clock and not sampler.clock else sampler


def known_arguments(config: Config, population: Population, sampler: Sampler) -> dict[str, Any]:
    """What works and links may ask of a run, by the names of their arguments."""
    return {
        "slots": sampler.slots,
        "sampler": sampler,
        "num_clients": -(-population.num_clients // max(config.server.edges, 1)),  # that one server hears
        "rounds": config.rounds,
        "num_train": population.num_train,
    }


def make_method(config: Config, model: Model, **known: Any) -> Method:
    """The method of a configuration, which trains the model. Raises ValueError."""
    check_method_sections(config)
    optimizer = make_client_optimizer(config.work.optimizer)
    layers = Layers(config.work.optimizer.layers, config.work.optimizer.layer_decay)
    layers.factors(list_leaves(jax.eval_shape(model.init, jax.random.key(0))))
    available = known | {"model": model, "client_optimizer": optimizer}
    spelled_out = call_registered("work", config.work, **available)
    method = call_registered("algorithm", config.algorithm, **available, spelled_out=spelled_out)
    if config.algorithm.name == "custom" and method.reads_histories != (config.server.name == "solve"):
        raise ValueError('a closed form takes work.name = "statistics" and server.name = "solve" together')
    method = keep_own_copy(method) if config.work.keep_copy else method
    if config.algorithm.name == "custom" and method.reads_histories:
        return method._replace(closed=make_server_optimizer(config, model))
    if not method.reads_histories:
        return method._replace(server=make_server_optimizer(config, model))
    if config_to_table(config.server) != config_to_table(build_section("server", {}, "server")):
        raise ValueError(f'server: with algorithm.name = "{config.algorithm.name}" the server solves: leave it out')
    return method


def check_method_sections(config: Config) -> None:
    """Raises ValueError where [algorithm] and [work] do not go together."""
    algorithm, work = config.algorithm.name, config.work.name
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


def make_server_optimizer(config: Config, model: Model) -> optax.GradientTransformation:
    """The server optimiser of a configuration."""
    pace = config.server
    rate = server_schedule(pace.learning_rate, config.rounds, pace.schedule, pace.warmup, pace.final)
    return call_registered("server", pace, learning_rate=rate, closed=model.closed)


def make_parametrized(config: Config, model: Model, data: Clients) -> tuple[Model, Parametrization | None]:
    """(the model, what the server holds in place of its parameters) of a configuration's [parametrization]; None where
    there is none, or where clients hold it, who then have another model. Raises ValueError."""
    chosen = config.parametrization
    made = call_registered("parametrization", chosen, model=model, **given_texts("parametrization", chosen.name, data))
    return (made, None) if isinstance(made, Model) else (model, made)


def given_texts(section: str, name: str, data: Clients) -> dict[str, np.ndarray]:
    """{"texts": str [N]} of the items, where a function of the registry asks for them."""
    asked = inspect.signature(REGISTRY[section][name]).parameters
    return {"texts": item_texts(data.source)} if "texts" in asked else {}


def make_started(config: Config, data: Clients, saved: SavedModel | None) -> tuple[Model, Parametrization | None]:
    """The model of a configuration, its frozen part apart, and its parametrization; both begin with the parameters that
    another run left, where there is one. Raises ValueError."""
    whole, key = make_model(config, data, make_runtime(config.run, data.num_items).table_rows), jax.random.key(0)
    if saved is None or config.start.distil_steps:
        model, parametrization = make_parametrized(config, freeze_leaves(whole, config.work.freeze), data)
        return with_distilled(config.start, saved, data, model, parametrization) if saved else (model, parametrization)
    find, parametrized = partial(find_start, config.start, saved, data), config.parametrization.name != "identity"
    plain = find(jax.eval_shape(whole.init, key)) if config.work.freeze or not parametrized else None
    model = freeze_leaves(whole, config.work.freeze, plain(jax.jit(whole.init)(key)) if plain else None)
    model, parametrization = make_parametrized(config, model, data)
    if parametrization is None:
        fill = find(jax.eval_shape(model.init, key)) if parametrized or plain is None else plain
        return with_start(model, fill), None
    return model, with_start(parametrization, find(jax.eval_shape(parametrization.init, key), of_theta=True))


def make_pieces(config: Config, data: Clients, saved: SavedModel | None = None) -> Pieces:
    """The pieces that a configuration names. Raises ValueError with one line for what cannot be.

    saved: of the run that this one starts from; None: it starts by itself.
    """
    population, run, server = data.population, config.run, config.server
    model, parametrization = make_started(config, data, saved)
    if parametrization and parametrization.pruning and parametrization.pruning.end > config.rounds:
        raise ValueError(
            f"parametrization.end is {parametrization.pruning.end} and rounds is {config.rounds}: pruning would not be "
            "finished, lower the one or raise the other"
        )
    sampler = choose_sampler(config, population)
    known = known_arguments(config, population, sampler)

    def chain_links(configs, where):
        return make_channel(configs, data.source.items, where, **known)

    at_clients = config.evaluation.where == "clients"
    channel, method = chain_links(config.channel, "channel"), make_method(config, model, **known)
    if saved:
        check_one_model(method, model)
    if saved and config.start.private:
        method = with_private(method, model, saved, population.names)

    def remake_method(hyperparameters):
        return make_method(set_hyperparameters(config, hyperparameters), model, **known)

    return Pieces(
        clients=data,
        model=model,
        method=method,
        remake_method=None if saved and config.start.private else remake_method,
        channel=channel,
        sampler=sampler,
        batching=Batching(**{name: getattr(config.work, name) for name in list_batching_keys()}),
        parametrization=parametrization,
        download=chain_links(config.download, "download") if config.download else None,
        evaluation=config.evaluation,
        evaluation_channel=chain_links(config.evaluation.channel, "evaluation.channel") if at_clients else None,
        privacy=config.privacy,
        run=run,
        edges=Edges(server.edges, server.edge_rounds, config.data.deal),
        lazy=server.lazy,
    )


def reads_rounds(config: Config) -> str:
    """What of a configuration is made for its number of rounds, so that more of them are not the same and more; "":
    nothing is."""
    if config.server.schedule != "constant":
        return f'server.schedule = "{config.server.schedule}"'
    named = [(key, key, getattr(config, key)) for key in NAMED]
    lists = (("channel", config.channel), ("download", config.download), ("channel", config.evaluation.channel))
    named += [("channel", key, link) for key, some in lists for link in some]
    for section, key, part in named:
        if "rounds" in inspect.signature(REGISTRY[section][part.name]).parameters:
            return f'the {key} "{part.name}"'
    return ""
