"""A node in the secure sum of a round (`jaxfed.secagg.protocol`): its vector is the sum of its clients' messages.

Flower starts a process for each request, so that a session lies on the node's disk: the secret that its random numbers
come from, and the messages of the steps so far, which are played again before the next one. A step is answered once:
the same message again gives the same answer, and any other one is refused.
"""

import hmac
import zipfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from secrets import token_bytes
from typing import Any, NamedTuple

import jax
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from jaxfed.deployment.envelope import NODE, Envelope, EnvelopeKind, read_distinct
from jaxfed.deployment.party import DeployedPieces
from jaxfed.secagg.protocol import ROUNDS, Party
from jaxfed.secagg.terms import SessionTerms
from jaxfed.training.run_dir import OWNER_ALONE, write_arrays, write_whole

NONCE = 16  # bytes: a server that begins a round anew begins another session
SECURE = "secure"  # the folder of what follows, among the states of a node
IDENTITY = "identity"
MASKED = "masked"  # the last round in which the node has sent a masked vector
MASK_STEP = ROUNDS.index("mask")


class NodeSession(NamedTuple):
    """A node's part in one secure sum, as it lies on its disk."""

    id: bytes
    round: int
    secret: bytes  # of its random numbers
    vector: np.ndarray  # uint32: the sum of its clients' messages
    steps: tuple[bytes, ...]  # what the server sent, of each step that was answered


def name_session(digest: bytes, round: int, begun: bytes) -> bytes:
    """32 bytes that name the session of a round. digest: of the configuration. begun: see `pack_begin`."""
    return sha256(b"jaxfed session" + digest + round.to_bytes(8, "little") + begun).digest()


def pack_begin(nonce: bytes, cohort: np.ndarray) -> bytes:
    """What a session begins with: `NONCE` bytes that are new, and whom the round asks. It is in the session's name, so
    that all nodes of a session know the same cohort."""
    return nonce + np.sort(cohort).astype("<i4").tobytes()


def check_secure_cohort(party: DeployedPieces, begun: bytes, own: np.ndarray, asked: np.ndarray) -> None:
    """Raises ValueError for a cohort that a node must not add its messages to: it would hide too little.

    A server that asked one client alone, of whom other nodes do not know, would read its message in the sum.

    Args:
        party: the node's.
        begun: see `pack_begin`.
        own: the clients of the node.
        asked: those of them that the plan asks.
    """
    cohort = read_distinct(begun[NONCE:], party.plan.num_clients)
    if not np.array_equal(np.intersect1d(cohort, own), np.sort(asked)):
        raise ValueError("the plan asks other clients of this node than the cohort of the secure sum")
    least = max(2, party.sampler.size if party.sampler.kind in ("everyone", "fixed") else 0)
    if len(cohort) < least:
        raise ValueError(
            f"a cohort of {len(cohort)} clients, where there must be {least}: the sum would hide too little"
        )


