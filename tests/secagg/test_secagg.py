"""Secure aggregation: known values, exact sums whoever drops out, and attempts to break each of its promises."""

import hashlib
import hmac
import itertools
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxfed.secagg import masks
from jaxfed.secagg.masks import (
    PRIME,
    check_graph,
    expand_mask,
    field_bytes,
    join_shares,
    mask_graph,
    shared_secret,
    split_secret,
)
from jaxfed.secagg.messages import pack_parties, pack_party_list, unpack_parties
from jaxfed.secagg.protocol import ROUNDS, Party, Server, run_session
from jaxfed.secagg.terms import SIGNATURE, KeyAdvert, SessionTerms, check_survivors, terms_digest

IDENTITIES = [Ed25519PrivateKey.from_private_bytes(bytes([i]) * 32) for i in range(100)]
ROSTER = tuple(key.public_key().public_bytes_raw() for key in IDENTITIES)
SESSION = b"one session, of thirty-two bytes"


def made(n=5, threshold=4, length=3, neighbours=None, session=SESSION, seed=0, vectors=None, brings=None, **more_terms):
    """A session about to begin; its randomness is a function of the seed."""
    terms = SessionTerms(session, ROSTER[:n], threshold, length, neighbours, **more_terms)
    if vectors is None:
        vectors = np.random.default_rng(seed).integers(0, 1 << 32, (n, length), np.uint32)
    random = [np.random.default_rng((seed, i)).bytes for i in range(n)]
    brings = brings or [1] * n
    parties = {i: Party(terms, i, IDENTITIES[i], vectors[i], random[i], brings[i]) for i in range(n)}
    return SimpleNamespace(terms=terms, parties=parties, server=Server(terms), vectors=vectors)


def until(step, silent=(), **kinds):
    """A session before this step, with all that was `said`, and what the server `sends` for it.

    silent: (party, step) that are not answered.
    """
    one = made(**kinds)
    one.said, one.sends = {}, dict.fromkeys(one.parties, b"")
    for name in ROUNDS[: ROUNDS.index(step)]:
        heard = one.sends.items()
        one.said[name] = {i: getattr(one.parties[i], name)(word) for i, word in heard if (i, name) not in silent}
        one.sends = getattr(one.server, name)(one.said[name])
    return one


def signed(party, step, body):
    """A message that a party of bad will makes of any body."""
    return body + party.identity.sign(masks.signed_words(party.context, step, party.id, hashlib.sha256(body).digest()))


def refused(match, call, *args):
    """The call raises ValueError with one line."""
    with pytest.raises(ValueError, match=match) as caught:
        call(*args)
    assert "\n" not in str(caught.value)


# known values


def test_shares_of_the_textbook():
    """1234 + 166 x + 94 x^2, by hand."""
    draws = iter([166, 94])
    shares = split_secret(1234, 3, range(1, 7), lambda size: next(draws).to_bytes(size, "little"))
    assert shares == {1: 1494, 2: 1942, 3: 2578, 4: 3402, 5: 4414, 6: 5614}
    # at 2, 4 and 5 the weights are 20/6, -10/2 and 8/3
    assert join_shares({2: 1942, 4: 3402, 5: 4414}) == (20 * 1942 - 30 * 3402 + 16 * 4414) // 6 == 1234


def test_keys_and_streams_of_the_standards():
    assert expand_mask(bytes(32), 4).tobytes().hex() == "dc95c078a2408989ad48a21492842087"  # AES-256, zeros by zeros
    once = "422c8e7a6227d7bca1350b3e2bb7279f7897b87bb6854b783c60e80311ae3079"  # RFC 7748, 5.2: 9 times 9
    assert shared_secret(9, field_bytes(9), 0).hex() == once


def test_a_masked_vector_by_its_formula():
    """HKDF as in RFC 5869; the lower of two adds their mask; survivors need not be there."""
    one = until("consent", n=3, threshold=2)
    party = one.parties[1]

    def mask(secret, use, *ids):
        info = party.context + use + b"".join(id.to_bytes(4, "little") for id in ids) + b"\1"
        return expand_mask(hmac.digest(hmac.digest(bytes(32), secret, "sha256"), info, "sha256"), 3)

    below = mask(shared_secret(one.parties[0].key, party.advert.mask, 1), b"pair", 0, 1)
    above = mask(shared_secret(party.key, one.parties[2].advert.mask, 2), b"pair", 1, 2)
    sent = np.frombuffer(one.said["mask"][1][:-SIGNATURE], "<u4")
    np.testing.assert_array_equal(sent, one.vectors[1] + mask(field_bytes(party.seed), b"self", 1) - below + above)


