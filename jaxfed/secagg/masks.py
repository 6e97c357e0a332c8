"""Masks, the keys that they are made from, and shares of those keys: the cryptography of `secagg`, without its talk.

X25519 and HKDF-SHA256 make keys, AES-256 in counter mode makes masks of them (all from the package `cryptography`);
Shamir's sharing (1979) is over the integers modulo a prime, in Python, whose big integers do not take constant time.
"""

import hashlib
import struct
from collections.abc import Callable, Collection, Mapping
from functools import lru_cache

import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

PRIME = (1 << 256) - 189  # the largest below 2^256: elements are 32 bytes

CURVE = (1 << 255) - 19  # the prime of Ed25519
# The y coordinates of the points whose order divides 8: a signature under such a key can be made by anybody.
ORDER_8 = int.from_bytes(bytes.fromhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05"), "little")
SMALL_ORDER = {0, 1, CURVE - 1, ORDER_8, CURVE - ORDER_8}

Random = Callable[[int], bytes]  # so many random bytes, as secrets.token_bytes


def hash_bytes(data: bytes) -> bytes:
    """32 bytes that stand for these."""
    return hashlib.sha256(data).digest()


def random_element(random: Random) -> int:
    """A random element of the field, too near to uniform (2^-128) to tell."""
    return int.from_bytes(random(48), "little") % PRIME


def split_secret(secret: int, threshold: int, points: Collection[int], random: Random) -> dict[int, int]:
    """Shares {point: value} of a secret below PRIME; any `threshold` give it back. Points are different and not 0."""
    polynomial = [secret, *(random_element(random) for _ in range(threshold - 1))]
    shares = {}
    for x in points:
        y = 0
        for coefficient in reversed(polynomial):
            y = (y * x + coefficient) % PRIME
        shares[x] = y
    return shares


def join_shares(shares: Mapping[int, int]) -> int:
    """The secret behind at least `threshold` shares. Too few, or a false one, give some other number: check it."""
    return sum(shares[x] * weight for x, weight in lagrange_weights(tuple(shares))) % PRIME


@lru_cache(maxsize=4)  # a session joins all its secrets at the same points
def lagrange_weights(points: tuple[int, ...]) -> list[tuple[int, int]]:
    """Lagrange's weights (point, weight) of the value at 0."""
    made = []
    for x in points:
        above = below = 1
        for other in points:
            if other != x:
                above, below = above * other % PRIME, below * (other - x) % PRIME
        made.append((x, above * pow(below, -1, PRIME) % PRIME))
    return made


def field_bytes(number: int) -> bytes:
    """A field element as its 32 bytes."""
    return number.to_bytes(32, "little")


def public_key(secret: int) -> bytes:
    """The X25519 public key of a secret."""
    return X25519PrivateKey.from_private_bytes(field_bytes(secret)).public_key().public_bytes_raw()


def shared_secret(secret: int, peer_key: bytes, peer: int) -> bytes:
    """What only two know, from one's secret and the other's public key. Raises ValueError for a key that hides none."""
    try:
        return X25519PrivateKey.from_private_bytes(field_bytes(secret)).exchange(
            X25519PublicKey.from_public_bytes(peer_key)
        )
    except ValueError:
        raise ValueError(f"the public key of party {peer} is not valid: leave that party out") from None


def derive_key(secret: bytes, context: bytes, use: bytes, *ids: int) -> bytes:
    """A key of 32 bytes for one use, between these parties in this order, in one session."""
    info = context + use + struct.pack(f"<{len(ids)}I", *ids)
    return HKDF(hashes.SHA256(), 32, salt=None, info=info).derive(secret)


def expand_mask(key: bytes, length: int) -> np.ndarray:
    """[length] uint32: AES-256 in counter mode from 0. A key is for one mask."""
    return np.frombuffer(Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update(bytes(4 * length)), "<u4")


def commit_seed(seed: int, id: int, context: bytes) -> bytes:
    """What fits one seed only, and shows nothing of it."""
    return derive_key(field_bytes(seed), context, b"seed", id)


def own_mask(seed: int, id: int, context: bytes, length: int) -> np.ndarray:
    """[length] uint32: the mask that a party adds for itself."""
    return expand_mask(derive_key(field_bytes(seed), context, b"self", id), length)


def pairwise_masks(secret: int, id: int, peers: Mapping[int, bytes], context: bytes, length: int) -> np.ndarray:
    """[length] uint32: all masks a party adds for peers {id: public key}. The lower id of two adds theirs."""
    total = np.zeros(length, np.uint32)
    for peer, key in peers.items():
        mask = expand_mask(derive_key(shared_secret(secret, key, peer), context, b"pair", *sorted((id, peer))), length)
        (np.add if id < peer else np.subtract)(total, mask, out=total)
    return total


@lru_cache(maxsize=4)
def mask_graph(seed: bytes, parties: int, neighbours: int | None) -> tuple[frozenset[int], ...]:
    """With whom each party shares masks: all, or those a few random steps away on a shuffled ring, one among them."""

    def shuffled(use: bytes, numbers: Collection[int]) -> list[int]:
        return sorted(numbers, key=lambda i: hash_bytes(seed + use + struct.pack("<I", i)))

    if neighbours is None:
        return tuple(frozenset(range(parties)) - {id} for id in range(parties))
    ring = shuffled(b"ring", range(parties))
    steps = [1, *shuffled(b"steps", range(2, (parties - 1) // 2 + 1))][: neighbours // 2]
    near = {
        id: frozenset(ring[(i + s) % parties] for step in steps for s in (step, -step)) for i, id in enumerate(ring)
    }
    return tuple(near[id] for id in range(parties))


def check_graph(kept: Mapping[int, Collection[int]], least: int) -> None:
    """Raises ValueError where one kept fewer than `least` of its neighbours, or masks do not tie all {id} together.

    The server knows the graph and picks who drops out, so in a sparse one a vector shows if all that its party kept
    are on the server's side, and a sum over some if these cut it in two: `least` should be more than there may be bad
    parties, or so many that this is unlikely.
    """
    if few := [id for id in kept if len(kept[id]) < least]:
        count = len(kept[few[0]])
        raise ValueError(f"party {few[0]} kept {count} neighbours, {least} are needed: take more neighbours, or all")
    reached, frontier = set[int](), {min(kept)}
    while frontier:
        reached |= frontier
        frontier = set().union(*(kept[id] for id in frontier)) - reached
    if len(reached) < len(kept):
        raise ValueError(f"masks tie {len(reached)} of {len(kept)} parties together: take more neighbours, or all")


def is_small_order(key: bytes) -> bool:
    """Whether an Ed25519 public key is a point of small order, in any of the ways to write it."""
    y = int.from_bytes(key, "little") & ((1 << 255) - 1)  # without the sign of x
    return y % CURVE in SMALL_ORDER


def signed_words(context: bytes, step: str, sender: int, digest: bytes) -> bytes:
    """What a party signs: who says something of this SHA-256, at which step of which session."""
    return context + step.encode() + struct.pack("<I", sender) + digest


def verify_signature(key: bytes, context: bytes, step: str, sender: int, digest: bytes, signature: bytes) -> None:
    """Raises ValueError where the owner of the Ed25519 public key did not sign these words."""
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, signed_words(context, step, sender, digest))
    except InvalidSignature:
        raise ValueError(f"the signature of party {sender} on its message {step!r} is false: refuse it") from None
