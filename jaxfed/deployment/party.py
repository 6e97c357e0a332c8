"""What the server and a node both make of a configuration: the pieces of its rounds, and the shapes of what is sent."""

import hashlib
import inspect
import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxfed import __version__
from jaxfed.config.config_files import map_paths
from jaxfed.config.registry import CLOSED, REGISTRY
from jaxfed.config.schema import config_to_table
from jaxfed.config.sections import make_pieces
from jaxfed.config.settings import Config
from jaxfed.config.stages import Pieces, Runtime, check_method, fit_batching, fit_model, make_runtime
from jaxfed.core.channel import chain
from jaxfed.core.channel_checks import message_shapes
from jaxfed.core.link import Channel, broadcast_state, list_links
from jaxfed.core.method import Method
from jaxfed.core.model import Model
from jaxfed.core.state import Plan, sent_shapes
from jaxfed.core.tables import is_table, num_rows, repeat_rows, take_rows
from jaxfed.core.tree import to_compute_dtype
from jaxfed.core.types import Broadcast, Kept, Sampler, Tree
from jaxfed.core.wire import Wire, is_form, make_wire, open_shapes
from jaxfed.data.batching import Batching
from jaxfed.data.clients import Clients
from jaxfed.deployment.late_messages import find_buffered_plan
from jaxfed.deployment.node_data import PublicFacts, facts_digest
from jaxfed.deployment.noise_shares import leave_noise_to_nodes
from jaxfed.deployment.roster import find_threshold
from jaxfed.sampling.buffered_rounds import BufferedPlan
from jaxfed.secagg.terms import SessionTerms, terms_digest

ONE_ROW = jnp.zeros(1, jnp.int32)


class DeployedPieces(NamedTuple):
    """What one end of a federation knows of its rounds. Whose data these are is another matter.

    Args:
        clients: A node's own, or nobody's.
        model, method, channel, plan, sampler, batching, wire: As in a run of the simulator.
        pieces: What the configuration names.
        shared: Shapes of what the server broadcasts, all rows.
        links: Shapes of what the links broadcast, all rows.
        message: A message's shapes: of a client with one row, or of all rows where `whole`.
        size: Rows of the tables (0: there are none).
        whole: Whether clients download whole tables, as the server does not learn their rows.
        lazy: Whether the server moves only the rows of a round.
        roster: The public keys of the nodes, where their messages are added by a secure sum; (): they are not.
        digest: 32 bytes that are the same where the configuration is.
        noise_shares: Whether the nodes add the noise of their sum, and the server adds none.
        buffered: What buffered rounds are played by; None: the cohort of a round is asked at once.
    """

    clients: Clients
    pieces: Pieces
    model: Model
    method: Method
    channel: Channel
    plan: Plan
    sampler: Sampler
    batching: Batching
    wire: Wire
    shared: Broadcast
    links: Tree
    message: Tree
    size: int
    whole: bool
    lazy: bool
    digest: bytes
    roster: tuple[bytes, ...] = ()
    noise_shares: bool = False
    buffered: BufferedPlan | None = None

    @property
    def sees(self) -> str:
        """What the server learns, see `Wire.sees`. Without a secure sum it has each message."""
        return "update" if self.wire.sees == "sum" and not self.roster else self.wire.sees


def config_digest(config: Config, facts: PublicFacts) -> bytes:
    """32 bytes of a configuration, of the facts, and of the version of jaxfed. Where things lie is left out."""
    table = map_paths(config_to_table(config), lambda path: "")
    del table["run"]
    text = json.dumps([table, facts_digest(facts), __version__], sort_keys=True)
    return hashlib.sha256(text.encode()).digest()


