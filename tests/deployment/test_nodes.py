"""Nodes and the server against each other's faults: repeats, replays, other models, other configurations, damage."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxfed.config.build import load_data
from jaxfed.config.schema import make_config
from jaxfed.deployment.coordinator import match_nodes, run_server_round
from jaxfed.deployment.envelope import (
    Envelope,
    EnvelopeKind,
    digest_model_bytes,
    pack_envelopes,
    read_envelopes,
    read_refusal,
)
from jaxfed.deployment.node import make_reply
from jaxfed.deployment.node_data import find_facts, read_facts, read_node_data, write_facts, write_node_data
from jaxfed.deployment.node_states import read_client, read_secret
from jaxfed.deployment.opened_node import open_node
from tests.deployment.federation import (
    MF,
    RING,
    compare_with_simulator,
    direct_exchange,
    make_parts,
    open_federation,
    run_federation,
    simulate,
)

EVERYONE = RING | {"cohort": {"name": "everyone"}}


def recording_exchange(nodes, seen, change=lambda number, node, reply: reply):
    """As `direct_exchange`; `seen` gets (node, request, reply), and replies are changed on their way."""
    exchange = direct_exchange(nodes)

    def through(requests):
        replies = exchange(requests)
        seen.extend((node, requests[node], reply) for node, reply in replies.items())
        return {node: change(len(seen), node, reply) for node, reply in replies.items()}

    return through


def messages_of(reply):
    return [each for each in read_envelopes(reply) if each.kind == EnvelopeKind.MESSAGE]


def refusals_of(reply):
    return [read_refusal(each) for each in read_envelopes(reply) if each.kind == EnvelopeKind.REFUSED]


@pytest.fixture
def after_two(tmp_path):
    """A federation after two rounds, and what was sent in them."""
    lines, seen = [], []
    server, nodes, parts = open_federation(tmp_path, MF | EVERYONE, say=lines.append)
    run_federation(server, nodes, 2, recording_exchange(nodes, seen))
    assert not lines
    return server, nodes, parts, seen, lines


def test_a_repeated_request_has_the_same_answer(after_two):
    """The answer of the last round comes again, bit by bit, also from a node that was started anew; nothing is counted
    twice, and an earlier round is not answered any more."""
    _server, nodes, _, seen, _ = after_two
    before = {path: path.read_bytes() for path in nodes[0].folder.glob("*.npz")}
    _node, request, reply = next(each for each in seen[::-1] if each[0] == 0)
    assert messages_of(reply)
    assert make_reply(nodes[0], request) == reply
    assert {path: path.read_bytes() for path in nodes[0].folder.glob("*.npz")} == before
    first = next(each for each in seen if each[0] == 0 and read_envelopes(each[1])[0].kind == EnvelopeKind.PLAN)
    again = make_reply(nodes[0], first[1])
    assert not messages_of(again)
    assert all("stands after round" in line for line in refusals_of(again))


def test_no_second_answer_for_another_model(after_two):
    """A server that asked twice in one round, with two models, could subtract one noise from the other."""
    _server, nodes, _, seen, _ = after_two
    _, request, _ = next(each for each in seen[::-1] if each[0] == 0)
    envelopes = read_envelopes(request)
    (common,) = (each for each in envelopes if each.kind == EnvelopeKind.COMMON)
    data = common.payload[:-4] + np.float32(0.25).tobytes()
    honest = common._replace(payload=data, digest=digest_model_bytes(common.round, data))
    for model, why in ((honest, "was answered for another model"), (common._replace(digest=bytes(32)), "of another")):
        reply = make_reply(nodes[0], pack_envelopes([model if each is common else each for each in envelopes]))
        assert not messages_of(reply)
        assert refusals_of(reply)
        assert all(why in line for line in refusals_of(reply))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda each: each._replace(round=each.round + 1), "of round"),
        (lambda each: each._replace(digest=bytes(32)), "of another model"),
        (lambda each: each._replace(client=each.client + 1), "not at this node"),
        (lambda each: each._replace(client=5000), "not at this node"),
        (lambda each: each._replace(payload=each.payload[:-1]), "bytes where"),
        (lambda each: each._replace(payload=b""), "bytes where"),
        (lambda each: each._replace(kind=EnvelopeKind.HELLO), "none of a reply"),
    ],
)
def test_a_wrong_message_is_refused_and_the_rest_goes_on(change, said, tmp_path):
    """One message of node 2 is another: its client counts as refused, the others as in a round without it."""
    lines, found = [], []
    server, nodes, parts = open_federation(tmp_path, MF | EVERYONE, say=lines.append)

    def forge(number, node, reply):
        envelopes = read_envelopes(reply)
        if node != 2 or envelopes[0].kind != EnvelopeKind.MESSAGE:
            return reply
        found.append(envelopes[0].client)
        return pack_envelopes([change(envelopes[0]), *envelopes[1:]])

    (info,) = run_federation(server, nodes, 1, recording_exchange(nodes, [], forge))
    assert len(lines) == 1
    assert said in lines[0]
    assert (int(info["clients/refused"]), int(info["clients/dropped"])) == (1, 0)
    want, _ = simulate(parts, 1, MF["seed"], lambda round: found)
    compare_with_simulator(server, nodes, parts, want, exact=True)


def test_damage_on_the_way(tmp_path):
    """Of every node a byte of the reply is flipped: the round goes on with whoever is sound, and nobody crashes."""
    lines = []
    server, nodes, _ = open_federation(tmp_path, MF, say=lines.append)
    random = np.random.default_rng(0)

    def flip(number, node, reply):
        if read_envelopes(reply)[0].kind == EnvelopeKind.HELLO or node == 4:
            return reply
        data = bytearray(reply)
        data[random.integers(len(data))] ^= 1 << int(random.integers(8))
        return bytes(data)

    found = run_federation(server, nodes, 3, recording_exchange(nodes, [], flip))
    assert lines
    reported = [np.asarray(info["clients/ids"])[np.asarray(info["clients/present"])] for info in found]
    assert all(np.isin(ids, nodes[4].ids).all() for ids in reported)
    assert any(map(len, reported))


def test_a_message_that_comes_twice_counts_once(tmp_path):
    lines = []
    server, nodes, parts = open_federation(tmp_path, MF | EVERYONE, say=lines.append)

    def twice(number, node, reply):
        return pack_envelopes(
            [each for each in read_envelopes(reply) for _ in range(1 + (each.kind == EnvelopeKind.MESSAGE))]
        )

    (info,) = run_federation(server, nodes, 1, recording_exchange(nodes, [], twice))
    assert int(info["clients/reported"]) == 40
    assert len(lines) == 40
    assert all("a second message of one client" in line for line in lines)
    want, _ = simulate(parts, 1, MF["seed"])
    compare_with_simulator(server, nodes, parts, want, exact=True)


def test_rows_that_change_after_they_were_asked_for(tmp_path):
    """A client says in its reply that it holds other rows of this round: what it asked for stands."""
    lines, table = [], MF | {"cohort": {"name": "everyone"}, "server": {"name": "sgd", "learning_rate": 1.0}}
    server, nodes, parts = open_federation(tmp_path, table, say=lines.append)

    def move(number, node, reply):
        envelopes = read_envelopes(reply)
        if node != 2 or envelopes[0].kind != EnvelopeKind.MESSAGE:
            return reply
        other = np.array([0, 1], "<i4").tobytes()
        false = Envelope(EnvelopeKind.WANTED, envelopes[0].round, envelopes[0].client, bytes(32), 2, other)
        return pack_envelopes([envelopes[0], false, *envelopes[1:]])

    run_federation(server, nodes, 1, recording_exchange(nodes, [], move))
    assert len(lines) == 1
    assert "rows of round 1" in lines[0]
    want, _ = simulate(parts, 1, table["seed"])
    compare_with_simulator(server, nodes, parts, want, exact=False)


def test_a_node_with_another_configuration_is_left_out(tmp_path):
    lines = []
    server, nodes, parts = open_federation(tmp_path, MF | EVERYONE, say=lines.append)
    other = make_config(MF | EVERYONE | {"seed": 6})
    facts = find_facts(parts.data.population, parts.shapes.kinds, parts.data.source.items)
    nodes[1] = open_node(tmp_path / "1", other, facts, "reproducible")
    members = match_nodes(server.party, [*nodes], {}, direct_exchange(nodes), server.say)
    assert sorted(members) == [0, 2, 3, 4]
    assert lines == [
        "node 1 is left out: this node has another configuration, other facts or another version of jaxfed than the "
        "server: copy its config.toml and facts.json, and install its version"
    ]
    request = pack_envelopes([Envelope(EnvelopeKind.PLAN, 0, 0, server.party.digest)])
    assert "another configuration" in refusals_of(make_reply(nodes[1], request))[0]


def test_a_client_that_two_nodes_claim(tmp_path):
    lines = []
    server, nodes, _ = open_federation(tmp_path, MF, say=lines.append)
    nodes[7] = nodes[3]
    members = match_nodes(server.party, [*nodes], {}, direct_exchange(nodes), server.say)
    assert 7 not in members
    assert lines == ["node 7 is left out: it claims client 3, whom another node holds"]


def test_mutated_requests_are_answered_by_a_line(after_two):
    """Thousands of requests with a byte that is another, their checksums made anew: an answer each, and no crash."""
    _server, nodes, _, seen, _ = after_two
    _, request, _ = next(each for each in seen[::-1] if each[0] == 0)
    envelopes, random = read_envelopes(request), np.random.default_rng(3)
    for _ in range(300):
        which = int(random.integers(len(envelopes)))
        payload = bytearray(envelopes[which].payload)
        if payload:
            payload[random.integers(len(payload))] ^= 1 << int(random.integers(8))
        if random.integers(2):
            del payload[random.integers(len(payload) + 1) :]
        fields = {"payload": bytes(payload), "round": int(random.integers(5)), "rows": int(random.integers(70))}
        chosen = str(random.choice([*fields]))
        changed = [*envelopes[:which], envelopes[which]._replace(**{chosen: fields[chosen]}), *envelopes[which + 1 :]]
        assert read_envelopes(make_reply(nodes[0], pack_envelopes(changed)))
    for request in (b"", b"?", pack_envelopes([Envelope(EnvelopeKind.MESSAGE, 0, 0, bytes(32))])):
        assert refusals_of(make_reply(nodes[0], request))


def test_a_node_that_comes_back_goes_on(tmp_path):
    """Every node is opened anew before every round, from its folder alone."""
    table = MF | EVERYONE
    server, nodes, parts = open_federation(tmp_path, table)
    config = make_config(table)
    facts = find_facts(parts.data.population, parts.shapes.kinds, parts.data.source.items)
    members = match_nodes(server.party, [*nodes], {}, direct_exchange(nodes), server.say)
    for _ in range(3):
        nodes = {node: open_node(tmp_path / str(node), config, facts, "reproducible") for node in nodes}
        run_server_round(server, members, direct_exchange(nodes))
    want, _ = simulate(parts, 3, table["seed"])
    compare_with_simulator(server, nodes, parts, want, exact=True)


def test_damaged_states_are_said_in_one_line(after_two):
    _server, nodes, _, seen, _ = after_two
    _, request, _ = next(each for each in seen[::-1] if each[0] == 0)
    path = nodes[0].folder / "0.npz"
    path.write_bytes(path.read_bytes()[:-40])
    reply = make_reply(nodes[0], request)
    assert len(messages_of(reply)) == 7
    assert "0.npz is damaged" in refusals_of(reply)[0]
    (nodes[0].folder / "secret").write_bytes(b"short")
    with pytest.raises(ValueError, match="secret is damaged"):
        read_secret(nodes[0].folder)


def test_a_state_is_written_whole_or_not_at_all(after_two, monkeypatch):
    """The disk is full while a state is written: the one before stands."""
    server, nodes, _, _seen, _ = after_two
    before = read_client(nodes[0].folder, 0, nodes[0].like)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="No space"):
        run_server_round(server, {0: nodes[0].ids}, direct_exchange(nodes))
    after = read_client(nodes[0].folder, 0, nodes[0].like)
    assert after.answered == before.answered
    assert after.message == before.message


def test_node_data_that_do_not_fit(tmp_path):
    _, parts = make_parts(MF)
    population = parts.data.population
    facts = find_facts(population, parts.shapes.kinds, parts.data.source.items)
    write_facts(tmp_path / "facts.json", facts)
    assert read_facts(tmp_path / "facts.json") == facts
    path = tmp_path / "data.npz"
    write_node_data(path, population, np.array([2, 5, 9]))
    found = read_node_data(path, facts).population
    np.testing.assert_array_equal(np.flatnonzero(found.num_train), [2, 5, 9])
    np.testing.assert_array_equal(found.train.of(1), population.train.of(5))
    for changes, said in (
        ({"clients": np.array([2, 9, 5])}, "ascending"),
        ({"clients": np.array([2, 5, 99])}, "none of 40"),
        ({"train": np.array([1])}, "counts of train"),
        ({"users": np.array([1, 1, 2])}, "more than 1 users"),
    ):
        with np.load(path) as file:
            arrays = dict(file) | changes
        np.savez(tmp_path / "other.npz", **arrays)
        with pytest.raises(ValueError, match=said):
            read_node_data(tmp_path / "other.npz", facts)
    arrays["train"] = np.full(len(population.train.some(np.array([2, 5, 9])).values), 60)
    arrays["users"] = np.array([1, 1, 1])
    np.savez(tmp_path / "other.npz", **arrays)
    with pytest.raises(ValueError, match="an item that is none of 60"):
        read_node_data(tmp_path / "other.npz", facts)
    for data in (b"", b"PK\x03\x04", path.read_bytes()[:200]):
        (tmp_path / "other.npz").write_bytes(data)
        with pytest.raises(ValueError, match="no data of this federation"):
            read_node_data(tmp_path / "other.npz", facts)
    for text in ("", "[]", "{}", '{"kinds": 3}'):
        (tmp_path / "facts.json").write_text(text)
        with pytest.raises(ValueError, match="no facts"):
            read_facts(tmp_path / "facts.json")


def test_the_server_holds_no_interactions(tmp_path):
    """Nothing that it has has as many numbers as there are interactions, users or clients' lengths."""
    server, _, _parts = open_federation(tmp_path, MF)
    population = server.party.clients.population
    assert len(population.train.values) == len(population.valid.values) == len(population.test.values) == 0
    assert not population.num_train.any()
    assert len(server.party.clients.source.interactions.user) == 0
    assert not jax.tree.leaves(server.state.client_states)
    config = make_config(MF)
    assert load_data(config.data).population.num_train.all()
    assert dataclasses.is_dataclass(server)
