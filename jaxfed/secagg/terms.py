"""What all parties of a session know: its terms, the keys they advertise, and what a signed message must be."""

import struct
from collections.abc import Collection, Mapping
from functools import lru_cache
from numbers import Integral
from typing import NamedTuple

from jaxfed.secagg import masks
from jaxfed.secagg.masks import (
    hash_bytes,
    verify_signature,
)
from jaxfed.secagg.messages import pack_parties

SIGNATURE = 64  # bytes
LONGEST = 1 << 30  # entries of a vector: 4 GiB
MOST_CONTRIBUTIONS = 1 << 32  # of a party
ADVERT = 32 * 3 + 4  # bytes


class SessionTerms(NamedTuple):
    """What all know before a session, and put into every key and signature.

    session: 32 bytes, never used before, that nobody chose alone: they make the graph of neighbours.
    roster: Ed25519 public keys (raw, 32 bytes) of the parties, which are named by their place in it.
    threshold: so many must stay to the end; 2 threshold > parties + bad ones (the paper: over 2/3 of the parties
        against a third). For two lists of survivors, 2 (threshold - bad) honest parties would have to sign one each.
    length: of the vectors.
    neighbours: with how many peers each party shares masks (even; after Bell et al., 2020), for less work. None: all,
        and only then does the promise hold whoever drops out, and may all but the threshold: see `check_survivors`.
    least_contributions: survivors must bring so many together, by what each says of its vector in its advert.
    """

    session: bytes
    roster: tuple[bytes, ...]
    threshold: int
    length: int
    neighbours: int | None = None
    least_contributions: int = 0


def terms_digest(terms: SessionTerms) -> bytes:
    """A digest of the terms. Raises ValueError where they are not sound."""
    session, roster, threshold, length, neighbours, least_contributions = terms
    numbers = [threshold, length, least_contributions, *([] if neighbours is None else [neighbours])]
    if any(isinstance(each, bool) or not isinstance(each, Integral) for each in numbers):
        raise ValueError("threshold, length, neighbours and contributions must be whole numbers")
    if not isinstance(roster, tuple) or not all(isinstance(each, bytes) for each in (session, *roster)):
        raise ValueError("the session must be bytes, and the roster a tuple of public keys, bytes each")
    return checked_terms_digest(terms)


@lru_cache(maxsize=4)
def checked_terms_digest(terms: SessionTerms) -> bytes:
    """The same of terms whose parts have the right types."""
    session, roster, threshold, length, neighbours, least_contributions = terms
    n = len(roster)
    if len(session) != 32 or any(len(key) != 32 for key in roster) or len(set(roster)) < n:
        raise ValueError("the session must be 32 bytes, and the roster different Ed25519 public keys of 32 bytes each")
    if weak := [place for place, key in enumerate(roster) if masks.is_small_order(key)]:
        raise ValueError(f"anybody can sign for party {weak[0]}: its public key is of small order: leave it out")
    if not 1 < threshold <= n < 2 * threshold:
        raise ValueError(f"the threshold is {threshold} of {n} parties: it must be 2 at least and more than half")
    if not 1 <= length <= LONGEST or (neighbours is not None and (neighbours % 2 or not 2 <= neighbours < n)):
        raise ValueError(
            f"{length} entries, {neighbours} neighbours: the vector must have 1 to {LONGEST} entries, and neighbours "
            f"must be None or an even number from 2, below {n}"
        )
    if not 0 <= least_contributions < n * MOST_CONTRIBUTIONS:
        raise ValueError(f"{least_contributions} contributions: {n} parties cannot bring so many")
    numbers = struct.pack("<IIQIQ", n, threshold, length, neighbours or 0, least_contributions)
    return hash_bytes(b"jaxfed secagg 2" + session + numbers + b"".join(roster))


def mask_peers(terms: SessionTerms, id: int) -> frozenset[int]:
    """With whom a party shares masks."""
    return masks.mask_graph(terms_digest(terms), len(terms.roster), terms.neighbours)[id]


def check_survivors(terms: SessionTerms, survivors: Collection[int]) -> None:
    """Raises ValueError where a sum over these parties would hide too little; of its neighbours, each must have kept
    as large a part as the threshold is of the parties.
    """
    check_threshold(len(survivors), terms.threshold, "are on the list of survivors")
    least = (terms.neighbours or 0) * terms.threshold // len(terms.roster)
    masks.check_graph({id: mask_peers(terms, id).intersection(survivors) for id in survivors}, least)


def refuse_parties(ids: Collection[int], what: str) -> None:
    """Raises ValueError where there are any."""
    if ids:
        raise ValueError(f"party {min(ids)} {what}: start a new session")


def check_threshold(count: int, threshold: int, what: str) -> None:
    """Raises ValueError for fewer than the threshold."""
    if count < threshold:
        raise ValueError(f"{count} parties {what}, {threshold} are needed: start a new session")


def open_signed(terms: SessionTerms, context: bytes, step: str, messages: Mapping[int, bytes]) -> dict[int, bytes]:
    """The bodies of signed messages, in the order of the parties. Raises ValueError for too few, or a false one."""
    check_threshold(len(messages), terms.threshold, f"answered {step!r}")
    refuse_parties([id for id in messages if not 0 <= id < len(terms.roster)], "is not in the roster")
    bodies = {id: messages[id][:-SIGNATURE] for id in sorted(messages)}
    for id, body in bodies.items():
        verify_signature(terms.roster[id], context, step, id, hash_bytes(body), messages[id][-SIGNATURE:])
    return bodies


class KeyAdvert(NamedTuple):
    """What a party says first. box, mask, seed: public keys for boxes and for masks, and what shows later that a seed
    is the party's own, 32 bytes each. contributions: how many are in its vector, 4 bytes, the lowest first."""

    box: bytes
    mask: bytes
    seed: bytes
    contributions: bytes


def check_contributions(terms: SessionTerms, adverts: Mapping[int, KeyAdvert], survivors: Collection[int]) -> None:
    """Raises ValueError where the vectors of these parties hold too few contributions for their sum to hide one."""
    found = sum(int.from_bytes(adverts[id].contributions, "little") for id in survivors)
    if found < terms.least_contributions:
        raise ValueError(
            f"the survivors bring {found} contributions, {terms.least_contributions} are needed: start a new session"
        )


def read_adverts(terms: SessionTerms, messages: Mapping[int, bytes]) -> tuple[dict[int, KeyAdvert], bytes]:
    """Adverts by party, and the context of all that follows: nothing that is said of other keys is of use then."""
    bodies = open_signed(terms, terms_digest(terms), "advertise", messages)
    refuse_parties([id for id, body in bodies.items() if len(body) != ADVERT], "advertised what is no keys")
    adverts = {id: KeyAdvert(body[:32], body[32:64], body[64:96], body[96:]) for id, body in bodies.items()}
    return adverts, hash_bytes(terms_digest(terms) + pack_parties(bodies))
