"""The stages of `build_parts`: each takes its own settings and what came before, and makes its own checks."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import numpy as np

from jaxfed.algorithms.central import build_central, no_wire
from jaxfed.algorithms.hierarchical import hierarchical, stack_copies, with_edge_models
from jaxfed.algorithms.multi_device import with_merged_devices
from jaxfed.config.memory import check_examples, check_solve, choose_chunk, estimate_capacity, largest_block_bytes
from jaxfed.config.settings import Evaluation, Privacy, Run
from jaxfed.core.aggregate import SUM
from jaxfed.core.download import check_download, make_download
from jaxfed.core.federate import Algorithm, federate
from jaxfed.core.link import Channel, list_links
from jaxfed.core.method import Method
from jaxfed.core.model import Model
from jaxfed.core.pairs import check_pairs
from jaxfed.core.parametrization import Parametrization, check_parametrization
from jaxfed.core.placement import Placement, make_placement, padded_table_rows
from jaxfed.core.processes import Processes, this_process
from jaxfed.core.state import sent_model
from jaxfed.core.streams import SetupStream, setup_rng
from jaxfed.core.tables import num_rows
from jaxfed.core.types import Sampler
from jaxfed.core.wire import Wire, join_wires, make_wire
from jaxfed.data.batching import Batching
from jaxfed.data.blocks import BlockShapes, make_block_shapes
from jaxfed.data.clients import Clients
from jaxfed.data.population import Population, ProcessShare

WITH_SUBMODELS = ("clip", "adaptive_clip", "zero_out", "quantize", "top_k")  # links that leave zeros as they are


class Edges(NamedTuple):
    """Edge servers between clients and server, each with a model of its own.

    Args:
        number: Number of edge servers. 0: there are none.
        rounds: Number of rounds after which the edges average their models.
        seed: Seed of who belongs to which edge.

    Example:
        >>> import jaxfed as jf
        >>> jf.Edges(number=4).rounds
        1
    """

    number: int = 0
    rounds: int = 1
    seed: int = 0


class Pieces(NamedTuple):
    """What a run is made of, as a configuration names it or a program hands it over."""

    clients: Clients
    model: Model  # tables with a row for each item; where devices share them, `padded_table_rows` rows
    method: Method
    channel: Channel  # beside the method's own links
    sampler: Sampler
    batching: Batching = Batching()
    parametrization: Parametrization | None = None  # what the server holds in place of the model's parameters
    download: Channel | None = None  # codes of what clients download
    evaluation: Evaluation = Evaluation()
    evaluation_channel: Channel | None = None  # what clients' figures go through; None: the server evaluates
    privacy: Privacy = Privacy()
    run: Run = Run()
    edges: Edges = Edges()
    lazy: bool = True  # the server optimiser moves only the rows that a round touched


class Runtime(NamedTuple):
    """Where a run computes."""

    placement: Placement
    processes: Processes
    share: ProcessShare
    table_rows: int  # of every table of the model


def make_runtime(run: Run, num_items: int) -> Runtime:
    """The devices and processes of a run."""
    placement, processes = make_placement(run.placement, run.devices, run.shard_tables), this_process()
    rows = padded_table_rows(num_items, placement.devices, run.shard_tables)
    return Runtime(placement, processes, ProcessShare(processes.rank, processes.size), rows)


def fit_model(model: Model, population: Population, table_rows: int) -> Model:
    """The model, which scores the items alone and knows their features.

    Raises ValueError where its tables are not those of the items.
    """
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    rows, items = num_rows((shapes, model.frozen)), population.num_items
    if rows not in (0, table_rows):
        raise ValueError(
            f"the model has tables of {rows:,} rows, the clients have {items:,} items: make the model with "
            f"num_items={table_rows}"
        )
    of_item: tuple = ()
    if model.features:
        known = population.item_features
        of_item = (known.rows(np.arange(table_rows)) if known and "item" in model.features else None,)

    def score(*args):  # rows past the items, if any, are nothing to recommend
        return model.score(*args, *of_item)[:items]

    def fold_in(*args):
        assert model.fold_in
        return model.fold_in(*args, *of_item)

    return model._replace(score=score, fold_in=model.fold_in and fold_in)


def check_method(method: Method, pieces: Pieces, channel: Channel, processes: Processes) -> None:
    """Raises ValueError where a method does not go with the clients, the channel, or where clients' states lie.

    channel: the method's links among it.
    """
    run, host, several = pieces.run, pieces.run.client_store == "host", processes.size > 1
    if several and host:
        raise ValueError("run.client_store: a store on the host is for one process: leave it out for several")
    if method.compare_clients and (host or several):
        raise ValueError(
            "run.client_store: the server of this work reads all clients' memory on one device: leave it out, and run "
            "one process"
        )
    if method.recipe and method.recipe.name == "fedrecon" and pieces.batching.epochs > 1:
        raise ValueError(
            "work.epochs: reconstruction parts the steps of one pass into two halves: leave it at 1, and set passes"
        )
    if pieces.sampler.history_length and run.shard_tables:
        raise ValueError("cohort.buffered: every device keeps the past models whole: leave run.shard_tables out")
    if method.submodels:
        check_submodels(pieces)
    if pieces.parametrization is not None:
        if method.reads_histories:
            raise ValueError("parametrization: a closed form is solved for the tables themselves: leave it out")
        check_parametrization(pieces.parametrization, pieces.model)
    if not method.reads_histories:
        return
    if pieces.sampler.history_length:
        raise ValueError("cohort.buffered: a closed form is solved from one sum of its own round: take everyone")
    if channel.aggregator not in (None, SUM):
        raise ValueError("a closed form is solved from sums: take the link with a reduction of its own out")
    if pieces.download and method.closed and method.closed.pair_columns:
        raise ValueError("download: clients of this closed form download nothing of the model: leave it out")
    if channel.claims.is_average:
        raise ValueError("a closed form is solved from sums, not from a mean: take the mean out (channel = [])")
    if pieces.clients.users_per_client > 1:
        raise ValueError('in a closed form a client is one user\'s history: set data.clients = "user"')


def check_submodels(pieces: Pieces) -> None:
    """Raises ValueError for what does not go with clients that train sub-models of different sizes."""
    if pieces.sampler.history_length or pieces.edges.number or pieces.parametrization:
        raise ValueError("sub-models: leave cohort.buffered, server.edges and the parametrization out")
    links = [each.claims.name for each in list_links(pieces.channel) if each.encode or each.aggregator]
    if refused := [name for name in links if name not in WITH_SUBMODELS]:
        raise ValueError(
            f"sub-models: {refused[0]} would change coordinates that a client does not hold: leave it out, or take one "
            f"of {', '.join(WITH_SUBMODELS)}"
        )


def fit_batching(batching: Batching, model: Model, method: Method) -> Batching:
    """The batches that a method takes of a model's clients; histories are whole and without negatives."""
    if method.reads_histories:
        return batching._replace(batch_size=1, negatives=0, epochs=1, ordered=True)
    chosen = batching._replace(pairwise=model.pairwise, features=model.features, sequence=model.sequence)
    return chosen._replace(ordered=False)


