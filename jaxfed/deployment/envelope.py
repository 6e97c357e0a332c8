"""What travels between the server and a node: envelopes around bytes, one after the other.

An envelope is a header, a payload and the SHA-256 of both. The sum finds damage, not a forger: who sent an envelope is
what Flower's TLS and authentication say. Nothing here is pickled, and what is malformed is refused in one line.
"""

import hashlib
import struct
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np

MAGIC, VERSION = b"JXFD", 1
HEADER = struct.Struct("<4sHHIIIQ32s")  # magic, version, kind, round, client, rows, bytes of the payload, digest
CHECKSUM = 32
OTHER_CONFIG = (
    "another configuration, other facts or another version of jaxfed than the server: copy its config.toml and "
    "facts.json, and install its version"
)
NODE = (1 << 32) - 1  # in place of a client: the envelope is for all of a node, or of it
MOST_ENVELOPES = 1 << 20  # of one request or reply
LONGEST_TEXT = 500  # characters of why something was refused
KEY_WORDS = 2  # 32-bit words of a key of JAX
BEFORE = struct.Struct("<IIIIII")  # of a plan: two words of a key, slots, next round, clients asked, clients next


class EnvelopeKind(IntEnum):
    """What an envelope holds."""

    HELLO = 1  # who is there: of a request nothing, of a reply the clients of the node
    PLAN = 2  # what everybody knows of the round, and whom of the node it asks
    COMMON = 3  # the part of the model that all clients of the node are sent alike
    ROWS = 4  # the rows of the model of one client
    MESSAGE = 5  # of one client, for the server
    WANTED = 6  # which rows one client asks for, in the round that the envelope names
    REFUSED = 7  # why there is no message, in one line
    SECURE = 8  # a step of a secure sum: its number is in place of the client, its session in place of the digest
    READY = 9  # whose messages are in the vector that a node brings to a secure sum


class Envelope(NamedTuple):
    """One piece of what is sent.

    Args:
        kind: What the payload is.
        round: The round that it is of.
        client: The client that it is for, or of; `NODE`: the node.
        digest: 32 bytes that say of which model it is; of `HELLO`, of which configuration.
        rows: Number of table rows in the payload.
        payload: The bytes.

    Example:
        >>> data = pack_envelopes([Envelope(EnvelopeKind.MESSAGE, 3, 7, bytes(32), 0, b"abc")])
        >>> read_envelopes(data)[0].payload
        b'abc'
    """

    kind: EnvelopeKind
    round: int
    client: int
    digest: bytes
    rows: int = 0
    payload: bytes = b""


class RoundPlan(NamedTuple):
    """What a node is told of a round."""

    key: np.ndarray  # uint32 [2]: public randomness of the round
    slots: int  # of the cohort
    next: int  # the round whose rows are asked for
    asked: np.ndarray  # int32 [n]: the clients of the node that take part
    counted: np.ndarray  # int32 [n]: of each the last round in which its message was counted; -1: none was
    coming: np.ndarray  # int32 [k]: the clients of the node whose rows of round `next` are asked for


def pack_envelopes(envelopes: Sequence[Envelope]) -> bytes:
    """Envelopes end to end."""
    out = []
    for each in envelopes:
        head = HEADER.pack(MAGIC, VERSION, *each[:3], each.rows, len(each.payload), each.digest)
        out += [head, each.payload, hashlib.sha256(head + each.payload).digest()]
    return b"".join(out)


def refuse_envelope(wrong: bool, what: str) -> None:
    """Raises ValueError where an envelope is wrong."""
    if wrong:
        raise ValueError(f"refused: {what}")


