"""Secure sums between nodes: the simulator's round, of which the server sees no message."""

import numpy as np
import pytest

from jaxfed.deployment.envelope import EnvelopeKind, pack_envelopes, read_envelopes
from jaxfed.deployment.node import make_reply
from jaxfed.deployment.node_states import read_client
from jaxfed.deployment.opened_node import open_node
from jaxfed.deployment.secure_node import (
    sum_ring_messages,
)
from jaxfed.secagg.protocol import ROUNDS
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
    compare_with_simulator(server, nodes, parts, want, exact=True)


@pytest.mark.parametrize(("number", "gone"), [(2, 0), (3, 0), (4, 0), (4, 1), (2, 1), (3, 1), (4, 2)])
def test_few_nodes(number, gone, tmp_path):
    """More than two thirds must stay: of two or three all, of four three. Else nobody has reported."""
    table, lines = MF | RING, []
    server, nodes, parts = open_federation(tmp_path, table, number=number, say=lines.append, secure=True)
    there = {node: each for node, each in nodes.items() if node >= gone}

    def lost(round, step, node):
        return "request" if node not in there else None

    run_federation(server, nodes, 1, secure_exchange(nodes, lost))
    enough = 3 * (number - gone) > 2 * number
    left = {client for node in there for client in nodes[node].ids.tolist()} if enough else set()
    want, _ = simulate(parts, 1, table["seed"], lambda round: set(range(parts.data.num_clients)) - left)
    compare_with_simulator(server, nodes, parts, want, exact=True)
    assert bool(lines) != enough


def test_figures_of_nodes_that_are_lost(tmp_path):
    """Before their vector came, their clients have dropped out, as the simulator's; those of a node that said something
    wrong are refused."""
    table, lines = MF | RING, []
    server, nodes, parts = open_federation(tmp_path, table, number=7, say=lines.append, secure=True)
    honest = secure_exchange(nodes, lambda round, step, node: "reply" if node == 2 and step >= 1 else None)

    def exchange(requests):
        replies = honest(requests)
        started = 4 in replies and read_envelopes(replies[4])[0].kind == EnvelopeKind.READY
        return replies | ({4: replies[4][:-3]} if started else {})

    (figures,) = run_federation(server, nodes, 1, exchange)
    cohort, lost = {*np.asarray(figures["clients/ids"]).tolist()}, deal_clients(parts, 7)
    dropped, refused = (len(cohort & {*lost[node].tolist()}) for node in (2, 4))
    assert dropped
    assert refused
    assert int(figures["clients/dropped"]) == dropped
    assert int(figures["clients/refused"]) == refused
    assert int(figures["clients/reported"]) == len(cohort) - dropped - refused
