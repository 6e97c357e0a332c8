"""A node in the secure sum of a round (`jaxfed.secagg.protocol`): its vector is the sum of its clients' messages.

Flower starts a process for each request, so that a session lies on the node's disk: the secret that its random numbers
come from, and the messages of the steps so far, which are played again before the next one. A step is answered once:
the same message again gives the same answer, and any other one is refused.
"""

import hmac
import json
import zipfile
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from secrets import token_bytes
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxfed.core.types import Sampler, Tree
from jaxfed.deployment.envelope import NODE, Envelope, EnvelopeKind, RoundPlan, read_distinct, refuse_envelope
from jaxfed.deployment.noise_shares import draw_noise_share
from jaxfed.deployment.opened_node import Node
from jaxfed.deployment.party import DeployedPieces
from jaxfed.deployment.roster import find_roster_index, find_threshold, read_node_identity
from jaxfed.secagg.protocol import ROUNDS, Party
from jaxfed.secagg.terms import SessionTerms
from jaxfed.training.run_dir import OWNER_ALONE, write_arrays, write_whole

NONCE, DIGEST, KEY = 16, 32, 8  # bytes
SESSION = "session.npz"
MASKED = "masked.json"  # the last round in which the node has sent a masked vector, and the SHA-256 of that
MASK_STEP = ROUNDS.index("mask")


class SessionStart(NamedTuple):
    """What a secure sum starts with. It is in the session's name, so that all nodes of a session know the same.

    Args:
        nonce: `NONCE` bytes that are new: a server that starts a round anew starts another session.
        model: SHA-256 of the model that clients are sent.
        key: uint32 [2]: public randomness of the round.
        cohort: int32 [n]: whom the round asks, ascending.
    """

    nonce: bytes
    model: bytes
    key: np.ndarray
    cohort: np.ndarray


class NodeSession(NamedTuple):
    """A node's part in one secure sum, as it lies on its disk."""

    id: bytes
    round: int
    secret: bytes  # of its random numbers
    vector: np.ndarray  # uint32: the sum of its clients' messages
    contributions: int  # how many messages that are
    asked: int  # clients in the cohort of the round
    steps: tuple[bytes, ...]  # what the server sent, of each step that was answered


def name_session(digest: bytes, round: int, start: bytes) -> bytes:
    """32 bytes that name the session of a round. digest: of the configuration. start: see `pack_session_start`."""
    return sha256(b"jaxfed session" + digest + round.to_bytes(8, "little") + start).digest()


def pack_session_start(start: SessionStart) -> bytes:
    """The payload of the first step of a session."""
    return start.nonce + start.model + start.key.astype("<u4").tobytes() + np.sort(start.cohort).astype("<i4").tobytes()


def read_session_start(payload: bytes, num_clients: int) -> SessionStart:
    """Undoes `pack_session_start`. Raises ValueError for what it would not write."""
    refuse_envelope(len(payload) < NONCE + DIGEST + KEY, "the start of a secure sum that is cut")
    head, key, cohort = payload[: NONCE + DIGEST], payload[NONCE + DIGEST :][:KEY], payload[NONCE + DIGEST + KEY :]
    clients = read_distinct(cohort, num_clients)
    refuse_envelope(bool((np.diff(clients) < 0).any()), "a cohort that is not ascending")
    return SessionStart(head[:NONCE], head[NONCE:], np.frombuffer(key, "<u4"), clients)


