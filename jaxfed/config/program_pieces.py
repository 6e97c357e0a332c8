"""The pieces of a run as a program hands them over, joined to `Pieces`."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_type_hints

from jaxfed.channels.average import mean, per_row_mean
from jaxfed.config.recipes import Originals, to_plain
from jaxfed.config.schema import check_numbers, coerce_table, coerce_value
from jaxfed.config.sections import call_with
from jaxfed.config.settings import Evaluation, Privacy, Run
from jaxfed.config.stages import Edges, Pieces
from jaxfed.core.channel import chain
from jaxfed.core.link import Channel, link
from jaxfed.core.method import Method
from jaxfed.core.model import Model
from jaxfed.core.types import Sampler
from jaxfed.data.batching import Batching
from jaxfed.data.clients import Clients
from jaxfed.sampling.asynchronous import with_clock
from jaxfed.sampling.choices import MakeClock, MakeSampler, uniform

SETTINGS: dict[str, Any] = {
    "batching": Batching,
    "evaluation": Evaluation,
    "privacy": Privacy,
    "run": Run,
    "edges": Edges,
}


def call_with_clients(make: Callable[..., Any], clients: Clients, **more: Any) -> Any:
    """What a cohort or a clock that waits for the clients is with these."""
    population = clients.population
    known = {"num_clients": clients.num_clients, "num_train": population.num_train, "names": population.names}
    return call_with(make, known | more)


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


def default_channel(method: Method) -> Channel:
    """The mean by row, where a method leaves averaging to the channel; the plain mean, where the server reads messages
    of the method's links one by one; and a link that does nothing, where the method averages or sums by itself."""
    if method.reads_histories or any(each.claims.is_average or each.aggregator for each in method.links):
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
    if settings["evaluation_channel"] is not None:
        settings["evaluation"] = replace(settings["evaluation"], where="clients")
    times = call_with_clients(clock, clients) if clock else None
    chosen = cohort or uniform()
    sampler = chosen if isinstance(chosen, Sampler) else call_with_clients(chosen, clients, clock=times)
    timed = with_clock(sampler, times, clients.num_clients) if times and not sampler.clock else sampler
    for name in ("download", "evaluation_channel"):  # a link alone is a chain of one, as in a configuration
        if settings.get(name) is not None:
            settings[name] = chain(settings[name])
    pieces = Pieces(clients, model, method, default_channel(method) if channel is None else channel, timed, **settings)
    return pieces, Originals(sampler, times)
