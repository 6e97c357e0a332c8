"""Buffered asynchronous rounds over a network (FedBuff, Nguyen et al. 2022).

`concurrency` clients train at any time, and the server updates the model whenever `size` messages have arrived. Each
message is an update of the model version that its client was sent.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxfed.core.streams import Stream, host_rng
from jaxfed.core.types import Tree
from jaxfed.deployment.coordinator import PackedModel, make_hello, make_plan, make_requests, match_nodes, pack_model
from jaxfed.deployment.envelope import pack_envelopes
from jaxfed.deployment.hearing import read_replies, sum_and_move
from jaxfed.deployment.opened_server import EMPTY_ROWS, FederationServer, HeardMessages, RoundRequest
from jaxfed.sampling.buffered_rounds import BufferedPlan, FilledRound, OpenRound, fill_round, take_arrival

RETRY_WAITS = 20  # calls of `Network.wait` before clients that are lost are asked again, where nobody else is left


class RequestQueue(NamedTuple):
    """How single requests reach nodes, each of which is answered when it is done.

    Args:
        send: Sends a request to a node, and returns a ticket that is like no other; None: it could not be sent.
        receive: Waits a moment, and gives back (ticket, reply) of what has come in; the reply of a node that failed, is
            gone or was too slow is None.
    """

    send: Callable[[int, bytes], Any]
    receive: Callable[[], list[tuple[Any, bytes | None]]]


class ClientInFlight(NamedTuple):
    """A client under way."""

    client: int
    node: int
    round: int  # when it was asked; its batches and keys are of that
    version: int | None = None  # of the model that it was sent; None: so far it was only asked for its rows
    digest: bytes = b""  # of that model


@dataclass
class Arrivals:
    """What is under way between two rounds. `open_arrivals` makes it."""

    plan: BufferedPlan
    queue: RequestQueue
    list_nodes: Callable[[], Iterable[int]]
    wait: Callable[[], None]
    open_round: OpenRound
    random: np.random.Generator
    members: dict[int, np.ndarray]  # node -> the clients that it holds
    hello_versions: dict[int, int] = field(
        default_factory=dict
    )  # node -> the version at which it was last asked who it is
    hellos: dict[Any, int] = field(default_factory=dict)  # ticket -> node
    in_flight: dict[Any, ClientInFlight] = field(default_factory=dict)  # by ticket
    unread_replies: list[tuple[Any, bytes | None]] = field(default_factory=list)
    heard: dict[int, tuple[ClientInFlight, Any]] = field(default_factory=dict)  # by client; its message and rows
    lost_clients: list[int] = field(default_factory=list)  # clients that were lost in this round
    answered: set[int] = field(default_factory=set)  # clients of this round of which something came, sound or not
    downloaded: int = 0  # bytes of the model that were sent in this round
    model: tuple[int, PackedModel] | None = None  # (a version, what is sent of it)


def open_arrivals(
    server: FederationServer,
    queue: RequestQueue,
    list_nodes: Callable[[], Iterable[int]],
    wait: Callable[[], None],
    members: dict[int, np.ndarray],
) -> Arrivals:
    """The state between two rounds with no client in flight. After a restart the server draws anew among all clients,
    and replies to requests of before are ignored.

    Args:
        server: Between two rounds.
        queue: How nodes are reached.
        list_nodes: Who is there now.
        wait: Waits a moment.
        members: The nodes that are known already, and their clients.
    """
    assert server.party.buffered
    plan, version = server.party.buffered, int(server.state.round)
    open_round = OpenRound(np.ones(plan.num_clients, bool), version)
    random = host_rng(server.seed, Stream.ARRIVALS, version)
    return Arrivals(plan, queue, list_nodes, wait, open_round, random, dict(members))


def run_buffered_round(server: FederationServer, arrivals: Arrivals) -> dict[str, Any]:
    """One round: sends clients out and hears what comes, until the round is full; then the model moves.

    Who is lost is not asked again in this round. Where nobody else is left, a round ends with those who came in. If
    nobody did, the server waits, and asks again.

    Args:
        server: It is changed.
        arrivals: Who is under way; it is changed.

    Returns:
        Figures of the round, as in the simulator.
    """
    plan, open_round = arrivals.plan, arrivals.open_round
    while len(open_round.arrived) < plan.size:
        if not arrivals.unread_replies:  # who has come in is heard before others leave
            ask_nodes(server, arrivals)
            send_clients(server, arrivals)
        if not arrivals.unread_replies and not arrivals.in_flight and not arrivals.hellos:
            if open_round.arrived:
                break
            for _ in range(RETRY_WAITS):
                arrivals.wait()
            open_round.idle[arrivals.lost_clients] = True
            arrivals.lost_clients = []
            continue
        arrivals.unread_replies = arrivals.unread_replies or arrivals.queue.receive()
        if arrivals.unread_replies:
            take_reply(server, arrivals, *arrivals.unread_replies.pop(0))
    return apply_round(server, arrivals, fill_round(plan, open_round))


def ask_nodes(server: FederationServer, arrivals: Arrivals) -> None:
    """Leaves out nodes that are gone, and asks those that have come who they are, once in a round."""
    there, version = {*arrivals.list_nodes()}, arrivals.open_round.version
    for known in (arrivals.members, arrivals.hello_versions):
        for node in known.keys() - there:
            del known[node]
    for node in sorted(there - arrivals.members.keys() - {*arrivals.hellos.values()}):
        if arrivals.hello_versions.get(node, -1) < version:
            arrivals.hello_versions[node] = version
            ticket = arrivals.queue.send(node, make_hello(server.party))
            if ticket is not None:
                arrivals.hellos[ticket] = node


def send_clients(server: FederationServer, arrivals: Arrivals) -> None:
    """Sends clients out, drawn uniformly among those that are idle at the nodes that are there, until enough are under
    way."""
    plan, open_round = arrivals.plan, arrivals.open_round
    node_of = {client: node for node, clients in arrivals.members.items() for client in clients.tolist()}
    there = np.isin(np.arange(plan.num_clients), [*node_of])
    while len(arrivals.in_flight) < plan.concurrency:
        ready = np.flatnonzero(open_round.idle & there)
        if not len(ready):
            return
        client = int(arrivals.random.choice(ready))
        arrivals.random.random()  # the simulator draws here whether it drops out: so both ask the same clients
        open_round.idle[client] = False
        sender = ClientInFlight(client, node_of[client], open_round.version)
        if server.party.whole:
            send_model(server, arrivals, sender)
        else:
            asked = make_plan(server, sender.round, EMPTY_ROWS, sender.round, np.array([client], np.int32))
            send_request(server, arrivals, sender, pack_envelopes([asked]))


def send_request(server: FederationServer, arrivals: Arrivals, sender: ClientInFlight, request: bytes) -> bool:
    """Sends a client's request; returns whether that worked. A client that cannot be reached is lost."""
    ticket = arrivals.queue.send(sender.node, request)
    if ticket is None:
        take_client(server, arrivals, sender, None)
        return False
    server.bytes_out += len(request)
    arrivals.in_flight[ticket] = sender
    return True


