"""Secure aggregation: parties sum vectors modulo 2^32 through a server, which learns the sum and nothing else.

The protocol of Bonawitz et al. (2017), "Practical secure aggregation for privacy-preserving machine learning", against
a malicious server and parties that help it. Each party adds to its vector a mask for every peer, which cancel in the
sum, and one of its own; all peers hold Shamir shares of what the masks are made from, for when it goes missing.
Each of the five `ROUNDS` is a method of `Party` and, by the same name, of `Server`; what passes between them is bytes.

With at most 2 threshold - parties - 1 parties on the server's side, nothing shows of an honest party's vector but the
sum over one list of survivors, `threshold` at least with the bad ones, who say that they bring as many contributions as
the terms ask for. Beyond the paper, adverts and the list of those who shared keys go into all later signatures: parties
that are told different ones do not agree. Seeds are committed to.
Not promised: that the sum is right (parties may send anything, the server may say anything), or that there is one (any
of them can make a session fail). Peers that deal or reveal false shares are found out, though not always which.
"""

from collections.abc import Callable, Collection, Mapping
from functools import wraps
from secrets import token_bytes
from typing import Any

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from jaxfed.secagg import masks
from jaxfed.secagg.masks import (
    derive_key,
    field_bytes,
    hash_bytes,
    join_shares,
    public_key,
    random_element,
    shared_secret,
    split_secret,
    verify_signature,
)
from jaxfed.secagg.messages import pack_parties, pack_party_list, unpack_parties
from jaxfed.secagg.terms import (
    SIGNATURE,
    KeyAdvert,
    SessionTerms,
    check_contributions,
    check_survivors,
    check_threshold,
    mask_peers,
    open_signed,
    read_adverts,
    refuse_parties,
    terms_digest,
)

ROUNDS = ("advertise", "share", "mask", "consent", "reveal")
NONCE = bytes(12)  # every key of AES-GCM is for one message
SHARE, BOX = 32, 80  # bytes of a share; of two shares in a box, with its tag


def signed_step(method: Callable[["Party", bytes], bytes]) -> Callable[..., bytes]:
    """A party's step: once, in order, never after one that failed. Its message is the body with a signature after."""

    @wraps(method)
    def signed(self: "Party", message: bytes = b"") -> bytes:
        step = method.__name__
        if self.turn != step:
            raise ValueError(f"party {self.id} refuses {step!r}: each step is for once, in order, until one fails")
        self.turn = ""
        body = method(self, message)
        self.turn = (*ROUNDS, "")[ROUNDS.index(step) + 1]
        return body + self.identity.sign(masks.signed_words(self.context, step, self.id, hash_bytes(body)))

    return signed


