"""The pieces of a run as a program hands them over, joined to `Pieces`."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_type_hints

import jax
import optax

from jaxfed.channels.average import mean, per_row_mean
from jaxfed.config.recipes import Originals, to_plain
from jaxfed.config.schema import check_numbers, coerce_table, coerce_value
from jaxfed.config.sections import call_with, list_client_facts
from jaxfed.config.settings import Evaluation, Privacy, Run, check_size_is_public, with_patience
from jaxfed.config.stages import Edges, Pieces
from jaxfed.core.channel import chain
from jaxfed.core.link import Channel, link, list_links
from jaxfed.core.method import AVERAGE, Method
from jaxfed.core.model import Model
from jaxfed.core.parametrization import Parametrization
from jaxfed.core.recipe import find_recipe
from jaxfed.core.tables import num_rows
from jaxfed.core.types import Sampler
from jaxfed.data.batching import Batching
from jaxfed.data.clients import Clients
from jaxfed.sampling.asynchronous import with_clock
from jaxfed.sampling.choices import MakeClock, MakeSampler, uniform
from jaxfed.sampling.clock import Clock

SETTINGS: dict[str, Any] = {
    "batching": Batching,
    "evaluation": Evaluation,
    "privacy": Privacy,
    "run": Run,
    "edges": Edges,
}


def call_with_clients(make: Callable[..., Any], clients: Clients, **more: Any) -> Any:
    """Makes a cohort or a clock for these clients."""
    return call_with(make, list_client_facts(clients.population) | more)


def make_for_clients(name: str, make: Any, kind: type, clients: Clients, **more: Any) -> Any:
    """The cohort or clock that waits for the clients. Raises ValueError where it is none."""
    made = call_with_clients(make, clients, **more) if callable(make) else make
    if not isinstance(made, kind):
        raise ValueError(
            f"Experiment: {name} is a {type(make).__name__} that gives no {kind.__name__}: call a function of "
            "jaxfed.sampling, such as " + ("uniform(128)" if name == "cohort" else "lognormal_clock()")
        )
    return made


def check_kinds(clients: Any, model: Any, method: Any) -> None:
    """Raises ValueError where the first three arguments of an experiment are not what they should be."""
    for name, value, kind, source in (
        ("clients", clients, Clients, "jaxfed.data.partition(data)"),
        ("model", model, Model, "a function of jaxfed.models, or jaxfed.from_module"),
        ("method", method, Method, "a function of jaxfed.algorithms"),
    ):
        if not isinstance(value, kind):
            raise ValueError(f"Experiment: {name} is a {type(value).__name__}, not a {kind.__name__}: use {source}")


def coerce_setting(kind: Any, value: Any, name: str) -> Any:
    """A value that a program gives, as `kind`. Raises ValueError for what a configuration could not say either."""
    made = coerce_value(kind, to_plain(value), name)
    check_numbers({name: made})
    return made


def coerce_settings(name: str, settings: Any) -> Any:
    """Settings that a program made, checked as those of a configuration are; whole numbers serve as floats.

    name: of the argument of `Experiment`. Raises ValueError.
    """
    kind = SETTINGS[name]
    if not isinstance(settings, kind):
        raise ValueError(f"{name} is a {type(settings).__name__}: make it with jaxfed.{kind.__name__}(...)")
    kinds = get_type_hints(kind)
    if kinds.pop("channel", None) and settings.channel:
        raise ValueError(f"{name}.channel is for configurations: pass the links to Experiment as {name}_channel")
    made = coerce_table(kinds, {key: to_plain(getattr(settings, key)) for key in kinds}, name)
    check_numbers({name: {key: to_plain(value) for key, value in made.items()}})
    return kind(**made)


def check_channels(**channels: Any) -> None:
    """Raises ValueError for a channel that is none; None stands for the default."""
    for name, value in channels.items():
        if value is None or isinstance(value, Channel):
            continue
        mend = "make it with jaxfed.chain and the links of jaxfed.channels"
        if isinstance(value, optax.GradientTransformation):
            mend = "wrap it in jaxfed.at_client or jaxfed.at_server"
        elif isinstance(value, list | tuple):
            mend = "use jaxfed.chain(*links)"
        elif callable(value):
            mend = "call it to make the link"
        raise ValueError(f"Experiment: {name} is a {type(value).__name__}, not a Channel: {mend}")


def check_method_arguments(method: Method, model: Model, num_clients: int) -> None:
    """Raises ValueError where a method was made with optimisers that are none, or for another model or population.

    num_clients: that one server hears.
    """
    recipe = find_recipe(method)
    arguments = recipe.arguments if recipe else {}
    for name in ("client_optimizer", "server_optimizer"):
        if not isinstance(arguments.get(name, AVERAGE), optax.GradientTransformation):
            raise ValueError(
                f"Experiment: {name} of the method is a {type(arguments[name]).__name__}: pass an optimiser of optax, "
                "such as optax.sgd(0.5)"
            )
    if arguments.get("model", model) is not model:
        raise ValueError("Experiment: the method was made for another model: make it with the one of the experiment")
    if arguments.get("num_clients", num_clients) != num_clients:
        raise ValueError(
            f"Experiment: the method was made for {arguments['num_clients']:,} clients, there are {num_clients:,}: "
            f"pass num_clients={num_clients}"
        )


def check_has_tables(model: Model) -> None:
    """Raises ValueError for a model of a program's own that has no tables: nothing of it would be about items."""
    if find_recipe(model) is None and not num_rows((jax.eval_shape(model.init, jax.random.key(0)), model.frozen)):
        raise ValueError(
            "Experiment: the model has no tables: put its item rows in the collection `tables`, a row for each item"
        )