def make_deployed_pieces(config: Config, facts: PublicFacts, clients: Clients) -> DeployedPieces:
    """What one end makes of a configuration. Raises ValueError, in one line, for what cannot be deployed.

    Args:
        config: what to run.
        facts: what everybody knows.
        clients: a node's (`read_node_data`), or nobody's (`wrap_population` of `make_empty_population`).
    """
    check_sections(config, facts)
    pieces = make_pieces(config, clients)
    runtime = make_runtime(config.run, clients.num_items)
    model = fit_model(pieces.model, clients.population, runtime.table_rows)
    channel = chain(*pieces.method.links, pieces.channel)
    check_method(pieces.method, pieces, channel, runtime.processes)
    check_pieces(pieces, model, channel)
    channel = leave_noise_to_nodes(channel, len(facts.keys)) if facts.noise_shares else channel
    method = pieces.method.with_server()._replace(links=())
    plan = make_plan_of_rounds(method, channel, facts, config, runtime)
    key = jax.random.key(0)
    shared = jax.eval_shape(lambda: method.work.init(model.init(key), key)[0])
    state = jax.eval_shape(channel.init, sent_shapes(plan, shared))[0]
    wire, size = make_wire(channel, shared, None, method.work.update_shapes, method.own_download), num_rows(shared)
    whole, lazy = wire.sees != "update+rows", pieces.lazy
    lazy = lazy and not (channel.claims.needs_all_rows or method.needs_all_rows)
    message = shape_message(plan, shared, state, size, whole)
    check_wire(wire, message, lazy and size > 0)
    return DeployedPieces(
        clients=clients,
        pieces=pieces,
        model=model,
        method=method,
        channel=channel,
        plan=plan,
        sampler=pieces.sampler,
        batching=fit_batching(pieces.batching, model, method),
        wire=wire,
        shared=shared,
        links=jax.eval_shape(lambda x: broadcast_state(channel, x), state),
        message=message,
        size=size,
        whole=whole,
        lazy=lazy and size > 0,
        digest=config_digest(config, facts),
        roster=read_roster(facts, wire, message),
        noise_shares=facts.noise_shares,
        buffered=find_buffered_plan(config, facts, channel, state),
    )


def make_plan_of_rounds(method: Method, channel: Channel, facts: PublicFacts, config: Config, runtime: Runtime) -> Plan:
    """What rounds are made of where clients are real: what is for the simulator alone is left out."""
    return Plan(
        method=method,
        channel=channel,
        num_clients=facts.num_clients,
        place=runtime.placement,
        padded_shape=None,
        client_memory_budget=1e9 * config.run.client_memory_gb,
        chunk=0,
        store_on_host=False,
        download=None,
        capacity=0,
        history_length=0,
        frozen_rows=0,
    )


def read_roster(facts: PublicFacts, wire: Wire, message: Tree) -> tuple[bytes, ...]:
    """The public keys of the nodes, where a secure sum adds their messages; (): the channel hides nothing, or the
    facts have no keys. Raises ValueError for messages that a secure sum cannot add, and keys that are none."""
    if wire.sees != "sum" or not facts.keys:
        return ()
    if any(is_form(node) or node.dtype != jnp.int32 for node in jax.tree.leaves(message, is_leaf=is_form)):
        raise ValueError("deploy: a secure sum adds integers: put the link ring last")
    try:
        keys = tuple(bytes.fromhex(key) for key in facts.keys)
        terms_digest(SessionTerms(bytes(32), keys, find_threshold(len(keys)), 1))
    except ValueError as error:
        raise ValueError(f"deploy: keys of the facts: {error}: copy the server's file") from None
    return keys


def shape_message(plan: Plan, shared: Broadcast, state: Tree, size: int, whole: bool) -> Tree:
    """Shapes of a message. whole: that has all rows of the tables."""
    one = jax.eval_shape(lambda x: to_compute_dtype(take_rows(x, ONE_ROW)), shared)
    update = jax.eval_shape(plan.method.work.update_shapes, one)
    sent = message_shapes(plan.channel, update, state, jax.eval_shape(plan.channel.init, update)[1], size)
    if not whole or not num_rows(open_shapes(sent)):
        return sent
    return jax.eval_shape(lambda x: spread_rows(x, ONE_ROW, size), sent)


def spread_rows(message: Tree, rows: jax.Array, size: int) -> Tree:
    """A message with whole tables: zeros in the rows that the client does not hold. rows: int [K], past the end:
    unused."""

    def spread(node):
        if not is_table(node):
            return node
        return jax.tree.map(lambda x: jnp.zeros((size, *x.shape[1:]), x.dtype).at[rows].set(x, mode="drop"), node)

    return jax.tree.map(spread, repeat_rows(message), is_leaf=is_table)