class Party:
    """A party in one session. A step takes the server's message and returns the party's, or raises ValueError.

    vector: uint32 [length]. identity: the private key of the roster's entry `id`. random(size): bytes nobody can guess.
    contributions: how many are in the vector, which all are told.
    """

    def __init__(
        self,
        terms: SessionTerms,
        id: int,
        identity: Ed25519PrivateKey,
        vector: np.ndarray,
        random: Callable[[int], bytes] = token_bytes,
        contributions: int = 1,
    ):
        self.terms, self.context, self.id, self.identity, self.random = terms, terms_digest(terms), id, identity, random
        if identity.public_key().public_bytes_raw() not in terms.roster[id : id + 1]:
            raise ValueError(f"party {id} does not have the identity key that the roster names")
        if vector.dtype != np.uint32 or vector.shape != (terms.length,):
            raise ValueError(f"party {id} has {vector.dtype} {vector.shape} and must have uint32 ({terms.length},)")
        self.vector, self.turn = vector, ROUNDS[0]
        self.box, self.key, self.seed = (random_element(random) for _ in range(3))
        self.advert = KeyAdvert(
            public_key(self.box),
            public_key(self.key),
            masks.commit_seed(self.seed, id, self.context),
            contributions.to_bytes(4, "little"),
        )

    @signed_step
    def advertise(self, message: bytes) -> bytes:
        """Its public keys, and how many contributions its vector holds."""
        return b"".join(self.advert)

    @signed_step
    def share(self, message: bytes) -> bytes:
        """From all adverts: to each peer, shares of the mask key and of the seed, encrypted."""
        self.adverts, self.context = read_adverts(self.terms, unpack_parties(message))
        if self.adverts.get(self.id) != self.advert:
            raise ValueError(f"party {self.id} is not among those that advertised keys, or not with its own")
        points = [id + 1 for id in self.adverts]
        keys, seeds = (
            split_secret(secret, self.terms.threshold, points, self.random) for secret in (self.key, self.seed)
        )
        shares = {id: field_bytes(keys[id + 1]) + field_bytes(seeds[id + 1]) for id in self.adverts}
        self.held, self.opens, boxes = {self.id: shares.pop(self.id)}, {}, {}
        for id, part in shares.items():
            common = shared_secret(self.box, self.adverts[id].box, id)
            self.opens[id] = AESGCM(derive_key(common, self.context, b"box", id, self.id))
            boxes[id] = AESGCM(derive_key(common, self.context, b"box", self.id, id)).encrypt(NONCE, part, None)
        return pack_parties(boxes)

    @signed_step
    def mask(self, message: bytes) -> bytes:
        """From the shares of its peers: its vector and all masks on it."""
        for id, box in unpack_parties(message).items():
            try:
                self.held[id] = self.opens[id].decrypt(NONCE, box if len(box) == BOX else b"", None)
            except (InvalidTag, KeyError):
                raise ValueError(f"what party {self.id} got as the shares of party {id} is not: refuse it") from None
        check_threshold(len(self.held), self.terms.threshold, "shared their keys")
        # one that was told of other sharers has other masks, and others see that from its signature
        self.context = hash_bytes(self.context + pack_party_list(self.held))
        keys = {id: self.adverts[id].mask for id in mask_peers(self.terms, self.id) & self.held.keys()}
        total = masks.pairwise_masks(self.key, self.id, keys, self.context, self.terms.length)
        own = masks.own_mask(self.seed, self.id, self.context, self.terms.length)
        return (total + own + self.vector).astype("<u4").tobytes()

    @signed_step
    def consent(self, message: bytes) -> bytes:
        """From the list of survivors, each with its signed digest: its word to help unmask their sum and no other."""
        signed = unpack_parties(message)
        self.survivors = frozenset(signed)
        if not {self.id} <= self.survivors <= self.held.keys():
            raise ValueError(f"party {self.id} refuses the list of survivors: it is not on it, or strangers are")
        check_survivors(self.terms, self.survivors)
        check_contributions(self.terms, self.adverts, self.survivors)
        for id, proof in signed.items():
            verify_signature(self.terms.roster[id], self.context, "mask", id, proof[:32], proof[32:])
        return pack_party_list(self.survivors)

    @signed_step
    def reveal(self, message: bytes) -> bytes:
        """From the others' signatures under that list: of each survivor the seed's share, of others the mask key's."""
        signatures = {id: word for id, word in unpack_parties(message).items() if id in self.survivors}
        check_threshold(len(signatures), self.terms.threshold, "signed the list of survivors")
        for id, word in signatures.items():
            verify_signature(
                self.terms.roster[id], self.context, "consent", id, hash_bytes(pack_party_list(self.survivors)), word
            )
        return pack_parties({id: part[32:] if id in self.survivors else part[:32] for id, part in self.held.items()})


