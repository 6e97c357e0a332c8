"""What a node of a secure sum refuses, whatever the server says: nothing but sums of many clients leaves it."""

import json

import jax
import numpy as np
import pytest

from jaxfed.deployment.coordinator import make_requests
from jaxfed.deployment.envelope import (
    Envelope,
    EnvelopeKind,
    digest_model_bytes,
    pack_envelopes,
    pack_plan,
    read_envelopes,
    read_plan,
    read_refusal,
)
from jaxfed.deployment.node import make_reply
from jaxfed.deployment.node_states import read_client
from jaxfed.deployment.secure_node import (
    MASKED,
    NONCE,
    SessionStart,
    make_session_terms,
    name_session,
    pack_session_start,
    read_session,
)
from jaxfed.sampling.cohort import sample_cohort
from jaxfed.secagg.protocol import Server
from tests.deployment.federation import MF, RING, open_federation


def ask(node, *envelopes):
    """(the envelopes of a reply, the line of a refusal among them)."""
    found = read_envelopes(make_reply(node, pack_envelopes(envelopes)))
    return found, next((read_refusal(each) for each in found if each.kind == EnvelopeKind.REFUSED), "")


def begin(server, nodes, nonce, round=0, cohort=None):
    """(session, {node: the envelopes by which it begins}) of a round: as an honest server asks, or of a cohort."""
    ids = sample_cohort(server.party.sampler, server.seed, round)[0] if cohort is None else np.array(cohort)
    members = {node: each.ids for node, each in nodes.items()}
    asked = {node: np.intersect1d(ids, clients).astype(np.int32) for node, clients in members.items()}
    requests, request = make_requests(server, round, ids, asked, members)
    start = pack_session_start(SessionStart(nonce.ljust(NONCE), request.digest, ids))
    session = name_session(server.party.digest, round, start)
    step = Envelope(EnvelopeKind.SECURE, round, 0, session, 0, start)
    whole = {node: read_envelopes(data) for node, data in requests.items()}
    return session, {node: [*(some if len(asked[node]) else some[:1]), step] for node, some in whole.items()}


def run_to_mask(server, nodes, nonce):
    """A session up to the inboxes of `mask`: (session, {node: inbox})."""
    session, first = begin(server, nodes, nonce)
    sums, places = Server(make_session_terms(server.party, session)), {}
    inbox = {}
    for number, step in enumerate(("advertise", "share")):
        messages = {}
        for node in nodes:
            words = (
                first[node] if number == 0 else [Envelope(EnvelopeKind.SECURE, 0, 1, session, 0, inbox[places[node]])]
            )
            found, said = ask(nodes[node], *words)
            assert not said
            messages |= {each.rows: each.payload for each in found if each.kind == EnvelopeKind.SECURE}
            places[node] = next(each.rows for each in found if each.kind == EnvelopeKind.SECURE)
        inbox = getattr(sums, step)(messages)
    return session, {node: inbox[places[node]] for node in nodes}


@pytest.fixture
def federation(tmp_path):
    server, nodes, _ = open_federation(tmp_path, MF | RING, secure=True)
    return server, nodes


def test_one_vector_of_a_round_is_masked_once(federation):
    """Two sums that differ by a node would tell its vector."""
    server, nodes = federation
    for number, nonce in enumerate((b"first", b"second")):
        session, inbox = run_to_mask(server, nodes, nonce)
        found, said = ask(nodes[0], Envelope(EnvelopeKind.SECURE, 0, 2, session, 0, inbox[0]))
        assert ("masked already" in said) == bool(number)
        assert (found[0].kind == EnvelopeKind.SECURE) == (not number)
    assert json.loads((nodes[0].secure / MASKED).read_text()) == {nodes[0].party.digest.hex(): 0}


def test_a_step_is_answered_once(federation):
    server, nodes = federation
    session, inbox = run_to_mask(server, nodes, b"nonce")
    step = Envelope(EnvelopeKind.SECURE, 0, 2, session, 0, inbox[0])
    first, _ = ask(nodes[0], step)
    again, _ = ask(nodes[0], step)
    assert first == again
    assert "a second time" in ask(nodes[0], step._replace(payload=inbox[1]))[1]
    assert "out of order" in ask(nodes[0], step._replace(client=4))[1]
    assert "another secure sum" in ask(nodes[0], step._replace(digest=bytes(32)))[1]
    assert "another secure sum" in ask(nodes[0], step._replace(round=1))[1]


