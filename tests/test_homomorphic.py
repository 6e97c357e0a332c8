"""Homomorphic sums: the error and the bytes that are promised, and what is refused."""

import sys

import numpy as np
import pytest

from jaxfed.homomorphic import LIMIT, add, decrypt, encrypt, keys
from jaxfed.messages import pack, unpack


@pytest.fixture(scope="module")
def pair():
    pytest.importorskip("tenseal")
    return keys()


@pytest.mark.parametrize(("parties", "length", "size"), [(1, 3, 1e-3), (3, 5000, 1.0), (30, 2048, 1e4)])
def test_a_sum_and_its_error(pair, parties, length, size):
    """6e-10 sqrt(k), whatever the values; entries differ in theirs, so the worst are further off than normal ones."""
    secret, public = pair
    vectors = np.random.default_rng(parties).normal(size=(parties, length)) * size
    error = decrypt(secret, add(public, [encrypt(public, vector) for vector in vectors])) - vectors.sum(0)
    assert error.shape == (length,)
    deviation = 6e-10 * parties**0.5
    assert np.abs(error).max() < 20 * deviation
    if length > 1000:
        assert 2 / 3 < error.std() / deviation < 3 / 2


def test_bytes(pair):
    message = encrypt(pair[1], np.zeros(4 * 2048))
    assert 32 <= len(message) / (4 * 2048) < 32.5
    assert len(add(pair[1], [message, message])) == pytest.approx(len(message), rel=0.01)
    assert encrypt(pair[1], np.zeros(4 * 2048)) != message


def test_only_the_secret_key_decrypts(pair):
    message = encrypt(pair[1], np.ones(3))
    with pytest.raises(ValueError, match="public key"):
        decrypt(pair[1], message)
    assert np.abs(decrypt(keys()[0], message) - 1).min() > 1
    assert len(pair[1]) < len(pair[0])


def test_what_is_refused(pair):
    _, public = pair
    for wrong in ([LIMIT], [np.nan], [-np.inf], []):
        with pytest.raises(ValueError, match="the vector is empty, or not finite and below"):
            encrypt(public, np.array(wrong))
    three, four = encrypt(public, np.ones(3)), encrypt(public, np.ones(4))
    for messages in ([], [three, four], [three, encrypt(public, np.ones(3000))]):
        with pytest.raises(ValueError, match="of one length"):
            add(public, messages)
    for wrong in (pack({0: b"x" * 99}), pack({0: unpack(three)[0][:-1]}), three[:-1]):
        with pytest.raises(ValueError, match=r"not a key or a message|cut short"):
            add(public, [three, wrong])
    for wrong in (b"", public[:-1], b"x" * 99):
        with pytest.raises(ValueError, match="not a key or a message"):
            encrypt(wrong, np.ones(3))


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "tenseal", None)
    for call in (keys, lambda: encrypt(b"", np.ones(3)), lambda: add(b"", []), lambda: decrypt(b"", b"")):
        with pytest.raises(ValueError, match="pip install tenseal"):
            call()