def find_least_cohort(sampler: Sampler) -> int:
    """How many clients a round must ask for a secure sum: as many as the configuration says, and where their number is
    random half of the expected ones; two at least."""
    exact = sampler.kind in ("everyone", "fixed", "cyclic")
    return max(2, sampler.size if exact else -(-sampler.size // 2))


def check_session_start(node: Node, plan: RoundPlan, request: Sequence[Envelope]) -> SessionStart:
    """What a request starts. Raises ValueError where a node must not add its messages to it, before it trains.

    A server that asked one client alone, of whom other nodes do not know, would read its message in the sum; one that
    sent each node another model would read in the sum whose rows moved.

    Args:
        node: The node.
        plan: The round's.
        request: Its envelopes: the plan, the model where a client is asked, and the first step.
    """
    party, head, first = node.party, request[0], request[-1]
    if first.kind != EnvelopeKind.SECURE or (first.round, first.client) != (head.round, 0):
        raise ValueError(
            "this node sends messages in secure sums only, and the plan starts none: the server's facts.json must have "
            "the same keys"
        )
    if first.digest != name_session(party.digest, first.round, first.payload):
        raise ValueError("the name of a secure sum is not that of what it starts with: start the round anew")
    if head.round >= node.rounds:
        raise ValueError(f"round {head.round + 1} of a federation of {node.rounds} rounds")
    start = read_session_start(first.payload, party.plan.num_clients)
    if not np.array_equal(np.intersect1d(start.cohort, node.ids), np.sort(plan.asked)):
        raise ValueError("the plan asks other clients of this node than the cohort of the secure sum")
    least = find_least_cohort(party.sampler)
    if len(start.cohort) < least:
        raise ValueError(
            f"a cohort of {len(start.cohort)} clients, where there must be {least}: the sum would hide too little"
        )
    if not np.array_equal(start.key, plan.key):
        raise ValueError("the plan has other public randomness than the secure sum")
    if len(plan.asked) and request[1].digest != start.model:
        raise ValueError("this node was sent another model than the one of the secure sum")
    return start


def count_message_numbers(message: Tree) -> int:
    """How many numbers a message of these shapes has."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(message))


def make_session_terms(party: DeployedPieces, session: bytes, asked: int) -> SessionTerms:
    """The terms of a session: of all nodes more than two thirds must stay to the end, and bring messages of at least
    half of the clients that are asked, and of two."""
    nodes, numbers = len(party.roster), count_message_numbers(party.message)
    return SessionTerms(
        session, party.roster, find_threshold(nodes), numbers, least_contributions=max(2, -(-asked // 2))
    )


def write_session(folder: Path, session: NodeSession) -> None:
    """Writes a session in the place of the one before."""
    arrays: dict[str, Any] = {f"step{n}": np.frombuffer(message, np.uint8) for n, message in enumerate(session.steps)}
    arrays |= {"id": np.frombuffer(session.id, np.uint8), "secret": np.frombuffer(session.secret, np.uint8)}
    facts = session.round, len(session.steps), session.contributions, session.asked
    arrays |= {"vector": session.vector, "facts": np.array(facts, np.int64)}
    write_arrays(folder / SESSION, arrays, OWNER_ALONE)


def read_session(folder: Path) -> NodeSession:
    """The session of a node. Raises ValueError where there is none, or it is damaged."""
    try:
        with np.load(folder / SESSION, allow_pickle=False) as file:
            round, count, contributions, asked = file["facts"].tolist()
            steps = tuple(file[f"step{n}"].tobytes() for n in range(count))
            return NodeSession(
                file["id"].tobytes(), round, file["secret"].tobytes(), file["vector"], contributions, asked, steps
            )
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile):
        raise ValueError("this node takes part in no secure sum") from None


def make_random(secret: bytes) -> Callable[[int], bytes]:
    """random(size), the same bytes in the same order each time: nobody without the secret can compute them."""
    count = 0

    def random(size: int) -> bytes:
        nonlocal count
        found = b""
        while len(found) < size:
            found += hmac.new(secret, count.to_bytes(8, "little"), sha256).digest()
            count += 1
        return found[:size]

    return random


def sum_ring_messages(party: DeployedPieces, messages: list[bytes]) -> np.ndarray:
    """uint32 [length]: the sum of messages of whole tables, modulo 2^32."""
    total = np.zeros(count_message_numbers(party.message), np.uint32)
    for message in messages:
        total += np.frombuffer(message, "<u4")
    return total


def open_session(node: Node, step: Envelope, asked: int, answers: list[Envelope]) -> list[Envelope]:
    """A node's first step: its public keys, and whose messages its vector holds. The messages themselves stay here.

    step: see `check_session_start`. asked: clients in the cohort. answers: of the node's clients, messages among them.
    """
    messages = [each for each in answers if each.kind == EnvelopeKind.MESSAGE]
    vector = sum_ring_messages(node.party, [each.payload for each in messages])
    if node.party.noise_shares:
        assert node.secret
        vector += draw_noise_share(node.party.channel, len(node.party.roster), len(vector), node.secret, step.digest)
    session = NodeSession(step.digest, step.round, token_bytes(32), vector, len(messages), asked, ())
    write_session(node.secure, session)
    clients = np.array([each.client for each in messages], "<i4")
    digest = messages[0].digest if messages else bytes(DIGEST)
    ready = Envelope(EnvelopeKind.READY, step.round, NODE, digest, 0, clients.tobytes())
    answer = answer_step(node, step._replace(payload=b""))
    return [ready, answer, *(each for each in answers if each.kind != EnvelopeKind.MESSAGE)]


def answer_step(node: Node, step: Envelope) -> Envelope:
    """A node's answer to a step of the session that it is in.

    Raises ValueError for a step that it must not answer: of another session, out of order, a second time with other
    words, or the mask of a second session of one round, from which its vector could be told. A step that the protocol
    refuses ends the session: there is no second try.
    """
    session, number = read_session(node.secure), step.client
    if (step.digest, step.round) != (session.id, session.round):
        raise ValueError("a step of another secure sum than the one that this node is in")
    if number > len(session.steps) or number >= len(ROUNDS):
        raise ValueError(f"step {number} of a secure sum out of order")
    if number < len(session.steps) and session.steps[number] != step.payload:
        raise ValueError(f"step {number} of a secure sum a second time, with other words")
    member = join_session(node, session)
    for name, message in zip(ROUNDS, session.steps[:number], strict=False):
        getattr(member, name)(message)
    try:
        answer = getattr(member, ROUNDS[number])(step.payload)
    except ValueError:
        (node.secure / SESSION).unlink()
        raise
    if number == len(session.steps):
        if number == MASK_STEP:
            note_masked_round(node, session.round, sha256(answer).hexdigest())
        write_session(node.secure, session._replace(steps=(*session.steps, step.payload)))
    return Envelope(EnvelopeKind.SECURE, step.round, number, session.id, member.id, answer)


def join_session(node: Node, session: NodeSession) -> Party:
    """The node as a party of its session, before the steps that it has answered."""
    identity = read_node_identity(node.secure)
    index = find_roster_index(node.party.roster, identity)
    terms, random = make_session_terms(node.party, session.id, session.asked), make_random(session.secret)
    return Party(terms, index, identity, session.vector, random, session.contributions)


def note_masked_round(node: Node, round: int, masked: str) -> None:
    """Notes that the vector of a round is masked and sent. Raises ValueError where another one of it, or one of a later
    round, was: two sums that differ by a node tell its vector. The same one may be sent again, by a node that was
    stopped before it could.

    masked: SHA-256 of the masked vector, in hexadecimal.
    """
    path, digest = node.secure / MASKED, node.party.digest.hex()
    try:
        known = json.loads(path.read_text()) if path.exists() else {}
        last, sent = known.get(digest, [-1, ""])
        done = round < int(last) or (round == int(last) and masked != sent)
    except (ValueError, TypeError, AttributeError):
        raise ValueError(f"{path} is damaged: restore it, or take the node out of the federation") from None
    if done:
        raise ValueError(f"a vector of round {int(last) + 1} was masked already: there is one secure sum a round")
    write_whole(path, json.dumps({**known, digest: [round, masked]}).encode(), OWNER_ALONE)