def test_no_message_leaves_without_a_secure_sum(federation):
    server, nodes = federation
    *words, step = begin(server, nodes, b"nonce")[1][0]
    others = step._replace(payload=b"other".ljust(NONCE) + step.payload[NONCE:]), step._replace(round=1)
    for last in ([], [others[0]], [others[1]], [step._replace(client=1)]):
        found, said = ask(nodes[0], *words, *last)
        assert said
        assert [each.kind for each in found] == [EnvelopeKind.REFUSED]
    assert "no secure sum" in ask(nodes[1], step._replace(client=1))[1]


def test_a_server_that_asks_one_client_alone_is_refused(federation):
    """Other nodes would bring zeros, and the sum would be its message."""
    server, nodes = federation
    nobody = server.party.plan.num_clients
    alone = [5, *[nobody] * 11]
    assert "hide too little" in ask(nodes[0], *begin_of(server, nodes, alone)[0])[1]
    honest = begin(server, nodes, b"nonce")[1]
    node = next(node for node, words in honest.items() if len(words) > 2)
    told = begin_of(server, nodes, [int(client) for client in nodes[node].ids[:1]] + [nobody] * 11)[node]
    found, said = ask(nodes[node], *told[:-1], honest[node][-1])  # it is told of the whole cohort, and asked for one
    assert "asks other clients" in said
    assert [each.kind for each in found] == [EnvelopeKind.REFUSED]


def begin_of(server, nodes, cohort):
    """What nodes are told by which a session of another cohort begins."""
    ids = np.array(cohort)
    real = ids[ids < server.party.plan.num_clients]
    _, words = begin(server, nodes, b"nonce", cohort=ids)
    model = next(each.digest for some in words.values() for each in some if each.kind == EnvelopeKind.COMMON)
    start = pack_session_start(SessionStart(b"nonce".ljust(NONCE), model, real))
    step = Envelope(EnvelopeKind.SECURE, 0, 0, name_session(server.party.digest, 0, start), 0, start)
    return {node: [*some[:-1], step] for node, some in words.items()}


def test_a_node_with_another_key_takes_no_part(federation):
    server, nodes = federation
    (nodes[0].secure / "identity").write_bytes(bytes(range(32)))
    assert "not among those" in ask(nodes[0], *begin(server, nodes, b"nonce")[1][0])[1]
    (nodes[0].secure / "identity").write_bytes(b"short")
    assert "damaged" in ask(nodes[0], *begin(server, nodes, b"nonce")[1][0])[1]


def test_the_same_start_twice_is_masked_once(federation):
    """The second session has the first one's name, and other keys."""
    server, nodes = federation
    for number in range(2):
        session, inbox = run_to_mask(server, nodes, b"same")
        found, said = ask(nodes[0], Envelope(EnvelopeKind.SECURE, 0, 2, session, 0, inbox[0]))
        assert ("masked already" in said) == bool(number)
        assert len(found) == 1


def test_a_step_that_the_protocol_refuses_ends_the_session(federation):
    """Else a server could try until a message fits."""
    server, nodes = federation
    session, inbox = run_to_mask(server, nodes, b"nonce")
    step = Envelope(EnvelopeKind.SECURE, 0, 2, session, 0, inbox[0])
    assert ask(nodes[0], step._replace(payload=inbox[0][:-1]))[1]
    assert "no secure sum" in ask(nodes[0], step)[1]
    assert not (nodes[0].secure / MASKED).exists()


def find_asked(words):
    """A node of which the request asks clients."""
    return next(node for node, some in words.items() if some[1].kind == EnvelopeKind.COMMON)


