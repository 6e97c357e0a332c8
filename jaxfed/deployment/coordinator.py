"""What the server asks of nodes in a round. How bytes travel is not its matter: `exchange` is Flower, or a function in
tests."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxfed.core.link import broadcast_state
from jaxfed.core.tables import num_rows
from jaxfed.core.types import Tree
from jaxfed.core.wire import ID, open_shapes, pack_message
from jaxfed.deployment.envelope import (
    NODE,
    OTHER_CONFIG,
    Envelope,
    EnvelopeKind,
    RoundPlan,
    digest_model_bytes,
    pack_envelopes,
    pack_plan,
    read_distinct,
    read_envelopes,
    read_refusal,
    refuse_envelope,
)
from jaxfed.deployment.hearing import read_replies, sum_and_move
from jaxfed.deployment.opened_server import EMPTY_ROWS, Exchange, FederationServer, RoundRequest, make_public_key
from jaxfed.deployment.party import DeployedPieces, divide_tables
from jaxfed.deployment.secure_server import sum_securely
from jaxfed.sampling.cohort import sample_cohort


def run_server_round(server: FederationServer, members: dict[int, np.ndarray], exchange: Exchange) -> dict[str, Any]:
    """One round: asks the nodes, hears what comes back in time, and moves the model.

    Args:
        server: It is changed.
        members: Node -> the clients that it holds.
        exchange: Sends requests to nodes and gives back the replies that came by the deadline.

    Returns:
        Figures of the round, as in the simulator.
    """
    number = int(server.state.round)
    ids = sample_cohort(server.party.sampler, server.seed, number)[0]
    asked = {node: np.intersect1d(ids, clients).astype(np.int32) for node, clients in members.items()}
    if not server.party.whole:
        asked = ask_missing_rows(server, number, asked, members, exchange)
    asked = {node: clients for node, clients in asked.items() if len(clients)}
    requests, request = make_requests(server, number, ids, asked, members)
    if server.party.roster:
        for node in members.keys() - requests.keys():  # which bring zeros
            nobody = make_plan(server, number, EMPTY_ROWS, number + 1, EMPTY_ROWS)
            requests[node] = pack_envelopes([nobody])
        heard = sum_securely(server, request, requests, lambda asked: count_exchange(server, asked, exchange))
    else:
        heard = read_replies(server, request, members, count_exchange(server, requests, exchange))
    state, info = sum_and_move(server, request, heard)
    server.state = state
    present = np.asarray(info["clients/present"])
    server.counted[ids[present]] = number
    server.wanted = {round: rows for round, rows in server.wanted.items() if round > number}
    return info | {"clients/ids": ids, "bytes/model": sum(request.downloaded.values())}


def count_exchange(server: FederationServer, requests: dict[int, bytes], exchange: Exchange) -> dict[int, bytes]:
    """Sends requests; counts the bytes both ways."""
    server.bytes_out += sum(map(len, requests.values()))
    replies = exchange(requests) if requests else {}
    server.bytes_in += sum(map(len, replies.values()))
    return replies


def make_hello(party: DeployedPieces) -> bytes:
    """What a node is asked first: who it is, and whether it has the same configuration."""
    return pack_envelopes([Envelope(EnvelopeKind.HELLO, 0, NODE, party.digest)])


def match_nodes(
    party: DeployedPieces,
    nodes: list[int],
    known: dict[int, np.ndarray],
    exchange: Exchange,
    say: Callable[[str], None],
) -> dict[int, np.ndarray]:
    """The clients of each node that has the same configuration, those that are `known` among them. A client that two
    nodes claim belongs to the first."""
    hello = make_hello(party)
    members = dict(known)
    taken = np.zeros(party.plan.num_clients, bool)
    for clients in known.values():
        taken[clients] = True
    for node, reply in sorted(exchange(dict.fromkeys(nodes, hello)).items()):
        try:
            found = read_envelopes(reply)
            if len(found) == 1 and found[0].kind == EnvelopeKind.REFUSED:
                raise ValueError(read_refusal(found[0]))
            refuse_envelope(len(found) != 1 or found[0].kind != EnvelopeKind.HELLO, "this is no answer to a hello")
            refuse_envelope(found[0].digest != party.digest, f"it has {OTHER_CONFIG}")
            clients = read_distinct(found[0].payload, party.plan.num_clients)
            refuse_envelope(not len(clients), "a node without clients")
            if taken[clients].any():
                raise ValueError(f"it claims client {clients[taken[clients]][0]}, whom another node holds")
        except ValueError as error:
            say(f"node {node} is left out: {error}")
            continue
        taken[clients] = True
        members[node] = clients
    return members


def find_coming(server: FederationServer, number: int, clients: np.ndarray) -> np.ndarray:
    """Which of a node's clients are asked in the next round, and whose rows are needed then."""
    if server.party.whole or server.party.buffered or number + 1 >= server.rounds:
        return np.zeros(0, np.int32)
    return np.intersect1d(sample_cohort(server.party.sampler, server.seed, number + 1)[0], clients).astype(np.int32)


