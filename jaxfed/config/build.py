"""From a configuration to the pieces of a run."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax

from jaxfed.algorithms.hierarchical import hierarchical, stack_copies, with_edge_models
from jaxfed.algorithms.multi_device import with_merged_devices
from jaxfed.config.limits import (
    check_client_store,
    check_closed_form,
    check_cold_start,
    check_examples,
    check_memory,
    check_merge,
    estimate_capacity,
)
from jaxfed.config.registry import BESIDE, REGISTRY
from jaxfed.config.sections import (
    assign_edges,
    averages_by_row,
    call_registered,
    choose_history,
    choose_sampler,
    known_arguments,
    make_account,
    make_batching,
    make_channel,
    make_method,
    make_model,
)
from jaxfed.core.aggregate import SUM
from jaxfed.core.channel import chain
from jaxfed.core.download import check_download, make_download
from jaxfed.core.federate import Algorithm, federate
from jaxfed.core.link import Channel
from jaxfed.core.method import Method
from jaxfed.core.model import Model
from jaxfed.core.placement import Placement, make_placement, padded_table_rows
from jaxfed.core.processes import Processes, this_process
from jaxfed.core.types import Sampler
from jaxfed.core.wire import Wire, make_wire
from jaxfed.data import cache
from jaxfed.data.batching import Batching
from jaxfed.data.blocks import BlockShapes, make_block_shapes
from jaxfed.data.features import Features
from jaxfed.data.interactions import Dataset, Interactions, data_digest, item_numbers
from jaxfed.data.population import Labels, Population, ProcessShare
from jaxfed.data.preparation import add_notes, prepare_population
from jaxfed.data.ragged import Domains, NegativeIndex, Ragged
from jaxfed.evaluation.evaluator import make_evaluator
from jaxfed.evaluation.split import EvalSplit, make_eval_split, map_to_homes
from jaxfed.privacy.accountant import PrivacyAccount, make_ledger

LARGE = 1_000_000  # rows from which prepared data are kept on disk


class Data(NamedTuple):
    """A configuration's data."""

    source: Dataset
    population: Population
    digest: str  # of the rows in their order, as they came, and of features that do not follow from them
    leaky: bool  # results must be marked


KEPT = (Data, Dataset, Interactions, Features, Population, Ragged, NegativeIndex, Labels, Domains)


class Experiment(NamedTuple):
    """All that a run needs, none of it with state."""

    data: Data
    model: Model
    batching: Batching
    shapes: BlockShapes
    sampler: Sampler
    method: Method
    channel: Channel
    algorithm: Algorithm
    placement: Placement
    examine: Any  # see `make_evaluator`
    exams: dict[str, EvalSplit]
    wire: Wire
    account: PrivacyAccount
    epsilon: Callable[[int], float]  # rounds -> what was spent; see `make_ledger`
    processes: Processes = Processes()
    examine_cold: Any = None  # for clients of which nothing is kept; see `check_cold_start`


def load_data(config: Any) -> Data:
    """Reads the data of a configuration's [data] section. Raises ValueError with one line where they are not fit.

    Large data are prepared once, kept on disk and mapped from there.
    """
    folder = cache.cache_place(dataclasses.asdict(config))
    found, wrong = cache.read_cache(folder, KEPT)
    if found is not None:
        return found
    data = read_data(config)
    if len(data.source.interactions.user) >= LARGE:
        try:
            cache.write_cache(folder, data, KEPT)
            data = cache.read_cache(folder, KEPT)[0] or data
        except OSError as error:
            wrong = f"prepared data cannot be kept in {folder} ({error.strerror}): they are read anew each time"
    return data._replace(source=add_notes(data.source, wrong)) if wrong else data


def read_data(config: Any) -> Data:
    """The same from its source."""
    beside = {name: getattr(config, name) for name in BESIDE["data"]}
    source = read_source_data(config)
    content = data_digest(source, features=not source.features_follow)
    source, population = prepare_population(source, **beside)
    return Data(source, population, content, config.protocol == "compat-pfedrec")


def read_source_data(config: Any) -> Dataset:
    """What a [data] section's source has, before anything is left out of it."""
    named = isinstance(REGISTRY["data"][config.name], partial)  # files keep only the columns asked for
    return call_registered("data", config, **({"keep": config.clients} if named else {}))