def test_nodes_of_a_session_are_sent_one_model(federation):
    server, nodes = federation
    session, words = begin(server, nodes, b"nonce")
    node = find_asked(words)
    plan, model, step = words[node]
    other = bytearray(model.payload)
    other[0] ^= 1
    assert "the digest of another" in ask(nodes[node], plan, model._replace(payload=bytes(other)), step)[1]
    honest = digest_model_bytes(0, bytes(other))
    moved = model._replace(payload=bytes(other), digest=honest)
    assert "another model than the one" in ask(nodes[node], plan, moved, step)[1]
    start = pack_session_start(SessionStart(step.payload[:NONCE], honest, sample_cohort(server.party.sampler, 5, 0)[0]))
    named = Envelope(EnvelopeKind.SECURE, 0, 0, name_session(server.party.digest, 0, start), 0, start)
    found, said = ask(nodes[node], plan, moved, named)  # a session of its own: others know that it is another one
    assert not said
    assert named.digest != session
    assert [each.kind for each in found] == [EnvelopeKind.READY, EnvelopeKind.SECURE]


def test_a_model_without_finite_updates_does_not_tell_who_holds_an_item(federation):
    """Those who hold the item have no update. They are listed as all others, and their messages are zeros."""
    server, nodes = federation
    params = server.state.shared.params
    signs = 3e38 * np.random.default_rng(0).choice([-1, 1], (8, 4))  # who learnt one has no number by another
    broken = jax.tree.map(lambda x: x.at[:8].set(signs) if x.ndim > 1 else x, params)
    server.state = server.state._replace(shared=server.state.shared._replace(params=broken))
    _, words = begin(server, nodes, b"nonce")
    unfinished = 0
    for node, some in words.items():
        found, _ = ask(nodes[node], *some)
        assert [each.kind for each in found] == [EnvelopeKind.READY, EnvelopeKind.SECURE]
        asked = read_plan(some[0].payload).asked
        np.testing.assert_array_equal(np.frombuffer(found[0].payload, "<i4"), asked)
        for client in asked.tolist():
            saved = read_client(nodes[node].folder, client, nodes[node].like)
            same = all(jax.tree.leaves(jax.tree.map(np.array_equal, saved.after, saved.state)))
            assert not same or not any(saved.message)
            unfinished += same
    assert 0 < unfinished < 12


def test_rounds_and_cohorts_are_those_of_the_configuration(federation):
    """A server that masked a vector of the last number there is would end the federation for the node."""
    server, nodes = federation
    words = begin(server, nodes, b"nonce", round=server.rounds)[1]
    node = find_asked(words)
    assert "of a federation of 4 rounds" in ask(nodes[node], *words[node])[1]
    plan, *others = begin(server, nodes, b"nonce")[1][node]
    wide = plan._replace(payload=pack_plan(read_plan(plan.payload)._replace(slots=1 << 30)))
    assert "1073741824 slots" in ask(nodes[node], wide, *others)[1]


@pytest.mark.parametrize("counted", [-1, 0, 1])
def test_no_client_answers_a_round_again(federation, counted):
    """Whatever the server says of what it counted."""
    server, nodes = federation
    words = begin(server, nodes, b"nonce", round=1)[1]
    node = find_asked(words)
    assert not ask(nodes[node], *words[node])[1]
    params = jax.tree.map(lambda x: x + 1, server.state.shared.params)
    server.state = server.state._replace(shared=server.state.shared._replace(params=params))
    server.counted[:] = counted
    for round in (0, 1):
        cohort = sample_cohort(server.party.sampler, server.seed, 1)[0]
        again = begin(server, nodes, b"again", round=round, cohort=cohort)[1][node]
        found, said = ask(nodes[node], *again)
        assert said
        assert found[0].kind == EnvelopeKind.READY
        assert not found[0].payload
        assert not read_session(nodes[node].secure).vector.any()


def test_a_note_of_masked_rounds_that_is_damaged_masks_nothing(federation):
    server, nodes = federation
    session, inbox = run_to_mask(server, nodes, b"nonce")
    (nodes[0].secure / MASKED).write_text("{")
    found, said = ask(nodes[0], Envelope(EnvelopeKind.SECURE, 0, 2, session, 0, inbox[0]))
    assert "damaged" in said
    assert len(found) == 1
