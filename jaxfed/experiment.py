"""From a configuration to the pieces of a run."""

import dataclasses
import inspect
import os
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfed.algorithms import compared
from jaxfed.arrivals import timed
from jaxfed.channel import Channel, chain, link, total
from jaxfed.cohort import Sampler
from jaxfed.data import store
from jaxfed.data.batches import Batching
from jaxfed.data.blocks import Lengths, lengths, plan
from jaxfed.data.clients import Population, Share, prepare
from jaxfed.data.interactions import Dataset, digest, numbers_of
from jaxfed.download import check_download, download
from jaxfed.evaluate import Exam, Past, exam, examiner
from jaxfed.federate import Algorithm, federate
from jaxfed.models.model import Model
from jaxfed.placement import Placement, place, table_rows
from jaxfed.privacy import Account, Sampling, ledger
from jaxfed.processes import Processes, here
from jaxfed.registry import BESIDE, REGISTRY, arguments, grouped, scheduled
from jaxfed.rows import take
from jaxfed.tree import nbytes, wide
from jaxfed.types import Tree
from jaxfed.wire import Wire, wire
from jaxfed.work import Work
from jaxfed.works.personal import keep

LARGE = 1_000_000  # rows from which prepared data are kept on disk


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
    work: Work
    channel: Channel
    algorithm: Algorithm
    placement: Placement
    examine: Any  # see `evaluate.examiner`
    exams: dict[str, Exam]
    wire: Wire
    account: Account
    epsilon: Callable[[int], float]  # rounds -> what was spent; see `privacy.ledger`
    processes: Processes = Processes()


def call(section: str, config: Any, **given: Any) -> Any:
    """The registry's function with the section's arguments and, of what the program gives, what it asks for."""
    function = REGISTRY[section][config.name]
    asked = inspect.signature(function).parameters
    given = {name: value for name, value in given.items() if name in asked}
    mine = arguments(section, config.name).keys() - BESIDE.get(section, {}).keys()
    return function(**{name: getattr(config, name) for name in mine}, **given)


def load(config: Any) -> Data:
    """Reads the data of a configuration's [data] section. Raises ValueError with one line where they are not fit.

    Large data are prepared once, kept on disk and mapped from there.
    """
    folder = store.place(dataclasses.asdict(config))
    if (found := store.kept(folder)) is not None:
        return found
    data = read(config)
    if len(data.source.interactions.user) >= LARGE:
        store.keep(folder, data)
        return store.kept(folder) or data
    return data


def read(config: Any) -> Data:
    """The same from its source."""
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


def links(configs: tuple[Any, ...], items: np.ndarray, where: str, **given: Any) -> Channel:
    """The chain of some links' sections. A section names items, a link knows their rows. Raises ValueError for an item
    that is not in the data."""

    def made(config, number):
        if hasattr(config, "targets"):
            rows = numbers_of(items, config.targets, f"{where}.{number}.targets").tolist()
            config = dataclasses.replace(config, targets=tuple(rows))
        return call("channel", config, **given)

    return chain(*(made(each, number) for number, each in enumerate(configs))) if configs else link()