def read_envelopes(data: bytes) -> list[Envelope]:
    """Undoes `pack_envelopes`.

    Args:
        data: what came, from anybody.

    Returns:
        The envelopes, in their order.

    Raises:
        ValueError: `pack_envelopes` would not write this: one line that says why.
    """
    refuse_envelope(not isinstance(data, bytes), "these are no bytes")
    found: list[Envelope] = []
    at = 0
    while at < len(data):
        refuse_envelope(len(found) >= MOST_ENVELOPES, "there are too many")
        refuse_envelope(len(data) - at < HEADER.size + CHECKSUM, "it is cut")
        magic, version, kind, round, client, rows, size, digest = HEADER.unpack_from(data, at)
        refuse_envelope(magic != MAGIC, "it is none of jaxfed's")
        refuse_envelope(version != VERSION, f"version {version}, this program reads version {VERSION}")
        end = at + HEADER.size + size
        refuse_envelope(size > len(data) or end + CHECKSUM > len(data), "it is cut")
        refuse_envelope(hashlib.sha256(data[at:end]).digest() != data[end : end + CHECKSUM], "its SHA-256 is another")
        refuse_envelope(kind not in set(EnvelopeKind), f"kind {kind}")
        found.append(Envelope(EnvelopeKind(kind), round, client, digest, rows, data[at + HEADER.size : end]))
        at = end + CHECKSUM
    return found


def peek_round(data: bytes) -> int | None:
    """The round of the first envelope, which is not checked; None: it is of no round."""
    if not isinstance(data, bytes) or len(data) < HEADER.size:
        return None
    kind, round = HEADER.unpack_from(data)[2:4]
    return None if kind == EnvelopeKind.HELLO else round


def digest_model_bytes(round: int, data: bytes) -> bytes:
    """32 bytes that name the model of a round: SHA-256 of both. data: all that is sent of it, ids of rows left out."""
    return hashlib.sha256(round.to_bytes(8, "little") + data).digest()


def pack_plan(plan: RoundPlan) -> bytes:
    """The payload of a `PLAN`."""
    head = BEFORE.pack(*(int(word) for word in plan.key), plan.slots, plan.next, len(plan.asked), len(plan.coming))
    return head + b"".join(np.asarray(x, "<i4").tobytes() for x in (plan.asked, plan.counted, plan.coming))


def read_plan(payload: bytes) -> RoundPlan:
    """Undoes `pack_plan`. Raises ValueError for what it would not write."""
    refuse_envelope(len(payload) < BEFORE.size, "a plan that is cut")
    *key, slots, next, asked, coming = BEFORE.unpack_from(payload)
    refuse_envelope(len(payload) != BEFORE.size + 4 * (2 * asked + coming), "a plan of another length")
    values = np.frombuffer(payload, "<i4", offset=BEFORE.size)
    parts = np.split(values, [asked, 2 * asked])
    for some in (parts[0], parts[2]):
        refuse_envelope(bool((some < 0).any()) or len(np.unique(some)) < len(some), "clients that are none, or twice")
    refuse_envelope(bool((parts[1] < -1).any()), "a round before the first")
    return RoundPlan(np.array(key, np.uint32), slots, next, *parts)


def read_distinct(payload: bytes, limit: int) -> np.ndarray:
    """int32 [n]: distinct numbers below `limit`. Raises ValueError for anything else."""
    refuse_envelope(len(payload) % 4 > 0, "numbers that are cut")
    numbers = np.frombuffer(payload, "<i4")
    refuse_envelope(bool(((numbers < 0) | (numbers >= limit)).any()), "a number that is out of range")
    refuse_envelope(len(np.unique(numbers)) < len(numbers), "a number that comes twice")
    return numbers


def make_refusal(text: str, round: int = 0, client: int = NODE) -> Envelope:
    """Why something is refused, in one line."""
    line = " ".join(text.split())[:LONGEST_TEXT]
    return Envelope(EnvelopeKind.REFUSED, round, client, bytes(32), 0, line.encode())


def read_refusal(envelope: Envelope) -> str:
    """The line of a make_refusal, as far as it can be printed."""
    text = envelope.payload[: 4 * LONGEST_TEXT].decode(errors="replace")
    return "".join(c if c.isprintable() else "?" for c in text)[:LONGEST_TEXT]
