"""From a configuration to the pieces of a run."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax

from jaxfed.algorithms import compared
from jaxfed.channel import Channel, total
from jaxfed.cohort import Sampler
from jaxfed.data import store
from jaxfed.data.batches import Batching
from jaxfed.data.blocks import Lengths, lengths
from jaxfed.data.clients import Labels, Population, Share, noted, prepare
from jaxfed.data.features import Features
from jaxfed.data.interactions import Dataset, Interactions, digest, numbers_of
from jaxfed.data.ragged import Domains, Ragged
from jaxfed.download import check_download, download
from jaxfed.evaluate import Exam, at_homes, exam, examiner
from jaxfed.federate import Algorithm, federate
from jaxfed.hierarchy import copies, edged, hierarchical
from jaxfed.limits import check_closed, check_cold, check_examples, check_memory, check_merge, check_places, room_of
from jaxfed.merge import merged
from jaxfed.models.model import Model
from jaxfed.placement import Placement, place, table_rows
from jaxfed.privacy import Account, ledger
from jaxfed.processes import Processes, here
from jaxfed.registry import BESIDE, REGISTRY
from jaxfed.sections import (
    account_of,
    batching_of,
    by_row,
    call,
    edges_of,
    history_of,
    known_of,
    links,
    model_of,
    sampler_of,
    server_of,
    work_of,
)
from jaxfed.wire import Wire, wire
from jaxfed.work import Work

LARGE = 1_000_000  # rows from which prepared data are kept on disk


class Data(NamedTuple):
    """A configuration's data."""

    source: Dataset
    population: Population
    digest: str  # of the rows in their order, as they came, and of features that do not follow from them
    leaky: bool  # results must be marked


KEPT = (Data, Dataset, Interactions, Features, Population, Ragged, Labels, Domains)


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
    examine_cold: Any = None  # for clients of which nothing is kept; see `check_cold`


def load(config: Any) -> Data:
    """Reads the data of a configuration's [data] section. Raises ValueError with one line where they are not fit.

    Large data are prepared once, kept on disk and mapped from there.
    """
    folder = store.place(dataclasses.asdict(config))
    found, wrong = store.kept(folder, KEPT)
    if found is not None:
        return found
    data = read(config)
    if len(data.source.interactions.user) >= LARGE:
        try:
            store.keep(folder, data, KEPT)
            data = store.kept(folder, KEPT)[0] or data
        except OSError as error:
            wrong = f"prepared data cannot be kept in {folder} ({error.strerror}): they are read anew each time"
    return data._replace(source=noted(data.source, wrong)) if wrong else data


def read(config: Any) -> Data:
    """The same from its source."""
    beside = {name: getattr(config, name) for name in BESIDE["data"]}
    source = source_of(config)
    content = digest(source, features=not source.features_follow)
    source, population = prepare(source, **beside)
    return Data(source, population, content, config.protocol == "compat-pfedrec")


def source_of(config: Any) -> Dataset:
    """What a [data] section's source has, before anything is left out of it."""
    named = isinstance(REGISTRY["data"][config.name], partial)  # files keep only the columns asked for
    return call("data", config, **({"keep": config.clients} if named else {}))


def examined(config: Any, data: Data, model: Model, work: Work, placement: Placement, share: Share) -> dict[str, Exam]:
    """What clients are asked: `val` and `test`, and `test/cold` of clients that never take part, if there are any.

    Raises ValueError where private parts would be folded in, and cannot be.
    """
    population, look = data.population, config.evaluation
    past = history_of(look, model, work, config.data.label)
    if past and population.domains:
        raise ValueError(
            "data.merge: a private part is folded in from one catalogue, not from domains: keep it instead"
        )

    def one(who, part, history):
        asked = look.seed, look.clients, placement.devices, share
        return exam(who, part, *asked, history=history, features=model.features)

    exams = {part: at_homes(one(population.asked, part, past), population) for part in ("val", "test")}
    return exams | ({"test/cold": one(population.cold, "test", look.history)} if population.cold else {})


def assemble(config: Any, data: Data, watch: Callable[[Channel], Channel] = lambda channel: channel) -> Experiment:
    """Builds everything from a configuration and its data; `watch` may replace the channel by one that records.

    Raises ValueError with one line for what cannot be.
    """
    population, run, processes = data.population, config.run, here()
    placement = place(run.placement, run.devices, run.shard_tables)
    share = Share(processes.rank, processes.size)
    end = table_rows(population.num_items, placement.devices, run.shard_tables)
    model, sampler = model_of(config, population, end), sampler_of(config, population)
    known = known_of(config, population, sampler)

    def chained(configs, where):
        return links(configs, data.source.items, where, **known)

    channel = watch(chained(config.channel, "channel"))
    work = work_of(config, model, **known, num_items=end)
    check_closed(work, config.server.name, channel, population)
    check_places(run, processes, work, sampler)
    batching, lazy = batching_of(config.work, model, work), config.server.lazy and not (channel.whole or work.whole)
    check_examples(population, batching, sampler.slots)
    shapes = lengths(population, batching, sampler.slots, placement.devices, run.area, lazy, share, end)
    shared = jax.eval_shape(lambda key: work.init(model.init(key), key)[0], jax.random.key(0))
    down = chained(config.download, "download") if config.download else None
    price = wire(channel, shared, down, work.sends, work.alone)
    if down:
        check_download(down, shared)
    sums, edge = channel.reduce in (None, total), edges_of(config, population.num_clients, sampler)
    meeting = {"edge": edge, "every": config.server.edge_rounds, "per_row": by_row(channel)}
    build: Callable[..., Algorithm] = federate if edge is None else partial(hierarchical, **meeting)
    algorithm = build(
        work,
        channel,
        server_of(config, model),
        population.num_clients,
        placement=placement,
        lay=shapes.lay,
        budget=1e9 * run.client_memory_gb,
        chunk=run.chunk,
        host=run.client_store == "host",
        download=download(down, price.sees != "update+rows") if down else None,
        room=0 if sums else room_of(population, batching, shapes, sampler),
        versions=sampler.versions,
    )
    if population.owner is not None:
        check_merge(model, work, run.client_store)
        algorithm = merged(algorithm, population.owner, population.activity)
    algorithm = compared(algorithm, work, channel, placement.common)
    beside = max(config.server.edges, 1)  # so many models lie in a message once it is summed
    sends, work = work.sends, work if edge is None else edged(work, edge)
    check_memory(population, batching, shapes, lambda x: copies(sends(x), beside), shared, run.chunk, sums)
    exams = examined(config, data, model, work, placement, share)
    through = chained(config.evaluation.channel if config.evaluation.where == "clients" else (), "evaluation.channel")
    promoted = numbers_of(data.source.items, config.evaluation.targets, "evaluation.targets").tolist()
    examine, examine_cold = examiner(model, through, placement, promoted, work.views), None
    if population.cold:
        check_cold(model, work)
        examine_cold = examiner(model, through, placement, promoted)
    account = account_of(channel, sampler, population.num_clients, config.privacy)
    epsilon = ledger(account.mechanisms, account.sampling, account.delta, account.relation)
    made = (data, model, batching, shapes, sampler, work, channel, algorithm, placement, examine, exams, price)
    return Experiment(*made, account, epsilon, processes, examine_cold)
