"""Sums of float vectors under homomorphic encryption: parties encrypt, the server adds, key holders decrypt the sum.

CKKS of the package tenseal (`pip install tenseal`), for parties that trust one another with a key and the
server with nothing; any may drop out, and nobody is asked twice. Unlike `secagg`, who has the secret key can read every
single vector that reaches it, and nothing is signed: who can change a message, can change the sum unseen.

128 bits of security: N = 4096, a modulus of 109 bits; sums only. 2048 entries are a ciphertext of 66 kB: 32 bytes an
entry, 8 times float32. A sum of k vectors is off by about 6e-10 sqrt(k) an entry (deviation; the worst of 100,000 was 8
times that; no relative part). The error says something of the key (Li and Micciancio, 2021): round what others see.
"""

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import numpy as np

from jaxfed.secagg.messages import pack_parties, unpack_parties

SLOTS = 2048  # entries of a ciphertext
PRIMES = (60, 49)  # bits; the second serves keys only
SCALE, LIMIT = 2.0**40, 2.0**19  # the sum must stay below the limit in size, or wraps around


def import_tenseal() -> Any:
    """The package tenseal. Raises ValueError where it is not installed."""
    try:
        import tenseal
    except ImportError:
        raise ValueError("tenseal is not installed: pip install tenseal") from None
    return tenseal


def parse_bytes(parse: Callable, *data: Any) -> Any:
    """What is in these bytes. Raises ValueError where they are not tenseal's."""
    try:
        return parse(*data)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"not a key or a message of tenseal ({error}): send it again") from None


def make_keys() -> tuple[bytes, bytes]:
    """A new (secret, public) key: the one for those who may decrypt, the other for parties and server."""
    context = import_tenseal().context(import_tenseal().SCHEME_TYPE.CKKS, 2 * SLOTS, coeff_mod_bit_sizes=PRIMES)
    context.global_scale = SCALE
    sums_only = {"save_galois_keys": False, "save_relin_keys": False}
    return context.serialize(save_secret_key=True, **sums_only), context.serialize(save_secret_key=False, **sums_only)


def encrypt_vector(public: bytes, vector: np.ndarray) -> bytes:
    """A party's message. Raises ValueError unless all of `vector`, [length], is finite and below LIMIT in size."""
    if not len(vector) or not (np.abs(vector) < LIMIT).all():
        raise ValueError(f"the vector is empty, or not finite and below {LIMIT:g} in size: scale or clip it")
    key = parse_bytes(import_tenseal().context_from, public)
    parts = [import_tenseal().ckks_vector(key, vector[i : i + SLOTS]) for i in range(0, len(vector), SLOTS)]
    return pack_parties({i: part.serialize() for i, part in enumerate(parts)})


def add_messages(public: bytes, messages: Sequence[bytes]) -> bytes:
    """The message that is the sum of these. Raises ValueError for none, or vectors that are not of one length."""
    key = parse_bytes(import_tenseal().context_from, public)
    rows = [
        [parse_bytes(import_tenseal().ckks_vector_from, key, part) for part in unpack_parties(each).values()]
        for each in messages
    ]
    if len({tuple(part.size() for part in row) for row in rows}) != 1:
        raise ValueError(f"{len(rows)} messages to add: there must be some, and their vectors of one length")
    sums = [reduce(lambda total, part: total + part, column) for column in zip(*rows, strict=True)]
    return pack_parties({i: part.serialize() for i, part in enumerate(sums)})


def decrypt_sum(secret: bytes, message: bytes) -> np.ndarray:
    """[length] float64: the sum in a message of `add`. Raises ValueError for a key that is not the secret one."""
    key = parse_bytes(import_tenseal().context_from, secret)
    if not key.is_private():
        raise ValueError("this is the public key: the sum is decrypted with the secret one")
    return np.concatenate(
        [parse_bytes(import_tenseal().ckks_vector_from, key, x).decrypt() for x in unpack_parties(message).values()]
    )
