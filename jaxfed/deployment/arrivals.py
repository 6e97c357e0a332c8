"""Buffered rounds over a network (FedBuff: Nguyen et al. 2022): so many clients are always under way, and the server
moves whenever so many messages have come in, each of the model that its client was sent."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxfed.core.streams import Stream, host_rng
from jaxfed.core.types import Tree
from jaxfed.deployment.coordinator import make_plan, make_requests
from jaxfed.deployment.envelope import pack_envelopes
from jaxfed.deployment.hearing import read_replies, sum_and_move
from jaxfed.deployment.opened_server import EMPTY_ROWS, FederationServer, HeardMessages, RoundRequest
from jaxfed.sampling.buffered_rounds import BufferedPlan, FilledRound, OpenRound, fill_round, take_arrival


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
    downloaded: int = 0  # bytes


@dataclass
class Arrivals:
    """What is under way between two rounds. `open_arrivals` makes it."""

    plan: BufferedPlan
    queue: RequestQueue
    open_round: OpenRound
    random: np.random.Generator
    trips: dict[Any, ClientTrip] = field(default_factory=dict)  # by ticket
    inbox: list[tuple[Any, bytes | None]] = field(default_factory=list)
    heard: dict[int, tuple[ClientTrip, Any]] = field(default_factory=dict)  # client -> its trip, its message and rows
    answered: set[int] = field(default_factory=set)  # clients of this round of which something came, sound or not
    downloaded: int = 0  # bytes of the model that were sent in this round


def open_arrivals(server: FederationServer, queue: RequestQueue) -> Arrivals:
    """Nobody is under way. After a pause the clients that were are sent out anew, as the server draws them then."""
    assert server.party.buffered
    plan, version = server.party.buffered, int(server.state.round)
    idle = np.ones(plan.num_clients, bool)
    random = host_rng(server.seed, Stream.ARRIVALS, version)
    return Arrivals(plan, queue, OpenRound(idle, version), random)


def run_buffered_round(server: FederationServer, arrivals: Arrivals, members: dict[int, np.ndarray]) -> dict[str, Any]:
    """One round: sends clients out and hears what comes, until the round is full; then the model moves.

    A round also ends when as many clients are lost as would fill it, or nobody is left to send out.

    Args:
        server: It is changed.
        arrivals: Who is under way; it is changed.
        members: Node -> the clients that it holds.

    Returns:
        Figures of the round, as in the simulator.
    """
    plan, open_round = arrivals.plan, arrivals.open_round
    while len(open_round.arrived) < plan.size and len(open_round.lost) < plan.size:
        if not arrivals.inbox:  # who has come in is heard before others leave
            send_clients(server, arrivals, members)
        if not arrivals.inbox and not arrivals.trips:
            break
        arrivals.inbox = arrivals.inbox or arrivals.queue.receive()
        if arrivals.inbox:
            ticket, reply = arrivals.inbox.pop(0)
            server.bytes_in += len(reply or b"")
            if trip := arrivals.trips.pop(ticket, None):
                hear_client(server, arrivals, trip, reply)
    return end_round(server, arrivals, fill_round(plan, open_round))


def send_clients(server: FederationServer, arrivals: Arrivals, members: dict[int, np.ndarray]) -> None:
    """Sends clients out, drawn uniformly among those that are idle at the nodes that are there, until enough are under
    way."""
    plan, open_round = arrivals.plan, arrivals.open_round
    node_of = {client: node for node, clients in members.items() for client in clients.tolist()}
    there = np.isin(np.arange(plan.num_clients), [*node_of])
    while len(arrivals.trips) < plan.concurrency and len(open_round.lost) < plan.size:
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


def send_request(server: FederationServer, arrivals: Arrivals, trip: ClientTrip, request: bytes) -> None:
    """Sends a request of a trip. A client that cannot be reached is lost."""
    ticket = arrivals.queue.send(trip.node, request)
    if ticket is None:
        take_arrival(arrivals.plan, arrivals.open_round, trip.client, trip.round, True)
        return
    server.bytes_out += len(request)
    arrivals.trips[ticket] = trip


def send_model(server: FederationServer, arrivals: Arrivals, trip: ClientTrip) -> None:
    """Sends a client the model of now."""
    client = np.array([trip.client], np.int32)
    asked = {trip.node: client}
    requests, request = make_requests(server, trip.round, client, asked, asked)
    downloaded = request.downloaded[trip.client]
    arrivals.downloaded += downloaded
    version = arrivals.open_round.version
    sent = trip._replace(version=version, digest=request.digest, downloaded=downloaded)
    send_request(server, arrivals, sent, requests[trip.node])


def hear_client(server: FederationServer, arrivals: Arrivals, trip: ClientTrip, reply: bytes | None) -> None:
    """Takes what came of a client under way: its rows, on which it is sent the model, its message, or nothing."""
    client = np.array([trip.client], np.int32)
    asked = {} if trip.version is None else {trip.node: client}
    request = RoundRequest(trip.round, client, asked, trip.digest, {})
    replies = {} if reply is None else {trip.node: reply}
    heard = read_replies(server, request, {trip.node: client}, replies)
    arrivals.answered |= heard.answered
    rows = server.wanted.get(trip.round, {})
    if trip.version is None and trip.client in rows:
        send_model(server, arrivals, trip)
        return
    rows.pop(trip.client, None)
    message = heard.messages.get(trip.client)
    sent = trip.round if trip.version is None else trip.version
    if take_arrival(arrivals.plan, arrivals.open_round, trip.client, sent, message is None):
        arrivals.heard[trip.client] = trip, message


def end_round(server: FederationServer, arrivals: Arrivals, filled: FilledRound) -> dict[str, Any]:
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
    arrivals.heard, arrivals.answered, arrivals.downloaded = {}, set(), 0
    return info | known


def rows_of(messages: dict[int, tuple[Tree, np.ndarray]], client: int) -> np.ndarray:
    """The rows of a client's message; none where there is no message."""
    return messages[client][1] if client in messages else EMPTY_ROWS
