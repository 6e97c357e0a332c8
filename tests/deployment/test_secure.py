"""Secure sums between nodes: the simulator's round, of which the server sees no message."""

import jax
import numpy as np
import pytest

from jaxfed.deployment.coordinator import make_requests
from jaxfed.deployment.envelope import Envelope, EnvelopeKind, pack_envelopes, read_envelopes, read_refusal
from jaxfed.deployment.node import make_reply
from jaxfed.deployment.node_states import read_client
from jaxfed.deployment.opened_node import open_node
from jaxfed.deployment.secure_node import (
    MASKED,
    NONCE,
    SECURE,
    find_terms,
    name_session,
    pack_begin,
    sum_ring_messages,
)
from jaxfed.sampling.cohort import sample_cohort
from jaxfed.secagg.protocol import ROUNDS, Server
from tests.deployment.federation import (
    MF,
    RING,
    SILOS,
    compare_with_simulator,
    deal_clients,
    open_federation,
    run_federation,
    simulate,
)

SKELLAM = {
    "channel": [
        {"name": "mean", "count": 12},
        {"name": "clip", "bound": 0.5},
        {"name": "skellam"},
    ],
    "server": {"name": "sgd", "lazy": False},
}
CASES = {"ring": RING, "ring of silos": RING | SILOS, "skellam": SKELLAM}
WINDOW = 16  # bytes: four numbers in a row


def secure_exchange(nodes, gone=lambda round, step, node: None, heard=None):
    """Requests go to the nodes as function calls. gone(round, step, node): "request" or "reply" where one is lost.
    heard: a list to which all bytes that the server receives are added."""

    def exchange(requests):
        replies = {}
        for node, data in requests.items():
            last = read_envelopes(data)[-1]
            lost = gone(last.round, last.client, node) if last.kind == EnvelopeKind.SECURE else None
            if lost != "request":
                replies[node] = make_reply(nodes[node], data)
            if lost == "reply":
                del replies[node]
        if heard is not None:
            heard.extend(replies.values())
        return replies

    return exchange


@pytest.mark.parametrize("name", CASES)
def test_a_secure_sum_is_the_simulators_bit_by_bit(name, tmp_path):
    table, lines = MF | CASES[name], []
    server, nodes, parts = open_federation(tmp_path, table, say=lines.append, secure=True)
    assert server.party.sees == "sum"
    found = run_federation(server, nodes, 3, secure_exchange(nodes))
    want, figures = simulate(parts, 3, table["seed"])
    assert not lines
    compare_with_simulator(server, nodes, parts, want, exact=True)
    for ours, theirs in zip(found, figures, strict=True):
        assert int(ours["clients/reported"]) == int(theirs["clients/reported"])


def windows(data, stride):
    """The windows of some bytes that are no run of few values, which anything may hold."""
    found = {bytes(data[at : at + WINDOW]) for at in range(0, len(data) - WINDOW + 1, stride)}
    return {each for each in found if len(set(each)) > 6}


def test_the_server_receives_no_message_nor_the_vector_of_a_node(tmp_path):
    """All bytes that come to it are looked through; without the masks the same search finds the messages."""
    server, nodes, _ = open_federation(tmp_path / "a", MF | RING, secure=True)
    heard = []
    run_federation(server, nodes, 1, secure_exchange(nodes, heard=heard))
    bare, sent = set(), set()
    for node in nodes.values():
        saved = [read_client(node.folder, client, node.like) for client in node.ids.tolist()]
        messages = [each.message for each in saved if each and each.message]
        assert messages
        for each in messages:
            sent |= windows(each, 4)
        bare |= sent | windows(sum_ring_messages(node.party, messages).tobytes(), 4)
    assert len(sent) > 20
    assert len(bare) > 100
    received = set().union(*(windows(data, 1) for data in heard))
    assert not bare & received
    server, nodes, _ = open_federation(tmp_path / "b", MF | RING)  # no keys: bare
    assert server.party.sees == "update"
    heard = []
    run_federation(server, nodes, 1, secure_exchange(nodes, heard=heard))
    assert sent <= set().union(*(windows(data, 1) for data in heard))


@pytest.mark.parametrize("way", ["request", "reply"])
@pytest.mark.parametrize("step", range(5))
def test_nodes_that_are_lost_at_any_step(step, way, tmp_path):
    """A vector that came is in the sum, whatever becomes of its node; the masks of others are taken back."""
    table, lines = MF | RING, []
    server, nodes, parts = open_federation(tmp_path, table, number=7, say=lines.append, secure=True)

    def gone(round, now, node):
        return way if round == 1 and node in (2, 4) and now >= step else None

    run_federation(server, nodes, 3, secure_exchange(nodes, gone))
    lost = deal_clients(parts, 7)
    arrived = step > ROUNDS.index("mask")

    def absent(round):
        return () if round != 1 or arrived else {*lost[2].tolist(), *lost[4].tolist()}

    want, _ = simulate(parts, 3, table["seed"], absent)
    compare_with_simulator(server, nodes, parts, want, exact=True)
    assert not lines


