"""What a node of a secure sum refuses, whatever the server says: nothing but sums of many clients leaves it."""

import json

import jax
import numpy as np
import pytest

from jaxfed.deployment import node as node_replies
from jaxfed.deployment import secure_node
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
from jaxfed.deployment.opened_server import make_public_key
from jaxfed.deployment.secure_node import (
    MASKED,
    NONCE,
    SessionStart,
    find_least_cohort,
    make_session_terms,
    name_session,
    pack_session_start,
    read_session,
)
from jaxfed.sampling.cohort import sample_cohort
from jaxfed.secagg.masks import hash_bytes
from jaxfed.secagg.messages import pack_parties
from jaxfed.secagg.protocol import Server
from jaxfed.secagg.terms import SIGNATURE
from tests.deployment.federation import MF, RING, make_parts, open_federation


def ask(node, *envelopes):
    """(the envelopes of a reply, the line of a refusal among them)."""
    found = read_envelopes(make_reply(node, pack_envelopes(envelopes)))
    return found, next((read_refusal(each) for each in found if each.kind == EnvelopeKind.REFUSED), "")


def start_round(server, nodes, nonce, round=0, cohort=None):
    """(session, {node: the envelopes by which it begins}) of a round: as an honest server asks, or of a cohort."""
    ids = sample_cohort(server.party.sampler, server.seed, round)[0] if cohort is None else np.array(cohort)
    members = {node: each.ids for node, each in nodes.items()}
    asked = {node: np.intersect1d(ids, clients).astype(np.int32) for node, clients in members.items()}
    requests, request = make_requests(server, round, ids, asked, members)
    start = pack_session_start(SessionStart(nonce.ljust(NONCE), request.digest, make_public_key(server, round), ids))
    session = name_session(server.party.digest, round, start)
    step = Envelope(EnvelopeKind.SECURE, round, 0, session, 0, start)
    whole = {node: read_envelopes(data) for node, data in requests.items()}
    return session, {node: [*(some if len(asked[node]) else some[:1]), step] for node, some in whole.items()}


def run_to_mask(server, nodes, nonce):
    """A session up to the inboxes of `mask`: (session, {node: inbox})."""
    session, first = start_round(server, nodes, nonce)
    return session, send_shares(server, nodes, session, first)


def send_shares(server, nodes, session, first):
    """{node: inbox of `mask`} of a session that starts with these requests. Nodes are at their own index."""
    sums, inbox = Server(make_session_terms(server.party, session, 12)), {}
    for number, step in enumerate(("advertise", "share")):
        messages = {}
        for node in nodes:
            words = first[node] if number == 0 else [Envelope(EnvelopeKind.SECURE, 0, 1, session, 0, inbox[node])]
            found, _ = ask(nodes[node], *words)
            messages |= {each.rows: each.payload for each in found if each.kind == EnvelopeKind.SECURE}
            assert list(messages) == [*range(node + 1)]
        inbox = getattr(sums, step)(messages)
    return inbox


def unmask_anyway(nodes, session, inbox, lost=()):
    """{node: the line of its refusal} of nodes that a server asks for help with a sum, whatever it should check."""
    messages = {}
    for node in inbox.keys() - set(lost):
        found, said = ask(nodes[node], Envelope(EnvelopeKind.SECURE, 0, 2, session, 0, inbox[node]))
        assert not said
        messages[node] = found[0].payload
    proofs = {node: hash_bytes(data[:-SIGNATURE]) + data[-SIGNATURE:] for node, data in sorted(messages.items())}
    step = Envelope(EnvelopeKind.SECURE, 0, 3, session, 0, pack_parties(proofs))
    return {node: ask(nodes[node], step)[1] for node in messages}


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
    (noted,) = json.loads((nodes[0].secure / MASKED).read_text()).items()
    assert (noted[0], noted[1][0]) == (nodes[0].party.digest.hex(), 0)