class Server:
    """The server in one session. A step takes {sender: message} and returns {receiver: message}; the last, the sum.

    Raises ValueError where fewer than the threshold answered, or one sent something wrong.
    """

    def __init__(self, terms: SessionTerms):
        self.terms, self.context = terms, terms_digest(terms)
        self.survivors: list[int] = []  # whose vectors are in the sum

    def open_answers(self, step: str, messages: Mapping[int, bytes], among: Collection[int]) -> dict[int, bytes]:
        """The bodies of messages from some of these parties."""
        refuse_parties(messages.keys() - set(among), f"answered {step!r} and had dropped out")
        return open_signed(self.terms, self.context, step, messages)

    def advertise(self, messages: Mapping[int, bytes]) -> dict[int, bytes]:
        """All adverts to all."""
        self.adverts, self.context = read_adverts(self.terms, messages)
        return dict.fromkeys(self.adverts, pack_parties(messages))

    def share(self, messages: Mapping[int, bytes]) -> dict[int, bytes]:
        """To each party what its peers encrypted for it."""
        boxes = {id: unpack_parties(body) for id, body in self.open_answers("share", messages, self.adverts).items()}
        refuse_parties(
            [id for id in boxes if boxes[id].keys() != self.adverts.keys() - {id}], "left out a peer's shares"
        )
        refuse_parties(
            [id for id, box in boxes.items() if {*map(len, box.values())} != {BOX}], "sent shares of the wrong length"
        )
        self.sharers, self.context = list(boxes), hash_bytes(self.context + pack_party_list(boxes))
        return {to: pack_parties({id: box[to] for id, box in boxes.items() if id != to}) for to in boxes}

    def mask(self, messages: Mapping[int, bytes]) -> dict[int, bytes]:
        """To those whose vectors arrived, the list of them, with their signatures."""
        bodies = self.open_answers("mask", messages, self.sharers)
        refuse_parties([id for id, body in bodies.items() if len(body) != 4 * self.terms.length], "sent another length")
        self.survivors = list(bodies)
        check_survivors(self.terms, self.survivors)
        check_contributions(self.terms, self.adverts, self.survivors)
        self.total = np.zeros(self.terms.length, np.uint32)
        for body in bodies.values():
            self.total += np.frombuffer(body, "<u4")
        return dict.fromkeys(
            bodies, pack_parties({id: hash_bytes(bodies[id]) + messages[id][-SIGNATURE:] for id in bodies})
        )

    def consent(self, messages: Mapping[int, bytes]) -> dict[int, bytes]:
        """To those that signed the list, the signatures."""
        bodies = self.open_answers("consent", messages, self.survivors)
        refuse_parties(
            [id for id, body in bodies.items() if body != pack_party_list(self.survivors)], "signed another list"
        )
        self.signers = list(bodies)
        return dict.fromkeys(bodies, pack_parties({id: messages[id][-SIGNATURE:] for id in bodies}))

    def reveal(self, messages: Mapping[int, bytes]) -> np.ndarray:
        """The sum over survivors, uint32 [length], from what the parties reveal."""
        revealed = {
            id: unpack_parties(body) for id, body in self.open_answers("reveal", messages, self.signers).items()
        }
        refuse_parties(
            [id for id, parts in revealed.items() if list(parts) != self.sharers], "did not reveal a share of each peer"
        )
        refuse_parties(
            [id for id, parts in revealed.items() if {*map(len, parts.values())} != {SHARE}],
            "revealed shares of the wrong length",
        )
        chosen, total = list(revealed)[: self.terms.threshold], self.total.copy()
        for id in self.sharers:
            secret = join_shares({peer + 1: int.from_bytes(revealed[peer][id], "little") for peer in chosen})
            kept = id in self.survivors
            public = masks.commit_seed(secret, id, terms_digest(self.terms)) if kept else public_key(secret)
            if public != (self.adverts[id].seed if kept else self.adverts[id].mask):
                raise ValueError(
                    f"the shares of party {id} are not those of its keys: it, or one of {chosen}, is malicious"
                )
            if kept:
                total -= masks.own_mask(secret, id, self.context, self.terms.length)
            else:  # survivors have added the opposite of what this party would have added for them
                keys = {
                    peer: self.adverts[peer].mask for peer in mask_peers(self.terms, id).intersection(self.survivors)
                }
                total += masks.pairwise_masks(secret, id, keys, self.context, self.terms.length)
        return total


def run_session(
    parties: Mapping[int, Party],
    server: Server,
    silent: Mapping[int, str] | None = None,
    call: Callable[[Any, str, Any], Any] = lambda who, step, message: getattr(who, step)(message),
) -> np.ndarray:
    """A session in memory: the sum over `server.survivors`, uint32 [length]. Raises what the first of them raises.

    silent: {party: the step from which on it does not answer}. call(who, step, message): the network.
    """
    last = {id: ROUNDS.index(step) for id, step in (silent or {}).items()}
    inbox: Any = dict.fromkeys(parties, b"")
    for number, step in enumerate(ROUNDS):
        answers = {
            id: call(parties[id], step, word) for id, word in inbox.items() if number < last.get(id, len(ROUNDS))
        }
        inbox = call(server, step, answers)
    return inbox
