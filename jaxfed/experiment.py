"""From a configuration to the pieces of a run."""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax

from jaxfed.channel import Channel, Wire, chain, link, wire
from jaxfed.cohort import Sampler
from jaxfed.data.batches import Batching
from jaxfed.data.blocks import Lengths, lengths
from jaxfed.data.clients import Population, Share, prepare
from jaxfed.data.interactions import Dataset, digest
from jaxfed.evaluate import Exam, exam, examiner
from jaxfed.federate import Algorithm, federate
from jaxfed.models.model import Model
from jaxfed.placement import Placement, place
from jaxfed.processes import Processes, here
from jaxfed.registry import BESIDE, REGISTRY, arguments, grouped
from jaxfed.types import Shared


class Data(NamedTuple):
    """A configuration's data."""

    source: Dataset
    population: Population
    digest: str  # of the rows in their order, as they came
    leaky: bool  # results must be marked


class Experiment(NamedTuple):
    """All that a run needs, none of it with state."""

    data: Data
    model: Model
    batching: Batching
    shapes: Lengths
    sampler: Sampler
    channel: Channel
    algorithm: Algorithm
    placement: Placement
    examine: Any  # see `evaluate.examiner`
    exams: dict[str, Exam]
    wire: tuple[Wire, Wire]  # for a client with one row, and with two
    processes: Processes = Processes()


def call(section: str, config: Any, **given: Any) -> Any:
    """The registry's function with the section's arguments and what the program gives."""
    function = REGISTRY[section][config.name]
    mine = arguments(section, config.name).keys() - BESIDE.get(section, {}).keys()
    return function(**{name: getattr(config, name) for name in mine}, **given)


def load(config: Any) -> Data:
    """Reads the data of a configuration's [data] section. Raises ValueError with one line where they are not fit."""
    beside = {name: getattr(config, name) for name in BESIDE["data"]}
    named = isinstance(REGISTRY["data"][config.name], partial)  # files keep only the columns asked for
    source = call("data", config, **({"keep": config.clients} if named else {}))
    content = digest(source)
    source, population = prepare(source, **beside, seed=0)
    return Data(source, population, content, config.protocol == "compat-pfedrec")


def optimizer_of(config: Any) -> Any:
    """A client's optimiser from [work.optimizer]."""
    rest = arguments("optimizer", config.name).keys() - BESIDE["optimizer"].keys()
    groups = {name: dataclasses.asdict(getattr(config, name)) for name in ("item", "user")}
    own = {name: getattr(config, name) for name in rest}
    return grouped(REGISTRY["optimizer"][config.name], config.learning_rate, config.weight_decay, **groups, **own)


def links(configs: tuple[Any, ...]) -> Channel:
    """The chain of some links' sections."""
    return chain(*(call("channel", each) for each in configs)) if configs else link()


def assemble(config: Any, data: Data) -> Experiment:
    """Builds everything from a configuration and its data. Raises ValueError with one line for what cannot be."""
    population = data.population
    processes, placement = here(), place(config.run.placement, config.run.devices)
    share = Share(processes.rank, processes.size)
    model = call("model", config.model, num_items=population.num_items, num_users=population.users_per_client)
    batching = Batching(**{name: getattr(config.work, name) for name in BESIDE["work"]}, pairwise=model.pairwise)
    sampler = call("cohort", config.cohort, num_clients=population.num_clients)
    run, lazy = config.run, config.server.lazy
    shapes = lengths(population, batching, sampler.slots, placement.devices, run.area, lazy, share)
    channel = links(config.channel)
    work = call(
        "work", config.work, loss=model.loss, optimizer=optimizer_of(config.work.optimizer), private=model.private
    )
    server = call("server", config.server, learning_rate=config.server.learning_rate)
    algorithm = federate(
        work, channel, server, population.num_clients, placement, shapes.lay, 1e9 * config.run.client_memory_gb
    )
    asked = config.evaluation.seed, config.evaluation.clients
    exams = {part: exam(population, part, *asked, placement.devices, share) for part in ("val", "test")}
    shared = jax.eval_shape(lambda key: Shared(model.init(key)), jax.random.key(0))
    through = links(config.evaluation.channel) if config.evaluation.where == "clients" else link()
    examine = examiner(model, through, placement)
    prices = wire(channel, shared, 1), wire(channel, shared, 2)
    return Experiment(
        data, model, batching, shapes, sampler, channel, algorithm, placement, examine, exams, prices, processes
    )