def make_eval_splits(
    config: Any, data: Data, model: Model, method: Method, placement: Placement, share: ProcessShare
) -> dict[str, EvalSplit]:
    """What clients are asked: `val` and `test`, and `test/cold` of clients that never take part, if there are any.

    Raises ValueError where private parts would be folded in, and cannot be.
    """
    population, look = data.population, config.evaluation
    past = choose_history(look, model, method, config.data.label)
    if past and population.domains:
        raise ValueError(
            "data.merge: a private part is folded in from one catalogue, not from domains: keep it instead"
        )

    def one(who, part, history):
        asked = look.seed, look.clients, placement.devices, share
        return make_eval_split(who, part, *asked, history=history, features=model.features)

    exams = {part: map_to_homes(one(population.asked, part, past), population) for part in ("val", "test")}
    return exams | ({"test/cold": one(population.cold, "test", look.history)} if population.cold else {})


def build_experiment(
    config: Any, data: Data, watch: Callable[[Channel], Channel] = lambda channel: channel
) -> Experiment:
    """Builds everything from a configuration and its data; `watch` may replace the channel by one that records.

    Raises ValueError with one line for what cannot be.
    """
    population, run, processes = data.population, config.run, this_process()
    placement = make_placement(run.placement, run.devices, run.shard_tables)
    share = ProcessShare(processes.rank, processes.size)
    end = padded_table_rows(population.num_items, placement.devices, run.shard_tables)
    model, sampler = make_model(config, population, end), choose_sampler(config, population)
    known = known_arguments(config, population, sampler)

    def chained(configs, where):
        return make_channel(configs, data.source.items, where, **known)

    channel = chained(config.channel, "channel")
    method = make_method(config, model, **known, num_items=end)
    channel = watch(chain(*method.links, channel))
    method = method._replace(links=())
    check_closed_form(method, config, channel, population)
    check_client_store(run, processes, method, sampler)
    batching = make_batching(config.work, model, method)
    lazy = config.server.lazy and not (channel.claims.needs_all_rows or method.needs_all_rows)
    check_examples(population, batching, sampler.slots)
    shapes = make_block_shapes(population, batching, sampler.slots, placement.devices, run.area, lazy, share, end)
    shared = jax.eval_shape(lambda key: method.work.init(model.init(key), key)[0], jax.random.key(0))
    down = chained(config.download, "download") if config.download else None
    price = make_wire(channel, shared, down, method.work.update_shapes, method.own_download)
    if down:
        check_download(down, shared)
    sums, edge = channel.aggregator in (None, SUM), assign_edges(config, population.num_clients, sampler)
    meeting = {"edge": edge, "every": config.server.edge_rounds, "per_row": averages_by_row(channel)}
    build: Callable[..., Algorithm] = federate if edge is None else partial(hierarchical, **meeting)
    algorithm = build(
        method,
        channel,
        population.num_clients,
        placement=placement,
        padded_shape=shapes.padded_shape,
        client_memory_budget=1e9 * run.client_memory_gb,
        chunk=run.chunk,
        store_on_host=run.client_store == "host",
        download=make_download(down, price.sees != "update+rows") if down else None,
        capacity=0 if sums else estimate_capacity(population, batching, shapes, sampler),
        history_length=sampler.history_length,
    )
    if population.owner is not None:
        check_merge(model, method, run.client_store)
        algorithm = with_merged_devices(algorithm, population.owner, population.num_train)
    beside = max(config.server.edges, 1)  # so many models lie in a message once it is summed
    sends, method = method.work.update_shapes, method if edge is None else with_edge_models(method, edge)
    check_memory(population, batching, shapes, lambda x: stack_copies(sends(x), beside), shared, run.chunk, sums)
    exams = make_eval_splits(config, data, model, method, placement, share)
    through = chained(config.evaluation.channel if config.evaluation.where == "clients" else (), "evaluation.channel")
    promoted = item_numbers(data.source.items, config.evaluation.targets, "evaluation.targets").tolist()
    examine, examine_cold = make_evaluator(model, through, placement, promoted, method.work.views), None
    if population.cold:
        check_cold_start(model, method)
        examine_cold = make_evaluator(model, through, placement, promoted)
    if through.claims.mechanisms and config.privacy.seed == "secret":
        raise ValueError(
            "evaluation.channel: its noise would come from the seed that config.toml holds, not from the secret one: "
            "leave the noise out, or privacy.seed"
        )
    account = make_account(channel, sampler, population.num_clients, config.privacy)
    epsilon = make_ledger(account.mechanisms, account.sampling, account.delta, account.relation)
    made = (data, model, batching, shapes, sampler, method, channel, algorithm, placement, examine, exams, price)
    return Experiment(*made, account, epsilon, processes, examine_cold)