@given(st.dictionaries(st.integers(0, 9), st.binary(max_size=9)), st.binary(max_size=40))
def test_a_message_has_one_way_to_be_written(parts, noise):
    assert unpack_parties(pack_parties(parts)) == parts
    try:
        assert pack_parties(unpack_parties(noise)) == noise
    except ValueError:
        return


@pytest.mark.parametrize(
    "message",
    [
        b"\0",
        pack_parties({3: b"abc"})[:-1],
        pack_parties({3: b"a"}) * 2,
        pack_parties({3: b""}) + pack_parties({1: b""}),
    ],
)
def test_a_message_that_is_cut_or_out_of_order(message):
    refused("cut short", unpack_parties, message)


# sums


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_the_sum_is_exact_or_refused_whoever_drops_out(data):
    n = data.draw(st.integers(2, 6))
    threshold = data.draw(st.integers(n // 2 + 1, n))
    silent = data.draw(st.dictionaries(st.integers(0, n - 1), st.sampled_from(ROUNDS)))
    one = made(n, threshold, data.draw(st.integers(1, 20)), seed=data.draw(st.integers(0, 99)))
    there = [[i for i in range(n) if i not in silent or ROUNDS.index(silent[i]) > step] for step in range(5)]
    few = [step for step in range(5) if len(there[step]) < threshold]
    if few:
        line = f"^{len(there[few[0]])} parties answered '{ROUNDS[few[0]]}', {threshold} are needed"
        refused(line, run_session, one.parties, one.server, silent)
    else:
        total = run_session(one.parties, one.server, silent)
        assert one.server.survivors == there[2]
        assert total.dtype == np.uint32
        np.testing.assert_array_equal(total, one.vectors[there[2]].sum(0, dtype=np.uint32))


@pytest.mark.parametrize("step", ROUNDS)
@pytest.mark.parametrize("neighbours", [None, 10])
def test_drop_outs_at_every_step(step, neighbours):
    """As many as may be, and one more."""
    one = made(12, 9, neighbours=neighbours)
    total = run_session(one.parties, one.server, dict.fromkeys((0, 5, 11), step))
    there = [i for i in range(12) if i not in (0, 5, 11) or ROUNDS.index(step) > 2]
    np.testing.assert_array_equal(total, one.vectors[there].sum(0, dtype=np.uint32))
    one = made(12, 9, neighbours=neighbours)
    refused(
        f"^8 parties answered '{step}', 9 are", run_session, one.parties, one.server, dict.fromkeys((0, 2, 5, 11), step)
    )


def test_the_default_randomness_is_new_each_time():
    one = made()
    sent = []
    for _ in range(2):
        parties = {i: Party(one.terms, i, IDENTITIES[i], one.vectors[i]) for i in range(5)}
        calls = lambda who, step, word: sent.append((who, step, getattr(who, step)(word))) or sent[-1][2]
        np.testing.assert_array_equal(
            run_session(parties, Server(one.terms), call=calls), one.vectors.sum(0, dtype=np.uint32)
        )
    masked = [word for who, step, word in sent if step == "mask" and isinstance(who, Party)]
    assert len(set(masked)) == 10


# what one may ask for


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"threshold": 6}, "the threshold is 6 of 5"),
        ({"threshold": 2}, "the threshold is 2 of 5 parties: it must be 2 at least and more than half"),
        ({"roster": ROSTER[:1], "threshold": 1}, "the threshold is 1 of 1"),
        ({"roster": ROSTER[:4], "threshold": 2}, "more than half"),
        ({"roster": (*ROSTER[:4], ROSTER[0])}, "different"),
        ({"roster": (*ROSTER[:4], b"short")}, "32 bytes each"),
        ({"session": b"short"}, "session must be 32 bytes"),
        ({"length": 0}, "0 entries"),
        ({"neighbours": 3}, "3 neighbours"),
        ({"neighbours": 0}, "0 neighbours"),
        ({"threshold": 2.5}, "must be whole numbers"),
        ({"threshold": 4.0}, "must be whole numbers"),  # equal to 4, of which the terms are known
        ({"neighbours": True}, "must be whole numbers"),
        ({"least_contributions": 0.5}, "must be whole numbers"),
        ({"least_contributions": None}, "must be whole numbers"),
        ({"least_contributions": -1}, "-1 contributions"),
        ({"least_contributions": 5 << 32}, "cannot bring so many"),
        ({"length": 1 << 40}, "1099511627776 entries"),
        ({"length": 1 << 64}, "18446744073709551616 entries"),
        ({"session": "one session, of thirty-two bytes"}, "the session must be bytes"),
        ({"roster": list(ROSTER[:5])}, "a tuple of public keys"),
        ({"roster": (*ROSTER[:4], bytes([1, *bytes(31)]))}, "anybody can sign for party 4"),
        ({"neighbours": 6}, "an even number from 2, below 5"),
    ],
)
def test_terms_that_are_not_sound(changes, match):
    terms = made().terms._replace(**changes)
    refused(match, Server, terms)
    refused(match, Party, terms, 0, IDENTITIES[0], np.zeros(3, np.uint32))


