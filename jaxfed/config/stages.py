"""The stages of `build_parts`: each takes its own settings and what came before, and makes its own checks."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfed.config.memory import check_examples
from jaxfed.config.mesh import count_devices, make_rules
from jaxfed.config.settings import Evaluation, Privacy, Run
from jaxfed.core.aggregate import SUM
from jaxfed.core.link import Channel, list_links
from jaxfed.core.method import Method
from jaxfed.core.model import Model
from jaxfed.core.pairs import check_pairs
from jaxfed.core.parametrization import Parametrization, check_parametrization
from jaxfed.core.placement import Placement, make_placement, padded_table_rows
from jaxfed.core.processes import Processes, this_process
from jaxfed.core.tables import is_table, num_rows
from jaxfed.core.types import Sampler
from jaxfed.data.batching import Batching, count_step_histories, measure_clients
from jaxfed.data.blocks import BlockShapes, make_block_shapes
from jaxfed.data.clients import Clients
from jaxfed.data.popular_negatives import make_popularity_index
from jaxfed.data.population import Population, ProcessShare
from jaxfed.models.freezing import FROZEN_PARAMETERS

WITH_PRUNING = ("clip", "adaptive_clip", "zero_out", "quantize", "gaussian")  # links that work number by number
MEANS = ("mean", "weighted_mean", "per_row_mean")
BUSY_FLOPS = {"cpu": 1e9}  # of one step of all clients of a block: it keeps a device busy, and more clients would wait
BUSY_FLOPS_ELSEWHERE = 1e11  # a guess: not measured on any accelerator
WITH_SUBMODELS = ("clip", "adaptive_clip", "zero_out", "quantize")  # links that leave zeros as they are


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


RemakeMethod = Callable[[dict[str, Any]], Method]  # from hyper-parameters of optimisers by their keys


class Pieces(NamedTuple):
    """What a run is made of, as a configuration names it or a program hands it over."""

    clients: Clients
    model: Model  # tables with a row for each item; where devices share them, `padded_table_rows` rows
    method: Method
    channel: Channel  # beside the method's own links
    sampler: Sampler
    batching: Batching = Batching()
    parametrization: Parametrization | None = None  # what the server holds in place of the model's parameters
    remake_method: RemakeMethod | None = None  # None: its hyper-parameters cannot be replaced
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
    rules, devices, model = make_rules(run.partition), count_devices(run.mesh, run.devices), max(run.mesh.model, 1)
    placement, processes = make_placement(run.placement, devices, run.shard_tables, model, rules), this_process()
    rows = padded_table_rows(num_items, placement.devices, run.shard_tables or bool(rules))
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
    if pieces.sampler.history_length and (run.shard_tables or run.partition):
        raise ValueError(
            "cohort.buffered: every device keeps the past models whole: leave run.shard_tables and run.partition out"
        )
    if method.send_to_client:
        check_hidden_model(pieces)
    if method.submodels or method.move_params:
        check_synchronous(pieces)
    if method.submodels:
        check_submodels(pieces)
    if pieces.parametrization is not None:
        if method.reads_histories:
            raise ValueError("parametrization: a closed form is solved for the tables themselves: leave it out")
        check_parametrization(pieces.parametrization, pieces.model)
        if pieces.parametrization.pruning:
            check_pruning(pieces, channel)
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


def check_synchronous(pieces: Pieces) -> None:
    """Raises ValueError where a method needs one model at one server, and clients would start from others."""
    if pieces.sampler.history_length or pieces.edges.number or pieces.parametrization:
        name = "sub-models" if pieces.method.submodels else "this rule for adapters"
        raise ValueError(f"{name}: leave cohort.buffered, server.edges and the parametrization out")


def check_hidden_model(pieces: Pieces) -> None:
    """Raises ValueError for what does not go with clients and a server that exchange no parameters."""
    run, clients = pieces.run, pieces.clients
    if links := [each.claims.name for each in list_links(pieces.channel) if each.encode or each.decode]:
        raise ValueError(
            f"{links[0]} is made for parameters, and clients of this method send scores of items: leave [[channel]] "
            "out (channel = [])"
        )
    if pieces.sampler.history_length or pieces.edges.number or pieces.parametrization or pieces.download:
        raise ValueError(
            "the server of this method sends no parameters: leave cohort.buffered, server.edges, [[download]] and the "
            "parametrization out"
        )
    if run.shard_tables or run.partition:
        raise ValueError("each client keeps a whole model: leave run.shard_tables and run.partition out")
    if clients.users_per_client > 1 or clients.population.labels is not None:
        raise ValueError(
            'a client of this method sends scores of one user\'s items: set data.clients = "user" and data.label = '
            '"implicit"'
        )
    if pieces.batching.negatives < 1:
        raise ValueError("work.negatives: what a client took is hidden among negatives: set it to 1 or more")


def check_submodels(pieces: Pieces) -> None:
    """Raises ValueError for what does not go with clients that train sub-models of different sizes."""
    if FROZEN_PARAMETERS in (pieces.model.frozen or {}):
        raise ValueError("sub-models: what is frozen would have the whole width: leave work.freeze out")
    links = [each.claims.name for each in list_links(pieces.channel) if each.encode or each.aggregator]
    if refused := [name for name in links if name not in WITH_SUBMODELS]:
        raise ValueError(
            f"sub-models: {refused[0]} would change coordinates that a client does not hold: leave it out, or take one "
            f"of {', '.join(WITH_SUBMODELS)}"
        )
    if jax.tree.leaves(jax.eval_shape(lambda: pieces.channel.init({"x": jnp.zeros(2)})[1])):
        raise ValueError(
            "sub-models: an error that a client keeps would be sent when it does not hold the coordinate: set "
            "keep_error = false"
        )
    if pieces.download:
        raise ValueError("sub-models: codes are made of the whole model, not of a part: leave [[download]] out")


def check_pruning(pieces: Pieces, channel: Channel) -> None:
    """Raises ValueError for what does not go with weights that are pruned."""
    if pieces.download:
        raise ValueError("parametrization.pruned: codes would change which weights are zero: leave [[download]] out")
    links = [each.claims.name for each in list_links(channel) if each.encode or each.aggregator]
    if refused := [name for name in links if name not in (*MEANS, *WITH_PRUNING)]:
        raise ValueError(
            f"parametrization.pruned: {refused[0]} mixes or chooses among weights, pruned ones too: leave it "
            f"out, or take one of {', '.join(WITH_PRUNING)}"
        )


def fit_batching(batching: Batching, model: Model, method: Method) -> Batching:
    """The batches that a method takes of a model's clients; those of a closed form are whole histories."""
    if method.reads_histories:
        return batching._replace(batch_size=1, negatives=0, epochs=1, ordered=True)
    chosen = batching._replace(pairwise=model.pairwise, features=model.features, sequence=model.sequence)
    # in_batch: the items that a step reads are its negatives, and none is drawn
    if model.sequence and (not model.sequence.compares or batching.negative_sampling == "in_batch"):
        chosen = chosen._replace(negatives=0)
    return chosen._replace(ordered=False)