def divide_tables(tree: Tree) -> tuple[list[Any], list[Any]]:
    """(the tables of a tree, its other leaves), each in order."""
    leaves = jax.tree.leaves(tree, is_leaf=is_table)
    return [leaf for leaf in leaves if is_table(leaf)], [leaf for leaf in leaves if not is_table(leaf)]


def join_tables(like: Tree, tables: list[Any], others: list[Any]) -> Tree:
    """Undoes `divide_tables`. like: a tree of that structure."""
    first, second = iter(tables), iter(others)
    return jax.tree.map(lambda leaf: next(first) if is_table(leaf) else next(second), like, is_leaf=is_table)


def check_sections(config: Config, facts: PublicFacts) -> None:
    """Raises ValueError for what of a configuration cannot be deployed."""
    refused = {
        "start.run": bool(config.start.run),
        "server.edges": config.server.edges > 0,
        "download": bool(config.download),
        'work.draw_on other than "host"': config.work.draw_on != "host",
        'work.negative_sampling = "popularity"': config.work.negative_sampling == "popularity",
        f'parametrization "{config.parametrization.name}"': config.parametrization.name != "identity",
        f'cohort "{config.cohort.name}"': config.cohort.name == "deadline",
        f'clock "{config.clock.name}"': config.clock.name != "none" and config.cohort.name != "buffered",
        "work.freeze": bool(config.work.freeze),
    }
    for section, parts in (("algorithm", (config.algorithm,)), ("channel", config.channel), ("work", (config.work,))):
        for part in parts:
            asked = inspect.signature(REGISTRY[section][part.name]).parameters
            refused[f'{section} "{part.name}" (it reads how much each client has)'] = "num_train" in asked
    asked = inspect.signature(REGISTRY["model"][config.model.name]).parameters
    refused[f'model "{config.model.name}" (it reads texts or features)'] = bool({"texts", "vocabulary"} & {*asked})
    refused[f'model "{config.model.name}" (a closed form)'] = config.model.name in CLOSED
    if found := [name for name, holds in refused.items() if holds]:
        raise ValueError(f"deploy: {found[0]} is not built for real clients: train it by jaxfed train, or leave it out")
    if getattr(config.cohort, "dropout", 0):
        raise ValueError("deploy: real clients drop out by themselves: set cohort.dropout to 0")
    if getattr(config.cohort, "holders", 0):
        raise ValueError("deploy: cohort.holders is found from the data of all: set cohort.size, and holders to 0")
    if config.data.label != facts.label:
        raise ValueError(f'deploy: data.label is "{config.data.label}", the federation has "{facts.label}"')


def check_pieces(pieces: Pieces, model: Model, channel: Channel) -> None:
    """Raises ValueError for a method, model or channel that needs more than a server which hears messages."""
    method, names = pieces.method, [each.claims.name for each in list_links(channel)]
    refused = {
        "a closed form": method.reads_histories or method.closed is not None,
        "central training": method.is_central,
        "a server that sends each client something else": method.send_to_client is not None,
        "a server that compares what clients keep": method.compare_clients is not None,
        "a method of sub-models": method.submodels is not None,
        "a method with a step of its own at the server": method.move_params is not None,
        "a model with frozen parts": bool(jax.tree.leaves(model.frozen)),
        "a model that reads features": bool(model.features),
        "the link pads (its pads are public)": "pads" in names,
        "a device of several": pieces.run.devices != 1 or pieces.run.shard_tables,
    }
    if found := [name for name, holds in refused.items() if holds]:
        raise ValueError(f"deploy: {found[0]} is not built for real clients: train it by jaxfed train, or leave it out")


def check_wire(wire: Wire, message: Tree, lazy: bool) -> None:
    """Raises ValueError for messages that are not built, and where the server would move rows it does not know of."""
    if wire.sees == "sum+union":
        raise ValueError("deploy: finding the rows of a cohort in secret is not built: set ring.union to false")
    if wire.sees != "update+rows" and lazy:
        raise ValueError(
            "deploy: the server does not learn which rows clients hold, so it cannot move these alone: set "
            "server.lazy = false"
        )
    forms = jax.tree.leaves(message, is_leaf=is_form)
    if any(isinstance(node, Kept) and node.known for node in forms):
        raise ValueError("deploy: random_k is not built for real clients: take top_k")
