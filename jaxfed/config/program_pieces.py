"""The pieces of a run as a program hands them over, joined to `Pieces`."""

from collections.abc import Callable
from typing import Any

from jaxfed.channels.average import mean, per_row_mean
from jaxfed.config.recipes import Originals
from jaxfed.config.sections import call_with
from jaxfed.config.stages import Pieces
from jaxfed.core.channel import chain
from jaxfed.core.link import Channel, link
from jaxfed.core.method import Method
from jaxfed.core.model import Model
from jaxfed.core.types import Sampler
from jaxfed.data.clients import Clients
from jaxfed.sampling.asynchronous import with_clock
from jaxfed.sampling.choices import MakeClock, MakeSampler, uniform


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
    times = call_with_clients(clock, clients) if clock else None
    chosen = cohort or uniform()
    sampler = chosen if isinstance(chosen, Sampler) else call_with_clients(chosen, clients, clock=times)
    timed = with_clock(sampler, times, clients.num_clients) if times and not sampler.clock else sampler
    for name in ("download", "evaluation_channel"):  # a link alone is a chain of one, as in a configuration
        if settings.get(name) is not None:
            settings[name] = chain(settings[name])
    pieces = Pieces(clients, model, method, default_channel(method) if channel is None else channel, timed, **settings)
    return pieces, Originals(sampler, times)
