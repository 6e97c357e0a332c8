"""A node between two requests: what it makes of its data and of the configuration, and what it compiles."""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfed.config.settings import Config
from jaxfed.config.stages import Runtime, choose_block_shapes, make_runtime
from jaxfed.core.client import ClientDownload, ClientInput, PublicRound, client_round
from jaxfed.core.state import initial_client_states
from jaxfed.core.streams import CLIENTS
from jaxfed.core.tree import to_compute_dtype
from jaxfed.core.types import Cohort, Tree
from jaxfed.data.blocks import BlockShapes
from jaxfed.data.packing import pack_cohort
from jaxfed.deployment.envelope import (
    RoundPlan,
)
from jaxfed.deployment.node_data import PublicFacts, read_node_data
from jaxfed.deployment.node_states import (
    Keys,
    draw_client_keys,
    draw_secret_key,
    read_secret,
)
from jaxfed.deployment.party import DeployedPieces, join_tables, make_deployed_pieces, spread_rows
from jaxfed.deployment.roster import SECURE, find_roster_index, read_node_identity
from jaxfed.training.rounds import make_run_keys


class Node(NamedTuple):
    """A node between two requests; all that changes lies on its disk. `open_node` makes it.

    Args:
        party: What it makes of the configuration.
        seed: The configuration's seed.
        ids: int64 [n]: its clients.
        shapes: Of the blocks in which they compute.
        program: What computes one block.
        first_states: first_states(ids [k]) -> what these clients keep before their first round.
        like: Shapes of what one client keeps.
        folder: Where that lies.
        secure: Where what it needs in secure sums lies.
        rounds: Number of rounds of the federation.
        secret: What its clients' random keys come from. None: they are reproducible, from the seed, so that the server
            can compute them.
    """

    party: DeployedPieces
    seed: int
    ids: np.ndarray
    shapes: BlockShapes
    program: Any
    first_states: Any
    like: Tree
    folder: Path
    secure: Path
    rounds: int
    secret: bytes | None


def open_node(folder: Path, config: Config, facts: PublicFacts, keys: Keys = "own") -> Node:
    """Opens a node.

    Args:
        folder: It holds data.npz; states and the secret are kept there, and what secure sums need.
        config: What to run; the server has the same.
        facts: What everybody knows.
        keys: own: clients' noise, dropout and batches are drawn from a secret of the node. reproducible: from the seed
            of the configuration, as in the simulator, for tests.

    Raises:
        ValueError: data or configuration are not fit, in one line.
    """
    if keys not in ("own", "reproducible"):
        raise ValueError(f"keys: {keys!r}: choose own or reproducible")
    if keys == "reproducible" and config.privacy.seed == "secret":
        raise ValueError('keys: reproducible ones come from the seed: set privacy.seed to "run", or keys to own')
    if keys == "reproducible" and facts.noise_shares:
        raise ValueError("keys: the server could compute this node's share of the noise: set keys to own")
    clients = read_node_data(folder / "data.npz", facts)
    party = make_deployed_pieces(config, facts, clients)
    states, secure = folder / "states", folder / SECURE
    if party.roster:
        find_roster_index(party.roster, read_node_identity(secure))
    states.mkdir(mode=0o700, exist_ok=True)
    secret = read_secret(states) if keys == "own" else None
    ids = np.flatnonzero(np.diff(clients.population.client_offsets))
    runtime = make_runtime(config.run, clients.num_items)
    streams = make_run_keys(config.seed)
    memory = (
        streams.memory if secret is None else jax.random.wrap_key_data(jnp.asarray(draw_secret_key(secret, "states")))
    )
    params = party.model.init(streams.model)
    first = jax.jit(lambda ids: initial_client_states(party.plan, params, ids, memory))
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), jax.eval_shape(first, jnp.zeros(1, jnp.int32))
    )
    shapes = choose_node_shapes(party, runtime, ids, facts)
    program = jax.jit(partial(train_block, party))
    return Node(party, config.seed, ids, shapes, program, first, like, states, secure, config.rounds, secret)


def choose_node_shapes(party: DeployedPieces, runtime: Runtime, ids: np.ndarray, facts: PublicFacts) -> BlockShapes:
    """The shapes of a node's blocks: the public ones, where there are any; side by side no more than it has clients."""
    pieces = party.pieces._replace(sampler=party.sampler._replace(slots=len(ids)))
    shapes = choose_block_shapes(pieces, party.batching, True, runtime)
    if not facts.kinds:
        return shapes
    longest = np.maximum(facts.kinds, 0).max(0)
    if (np.array(shapes.kinds).max(0) > longest).any():
        raise ValueError("a client of this node is longer than the federation's blocks: take some of its data out")
    return shapes._replace(kinds=facts.kinds)


def train_block(
    party: DeployedPieces,
    others: list,
    tables: list,
    own: ClientInput,
    keys: jax.Array,
    public_key: jax.Array,
    slots: jax.Array,
) -> tuple:
    """The rounds of the clients of a block, side by side: (messages, what they keep, whether these are finite).

    others: what all are sent alike; tables: the rows of each. keys: the data of the clients' keys. slots: [M], for
    their number.
    """
    like = party.shared, party.links
    nobody = jnp.full(slots.shape, party.plan.num_clients, jnp.int32)
    public = PublicRound(jax.random.wrap_key_data(public_key), nobody, party.size)

    def one(others, each):
        tables, own, key = each
        broadcast, links = join_tables(like, tables, others)
        received = ClientDownload(jax.lax.optimization_barrier(to_compute_dtype(broadcast)), links)
        done = client_round(party.method.work, party.channel, received, own, public, jax.random.wrap_key_data(key))
        message = spread_rows(done.message, own.rows, party.size) if party.whole else done.message
        return message, done.state, done.is_finite

    return party.plan.place.clients(one)(others, (tables, own, keys))


def pack_clients(node: Node, clients: np.ndarray, round: int) -> Cohort:
    """Some of the node's clients with their data for a round."""
    seed = node.seed
    if node.secret is not None and not node.party.batching.shared_negatives:  # which are drawn in public
        seed = int(draw_secret_key(node.secret, "batches").view(np.uint64)[0])
    ids = np.full(node.shapes.slots, node.party.plan.num_clients, np.int64)
    ids[: len(clients)] = clients
    return pack_cohort(
        node.party.clients.population,
        node.party.batching,
        node.shapes,
        ids,
        ids < node.party.plan.num_clients,
        seed,
        round,
    )


def make_client_keys(node: Node, round: int, plan: RoundPlan, who: np.ndarray) -> np.ndarray:
    """uint32 [m, 2]: the keys of clients in a round."""
    if node.secret is not None:
        return draw_client_keys(node.secret, round, who.tolist())
    own = jax.random.fold_in(jax.random.wrap_key_data(jnp.asarray(plan.key)), CLIENTS)
    return np.asarray(jax.random.key_data(jax.vmap(lambda i: jax.random.fold_in(own, i))(who.astype(np.int32))))