def test_keys_of_small_order_are_those_of_the_curve():
    """All points of order 1, 2, 4 and 8, by the addition law of the curve, and each way to write one."""
    p = masks.CURVE
    d = -121665 * pow(121666, -1, p) % p

    def above(y):
        """An x of the curve at this y."""
        square = (y * y - 1) * pow(d * y * y + 1, -1, p) % p
        x = pow(square, (p + 3) // 8, p)
        return x if x * x % p == square else x * pow(2, (p - 1) // 4, p) % p

    def add(a, b):
        t = d * a[0] * b[0] * a[1] * b[1] % p
        over = pow(1 + t, -1, p), pow(1 - t, -1, p)
        return (a[0] * b[1] + b[0] * a[1]) * over[0] % p, (a[1] * b[1] + a[0] * b[0]) * over[1] % p

    def order(point):
        count, at = 1, point
        while at != (0, 1):
            count, at = count + 1, add(at, point)
        return count

    points = {(x, y) for y in masks.SMALL_ORDER for x in (above(y), -above(y) % p)}
    assert sorted(map(order, points)) == [1, 2, 4, 4, 8, 8, 8, 8]  # all there are: the group has 8 of them
    ways = [field_bytes(y + sign) for _, y in points for y in (y, y + p) if y < 1 << 255 for sign in (0, 1 << 255)]
    assert len(set(ways)) == 14
    assert all(map(masks.is_small_order, ways))
    assert not any(map(masks.is_small_order, ROSTER))


def test_a_share_of_another_length_is_refused_before_it_is_a_number():
    """20 MB took a second, and then another party was said to have lied."""
    one = until("reveal")
    said = {i: one.parties[i].reveal(word) for i, word in one.sends.items()}
    long = dict(unpack_parties(said[2][:-SIGNATURE]))
    long[1] = bytes(20_000_000)
    said[2] = signed(one.parties[2], "reveal", pack_parties(long))
    refused("party 2 revealed shares of the wrong length", one.server.reveal, said)
    one = until("share")
    said = {i: one.parties[i].share(word) for i, word in one.sends.items()}
    boxes = unpack_parties(said[3][:-SIGNATURE])
    said[3] = signed(one.parties[3], "share", pack_parties({i: box + b"x" for i, box in boxes.items()}))
    refused("party 3 sent shares of the wrong length", one.server.share, said)


def test_all_terms_are_in_what_is_signed():
    terms = made().terms
    changes = {"session": b"z" * 32, "roster": ROSTER[1:6], "threshold": 5, "length": 4, "neighbours": 4}
    changes |= {"least_contributions": 3}
    digests = {terms_digest(terms), *(terms_digest(terms._replace(**{key: value})) for key, value in changes.items())}
    assert len(digests) == 7 == len(terms) + 1


# how many contributions are in a sum

BRINGS = (4, 0, 3, 0, 5)


def test_a_sum_of_too_few_contributions_is_not_unmasked():
    """Five parties bring 12. Without the last they bring 7, and so the server says, and each of them."""
    enough = made(brings=BRINGS, least_contributions=7)
    np.testing.assert_array_equal(
        run_session(enough.parties, enough.server, {4: "mask"}), enough.vectors[:4].sum(0, np.uint32)
    )
    few = made(brings=BRINGS, least_contributions=8)
    refused("bring 7 contributions, 8 are needed", run_session, few.parties, few.server, {4: "mask"})
    one = until("consent", brings=BRINGS, least_contributions=8)  # a server that unmasks it all the same
    proofs = {id: proof for id, proof in unpack_parties(one.sends[0]).items() if id < 4}
    for id in range(4):
        refused("bring 7 contributions, 8 are needed", one.parties[id].consent, pack_parties(proofs))


def test_nobody_is_told_another_number_of_contributions():
    """A server that adds to what a party says of its vector has no signature for it."""
    one = until("share", brings=BRINGS, least_contributions=8)
    adverts = unpack_parties(one.sends[0])
    body = bytearray(adverts[1])
    body[96] = 9
    refused("signature of party 1", one.parties[0].share, pack_parties(adverts | {1: bytes(body)}))


def test_vectors_and_identities_that_do_not_fit():
    terms = made().terms
    for wrong in (np.zeros(3), np.zeros(3, np.int32), np.zeros(4, np.uint32), np.zeros((3, 1), np.uint32)):
        refused("must have uint32", Party, terms, 0, IDENTITIES[0], wrong)
    for id, key in ((1, 0), (5, 5), (-1, 4)):
        refused("identity key", Party, terms, id, IDENTITIES[key], np.zeros(3, np.uint32))


# what nobody learns


@given(st.integers(0, PRIME - 1), st.integers(0, PRIME - 1), st.integers(0, 2**32), st.permutations(range(1, 6)))
def test_fewer_shares_than_the_threshold_fit_any_secret(secret, other, seed, points):
    """Another secret and other, as likely, coefficients give the same two shares: 3 are needed."""
    shares = split_secret(secret, 3, points, np.random.default_rng(seed).bytes)
    (x, fx), (y, fy) = ((point, shares[point]) for point in points[:2])
    # f(z) = other + a z + b z^2 through both
    u, v = (fx - other) * pow(x, -1, PRIME), (fy - other) * pow(y, -1, PRIME)
    b = (u - v) * pow(x - y, -1, PRIME) % PRIME
    draws = iter([(u - b * x) % PRIME, b])
    forged = split_secret(other, 3, points, lambda size: next(draws).to_bytes(size, "little"))
    assert (forged[x], forged[y]) == (fx, fy)
    assert (forged == shares) == (secret == other)
    assert join_shares(shares) == secret
    assert join_shares({point: forged[point] for point in points[2:]}) == other


def uneven(data):
    """Chi-square over the 256 values of a byte: 255 +- 23 for noise."""
    counts = np.bincount(np.frombuffer(data, np.uint8), minlength=256)
    return float(((counts - counts.mean()) ** 2 / counts.mean()).sum())


@pytest.mark.parametrize("neighbours", [None, 2])
def test_masked_vectors_look_like_noise_and_are_not_alike(neighbours):
    vectors = np.arange(5 * 8192, dtype=np.uint32).reshape(5, 8192)
    one = until("consent", length=8192, vectors=vectors, neighbours=neighbours)
    sent = {i: word[:-SIGNATURE] for i, word in one.said["mask"].items()}
    assert uneven(vectors[0].tobytes()) > 1e4
    for i, j in itertools.combinations(range(5), 2):
        assert 100 < uneven(sent[i]) < 400
        difference = np.frombuffer(sent[i], "<u4") - np.frombuffer(sent[j], "<u4")
        assert 100 < uneven(difference.tobytes()) < 400


def test_nothing_that_others_receive_depends_on_a_vector():
    """Bit for bit, but for the digest of the masked vector, whose mask they do not know."""

    def received(vectors):
        words, digests = {}, []

        def call(who, step, word):
            if isinstance(who, Party) and who.id:
                parts = unpack_parties(word)
                digests.extend([parts.pop(0)] if step == "consent" else [])
                words[who.id, step] = parts
            return getattr(who, step)(word)

        one = made(vectors=vectors)
        return run_session(one.parties, one.server, call=call).tolist(), words, digests

    vectors = made().vectors
    others = np.concatenate([vectors[:1] + np.uint32(1), vectors[1:]])
    (total, words, digests), (other_total, other_words, other_digests) = received(vectors), received(others)
    assert total != other_total
    assert words == other_words
    assert set(digests).isdisjoint(other_digests)


def shown(one, bad, views):
    """Shares {survived: {holder: share}} of party 3's seed (it survived) and mask key (it did not) that come out.

    views: {honest party: what the server tells it}. Bad parties sign both lists and show both shares.
    """
    proofs, half = unpack_parties(one.sends[0]), {True: slice(32, 64), False: slice(32)}
    lists = {alive: {i: proofs[i] for i in proofs if alive or i != 3} for alive in (True, False)}
    signatures = {
        alive: {i: signed(one.parties[i], "consent", pack_party_list(list))[-SIGNATURE:] for i in bad}
        for alive, list in lists.items()
    }
    shares = {alive: {i: one.parties[i].held[3][half[alive]] for i in bad} for alive in lists}
    for i, alive in views.items():
        if i in lists[alive]:
            signatures[alive][i] = one.parties[i].consent(pack_parties(lists[alive]))[-SIGNATURE:]
        else:
            refused("it is not on it", one.parties[i].consent, pack_parties(lists[alive]))
    for i, alive in views.items():
        try:
            shares[alive][i] = unpack_parties(one.parties[i].reveal(pack_parties(signatures[alive]))[:-SIGNATURE])[3]
        except ValueError:
            continue
    return shares


@pytest.mark.parametrize(("bad", "breaks"), [((), False), ((0,), False), ((0, 1), False), ((0, 1, 2), True)])
def test_two_lists_unmask_a_vector_only_with_more_bad_parties_than_promised(bad, breaks):
    """Of 5 parties with threshold 4, 2 x 4 - 5 - 1 = 2 may be bad. All ways to tell the honest ones different lists."""
    honest, found = [i for i in range(5) if i not in bad], False
    for told in itertools.product((True, False), repeat=len(honest)):
        one = until("consent")
        shares = shown(one, bad, dict(zip(honest, told, strict=True)))
        if all(len(shares[alive]) >= 4 for alive in shares):
            found, party = True, one.parties[3]
            numbers = [
                {i + 1: int.from_bytes(x, "little") for i, x in shares[alive].items()} for alive in (True, False)
            ]
            seed, key = map(join_shares, numbers)
            peers = {i: one.parties[i].advert.mask for i in (0, 1, 2, 4)}
            mask = masks.own_mask(seed, 3, party.context, 3) + masks.pairwise_masks(key, 3, peers, party.context, 3)
            sent = np.frombuffer(one.said["mask"][3][:-SIGNATURE], "<u4")
            np.testing.assert_array_equal(sent - mask, one.vectors[3])
    assert found == breaks


# what parties refuse


def test_a_party_reveals_one_share_of_each_peer_once():
    one = until("reveal", silent={(1, "mask")}, n=5, threshold=4)
    party = one.parties[0]
    told = unpack_parties(party.reveal(one.sends[0])[:-SIGNATURE])
    assert told == {i: held[:32] if i == 1 else held[32:] for i, held in party.held.items()}
    for step in ROUNDS:
        refused(f"party 0 refuses '{step}'", getattr(party, step), one.sends[0])


def test_a_step_out_of_turn():
    one = until("mask")
    refused("refuses 'consent'", one.parties[0].consent, b"")
    refused("refuses 'advertise'", one.parties[0].advertise)
    one.parties[0].mask(one.sends[0])
    refused("refuses 'mask'", one.parties[0].mask, one.sends[0])


def test_a_party_that_refused_once_refuses_ever_after():
    one = until("consent")
    refused("it is not on it", one.parties[0].consent, b"")
    refused("refuses 'consent'", one.parties[0].consent, one.sends[0])
    refused("refuses 'reveal'", one.parties[0].reveal, b"")


def test_lists_of_survivors_that_a_party_does_not_sign():
    for change, match in (
        (lambda proofs: {i: proofs[i] for i in (1, 2, 3, 4)}, "it is not on it"),
        (lambda proofs: {i: proofs[i] for i in (0, 1, 2)}, "^3 parties are on the list of survivors, 4 are needed"),
        (lambda proofs: proofs | {5: proofs[0]}, "strangers"),
        (lambda proofs: proofs | {2: proofs[1]}, "signature of party 2 on its message 'mask'"),
        (lambda proofs: proofs | {2: b""}, "signature of party 2 on its message 'mask'"),
    ):
        one = until("consent", n=6, threshold=4, silent={(5, "share")})
        refused(match, one.parties[0].consent, pack_parties(change(unpack_parties(one.sends[0]))))


def test_a_survivor_without_a_masked_vector():
    """Party 3 stays silent, the server has it survive: no signature of it says so."""
    one = until("consent", silent={(3, "mask")})
    proofs = unpack_parties(one.sends[0])
    refused("signature of party 3", one.parties[0].consent, pack_parties(proofs | {3: proofs[1]}))


def test_a_signature_of_one_step_is_none_of_another():
    """A word on the list is no word on a masked vector."""
    one = until("consent")
    word = one.parties[1].consent(one.sends[1])
    proof = hashlib.sha256(word[:-SIGNATURE]).digest() + word[-SIGNATURE:]
    proofs = unpack_parties(one.sends[0]) | {1: proof}
    refused("signature of party 1 on its message 'mask'", one.parties[0].consent, pack_parties(proofs))


def test_too_few_shares_for_a_party_to_send_its_vector():
    one = until("mask")
    boxes = unpack_parties(one.sends[0])
    refused("^3 parties shared their keys, 4 are", one.parties[0].mask, pack_parties({1: boxes[1], 2: boxes[2]}))


def test_signatures_that_do_not_make_a_party_reveal():
    def party(silent=()):
        one = until("reveal", n=6, threshold=4, silent=silent)
        return one, one.parties[0].reveal, unpack_parties(one.sends[0])

    _, reveal, words = party()
    refused("^3 parties signed the list of survivors, 4 are", reveal, pack_parties({i: words[i] for i in (0, 1, 2)}))
    _, reveal, words = party()
    refused("signature of party 2 on its message 'consent'", reveal, pack_parties(words | {2: words[1]}))
    one, reveal, words = party({(5, "mask")})  # one that is not on the list signs it
    extra = signed(one.parties[5], "consent", pack_party_list(range(5)))[-SIGNATURE:]
    refused("^3 parties signed", reveal, pack_parties({0: words[0], 1: words[1], 2: words[2], 5: extra}))
    one, reveal, words = party()  # a peer signed another list
    other = signed(one.parties[1], "consent", pack_party_list(range(5)))[-SIGNATURE:]
    refused("signature of party 1", reveal, pack_parties(words | {1: other}))


def test_other_sharers_for_one_party_show():
    """Told that party 3 shared nothing, party 0 leaves out a mask; nobody helps to unmask it then."""
    one = until("mask")
    sent = {0: one.parties[0].mask(pack_parties({i: box for i, box in unpack_parties(one.sends[0]).items() if i != 3}))}
    sent |= {i: one.parties[i].mask(one.sends[i]) for i in range(1, 5)}
    proofs = {i: hashlib.sha256(word[:-SIGNATURE]).digest() + word[-SIGNATURE:] for i, word in sent.items()}
    for i in range(1, 5):
        refused("signature of party 0 on its message 'mask'", one.parties[i].consent, pack_parties(proofs))
    refused("strangers", one.parties[0].consent, pack_parties(proofs))
    refused("signature of party 0", one.server.mask, sent)


@pytest.mark.parametrize("part", [slice(0, 32), slice(32, 64)])
def test_a_public_key_that_hides_nothing(part):
    """Zeros give every key the same secret."""
    one = until("share")
    keys = bytearray(b"".join(one.parties[4].advert))
    keys[part] = bytes(32)
    one.parties[4].advert = KeyAdvert(*(bytes(keys[i : i + 32]) for i in (0, 32, 64)), bytes(keys[96:]))
    adverts = unpack_parties(one.sends[0]) | {4: signed(one.parties[4], "advertise", bytes(keys))}

    def rest():
        boxes = {i: unpack_parties(one.parties[i].share(pack_parties(adverts))[:-SIGNATURE]) for i in range(5)}
        one.parties[0].mask(pack_parties({i: boxes[i][0] for i in range(1, 5)}))

    refused("the public key of party 4 is not valid", rest)


def test_adverts_that_a_party_does_not_take():
    for change, match in (
        (lambda words, one: {i: words[i] for i in (1, 2, 3, 4)}, "party 0 is not among"),
        (lambda words, one: {i: words[i] for i in (0, 1, 2)}, "^3 parties answered 'advertise', 4 are"),
        (lambda words, one: words | {1: words[2]}, "signature of party 1"),
        (lambda words, one: words | {99: words[2]}, "party 99 is not in the roster"),
        (
            lambda words, one: words | {1: signed(one.parties[1], "advertise", b"short")},
            "party 1 advertised what is no",
        ),
        (lambda words, one: words | {0: made(seed=9).parties[0].advertise()}, "not with its own"),
    ):
        one = until("share")
        refused(match, one.parties[0].share, pack_parties(change(unpack_parties(one.sends[0]), one)))


@pytest.mark.parametrize("session", [SESSION, b"z" * 32])
def test_what_was_said_in_an_old_session(session):
    """To parties and to the server; also where the bytes of the session are used again, against the terms."""
    old, same = until("reveal"), session == SESSION
    for step, match in (
        ("share", "not with its own" if same else "signature of party 0 on its message 'advertise'"),
        ("mask", "as the shares of party 1 is not"),
        ("consent", "signature of party 0 on its message 'mask'"),
        ("reveal", "signature of party 0 on its message 'consent'"),
    ):
        new = until(step, session=session, seed=1)
        refused(match, getattr(new.parties[0], step), until(step).sends[0])
    for step in ROUNDS[same:4]:
        new = until(step, session=session, seed=1)
        said = {i: getattr(party, step)(new.sends[i]) for i, party in new.parties.items()}
        refused(
            f"signature of party 2 on its message '{step}'", getattr(new.server, step), said | {2: old.said[step][2]}
        )


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_one_changed_bit_ends_a_session(data):
    """On the way to a party or from it; but for one that makes a signature that of nobody, where enough are left."""
    step, id, back = data.draw(st.sampled_from(ROUNDS)), data.draw(st.integers(0, 4)), data.draw(st.booleans())
    if step == "advertise":
        back = True

    def flip(word):
        bit = data.draw(st.integers(0, 8 * len(word) - 1))
        return bytes(byte ^ (1 << bit % 8 if place == bit // 8 else 0) for place, byte in enumerate(word))

    def call(who, name, word):
        mine = isinstance(who, Party) and who.id == id and name == step
        answer = getattr(who, name)(flip(word) if mine and not back else word)
        return flip(answer) if mine and back else answer

    one = made(seed=3)
    if (step, back) == ("reveal", False):
        try:
            total = run_session(one.parties, one.server, call=call)
        except ValueError:
            return
        np.testing.assert_array_equal(total, one.vectors.sum(0, dtype=np.uint32))
    else:
        refused(".", run_session, one.parties, one.server, None, call)


# what the server refuses


def lie(step, id, body, silent=()):
    """A session up to here, where party `id` says body(what it should have said) instead, signed."""
    one = until(step, silent)
    said = {i: getattr(one.parties[i], step)(word) for i, word in one.sends.items()}
    said[id] = signed(one.parties[id], step, body(said[id][:-SIGNATURE]))
    return getattr(one.server, step), said


def test_what_the_server_does_not_take():
    for step, body, match in (
        ("advertise", lambda word: word + b"x", "party 2 advertised what is no keys"),
        (
            "share",
            lambda word: pack_parties({i: box for i, box in unpack_parties(word).items() if i != 4}),
            "party 2 left out a peer",
        ),
        ("mask", lambda word: word[:-4], "party 2 sent another length"),
        ("consent", lambda word: pack_party_list(range(4)), "party 2 signed another list"),
        ("reveal", lambda word: pack_party_list(range(4)), "party 2 did not reveal"),
    ):
        refused(match, *lie(step, 2, body))
    one = until("mask", silent={(4, "share")})
    said = {i: one.parties[i].mask(one.sends[i]) for i in range(4)}
    refused("party 4 answered 'mask' and had dropped out", one.server.mask, said | {4: said[0]})


@pytest.mark.parametrize("about", [0, 1])
def test_a_false_share_is_no_wrong_sum(about):
    """Of a survivor's seed and, about party 0, of the mask key of one that dropped out; at any place in the message."""
    body = lambda word: pack_parties(unpack_parties(word) | {about: field_bytes(5)})
    refused(f"the shares of party {about} are not those of its keys", *lie("reveal", 2, body, {(0, "mask")}))


def test_a_party_that_deals_false_shares():
    one = made()
    one.parties[3].seed += 1  # after it told what would fit
    refused("the shares of party 3 are not those of its keys", run_session, one.parties, one.server)


# sparse graphs


@pytest.mark.parametrize(("n", "k"), [(5, 2), (5, 4), (12, 10), (100, 20), (100, 2), (7, None)])
def test_graphs_are_regular_connected_and_of_the_session(n, k):
    near = mask_graph(SESSION, n, k)
    for id in range(n):
        assert len(near[id]) == (n - 1 if k is None else k)
        assert id not in near[id]
        assert all(id in near[peer] for peer in near[id])
    check_graph(dict(enumerate(near)), 1)
    assert (mask_graph(b"z" * 32, n, k) == near) == (k in (None, n - 1))


def test_a_graph_in_two_parts():
    refused("masks tie 2 of 4 parties", check_graph, {0: {1}, 1: {0}, 2: {3}, 3: {2}}, 1)
    refused("party 2 kept 0 neighbours, 1 are needed", check_graph, {0: {1}, 1: {0}, 2: set()}, 1)


def test_a_party_cut_off_from_its_neighbours():
    """The server may say so or not: party 7 keeps 1 of 4, and 4 x 11 // 20 = 2 are needed."""
    terms = SessionTerms(SESSION, ROSTER[:20], 11, 3, 4)
    gone = sorted(mask_graph(terms_digest(terms), 20, 4)[7])[:3]
    kinds = {"n": 20, "threshold": 11, "neighbours": 4}
    one = made(**kinds)
    refused("kept . neighbours, 2 are needed", run_session, one.parties, one.server, dict.fromkeys(gone, "mask"))
    one = until("consent", **kinds)
    proofs = {i: proof for i, proof in unpack_parties(one.sends[7]).items() if i not in gone}
    refused("kept . neighbours, 2 are needed", one.parties[7].consent, pack_parties(proofs))
    check_survivors(terms, set(range(20)) - set(gone[:1]))


def test_neighbours_save_masks():
    """A party adds a mask for each neighbour and no other."""
    one = until("consent", n=9, threshold=6, neighbours=4)
    near = {i: one.parties[i].advert.mask for i in mask_graph(terms_digest(one.terms), 9, 4)[0]}
    party, sent = one.parties[0], np.frombuffer(one.said["mask"][0][:-SIGNATURE], "<u4")
    mask = masks.own_mask(party.seed, 0, party.context, 3) + masks.pairwise_masks(party.key, 0, near, party.context, 3)
    np.testing.assert_array_equal(sent - mask, one.vectors[0])


def test_the_script_that_measures(tmp_path):
    script, file = Path(__file__).parents[2] / "scripts" / "secagg.py", tmp_path / "figures.json"
    command = [sys.executable, str(script), "--parties", "6", "--length", "50", "--silent", "1", "--json", str(file)]
    subprocess.run(command, check=True, capture_output=True)
    figures = json.loads(file.read_text())
    assert (figures["exact"], figures["in_the_sum"], figures["threshold"]) == (True, 5, 5)
    assert figures["sent_party"] > 4 * 50
    failed = subprocess.run([*command, "--silent", "2"], capture_output=True, text=True)
    assert (failed.returncode, failed.stderr) == (2, "4 parties answered 'mask', 5 are needed: start a new session\n")
