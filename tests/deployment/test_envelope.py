"""What comes from anybody is read, or refused in one line: it never crashes, and what was changed is never accepted."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxfed.deployment.envelope import (
    CHECKSUM,
    HEADER,
    NODE,
    Envelope,
    EnvelopeKind,
    RoundPlan,
    make_refusal,
    pack_envelopes,
    pack_plan,
    read_distinct,
    read_envelopes,
    read_plan,
    read_refusal,
)
from tests.small import child_environment

ENVELOPES = st.builds(
    Envelope,
    st.sampled_from(EnvelopeKind),
    st.integers(0, (1 << 32) - 1),
    st.integers(0, (1 << 32) - 1),
    st.binary(min_size=32, max_size=32),
    st.integers(0, (1 << 32) - 1),
    st.binary(max_size=40),
)


@given(st.lists(ENVELOPES, max_size=4))
@settings(max_examples=200, deadline=None)
def test_what_is_packed_is_read(envelopes):
    assert read_envelopes(pack_envelopes(envelopes)) == envelopes


def changed(random, data):
    """The bytes, of which some are others, are missing, come twice or are put in."""
    data, how = bytearray(data), random.integers(5)
    at = int(random.integers(len(data)))
    if how == 0:
        data[at] ^= int(random.integers(1, 256))
    elif how == 1:
        del data[at : at + int(random.integers(1, 9))]
    elif how == 2:
        data[at:at] = random.bytes(int(random.integers(1, 9)))
    elif how == 3:
        data = data[:at]
    else:
        data[at : at + 8] = random.bytes(8)
    return bytes(data)


def test_no_changed_envelope_is_accepted():
    """20,000 of them. A cut between two envelopes leaves whole ones, which are those that were sent."""
    random = np.random.default_rng(0)
    sent = [Envelope(EnvelopeKind.MESSAGE, 3, client, random.bytes(32), 5, random.bytes(60)) for client in range(3)]
    data, said = pack_envelopes(sent), set()
    for _ in range(20_000):
        other = changed(random, data)
        if other == data:
            continue
        try:
            found = read_envelopes(other)
        except ValueError as error:
            said.add(str(error))
            continue
        assert found == sent[: len(found)]
        assert len(found) < len(sent)
    assert said
    assert not any("\n" in line for line in said)


@pytest.mark.full
def test_the_script_that_sends_changed_messages(tmp_path):
    script, file = Path(__file__).parents[2] / "scripts" / "fuzz_messages.py", tmp_path / "figures.json"
    command = [sys.executable, str(script), "--messages", "600", "--json", str(file)]
    subprocess.run(command, check=True, capture_output=True, env=child_environment())
    found = json.loads(file.read_text())
    assert {*found} == {
        f"{receiver}, {kind}" for receiver in ("node", "server", "aggregate") for kind in ("damaged", "forged")
    }
    assert all(sum(outcomes.values()) > 90 for outcomes in found.values())
    assert not any("changed" in outcomes for name, outcomes in found.items() if "damaged" in name and outcomes)


def test_forged_checksums_do_not_crash():
    """Whoever makes the checksum anew is refused by what follows, or says something that is well formed."""
    random, said = np.random.default_rng(1), set()
    head = HEADER.pack(b"JXFD", 1, EnvelopeKind.PLAN, 3, 7, 5, 40, bytes(32))
    for _ in range(5_000):
        body = changed(random, head + random.bytes(40))
        try:
            found = read_envelopes(body + hashlib.sha256(body).digest())
        except ValueError as error:
            said.add(str(error))
            continue
        assert len(pack_envelopes(found)) == len(body) + CHECKSUM
    assert said
    assert not any("\n" in line for line in said)


PLAN = RoundPlan(
    np.array([1, (1 << 32) - 1], np.uint32), 12, 4, *(np.array(x, np.int32) for x in ([3, 8], [-1, 2], [8]))
)


def test_plans():
    for got, want in zip(read_plan(pack_plan(PLAN)), PLAN, strict=True):
        np.testing.assert_array_equal(got, want)
    random, data = np.random.default_rng(2), pack_plan(PLAN)
    for _ in range(5_000):
        try:
            found = read_plan(changed(random, data))
        except ValueError:
            continue
        assert len(found.asked) == len(found.counted)
        assert (found.asked >= 0).all()


@pytest.mark.parametrize("payload", [b"abc", np.array([1, 1], "<i4").tobytes(), np.array([9], "<i4").tobytes()])
def test_numbers_that_are_none(payload):
    with pytest.raises(ValueError, match="refused: "):
        read_distinct(payload, 9)


def test_refusals_are_one_line():
    text = read_refusal(make_refusal("a\nb" + "c" * 10_000))
    assert text.startswith("a b")
    assert len(text) <= 500
    ugly = Envelope(EnvelopeKind.REFUSED, 0, NODE, bytes(32), 0, b"\x1b[31m\xff\n")
    assert "\x1b" not in read_refusal(ugly)
    assert "\n" not in read_refusal(ugly)


@pytest.mark.parametrize("data", [None, "text", b"x", b"JXFD" + bytes(100)])
def test_what_is_none(data):
    with pytest.raises(ValueError, match="refused: "):
        read_envelopes(data)