def choose_block_shapes(pieces: Pieces, batching: Batching, needs_all_rows: bool, runtime: Runtime) -> BlockShapes:
    """The shapes in which cohorts are packed. needs_all_rows: of the channel or the method."""
    population, slots = pieces.clients.population, pieces.sampler.slots
    lazy = pieces.lazy and not needs_all_rows
    check_examples(population, batching, slots)
    devices, rows = runtime.placement.devices, runtime.table_rows
    pairs = pieces.method.closed is not None and pieces.method.closed.pair_columns > 0
    if pairs:
        check_pairs(rows)
    return make_block_shapes(population, batching, slots, devices, pieces.run.area, lazy, runtime.share, rows, pairs)


def averages_by_row(channel: Channel) -> bool:
    """Whether rows are averaged over those who hold them: then edges do so too."""
    return any(each.claims.name == "per_row_mean" for each in list_links(channel))


def assign_edges(pieces: Pieces) -> np.ndarray | None:
    """int64 [clients]: the edge of each, dealt at random by the seed of the data; None: there are none.

    Raises ValueError for what does not go with edges.
    """
    edges, clients = pieces.edges.number, pieces.clients.num_clients
    if not edges:
        return None
    if pieces.download:
        raise ValueError("server.edges: there are no codes of the download between edges and clients: leave it out")
    if pieces.sampler.history_length:
        raise ValueError("server.edges: edges need synchronous rounds, this cohort is asynchronous: take another")
    if pieces.run.client_store == "host":
        raise ValueError("run.client_store: the store of clients of edges lies on the device: leave it out")
    if edges > clients:
        raise ValueError(f"server.edges: edge {clients} has no clients: there are {clients:,}, lower it to that")
    return setup_rng(pieces.edges.seed, SetupStream.EDGES, edges).permutation(clients) % edges