def add_popularity(clients: Clients, batching: Batching, runtime: Runtime) -> Clients:
    """The clients with the popularity of items, where negatives are drawn by it. Raises ValueError where it is not
    known."""
    if batching.negative_sampling != "popularity":
        return clients
    if runtime.share.size > 1:
        raise ValueError(
            "work.negative_sampling: popularity is counted over all clients, and of several processes each knows its "
            "own: take uniform, or one process"
        )
    population = clients.population
    span = population.span(np.arange(len(population.user_names)))
    index = make_popularity_index(population.train, population.excluded, population.num_items, span, population.domains)
    return clients._replace(population=population._replace(popularity=index))


def choose_block_shapes(pieces: Pieces, batching: Batching, needs_all_rows: bool, runtime: Runtime) -> BlockShapes:
    """The shapes in which cohorts are packed. needs_all_rows: of the channel or the method."""
    population, slots = pieces.clients.population, pieces.sampler.slots
    lazy = pieces.lazy and not needs_all_rows
    check_examples(population, batching, slots)
    devices, rows = runtime.placement.client_devices, runtime.table_rows
    pairs = pieces.method.closed is not None and pieces.method.closed.pair_columns > 0
    if pairs:
        check_pairs(rows)
    shapes = make_block_shapes(population, batching, slots, devices, pieces.run.area, lazy, runtime.share, rows, pairs)
    if pieces.run.area:
        return shapes
    return shapes._replace(most_clients=count_useful_clients(pieces.model, batching, population))


def count_useful_clients(model: Model, batching: Batching, population: Population) -> int:
    """The clients whose steps together keep a device busy. Where one client's step does, clients of unequal length side
    by side would only wait for each other. 0: no limit. A step costs about six operations for each dense number and
    each of its examples."""
    held = jax.eval_shape(model.init, jax.random.key(0)), model.frozen
    dense = sum(x.size for x in jax.tree.leaves(held, is_leaf=is_table) if not is_table(x))
    longest = measure_clients(population, batching, np.arange(population.num_clients)).largest.max()
    histories = count_step_histories(population, batching) if batching.sequence else 1
    flops = 6 * dense * int(longest) * histories
    busy = BUSY_FLOPS.get(jax.default_backend(), BUSY_FLOPS_ELSEWHERE)
    if batching.ordered or not flops:
        return 0
    return 1 << round(np.log2(max(1, int(busy / flops))))  # cohorts are powers of two more often than not