def test_a_node_that_is_killed_before_it_sends_its_vector_sends_the_same_one(federation, monkeypatch):
    """It has noted that the vector is masked, and not yet that the step is answered."""
    server, nodes = federation
    session, inbox = run_to_mask(server, nodes, b"nonce")
    step = Envelope(EnvelopeKind.SECURE, 0, 2, session, 0, inbox[0])
    with monkeypatch.context() as killed:
        killed.setattr(secure_node, "write_session", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            ask(nodes[0], step)
    assert (nodes[0].secure / MASKED).exists()
    (answer,), said = ask(nodes[0], step)
    assert not said
    assert ask(nodes[0], step) == ([answer], "")
    assert not any(unmask_anyway(nodes, session, inbox).values())


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
    *words, step = start_round(server, nodes, b"nonce")[1][0]
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
    assert "hide too little" in ask(nodes[0], *start_round_of_cohort(server, nodes, alone)[0])[1]
    honest = start_round(server, nodes, b"nonce")[1]
    node = next(node for node, words in honest.items() if len(words) > 2)
    told = start_round_of_cohort(server, nodes, [int(nodes[node].ids[0]), *[nobody] * 11])[node]
    found, said = ask(nodes[node], *told[:-1], honest[node][-1])  # it is told of the whole cohort, and asked for one
    assert "asks other clients" in said
    assert [each.kind for each in found] == [EnvelopeKind.REFUSED]


def test_a_cohort_that_is_lost_but_for_a_few_is_not_unmasked(federation):
    """The server asks twelve clients, eight of one node, which it then loses: four would be left, of six at least."""
    server, nodes = federation
    cohort = [*nodes[4].ids, *nodes[3].ids[:3], nodes[0].ids[0]]
    words = start_round_of_cohort(server, nodes, sorted(map(int, cohort)))
    session = words[0][-1].digest
    said = unmask_anyway(nodes, session, send_shares(server, nodes, session, words), lost=[4])
    assert said.keys() == {0, 1, 2, 3}
    assert all("bring 4 contributions, 6 are needed" in line for line in said.values())


def test_a_sum_in_which_most_clients_are_refused_is_not_unmasked(federation):
    """They have answered this round for another model, in a session that the server gave up. One node has not."""
    server, nodes = federation
    _, first = start_round(server, nodes, b"first")
    for node in range(1, 5):
        assert not ask(nodes[node], *first[node])[1]
    params = jax.tree.map(lambda x: x + 1, server.state.shared.params)
    server.state = server.state._replace(shared=server.state.shared._replace(params=params))
    session, second = start_round(server, nodes, b"second")
    own = len(read_plan(second[0][0].payload).asked)
    assert 0 < own < 6
    said = unmask_anyway(nodes, session, send_shares(server, nodes, session, second))
    assert len(said) == 5
    assert all(f"bring {own} contributions, 6 are needed" in line for line in said.values())


@pytest.mark.parametrize(
    ("cohort", "least"), [({"name": "cyclic", "size": 12}, 12), ({"name": "poisson", "size": 12}, 6), ({}, 12)]
)
def test_a_cohort_is_as_large_as_the_configuration_says(cohort, least):
    _, parts = make_parts(MF | RING | {"cohort": MF["cohort"] | cohort})
    assert find_least_cohort(parts.sampler) == least


def start_round_of_cohort(server, nodes, cohort):
    """What nodes are told by which a session of another cohort begins."""
    ids = np.array(cohort)
    real = ids[ids < server.party.plan.num_clients]
    _, words = start_round(server, nodes, b"nonce", cohort=ids)
    model = next(each.digest for some in words.values() for each in some if each.kind == EnvelopeKind.COMMON)
    key = make_public_key(server, 0)
    start = pack_session_start(SessionStart(b"nonce".ljust(NONCE), model, key, real))
    step = Envelope(EnvelopeKind.SECURE, 0, 0, name_session(server.party.digest, 0, start), 0, start)
    return {node: [*some[:-1], step] for node, some in words.items()}


def test_a_node_with_another_key_takes_no_part(federation):
    server, nodes = federation
    (nodes[0].secure / "identity").write_bytes(bytes(range(32)))
    assert "not among those" in ask(nodes[0], *start_round(server, nodes, b"nonce")[1][0])[1]
    (nodes[0].secure / "identity").write_bytes(b"short")
    assert "damaged" in ask(nodes[0], *start_round(server, nodes, b"nonce")[1][0])[1]


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
    session, words = start_round(server, nodes, b"nonce")
    node = find_asked(words)
    plan, model, step = words[node]
    other = bytearray(model.payload)
    other[0] ^= 1
    assert "the digest of another" in ask(nodes[node], plan, model._replace(payload=bytes(other)), step)[1]
    honest = digest_model_bytes(0, bytes(other))
    moved = model._replace(payload=bytes(other), digest=honest)
    assert "another model than the one" in ask(nodes[node], plan, moved, step)[1]
    cohort, key = sample_cohort(server.party.sampler, 5, 0)[0], make_public_key(server, 0)
    start = pack_session_start(SessionStart(step.payload[:NONCE], honest, key, cohort))
    named = Envelope(EnvelopeKind.SECURE, 0, 0, name_session(server.party.digest, 0, start), 0, start)
    found, said = ask(nodes[node], plan, moved, named)  # a session of its own: others know that it is another one
    assert not said
    assert named.digest != session
    assert [each.kind for each in found] == [EnvelopeKind.READY, EnvelopeKind.SECURE]


def test_nodes_of_a_session_have_one_public_key(federation):
    """Links that both ends draw from it would not add up."""
    server, nodes = federation
    _, words = start_round(server, nodes, b"nonce")
    node = find_asked(words)
    head, *others = words[node]
    plan = read_plan(head.payload)
    other = head._replace(payload=pack_plan(plan._replace(key=plan.key + 1)))
    assert "other public randomness" in ask(nodes[node], other, *others)[1]


@pytest.mark.parametrize("number", [np.nan, np.inf, 1.1e6])
def test_a_model_that_might_have_no_finite_updates_is_refused(federation, number):
    """Otherwise a server could choose whose messages are zeros, and the sum would hide the others less."""
    server, nodes = federation
    params = server.state.shared.params
    broken = jax.tree.map(lambda x: x.at[0].set(number) if x.ndim > 1 else x, params)
    server.state = server.state._replace(shared=server.state.shared._replace(params=broken))
    _, words = start_round(server, nodes, b"nonce")
    found, said = ask(nodes[find_asked(words)], *words[find_asked(words)])
    assert ("not finite, or beyond 1,000,000" if np.isfinite(number) else "not finite") in said
    assert [each.kind for each in found] == [EnvelopeKind.REFUSED]


def test_a_model_without_finite_updates_does_not_tell_who_holds_an_item(federation, monkeypatch):
    """Those who hold the item have no update. They are listed as all others, and their messages are zeros."""
    server, nodes = federation
    monkeypatch.setattr(node_replies, "LARGEST_NUMBER", np.inf)
    params = server.state.shared.params
    signs = 3e38 * np.random.default_rng(0).choice([-1, 1], (8, 4))  # whoever trains on one of these has no update
    broken = jax.tree.map(lambda x: x.at[:8].set(signs) if x.ndim > 1 else x, params)
    server.state = server.state._replace(shared=server.state.shared._replace(params=broken))
    _, words = start_round(server, nodes, b"nonce")
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


def test_rounds_and_slots_beyond_the_configuration_are_refused(federation):
    """If a node masked a vector for the largest round number, it would refuse every later round."""
    server, nodes = federation
    words = start_round(server, nodes, b"nonce", round=server.rounds)[1]
    node = find_asked(words)
    assert "of a federation of 4 rounds" in ask(nodes[node], *words[node])[1]
    plan, *others = start_round(server, nodes, b"nonce")[1][node]
    wide = plan._replace(payload=pack_plan(read_plan(plan.payload)._replace(slots=1 << 30)))
    assert "1073741824 slots" in ask(nodes[node], wide, *others)[1]


@pytest.mark.parametrize("counted", [-1, 0, 1])
def test_no_client_answers_a_round_again(federation, counted):
    """Whatever the server says of what it counted."""
    server, nodes = federation
    words = start_round(server, nodes, b"nonce", round=1)[1]
    node = find_asked(words)
    assert not ask(nodes[node], *words[node])[1]
    params = jax.tree.map(lambda x: x + 1, server.state.shared.params)
    server.state = server.state._replace(shared=server.state.shared._replace(params=params))
    server.counted[:] = counted
    for round in (0, 1):
        cohort = sample_cohort(server.party.sampler, server.seed, 1)[0]
        again = start_round(server, nodes, b"again", round=round, cohort=cohort)[1][node]
        found, said = ask(nodes[node], *again)
        assert said
        assert found[0].kind == EnvelopeKind.READY
        assert not found[0].payload
        assert not read_session(nodes[node].secure).vector.any()


def test_no_vector_is_masked_if_the_note_of_masked_rounds_is_damaged(federation):
    server, nodes = federation
    session, inbox = run_to_mask(server, nodes, b"nonce")
    (nodes[0].secure / MASKED).write_text("{")
    found, said = ask(nodes[0], Envelope(EnvelopeKind.SECURE, 0, 2, session, 0, inbox[0]))
    assert "damaged" in said
    assert len(found) == 1