def check_merge(model: Model, method: Method, client_store: str) -> None:
    """Raises ValueError where what clients keep is not the model's private part alone, on the device."""
    if client_store == "host":
        raise ValueError("run.client_store: the parts of a user's devices are merged where rounds run: leave it out")
    if method.reads_histories:
        raise ValueError('data.merge: in a closed form a client is all of a user\'s history: set data.clients = "user"')
    key = jax.random.key(0)
    kept, own = jax.eval_shape(lambda: (method.work.init(model.init(key), key)[1], model.private(key)))
    if jax.tree.leaves(kept) and kept != own:
        raise ValueError(
            "data.merge: this work keeps more on a client than the private part that a user's devices have in common: "
            "take local_steps, gradient, alternate or reconstruct"
        )


class Rounds(NamedTuple):
    """What runs the rounds of an experiment."""

    method: Method  # its links are in the channel
    algorithm: Algorithm
    wire: Wire


def make_algorithm(
    pieces: Pieces,
    model: Model,
    method: Method,
    channel: Channel,
    batching: Batching,
    shapes: BlockShapes,
    runtime: Runtime,
) -> Rounds:
    """The algorithm, and the bytes of its messages. Raises ValueError for what does not fit together."""
    population, run, sampler = pieces.clients.population, pieces.run, pieces.sampler
    held = jax.eval_shape(lambda key: method.work.init(model.init(key), key)[0], jax.random.key(0))
    shared = jax.eval_shape(partial(sent_model, method), held)

    def wire_of(shared):
        return make_wire(
            channel, shared, pieces.download, method.work.update_shapes, method.own_download, model.frozen, shapes.pairs
        )

    parts = method.submodels
    wire = (
        join_wires([wire_of(parts.cut(group, shared)) for group in range(parts.number)], parts.groups)
        if parts
        else wire_of(shared)
    )
    if pieces.download:
        check_download(pieces.download, shared)
    sums, edge = channel.aggregator in (None, SUM), assign_edges(pieces)
    check_solve(method.closed)
    if method.is_central:
        rounds = build_central(method, model, population.num_clients, runtime.placement, model.frozen)
        return Rounds(method, rounds, no_wire())
    copies = max(pieces.edges.number, 1)  # so many models lie in a message once it is summed

    def block_bytes(shapes):
        sends = method.work.update_shapes
        return largest_block_bytes(shapes, lambda x: stack_copies(sends(x), copies), shared, padded=not method.closed)

    build: Callable[..., Algorithm] = federate
    if edge is not None:
        build = partial(hierarchical, edge=edge, every=pieces.edges.rounds, per_row=averages_by_row(channel))
    algorithm = build(
        method,
        channel,
        population.num_clients,
        placement=runtime.placement,
        padded_shape=None if method.closed else shapes.padded_shape,
        client_memory_budget=1e9 * run.client_memory_gb,
        chunk=choose_chunk(population, batching, shapes, block_bytes, run.chunk, sums),
        store_on_host=run.client_store == "host",
        download=make_download(pieces.download, wire.sees != "update+rows") if pieces.download else None,
        capacity=0 if sums else estimate_capacity(population, batching, shapes, sampler),
        history_length=sampler.history_length,
        frozen=model.frozen,
    )
    if population.owner is not None:
        check_merge(model, method, run.client_store)
        algorithm = with_merged_devices(algorithm, population.owner, population.num_train)
    return Rounds(method if edge is None else with_edge_models(method, edge), algorithm, wire)