def send_model(server: FederationServer, arrivals: Arrivals, sender: ClientInFlight) -> None:
    """Sends a client the model of now."""
    version = arrivals.open_round.version
    if not arrivals.model or arrivals.model[0] != version:
        arrivals.model = version, pack_model(server)
    client = np.array([sender.client], np.int32)
    asked = {sender.node: client}
    requests, request = make_requests(server, sender.round, client, asked, asked, arrivals.model[1])
    if send_request(server, arrivals, sender._replace(version=version, digest=request.digest), requests[sender.node]):
        arrivals.downloaded += request.downloaded[sender.client]


def take_reply(server: FederationServer, arrivals: Arrivals, ticket: Any, reply: bytes | None) -> None:
    """Takes what came in: who a node is, or what came of a client under way (its rows, on which it is sent the model,
    its message, or nothing)."""
    if ticket in arrivals.hellos:
        node = arrivals.hellos.pop(ticket)
        replies = {} if reply is None else {node: reply}
        arrivals.members = match_nodes(server.party, [node], arrivals.members, lambda _: replies, server.say)
        return
    if not (sender := arrivals.in_flight.pop(ticket, None)):
        return
    server.bytes_in += len(reply or b"")
    client = np.array([sender.client], np.int32)
    asked = {} if sender.version is None else {sender.node: client}
    request = RoundRequest(sender.round, client, asked, sender.digest, {})
    heard = read_replies(server, request, {sender.node: client}, {} if reply is None else {sender.node: reply})
    if sender.version is None and sender.client in server.wanted.get(sender.round, {}):
        send_model(server, arrivals, sender)
        return
    if reply is not None:
        arrivals.answered.add(sender.client)
    take_client(server, arrivals, sender, heard.messages.get(sender.client))


def take_client(server: FederationServer, arrivals: Arrivals, sender: ClientInFlight, message: Any) -> None:
    """Takes a client's message into the round; None, or one of a model that is too old: the client is lost."""
    server.wanted.get(sender.round, {}).pop(sender.client, None)
    sent = sender.round if sender.version is None else sender.version
    if take_arrival(arrivals.plan, arrivals.open_round, sender.client, sent, message is None):
        arrivals.heard[sender.client] = sender, message
        return
    arrivals.open_round.idle[sender.client] = False
    arrivals.lost_clients.append(sender.client)
    if message is not None:  # it came too late: as one that drops out
        arrivals.answered.discard(sender.client)


def apply_round(server: FederationServer, arrivals: Arrivals, filled: FilledRound) -> dict[str, Any]:
    """Moves the model by the messages of a round, and notes whose were counted."""
    number, under_way = int(server.state.round), server.wanted
    messages = {client: message for client, (_, message) in arrivals.heard.items()}
    came = [client for client in filled.ids.tolist() if client < arrivals.plan.num_clients]
    ages = dict(zip(filled.ids.tolist(), filled.ages.tolist(), strict=True))
    server.wanted = {number: {client: rows_of(messages, client) for client in came}}
    request = RoundRequest(number, filled.ids, {0: np.array(came, np.int32)}, b"", {})
    state, info = sum_and_move(server, request, HeardMessages(messages, arrivals.answered, ages))
    server.state = jax.block_until_ready(state)
    server.wanted = {round: rows for round, rows in under_way.items() if rows}
    for client in filled.ids[np.asarray(info["clients/present"])].tolist():
        server.counted[client] = arrivals.heard[client][0].round
    age = float(filled.ages[filled.present].mean()) if filled.present.any() else float("nan")
    known = {"clients/ids": filled.ids, "clients/age": age, "bytes/model": arrivals.downloaded}
    arrivals.open_round.idle[arrivals.lost_clients] = True
    arrivals.heard, arrivals.answered, arrivals.lost_clients, arrivals.downloaded = {}, set(), [], 0
    return info | known


def rows_of(messages: dict[int, tuple[Tree, np.ndarray]], client: int) -> np.ndarray:
    """The rows of a client's message; none where there is no message."""
    return messages[client][1] if client in messages else EMPTY_ROWS
