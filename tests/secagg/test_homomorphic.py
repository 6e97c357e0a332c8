"""Homomorphic sums: the error and the bytes that are promised, and what is refused."""

import sys

import numpy as np
import pytest

from jaxfed.secagg.homomorphic import LIMIT, add_messages, decrypt_sum, encrypt_vector, make_keys
from jaxfed.secagg.messages import pack_parties, unpack_parties


@pytest.fixture(scope="module")
def pair():
    pytest.importorskip("tenseal")
    return make_keys()


@pytest.mark.parametrize(("parties", "length", "size"), [(1, 3, 1e-3), (3, 5000, 1.0), (30, 2048, 1e4)])
def test_a_sum_and_its_error(pair, parties, length, size):
    """6e-10 sqrt(k), whatever the values; entries differ in theirs, so the worst are further off than normal ones."""
    secret, public = pair
    vectors = np.random.default_rng(parties).normal(size=(parties, length)) * size
    error = decrypt_sum(
        secret, add_messages(public, [encrypt_vector(public, vector) for vector in vectors])
    ) - vectors.sum(0)
    assert error.shape == (length,)
    deviation = 6e-10 * parties**0.5
    assert np.abs(error).max() < 20 * deviation
    if length > 1000:
        assert 2 / 3 < error.std() / deviation < 3 / 2


def test_bytes(pair):
    message = encrypt_vector(pair[1], np.zeros(4 * 2048))
    assert 32 <= len(message) / (4 * 2048) < 32.5
    assert len(add_messages(pair[1], [message, message])) == pytest.approx(len(message), rel=0.01)
    assert encrypt_vector(pair[1], np.zeros(4 * 2048)) != message


def test_only_the_secret_key_decrypts(pair):
    message = encrypt_vector(pair[1], np.ones(3))
    with pytest.raises(ValueError, match="public key"):
        decrypt_sum(pair[1], message)
    assert np.abs(decrypt_sum(make_keys()[0], message) - 1).min() > 1
    assert len(pair[1]) < len(pair[0])


def test_what_is_refused(pair):
    _, public = pair
    for wrong in ([LIMIT], [np.nan], [-np.inf], []):
        with pytest.raises(ValueError, match="the vector is empty, or not finite and below"):
            encrypt_vector(public, np.array(wrong))
    three, four = encrypt_vector(public, np.ones(3)), encrypt_vector(public, np.ones(4))
    for messages in ([], [three, four], [three, encrypt_vector(public, np.ones(3000))]):
        with pytest.raises(ValueError, match="of one length"):
            add_messages(public, messages)
    for wrong in (pack_parties({0: b"x" * 99}), pack_parties({0: unpack_parties(three)[0][:-1]}), three[:-1]):
        with pytest.raises(ValueError, match=r"not a key or a message|cut short"):
            add_messages(public, [three, wrong])
    for wrong in (b"", public[:-1], b"x" * 99):
        with pytest.raises(ValueError, match="not a key or a message"):
            encrypt_vector(wrong, np.ones(3))


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "tenseal", None)
    for call in (
        make_keys,
        lambda: encrypt_vector(b"", np.ones(3)),
        lambda: add_messages(b"", []),
        lambda: decrypt_sum(b"", b""),
    ):
        with pytest.raises(ValueError, match="pip install tenseal"):
            call()
