"""A small federation in one process: nodes and server are functions of bytes, and Flower is left out."""

import jax
import numpy as np

from jaxfed.config.build import build_from_config, load_data
from jaxfed.config.schema import make_config
from jaxfed.deployment.coordinator import match_nodes, run_server_round
from jaxfed.deployment.envelope import EnvelopeKind, read_envelopes
from jaxfed.deployment.node import make_reply
from jaxfed.deployment.node_data import find_facts, write_node_data
from jaxfed.deployment.node_states import read_client
from jaxfed.deployment.opened_node import open_node
from jaxfed.deployment.opened_server import open_server
from jaxfed.deployment.roster import make_node_identity
from jaxfed.training.rounds import initial_arrays, make_run_keys, prepare_round

DATA = {"name": "synthetic", "users": 40, "items": 60, "mean_length": 9.0, "seed": 3}
MF = {
    "seed": 5,
    "rounds": 4,
    "data": DATA,
    "model": {"name": "mf", "dim": 4},
    "work": {"batch_size": 32, "negatives": 4, "optimizer": {"name": "sgd", "learning_rate": 0.5}},
    "channel": [{"name": "per_row_mean"}],
    "server": {"name": "adam", "learning_rate": 0.05},
    "cohort": {"name": "uniform", "size": 12},
    "evaluation": {"every": 4},
}
RING = {
    "channel": [
        {"name": "weighted_mean", "by": "uniform"},
        {"name": "clip", "bound": 1.0},
        {"name": "ring", "fraction_bits": 14},
    ],
    "server": {"name": "sgd", "learning_rate": 0.5, "lazy": False},
}
SILOS = {"data": {**DATA, "clients": "silo", "silos": 5}, "cohort": {"name": "everyone"}}


def write_ratings(path, users, items, lengths):
    """A file of ratings and times. lengths: (least, most + 1) rows of a user."""
    random = np.random.default_rng(0)
    rows = [
        f"u{user},i{item},{random.integers(1, 6)},{1_600_000_000 + random.integers(1_000_000)}"
        for user in range(users)
        for item in random.choice(items, random.integers(*lengths), replace=False)
    ]
    path.write_text("user,item,rating,time\n" + "\n".join(rows) + "\n")


def make_parts(table):
    """(the configuration, what the simulator makes of it)."""
    config = make_config(table)
    return config, build_from_config(config, load_data(config.data))


def deal_clients(parts, number):
    """The clients of each node: they lie apart, and differ in length."""
    return [np.arange(parts.data.num_clients)[node::number] for node in range(number)]


def open_federation(
    folder, table, number=5, keys="reproducible", say=print, kinds=None, secure=False, shares=False, compile_once=True
):
    """(server, {node: Node}, the simulator's parts). kinds: see `PublicFacts`; None: those of the simulator. secure:
    messages are added by a secure sum. shares: whose noise nodes add in shares. compile_once: all nodes run the program
    of the first, for time; a node makes the same from its own configuration."""
    config, parts = make_parts(table)
    chosen = parts.shapes.kinds if kinds is None else kinds
    facts = find_facts(parts.data.population, chosen, parts.data.source.items)._replace(noise_shares=shares)
    nodes = {}
    for node in range(number if secure else 0):
        place = folder / str(node)
        place.mkdir(parents=True, exist_ok=True)
        facts = facts._replace(keys=(*facts.keys, make_node_identity(place)))
    for node, clients in enumerate(deal_clients(parts, number)):
        place = folder / str(node)
        place.mkdir(parents=True, exist_ok=True)
        write_node_data(place / "data.npz", parts.data.population, clients)
        nodes[node] = open_node(place, config, facts, keys)
        if compile_once:
            nodes[node] = nodes[node]._replace(program=nodes[0].program)
    return open_server(config, facts, config.seed, say), nodes, parts


def direct_exchange(nodes, lost=lambda round, node: None):
    """Requests go to the nodes as function calls. lost(round, node): "request" or "reply" where one does not arrive."""

    def exchange(requests):
        replies = {}
        for node, data in requests.items():
            head = read_envelopes(data)[0]
            gone = lost(head.round, node) if head.kind == EnvelopeKind.PLAN else None
            if gone != "request":
                replies[node] = make_reply(nodes[node], data)
            if gone == "reply":
                del replies[node]
        return replies

    return exchange


def run_federation(server, nodes, rounds, exchange=None):
    """Runs rounds; returns the figures of each."""
    exchange = exchange or direct_exchange(nodes)
    members = match_nodes(server.party, [*nodes], {}, exchange, server.say)
    return [run_server_round(server, members, exchange) for _ in range(rounds)]


def read_states(server, nodes, parts):
    """What all clients keep [clients, ...], as the server has counted it."""
    found = [None] * parts.data.num_clients
    for node in nodes.values():
        for client in node.ids.tolist():
            saved = read_client(node.folder, client, node.like)
            if saved is None:
                found[client] = jax.tree.map(lambda x: np.asarray(x[0]), node.first_states(np.array([client])))
            else:
                found[client] = saved.settle(int(server.counted[client])).state
    return jax.tree.map(lambda *x: np.stack(x), *found)


def simulate(parts, rounds, seed, absent=lambda round: ()):
    """(the simulator's state after so many rounds, the figures of each). absent(round): clients that do not report."""
    state, figures = initial_arrays(parts, seed)["state"], []
    key = make_run_keys(seed).rounds
    for round in range(rounds):
        cohort = prepare_round(parts, seed, round).cohort
        cohort = cohort._replace(present=cohort.present & ~np.isin(cohort.ids, list(absent(round))))
        state, info = parts.algorithm.step(state, cohort, key)
        figures.append(jax.device_get(info))
    return jax.device_get(state), figures


def compare_with_simulator(server, nodes, parts, want, exact):
    """Asserts that server and nodes hold what the simulator does."""
    got = jax.device_get(server.state)
    mine = got.shared, got.opt, got.channel, read_states(server, nodes, parts)
    theirs = want.shared, want.opt, want.channel, want.client_states
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        largest = 0 if exact else 1e-6 * np.abs(b).max(initial=1)
        np.testing.assert_allclose(a, b, rtol=0, atol=largest)