def find_terms(party: DeployedPieces, session: bytes) -> SessionTerms:
    """The terms of a session: of all nodes more than two thirds must stay to the end."""
    length = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(party.message))
    return SessionTerms(session, party.roster, 2 * len(party.roster) // 3 + 1, length)


def make_identity(folder: Path) -> str:
    """The public key of a node in hexadecimal; the private one is made the first time, and stays in the folder."""
    path = folder / IDENTITY
    if not path.exists():
        write_whole(path, Ed25519PrivateKey.generate().private_bytes_raw(), OWNER_ALONE)
    return read_identity(folder).public_key().public_bytes_raw().hex()


def read_identity(folder: Path) -> Ed25519PrivateKey:
    """The private key of a node. Raises ValueError where it has none."""
    try:
        return Ed25519PrivateKey.from_private_bytes((folder / IDENTITY).read_bytes())
    except (OSError, ValueError):
        raise ValueError(
            f"{folder / IDENTITY} is missing or damaged: restore it: the others know this node by it"
        ) from None


def write_session(folder: Path, session: NodeSession) -> None:
    """Writes a session in the place of the one before."""
    arrays: dict[str, Any] = {f"step{n}": np.frombuffer(message, np.uint8) for n, message in enumerate(session.steps)}
    arrays |= {"id": np.frombuffer(session.id, np.uint8), "secret": np.frombuffer(session.secret, np.uint8)}
    arrays |= {"vector": session.vector, "facts": np.array([session.round, len(session.steps)], np.int64)}
    write_arrays(folder / "session.npz", arrays, OWNER_ALONE)


def read_session(folder: Path) -> NodeSession:
    """The session of a node. Raises ValueError where there is none, or it is damaged."""
    try:
        with np.load(folder / "session.npz", allow_pickle=False) as file:
            round, count = file["facts"].tolist()
            steps = tuple(file[f"step{n}"].tobytes() for n in range(count))
            return NodeSession(file["id"].tobytes(), round, file["secret"].tobytes(), file["vector"], steps)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
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
    total = np.zeros(find_terms(party, bytes(32)).length, np.uint32)
    for message in messages:
        total += np.frombuffer(message, "<u4")
    return total


def open_session(party: DeployedPieces, folder: Path, asked: Envelope, answers: list[Envelope]) -> list[Envelope]:
    """A node's first step: its public keys, and whose messages its vector holds. The messages themselves stay here.

    asked: the step. answers: of the node's clients, messages among them. Raises ValueError for a step that is none.
    """
    if (
        asked.kind != EnvelopeKind.SECURE
        or asked.client
        or asked.digest != name_session(party.digest, asked.round, asked.payload)
    ):
        raise ValueError("this node adds its messages by a secure sum alone, and the plan begins none")
    messages = [each for each in answers if each.kind == EnvelopeKind.MESSAGE]
    vector = sum_ring_messages(party, [each.payload for each in messages])
    write_session(folder, NodeSession(asked.digest, asked.round, token_bytes(32), vector, ()))
    clients = np.array([each.client for each in messages], "<i4")
    digest = messages[0].digest if messages else bytes(32)
    ready = Envelope(EnvelopeKind.READY, asked.round, NODE, digest, 0, clients.tobytes())
    step = answer_step(party, folder, asked._replace(payload=b""))
    return [ready, step, *(each for each in answers if each.kind != EnvelopeKind.MESSAGE)]


def answer_step(party: DeployedPieces, folder: Path, asked: Envelope) -> Envelope:
    """A node's answer to a step of the session that it is in.

    Raises ValueError for a step that it must not answer: of another session, out of order, a second time with other
    words, or the mask of a second session of one round, from which its vector could be told.
    """
    session, number = read_session(folder), asked.client
    if (asked.digest, asked.round) != (session.id, session.round):
        raise ValueError("a step of another secure sum than the one that this node is in")
    if number > len(session.steps) or number >= len(ROUNDS):
        raise ValueError(f"step {number} of a secure sum out of order")
    if number < len(session.steps) and session.steps[number] != asked.payload:
        raise ValueError(f"step {number} of a secure sum a second time, with other words")
    identity = read_identity(folder)
    own = identity.public_key().public_bytes_raw()
    if own not in party.roster:
        raise ValueError("this node's key is not among those of the federation")
    index = party.roster.index(own)
    member = Party(find_terms(party, session.id), index, identity, session.vector, make_random(session.secret))
    for name, message in zip(ROUNDS, session.steps[:number], strict=False):
        getattr(member, name)(message)
    answer = getattr(member, ROUNDS[number])(asked.payload)
    if number == len(session.steps):
        if number == MASK_STEP:
            mark_masked(folder, session.round)
        write_session(folder, session._replace(steps=(*session.steps, asked.payload)))
    return Envelope(EnvelopeKind.SECURE, asked.round, number, session.id, index, answer)


def mark_masked(folder: Path, round: int) -> None:
    """Notes that the vector of a round is masked and sent. Raises ValueError where one of it, or of a later one, was:
    two sums that differ by a node tell its vector."""
    path = folder / MASKED
    last = int(path.read_text()) if path.exists() else -1
    if round <= last:
        raise ValueError(f"a vector of round {last} was masked already: there is one secure sum a round")
    write_whole(path, str(round).encode(), OWNER_ALONE)
