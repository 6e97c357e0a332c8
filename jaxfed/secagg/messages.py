"""Messages that are bytes by party, or by any other number."""

import struct
from collections.abc import Collection, Mapping


def pack_parties(parts: Mapping[int, bytes]) -> bytes:
    """One message of bytes by party, in the order of the parties: id and length (uint32) before each part."""
    return b"".join(struct.pack("<II", id, len(part)) + part for id, part in sorted(parts.items()))


def unpack_parties(message: bytes) -> dict[int, bytes]:
    """Undoes `pack`. Raises ValueError for anything that `pack` would not make."""
    parts: dict[int, bytes] = {}
    place, last = 0, -1
    while place < len(message):
        id, size = struct.unpack_from("<II", message, place) if len(message) - place >= 8 else (-1, 0)
        place += 8 + size
        if id <= last or place > len(message):
            raise ValueError("a message is cut short, or its parties are out of order: refuse it")
        parts[id], last = message[place - size : place], id
    return parts


def pack_party_list(ids: Collection[int]) -> bytes:
    """A list of parties as a message."""
    return pack_parties(dict.fromkeys(ids, b""))
