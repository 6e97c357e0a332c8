"""The server's side of the secure sum of a round: it hears masked vectors, and learns their sum."""

from secrets import token_bytes
from typing import NamedTuple

import numpy as np

from jaxfed.core.tables import num_rows
from jaxfed.core.types import Tree
from jaxfed.core.wire import open_shapes, unpack_message
from jaxfed.deployment.envelope import (
    NODE,
    Envelope,
    EnvelopeKind,
    pack_envelopes,
    read_distinct,
    read_envelopes,
    read_refusal,
    refuse_envelope,
)
from jaxfed.deployment.opened_server import (
    EMPTY_ROWS,
    Exchange,
    FederationServer,
    HeardMessages,
    RoundRequest,
    make_public_key,
)
from jaxfed.deployment.party import DeployedPieces
from jaxfed.deployment.secure_node import (
    MASK_STEP,
    NONCE,
    SessionStart,
    make_session_terms,
    name_session,
    pack_session_start,
)
from jaxfed.secagg.protocol import ROUNDS, Server


class SecureAnswers(NamedTuple):
    """What nodes have said in a secure sum so far; both are filled as answers come."""

    roster_indices: dict[int, int]  # node -> its index in the roster
    clients: dict[int, np.ndarray]  # node -> whose messages its vector holds


def sum_securely(
    server: FederationServer, request: RoundRequest, requests: dict[int, bytes], exchange: Exchange
) -> HeardMessages:
    """The sum of a round's messages, as the message of one client, and messages of zeros of the others.

    Nodes that are lost on the way are lost for the round, and their masks are taken back. A reply that cannot be read
    is left out, as if it had not come. Where too few stay, or a signed step of a node is wrong, nobody has reported,
    and a line says why.

    Args:
        server: The server.
        request: The round.
        requests: {node: what it is sent to begin with}, of all nodes: those whose clients are not asked bring zeros.
        exchange: See `run_server_round`.
    """
    heard, cohort = HeardMessages({}, set()), request.ids[request.ids < server.party.plan.num_clients]
    key = make_public_key(server, request.number)
    start = pack_session_start(SessionStart(token_bytes(NONCE), request.digest, key, cohort))
    session = name_session(server.party.digest, request.number, start)
    first = pack_envelopes([Envelope(EnvelopeKind.SECURE, request.number, 0, session, 0, start)])
    answers, protocol = SecureAnswers({}, {}), Server(make_session_terms(server.party, session, len(cohort)))
    asked = {node: data + first for node, data in requests.items()}
    try:
        for number, step in enumerate(ROUNDS):
            replies = exchange(asked)
            messages, malformed = read_steps(server, request, session, number, replies, answers)
            nodes = {index: node for node, index in answers.roster_indices.items()}
            arrived = [nodes[index] for index in messages] if number == MASK_STEP else []
            for node in [*malformed, *arrived]:  # any other node is lost: its clients count as dropped out
                heard.answered.update(request.asked.get(node, EMPTY_ROWS).tolist())
            inbox = getattr(protocol, step)(messages)
            if step == ROUNDS[-1]:
                return spread_sum(server.party, inbox, answers, protocol.survivors, heard)
            asked = {
                nodes[index]: pack_envelopes(
                    [Envelope(EnvelopeKind.SECURE, request.number, number + 1, session, 0, message)]
                )
                for index, message in inbox.items()
            }
    except ValueError as error:
        server.say(f"round {request.number + 1}: the secure sum failed: {error}")
    return heard


def read_steps(
    server: FederationServer,
    request: RoundRequest,
    session: bytes,
    number: int,
    replies: dict[int, bytes],
    answers: SecureAnswers,
) -> tuple[dict[int, bytes], list[int]]:
    """({index in the roster: message} of a step, the nodes that said something malformed). A malformed reply is left
    out whole, as if it had not come, and logged."""
    messages: dict[int, bytes] = {}
    malformed = []
    for node, data in sorted(replies.items()):
        try:
            step, clients = read_step_reply(server, request, session, number, node, read_envelopes(data))
            if step is None:
                continue
            taken = {index for other, index in answers.roster_indices.items() if other != node}
            refuse_envelope(step.rows in taken or step.rows >= len(server.party.roster), "of another node")
            refuse_envelope(number > 0 and answers.roster_indices.get(node) != step.rows, "of another node")
        except ValueError as error:
            server.say(f"round {request.number + 1}: node {node}: {error}")
            malformed.append(node)
            continue
        if number == 0:
            if clients is None:  # who does not say whose messages it brings is not in the sum
                continue
            answers.roster_indices[node], answers.clients[node] = step.rows, clients
        messages[step.rows] = step.payload
    return messages, malformed


def read_step_reply(
    server: FederationServer,
    request: RoundRequest,
    session: bytes,
    number: int,
    node: int,
    envelopes: list[Envelope],
) -> tuple[Envelope | None, np.ndarray | None]:
    """(a node's step, whose messages its vector holds); None for what it does not say. Raises ValueError for a reply
    with anything that is refused."""
    step, clients = None, None
    for each in envelopes:
        if each.kind == EnvelopeKind.REFUSED:
            who = "" if each.client == NODE else f", client {each.client}"
            server.say(f"round {request.number + 1}: node {node}{who}: {read_refusal(each)}")
            continue
        refuse_envelope(each.round != request.number, f"of round {each.round + 1}")
        if each.kind == EnvelopeKind.READY and number == 0 and clients is None:
            clients = read_distinct(each.payload, server.party.plan.num_clients)
            strangers = np.setdiff1d(clients, request.asked.get(node, EMPTY_ROWS))
            refuse_envelope(len(strangers) > 0, "of a client that was not asked")
            refuse_envelope(len(clients) > 0 and each.digest != request.digest, "of another model")
            continue
        refuse_envelope(each.kind != EnvelopeKind.SECURE or step is not None, f"kind {each.kind.name} is not expected")
        refuse_envelope((each.client, each.digest) != (number, session), "a step of another secure sum")
        step = each
    return step, clients


def spread_sum(
    party: DeployedPieces, total: np.ndarray, answers: SecureAnswers, survivors: list[int], heard: HeardMessages
) -> HeardMessages:
    """The sum as the message of the first client that is in it, and zeros of the others: they add up to it."""
    nodes = [node for node, index in answers.roster_indices.items() if index in survivors]
    clients = sorted(int(client) for node in nodes for client in answers.clients[node])
    for place, client in enumerate(clients):
        heard.messages[client] = read_total(party, total if place == 0 else np.zeros_like(total))
    return heard


def read_total(party: DeployedPieces, total: np.ndarray) -> tuple[Tree, np.ndarray]:
    """(a vector as a message, its rows)."""
    like, every, data = party.message, np.arange(party.size, dtype=np.int32), total.astype("<u4").tobytes()
    if not num_rows(open_shapes(like)):
        return unpack_message(data, like, 0, party.size)
    return unpack_message(every.tobytes() + data, like, party.size, party.size)