def test_where_too_few_stay_nobody_has_reported_and_the_next_round_goes_on(tmp_path):
    table, lines = MF | RING, []
    server, nodes, parts = open_federation(tmp_path, table, say=lines.append, secure=True)

    def gone(round, now, node):
        return "reply" if round == 0 and node < 2 and now >= 2 else None

    found = run_federation(server, nodes, 2, secure_exchange(nodes, gone))
    assert int(found[0]["clients/reported"]) == 0
    assert "the secure sum failed" in lines[0]
    everyone = range(parts.data.num_clients)
    want, _ = simulate(parts, 2, table["seed"], lambda round: everyone if round == 0 else ())
    compare_with_simulator(server, nodes, parts, want, exact=True)


def test_nodes_are_opened_anew_for_each_request(tmp_path):
    """As Flower does: all that a session needs lies on the disk."""
    table = MF | RING
    server, nodes, parts = open_federation(tmp_path, table, secure=True)
    from jaxfed.config.schema import make_config
    from jaxfed.deployment.node_data import find_facts

    keys = tuple(key.hex() for key in server.party.roster)
    facts = find_facts(parts.data.population, parts.shapes.kinds, parts.data.source.items)._replace(keys=keys)

    class Reopened(dict):
        def __getitem__(self, node):
            return open_node(tmp_path / str(node), make_config(table), facts, "reproducible")

    run_federation(server, nodes, 1, secure_exchange(Reopened(nodes)))
    want, _ = simulate(parts, 1, table["seed"])
    compare_with_simulator(server, nodes, parts, want, exact=True)


# --- a server that is not honest ----------------------------------------


def ask(node, *envelopes):
    """(the envelopes of a reply, the line of a refusal among them)."""
    found = read_envelopes(make_reply(node, pack_envelopes(envelopes)))
    return found, next((read_refusal(each) for each in found if each.kind == EnvelopeKind.REFUSED), "")


def begin(server, nodes, nonce, round=0, cohort=None):
    """(session, {node: the envelopes by which it begins}) of a round: as an honest server asks, or of a cohort."""
    ids = sample_cohort(server.party.sampler, server.seed, round)[0] if cohort is None else np.array(cohort)
    members = {node: each.ids for node, each in nodes.items()}
    asked = {node: np.intersect1d(ids, clients).astype(np.int32) for node, clients in members.items()}
    requests, _ = make_requests(server, round, ids, asked, members)
    begun = pack_begin(nonce.ljust(NONCE), ids)
    session = name_session(server.party.digest, round, begun)
    step = Envelope(EnvelopeKind.SECURE, round, 0, session, 0, begun)
    whole = {node: read_envelopes(data) for node, data in requests.items()}
    return session, {node: [*(some if len(asked[node]) else some[:1]), step] for node, some in whole.items()}


def run_to_mask(server, nodes, nonce):
    """A session up to the inboxes of `mask`: (session, {node: inbox})."""
    session, first = begin(server, nodes, nonce)
    sums, places = Server(find_terms(server.party, session)), {}
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
    assert (nodes[0].folder / SECURE / MASKED).read_text() == "0"


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
    begun = pack_begin(b"nonce".ljust(NONCE), real)
    step = Envelope(EnvelopeKind.SECURE, 0, 0, name_session(server.party.digest, 0, begun), 0, begun)
    return {node: [*some[:-1], step] for node, some in words.items()}


def test_a_node_with_another_key_takes_no_part(federation):
    server, nodes = federation
    (nodes[0].folder / SECURE / "identity").write_bytes(bytes(range(32)))
    assert "not among those" in ask(nodes[0], *begin(server, nodes, b"nonce")[1][0])[1]
    (nodes[0].folder / SECURE / "identity").write_bytes(b"short")
    assert "damaged" in ask(nodes[0], *begin(server, nodes, b"nonce")[1][0])[1]


def test_what_a_node_says_wrongly_is_left_out(tmp_path):
    """A node that lies about whose messages it brings, or is cut, does not stop the others."""
    table, lines = MF | RING, []
    server, nodes, parts = open_federation(tmp_path, table, number=7, say=lines.append, secure=True)
    honest = secure_exchange(nodes)

    def exchange(requests):
        replies = honest(requests)
        if 0 in replies:
            found = read_envelopes(replies[0])
            if found[0].kind == EnvelopeKind.READY:
                strangers = np.arange(parts.data.num_clients, dtype="<i4").tobytes()
                replies[0] = pack_envelopes([found[0]._replace(payload=strangers), *found[1:]])
        if 1 in replies and read_envelopes(replies[1])[0].kind == EnvelopeKind.READY:
            replies[1] = replies[1][:-3]
        return replies

    run_federation(server, nodes, 1, exchange)
    lost = deal_clients(parts, 7)
    want, _ = simulate(parts, 1, table["seed"], lambda round: {*lost[0].tolist(), *lost[1].tolist()})
    assert len(lines) == 2
    got = jax.tree.leaves(jax.device_get(server.state.shared))
    for ours, theirs in zip(got, jax.tree.leaves(want.shared), strict=True):
        np.testing.assert_array_equal(ours, theirs)
