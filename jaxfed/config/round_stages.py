"""The stage of `build_parts` that makes the rounds: the algorithm, and the bytes of its messages."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxfed.algorithms.central import build_central, no_wire
from jaxfed.algorithms.hierarchical import hierarchical, stack_copies, with_edge_models
from jaxfed.algorithms.multi_device import with_merged_devices
from jaxfed.config.memory import check_solve, choose_chunk, estimate_capacity, largest_block_bytes
from jaxfed.config.mesh import make_rules
from jaxfed.config.stages import Pieces, RemakeMethod, Runtime
from jaxfed.core.aggregate import SUM
from jaxfed.core.download import check_download, make_download
from jaxfed.core.federate import Algorithm, federate
from jaxfed.core.link import Channel, list_links
from jaxfed.core.method import Method
from jaxfed.core.model import Model
from jaxfed.core.partition import check_rules
from jaxfed.core.pruning import Pruning, count_mask_bytes, find_level, kept_shapes
from jaxfed.core.state import sent_model
from jaxfed.core.streams import SetupStream, setup_rng
from jaxfed.core.types import Broadcast
from jaxfed.core.wire import Wire, join_wires, make_wire
from jaxfed.data.batching import Batching
from jaxfed.data.blocks import BlockShapes
from jaxfed.data.device_rounds import drop_finer_kinds, expect_room, make_block_source
from jaxfed.data.draw_place import find_draw_problem
from jaxfed.data.population import Population


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


PLAN_BYTES = 1 << 26  # of what a program is told of its rounds, at most
BYTES_OF_SLOT = 16  # of a client in a round: its id, whether it is there, its age, its place


class RoundLoop(NamedTuple):
    """What runs many rounds as one program."""

    length: int  # rounds of a program at most
    shapes: BlockShapes  # of its blocks
    program: Callable[..., Any]  # of one run, see `make_round_loops`
    joint_program: Callable[..., Any]  # of several
    remake_method: RemakeMethod | None  # None: runs of the program differ in seeds alone
    room: int  # rows that a cohort is expected to hold; 0: rounds run on all rows


def choose_loop(
    pieces: Pieces, algorithm: Algorithm, batching: Batching, shapes: BlockShapes, fit: Callable[[Method], Method]
) -> RoundLoop | None:
    """What runs many rounds as one program; None: the host starts each. Raises ValueError where it must.

    fit: prepares a method for its rounds.
    """
    length = pieces.run.rounds_per_program
    if length < 1:
        raise ValueError(f"run.rounds_per_program is {length}: it must be at least 1")
    if length == 1:
        return None
    reasons = {
        "this algorithm has no program of many rounds": algorithm.make_loops is None,
        "clients are spread by pmap (run.placement)": pieces.run.placement == "pmap",
        "there are several processes": shapes.share.size > 1,
    }
    if found := [reason for reason, holds in reasons.items() if holds]:
        raise ValueError(f"run.rounds_per_program: {found[0]}, so the host starts each round: set it to 1")
    if problem := find_draw_problem(pieces.clients.population, batching, shapes):
        raise ValueError(f"run.rounds_per_program: {problem}, so the host starts each round: set it to 1")
    if batching.draw_on != "device" and pieces.batching.draw_on == "auto":
        raise ValueError(
            'run.rounds_per_program: work.draw_on = "auto" chose the host here, which starts each round: set it to 1'
        )
    if batching.draw_on != "device":
        raise ValueError(
            'run.rounds_per_program: the rounds of one program are drawn on the device: set work.draw_on = "device" too'
        )
    # a program ends where the host is asked, so that a longer plan would be memory for nothing
    most = max(PLAN_BYTES // (BYTES_OF_SLOT * shapes.slots), 1)
    length = min(length, pieces.evaluation.every, pieces.run.checkpoint_every, most)
    of_pieces = pieces.remake_method
    remake_method = of_pieces and (lambda hyperparameters: fit(of_pieces(hyperparameters)))
    return build_loop(algorithm, length, pieces.clients.population, batching, shapes, remake_method)


def build_loop(
    algorithm: Algorithm,
    length: int,
    population: Population,
    batching: Batching,
    shapes: BlockShapes,
    remake_method: RemakeMethod | None = None,
) -> RoundLoop:
    """What runs up to so many rounds of an algorithm as one program."""
    assert algorithm.make_loops
    shapes = drop_finer_kinds(shapes)
    program, joint_program = algorithm.make_loops(make_block_source(population, batching, shapes), remake_method)
    return RoundLoop(length, shapes, program, joint_program, remake_method, expect_room(population, batching, shapes))


class Rounds(NamedTuple):
    """What runs the rounds of an experiment."""

    method: Method  # its links are in the channel
    algorithm: Algorithm
    wire: Wire


def price_messages(
    pieces: Pieces, model: Model, method: Method, channel: Channel, shapes: BlockShapes, shared: Broadcast
) -> Wire:
    """The bytes of messages, by the client's group where clients train sub-models. shared: shapes of what is sent."""

    def price(shared):
        return make_wire(
            channel, shared, pieces.download, method.work.update_shapes, method.own_download, model.frozen, shapes.pairs
        )

    if (made := method.parametrization) and made.pruning:
        return price_pruned_messages(price, made.pruning, shared)
    if not (submodels := method.submodels):
        return price(shared)
    return join_wires([price(submodels.cut(group, shared)) for group in range(submodels.number)], submodels.groups)


def check_partition(pieces: Pieces, model: Model, method: Method, held: Broadcast) -> None:
    """Raises ValueError for a partition rule that matches neither an array of the server nor a frozen one."""
    parametrization = method.parametrization
    own: tuple = (held.params,)
    if parametrization:
        own = jax.eval_shape(parametrization.init, jax.random.key(0)), parametrization.frozen
    check_rules(make_rules(pieces.run.partition), held.extra, model.frozen, *own)


def price_pruned_messages(price: Callable[[Broadcast], Wire], pruning: Pruning, shared: Broadcast) -> Wire:
    """The wire of a pruned model: weights that are kept are sent; clients also download which weights these are."""

    @cache
    def at_level(level):
        wire = price(kept_shapes(pruning, level, shared))
        masks = count_mask_bytes(pruning, level, shared.params)
        return wire._replace(down=lambda *facts: wire.down(*facts) + masks)

    return price(shared)._replace(by_round=lambda number: at_level(find_level(pruning, number)))


def make_central_rounds(pieces: Pieces, model: Model, method: Method, runtime: Runtime) -> Rounds:
    """The rounds of central training, in which nothing is sent."""
    num_clients = pieces.clients.num_clients
    return Rounds(method, build_central(method, model, num_clients, runtime.placement, model.frozen), no_wire())


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
    check_partition(pieces, model, method, held)
    shared = jax.eval_shape(partial(sent_model, method), held)
    hidden = method.send_to_client is not None  # the server sends what it computes, and nothing of what it holds
    wire = price_messages(pieces, model, method, channel, shapes, Broadcast(()) if hidden else shared)
    if pieces.download:
        check_download(pieces.download, shared)
    sums, edge = channel.aggregator in (None, SUM), assign_edges(pieces)
    check_solve(method.closed)
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
