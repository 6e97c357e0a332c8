"""Buffered rounds over a network (FedBuff: Nguyen et al. 2022): so many clients are always under way, and the server
moves whenever so many messages have come in, each of the model that its client was sent."""

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

REST = 20  # moments to wait before clients that are lost are asked again, where nobody else is left


class RequestQueue(NamedTuple):
    """How single requests reach nodes, each of which is answered when it is done.

    Args:
        send: Sends a request to a node, and returns a ticket that is like no other; None: it could not be sent.
        receive: Waits a moment, and gives back (ticket, reply) of what has come in; the reply of a node that failed, is
            gone or was too slow is None.
    """

    send: Callable[[int, bytes], Any]
    receive: Callable[[], list[tuple[Any, bytes | None]]]


class ClientTrip(NamedTuple):
    """A client under way."""

    client: int
    node: int
    round: int  # when it was asked; its batches and keys are of that
    version: int | None = None  # of the model that it was sent; None: it was only asked for its rows yet
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
    greeted: dict[int, int] = field(default_factory=dict)  # node -> the version at which it was last asked who it is
    hellos: dict[Any, int] = field(default_factory=dict)  # ticket -> node
    trips: dict[Any, ClientTrip] = field(default_factory=dict)  # by ticket
    inbox: list[tuple[Any, bytes | None]] = field(default_factory=list)
    heard: dict[int, tuple[ClientTrip, Any]] = field(default_factory=dict)  # client -> its trip, its message and rows
    resting: list[int] = field(default_factory=list)  # clients that were lost in this round
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
    """Nobody is under way. After a pause the clients that were are sent out anew, as the server draws them then.

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
        if not arrivals.inbox:  # who has come in is heard before others leave
            ask_nodes(server, arrivals)
            send_clients(server, arrivals)
        if not arrivals.inbox and not arrivals.trips and not arrivals.hellos:
            if open_round.arrived:
                break
            for _ in range(REST):
                arrivals.wait()
            open_round.idle[arrivals.resting] = True
            arrivals.resting = []
            continue
        arrivals.inbox = arrivals.inbox or arrivals.queue.receive()
        if arrivals.inbox:
            take_reply(server, arrivals, *arrivals.inbox.pop(0))
    return apply_round(server, arrivals, fill_round(plan, open_round))


def ask_nodes(server: FederationServer, arrivals: Arrivals) -> None:
    """Leaves out nodes that are gone, and asks those that have come who they are, once in a round."""
    there, version = {*arrivals.list_nodes()}, arrivals.open_round.version
    for known in (arrivals.members, arrivals.greeted):
        for node in known.keys() - there:
            del known[node]
    for node in sorted(there - arrivals.members.keys() - {*arrivals.hellos.values()}):
        if arrivals.greeted.get(node, -1) < version:
            arrivals.greeted[node] = version
            ticket = arrivals.queue.send(node, make_hello(server.party))
            if ticket is not None:
                arrivals.hellos[ticket] = node


def send_clients(server: FederationServer, arrivals: Arrivals) -> None:
    """Sends clients out, drawn uniformly among those that are idle at the nodes that are there, until enough are under
    way."""
    plan, open_round = arrivals.plan, arrivals.open_round
    node_of = {client: node for node, clients in arrivals.members.items() for client in clients.tolist()}
    there = np.isin(np.arange(plan.num_clients), [*node_of])
    while len(arrivals.trips) < plan.concurrency:
        ready = np.flatnonzero(open_round.idle & there)
        if not len(ready):
            return
        client = int(arrivals.random.choice(ready))
        arrivals.random.random()  # the simulator draws here whether it drops out: so both ask the same clients
        open_round.idle[client] = False
        trip = ClientTrip(client, node_of[client], open_round.version)
        if server.party.whole:
            send_model(server, arrivals, trip)
        else:
            asked = make_plan(server, trip.round, EMPTY_ROWS, trip.round, np.array([client], np.int32))
            send_request(server, arrivals, trip, pack_envelopes([asked]))


def send_request(server: FederationServer, arrivals: Arrivals, trip: ClientTrip, request: bytes) -> bool:
    """Sends a request of a trip; returns whether that worked. A client that cannot be reached is lost."""
    ticket = arrivals.queue.send(trip.node, request)
    if ticket is None:
        take_client(server, arrivals, trip, None)
        return False
    server.bytes_out += len(request)
    arrivals.trips[ticket] = trip
    return True


def send_model(server: FederationServer, arrivals: Arrivals, trip: ClientTrip) -> None:
    """Sends a client the model of now."""
    version = arrivals.open_round.version
    if not arrivals.model or arrivals.model[0] != version:
        arrivals.model = version, pack_model(server)
    client = np.array([trip.client], np.int32)
    asked = {trip.node: client}
    requests, request = make_requests(server, trip.round, client, asked, asked, arrivals.model[1])
    if send_request(server, arrivals, trip._replace(version=version, digest=request.digest), requests[trip.node]):
        arrivals.downloaded += request.downloaded[trip.client]


def take_reply(server: FederationServer, arrivals: Arrivals, ticket: Any, reply: bytes | None) -> None:
    """Takes what came in: who a node is, or what came of a client under way (its rows, on which it is sent the model,
    its message, or nothing)."""
    if ticket in arrivals.hellos:
        node = arrivals.hellos.pop(ticket)
        replies = {} if reply is None else {node: reply}
        arrivals.members = match_nodes(server.party, [node], arrivals.members, lambda _: replies, server.say)
        return
    if not (trip := arrivals.trips.pop(ticket, None)):
        return
    server.bytes_in += len(reply or b"")
    client = np.array([trip.client], np.int32)
    asked = {} if trip.version is None else {trip.node: client}
    request = RoundRequest(trip.round, client, asked, trip.digest, {})
    heard = read_replies(server, request, {trip.node: client}, {} if reply is None else {trip.node: reply})
    if trip.version is None and trip.client in server.wanted.get(trip.round, {}):
        send_model(server, arrivals, trip)
        return
    if reply is not None:
        arrivals.answered.add(trip.client)
    take_client(server, arrivals, trip, heard.messages.get(trip.client))


def take_client(server: FederationServer, arrivals: Arrivals, trip: ClientTrip, message: Any) -> None:
    """Takes a client's message into the round; None, or one of a model that is too old: the client is lost."""
    server.wanted.get(trip.round, {}).pop(trip.client, None)
    sent = trip.round if trip.version is None else trip.version
    if take_arrival(arrivals.plan, arrivals.open_round, trip.client, sent, message is None):
        arrivals.heard[trip.client] = trip, message
        return
    arrivals.open_round.idle[trip.client] = False
    arrivals.resting.append(trip.client)
    if message is not None:  # it came too late: as one that drops out
        arrivals.answered.discard(trip.client)


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
    arrivals.open_round.idle[arrivals.resting] = True
    arrivals.heard, arrivals.answered, arrivals.resting, arrivals.downloaded = {}, set(), [], 0
    return info | known


def rows_of(messages: dict[int, tuple[Tree, np.ndarray]], client: int) -> np.ndarray:
    """The rows of a client's message; none where there is no message."""
    return messages[client][1] if client in messages else EMPTY_ROWS