def check_loss(model: Model, clients: Clients) -> None:
    """Raises ValueError where a model's loss is not that of the labels of the data."""
    recipe, labels = find_recipe(model), clients.population.labels
    loss = recipe.arguments.get("loss") if recipe else None
    if labels and loss and loss != (wanted := {"rating": "rating", "click": "bce"}[labels.kind]):
        raise ValueError(f'data.label = "{labels.kind}": make the model with loss="{wanted}"')


def default_channel(method: Method) -> Channel:
    """The mean by row, where a method leaves averaging to the channel; the plain mean, where the server reads messages
    of the method's links one by one; and a link that does nothing, where the method averages or sums by itself."""
    averaged = any(each.claims.is_average or each.aggregator for each in method.links)
    if method.reads_histories or method.is_central or averaged:
        return link()
    return mean() if any(each.decode_message for each in method.links) else per_row_mean()


def join_pieces(
    clients: Clients,
    model: Model,
    method: Method,
    channel: Channel | None,
    cohort: Sampler | MakeSampler | None,
    clock: MakeClock | None,
    **settings: Any,
) -> tuple[Pieces, Originals]:
    """The pieces of a run.

    Args:
        clients, model, method, channel, cohort, clock: see `Experiment`; None: the defaults.
        settings: the other fields of `Pieces`.

    Returns:
        (the pieces, some of them as they were before they were joined).

    Raises:
        ValueError: something is not what it should be.
    """
    check_kinds(clients, model, method)
    settings |= {name: coerce_settings(name, settings[name]) for name in SETTINGS}
    settings["lazy"] = coerce_setting(bool, settings["lazy"], "lazy")
    check_channels(channel=channel, **{name: settings[name] for name in ("download", "evaluation_channel")})
    edges = max(settings["edges"].number, 1)
    check_method_arguments(method, model, -(-clients.num_clients // edges))
    check_has_tables(model)
    check_loss(model, clients)
    given = settings["parametrization"]
    if not isinstance(given, Parametrization | None):
        raise ValueError(
            f"Experiment: parametrization is a {type(given).__name__}: pass a "
            "Parametrization; what makes recommendations, such as a model with rows of codes, is `model`"
        )
    if method.parametrization is not None:
        if settings["parametrization"] is not None:
            raise ValueError("Experiment: the method has a parametrization already: leave one of the two out")
        settings["parametrization"] = method.parametrization
    if settings["evaluation_channel"] is not None:
        settings["evaluation"] = replace(settings["evaluation"], where="clients")
    times = make_for_clients("clock", clock, Clock, clients) if clock is not None else None
    chosen = uniform() if cohort is None else cohort
    sampler = (
        chosen if isinstance(chosen, Sampler) else make_for_clients("cohort", chosen, Sampler, clients, clock=times)
    )
    timed = with_clock(sampler, times, clients.num_clients) if times and not sampler.clock else sampler
    for name in ("download", "evaluation_channel"):  # a link alone is a chain of one, as in a configuration
        if settings.get(name) is not None:
            settings[name] = chain(settings[name])
    chosen_channel = default_channel(method) if channel is None else channel
    noisy = any(each.claims.mechanisms for each in (*list_links(chosen_channel), *method.links))
    settings["evaluation"] = with_patience(settings["evaluation"], noisy)
    if noisy and (recipe := find_recipe(sampler)):
        check_size_is_public(recipe.arguments)
    return Pieces(clients, model, method, chosen_channel, timed, **settings), Originals(sampler, times)