def make_plan(server: FederationServer, number: int, clients: np.ndarray, next: int, coming: np.ndarray) -> Envelope:
    """What a node is told of a round."""
    key, slots = make_public_key(server, number), server.party.sampler.slots
    plan = RoundPlan(key, slots, next, clients, server.counted[clients], coming)
    return Envelope(EnvelopeKind.PLAN, number, NODE, server.party.digest, 0, pack_plan(plan))


def ask_missing_rows(
    server: FederationServer,
    number: int,
    asked: dict[int, np.ndarray],
    members: dict[int, np.ndarray],
    exchange: Exchange,
) -> dict[int, np.ndarray]:
    """Asks which rows clients hold where that did not come with the round before; returns the clients of whom it is
    known."""
    known = server.wanted.setdefault(number, {})
    missing = {node: np.array([c for c in ids if c not in known], np.int32) for node, ids in asked.items()}
    nobody = np.zeros(0, np.int32)
    requests = {
        node: pack_envelopes([make_plan(server, number, nobody, number, ids)])
        for node, ids in missing.items()
        if len(ids)
    }
    request = RoundRequest(number, nobody, {}, b"", {})
    read_replies(server, request, members, count_exchange(server, requests, exchange))
    return {node: np.array([c for c in ids if c in known], np.int32) for node, ids in asked.items()}


class PackedModel(NamedTuple):
    """A model as it is sent."""

    tables: list[Any]
    whole: bytes  # all of it: what its digest is of
    common: bytes  # what all clients are sent alike


def pack_model(server: FederationServer) -> PackedModel:
    """The model of now."""
    party = server.party
    sent = jax.device_get((server.state.shared, broadcast_state(party.channel, server.state.channel)))
    tables, others = divide_tables(sent)
    whole = pack_all_rows([*tables, *others], party.size)
    return PackedModel(tables, whole, whole if party.whole else pack_message(others, EMPTY_ROWS))


def make_requests(
    server: FederationServer,
    number: int,
    ids: np.ndarray,
    asked: dict[int, np.ndarray],
    members: dict[int, np.ndarray],
    model: PackedModel | None = None,
) -> tuple[dict[int, bytes], RoundRequest]:
    """What each node is sent: the plan, the model's parts for all, and the rows of each of its clients. model: what of
    it is packed already; None: it is packed."""
    party, model = server.party, model or pack_model(server)
    digest = digest_model_bytes(number, model.whole)
    common = Envelope(EnvelopeKind.COMMON, number, NODE, digest, 0, model.common)
    requests, downloaded = {}, {}
    for node, clients in asked.items():
        pieces = [make_plan(server, number, clients, number + 1, find_coming(server, number, members[node])), common]
        for client in clients.tolist():
            if not party.whole:
                rows = server.wanted[number][client]
                payload = pack_message(jax.tree.map(lambda x, rows=rows: x[rows], model.tables), rows)
                pieces.append(Envelope(EnvelopeKind.ROWS, number, client, digest, len(rows), payload))
            downloaded[client] = len(common.payload) + (0 if party.whole else len(pieces[-1].payload))
        requests[node] = pack_envelopes(pieces)
    return requests, RoundRequest(number, ids, asked, digest, downloaded)


def digest_model(party: DeployedPieces, shared: Tree, links: Tree, number: int) -> tuple[bytes, bytes]:
    """(SHA-256 of a round and what is sent in it, that as bytes)."""
    tables, others = divide_tables((shared, links))
    whole = pack_all_rows([*tables, *others], party.size)
    return digest_model_bytes(number, whole), whole


def pack_all_rows(tree: Tree, size: int) -> bytes:
    """A tree with all rows of its tables, whose ids need not be told."""
    packed = pack_message(tree, np.arange(size, dtype=np.int32))
    return packed[ID * size :] if num_rows(open_shapes(tree)) else packed