def device_memory() -> int:
    """Bytes of one device, of the whole machine where the device does not say."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit") or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def room_of(population: Population, batching: Batching, shapes: Lengths, sampler: Sampler) -> int:
    """Blocks that hardly any cohort exceeds: the most in some rounds, and twice as many more as those rounds differ."""
    counts = []
    for round in range(8):
        ids, _ = sampler.draw(0, round)
        clients = ids[ids < population.num_clients]
        owner = shapes.share.owner(clients, population.num_clients)
        counts.append(len(plan(shapes, batching, population.activity[clients], owner).shapes))
    return 3 * max(counts) - 2 * min(counts)


def check_memory(population, batching: Batching, shapes: Lengths, sends, shared: Tree, chunk: int, sums: bool):
    """Raises ValueError when the messages of a cohort of the largest clients do not fit into a device beside each other
    and the working copies of one block; three times where a reduction of a link's own collects and compares them."""
    clients, rows = shapes.lay
    one, two = (
        nbytes(jax.eval_shape(lambda x, k=k: sends(wide(take(x, jnp.zeros(k, jnp.int32)))), shared)) for k in (1, 2)
    )
    block = clients * one + (rows - clients) * (two - one)
    largest = np.sort(population.activity)[-shapes.slots :]
    owner = np.arange(len(largest)) % shapes.share.size
    blocks, room = len(plan(shapes, batching, largest, owner).shapes), device_memory()
    if not sums and (3 * blocks + 3) * block > room:
        raise ValueError(
            f"a link has a reduction of its own, for which {blocks} blocks of messages may take "
            f"{3 * blocks * block / 1e9:.1f} GB, a device has {room / 1e9:.1f} GB: set cohort.size lower"
        )
    if (min(chunk or blocks, blocks) + 3) * block > room:
        fit = max(1, room // block - 3)
        raise ValueError(
            f"the {blocks} blocks of a cohort may hold {blocks * block / 1e9:.1f} GB of messages, a device has "
            f"{room / 1e9:.1f} GB: set run.chunk to {fit} (blocks held at a time), or run.area lower"
        )


def account_of(channel: Channel, sampler: Sampler, num_clients: int, config: Any) -> Account:
    """What the accountant needs of a run, from its channel, its sampler and its [privacy] section."""
    cap = sampler.slots if sampler.kind == "poisson" else 0
    sampling = Sampling(sampler.kind, num_clients, sampler.size, cap)
    return Account(channel.private, sampling, config.delta, config.accountant, config.relation or None)


def check_closed(work: Work, server: str, channel: Channel, population: Population) -> None:
    """Raises ValueError for a closed form whose halves do not meet, or whose sums are none."""
    if work.histories != (server == "solve"):
        raise ValueError('a closed form takes work.name = "statistics" and server.name = "solve" together')
    if work.histories and channel.weighs:
        raise ValueError("work.statistics: the server solves from sums, a link makes a mean of them: set channel = []")
    if work.histories and population.users_per_client > 1:
        raise ValueError('work.statistics: a client is one user\'s history: set data.clients = "user"')


def batching_of(config: Any, model: Model, work: Work) -> Batching:
    """How a configuration's [work] section cuts data into steps; histories are whole and without negatives."""
    asked = {name: getattr(config, name) for name in BESIDE["work"] if name in Batching._fields}
    if work.histories:
        return Batching(**asked | {"negatives": 0, "epochs": 1}, ordered=True)
    return Batching(**asked, pairwise=model.pairwise)


def history_of(config: Any, model: Model, work: Work) -> Past:
    """What the [evaluation] section has models fold in: a history where asked to, or where nothing private is kept.

    Raises ValueError where a model cannot.
    """

    def parts(key):
        return model.private(key), work.private(work.init(model.init(key), key)[1])

    needed, kept = (jax.tree.leaves(part) for part in jax.eval_shape(parts, jax.random.key(0)))
    fold = config.fold_in or model.closed is not None or bool(needed and not kept)
    if fold and model.fold_in is None:
        raise ValueError(
            "evaluation.fold_in: the model has no way from a history to a private part: take a work that keeps it"
        )
    return config.history if fold else ""


def assemble(config: Any, data: Data) -> Experiment:
    """Builds everything from a configuration and its data. Raises ValueError with one line for what cannot be."""
    population = data.population
    processes = here()
    placement = place(config.run.placement, config.run.devices, config.run.shard_tables)
    if processes.size > 1 and config.run.client_store == "host":
        raise ValueError("run.client_store: a store on the host is for one process: leave it out for several")
    share = Share(processes.rank, processes.size)
    items = population.num_items
    end = table_rows(items, placement.devices, config.run.shard_tables)
    model = call("model", config.model, num_items=end, num_users=population.users_per_client, real_items=items)
    every = model.score  # rows past the items, if any, are nothing to recommend
    model = model._replace(score=lambda *args: every(*args)[:items])
    everyone = {"num_clients": population.num_clients, "activity": population.activity, "names": population.names}
    clock = call("clock", config.clock, **everyone)
    sampler = call("cohort", config.cohort, clock=clock, **everyone)
    sampler = timed(sampler, clock, population.num_clients) if clock and not sampler.clock else sampler
    known = {"slots": sampler.slots, "sampler": sampler, "population": population.num_clients, "rounds": config.rounds}
    known |= {"cohort_share": min(1.0, sampler.size / population.num_clients), "activity": population.activity}
    channel = links(config.channel, data.source.items, "channel", **known)
    taught = {
        "initial": model.init,
        "loss": model.loss,
        "optimizer": optimizer_of(config.work.optimizer),
        "private": model.private,
    }
    work = call("work", config.work, **taught, **known, closed=model.closed, num_items=end)
    check_closed(work, config.server.name, channel, population)
    work = keep(work) if config.work.keep_copy else work
    batching = batching_of(config.work, model, work)
    run, lazy = config.run, config.server.lazy and not (channel.whole or work.whole)
    shapes = lengths(population, batching, sampler.slots, placement.devices, run.area, lazy, share, end)
    shared = jax.eval_shape(lambda key: work.init(model.init(key), key)[0], jax.random.key(0))
    if work.compares and (run.client_store == "host" or processes.size > 1):
        raise ValueError("run.client_store: the server of this work reads all clients' memory on one device")
    down = links(config.download, data.source.items, "download", **known) if config.download else None
    price = wire(channel, shared, down, work.sends, work.alone)
    if down:
        check_download(down, shared)
    if sampler.versions and (down or run.shard_tables):
        raise ValueError(
            "clients of different rounds are sent the model as it is, and each device keeps its past ones whole: leave "
            "[[download]] and run.shard_tables out"
        )
    pace = config.server
    rate = scheduled(pace.learning_rate, config.rounds, pace.schedule, pace.warmup, pace.final)
    server = call("server", config.server, learning_rate=rate, closed=model.closed)
    sums = channel.reduce in (None, total)
    algorithm = federate(
        work,
        channel,
        server,
        population.num_clients,
        placement,
        shapes.lay,
        1e9 * config.run.client_memory_gb,
        config.run.chunk,
        config.run.client_store == "host",
        download(down, price.sees != "update+rows") if down else None,
        0 if sums else room_of(population, batching, shapes, sampler),
        sampler.versions,
    )
    algorithm = compared(algorithm, work, channel, placement.common)
    asked = config.evaluation.seed, config.evaluation.clients
    past = history_of(config.evaluation, model, work)
    exams = {part: exam(population, part, *asked, placement.devices, share, history=past) for part in ("val", "test")}
    asked_through = config.evaluation.channel if config.evaluation.where == "clients" else ()
    through = links(asked_through, data.source.items, "evaluation.channel", **known)
    promoted = numbers_of(data.source.items, config.evaluation.targets, "evaluation.targets").tolist()
    examine = examiner(model, through, placement, promoted, work.views)
    check_memory(population, batching, shapes, work.sends, shared, config.run.chunk, sums)
    account = account_of(channel, sampler, population.num_clients, config.privacy)
    epsilon = ledger(account.mechanisms, account.sampling, account.delta, account.relation)
    made = (data, model, batching, shapes, sampler, work, channel, algorithm, placement, examine, exams, price)
    return Experiment(*made, account, epsilon, processes)
