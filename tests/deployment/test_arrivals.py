"""Buffered rounds over a network: those of the simulator where messages come in as by its clock, and by hand where
clients are lost, slow, or wrong."""

import heapq
import itertools
import json

import jax
import numpy as np
import pytest

from jaxfed.config.schema import make_config
from jaxfed.deployment.arrivals import RequestQueue, open_arrivals, run_buffered_round
from jaxfed.deployment.collected_run import read_federation
from jaxfed.deployment.coordinator import match_nodes
from jaxfed.deployment.envelope import Envelope, EnvelopeKind, pack_envelopes, read_envelopes, read_plan
from jaxfed.deployment.node import make_reply
from jaxfed.deployment.node_data import find_facts
from jaxfed.deployment.server_run import Network, serve_rounds
from jaxfed.sampling.clock import lognormal_times
from jaxfed.training.rounds import initial_arrays
from tests.deployment.federation import (
    MF,
    compare_with_simulator,
    direct_exchange,
    open_federation,
    simulate,
    write_ratings,
)

BUFFERED = {
    "algorithm": {"name": "fedbuff", "exponent": 1.0},
    "cohort": {"name": "buffered", "size": 3, "concurrency": 6, "max_age": 4},
    "clock": {"name": "lognormal"},
}
# a bound that clips nobody: a real client clips before the discount of its age, one of the simulator after it
WHOLE = {
    "channel": [{"name": "weighted_mean"}, {"name": "clip", "bound": 1000.0}, {"name": "densify"}],
    "server": {"name": "sgd", "learning_rate": 0.5, "lazy": False},
}
CASES = {
    "rows": {},
    "whole tables": WHOLE,
    "memory of links": {  # the same for what was left of the last message: no discount
        "algorithm": {"name": "fedbuff", "exponent": 0.0},
        "channel": [{"name": "weighted_mean"}, {"name": "top_k", "share": 0.25}],
    },
}


@pytest.fixture
def ratings(tmp_path):
    """Clients of very different lengths, each of which takes one batch of all its ratings: what it computes does not
    depend on the round in which it is asked."""
    write_ratings(path := tmp_path / "log.csv", users=40, items=60, lengths=(3, 25))
    return {
        "data": {"name": "csv", "path": str(path), "label": "rating"},
        "model": {"name": "mf", "dim": 4, "loss": "squared"},
        "work": {"batch_size": 32, "negatives": 0, "optimizer": {"name": "sgd", "learning_rate": 0.05}},
    }


def make_clocked_queue(nodes, clock, seed, spoil=lambda client, round, reply: reply):
    """Nodes answer by a simulated clock: rows are told at once, and a message comes when its client's trip is over.
    spoil(client, round, reply) -> reply; None: nothing comes. A node that is not there never answers; -1 cannot be
    reached."""
    now, tickets, under_way, asked = [0.0], itertools.count(), [], []

    def send(node, data):
        head, ticket = read_envelopes(data)[0], next(tickets)
        if node not in nodes:
            return None if node == -1 else ticket
        reply, seconds = make_reply(nodes[node], data), 0.0
        if head.kind == EnvelopeKind.HELLO:
            heapq.heappush(under_way, (now[0], ticket, reply))
            return ticket
        plan = read_plan(head.payload)
        if len(plan.asked):
            [client] = plan.asked.tolist()
            seconds = float(clock.trip(seed, np.array([client]), np.array([head.round]))[0])
            if (spoilt := spoil(client, head.round, reply)) != reply:
                reply, seconds = spoilt, 0.0  # at once
            asked.append((client, head.round))
        heapq.heappush(under_way, (now[0] + seconds, ticket, reply))
        return ticket

    def receive():
        now[0], ticket, reply = heapq.heappop(under_way)
        return [(ticket, reply)]

    return RequestQueue(send, receive), asked


def open_buffered(folder, table, say, **more):
    server, nodes, parts = open_federation(folder, table, say=say)
    clock = lognormal_times(parts.data.num_clients, parts.data.population.num_train)
    queue, asked = make_clocked_queue(nodes, clock, table["seed"], **more)
    members = match_nodes(server.party, [*nodes], {}, direct_exchange(nodes), say)
    arrivals = open_arrivals(server, queue, lambda: [*nodes], lambda: None, members)
    return server, nodes, parts, arrivals, asked


@pytest.mark.parametrize("name", CASES)
def test_messages_that_come_in_as_by_the_clock_are_rounds_of_the_simulator(name, ratings, tmp_path):
    """Models of several ages, private vectors at the nodes, and what clients keep of links."""
    table, lines = MF | ratings | BUFFERED | CASES[name], []
    server, nodes, parts, arrivals, _ = open_buffered(tmp_path, table, lines.append)
    found = [run_buffered_round(server, arrivals) for _ in range(6)]
    want, figures = simulate(parts, 6, table["seed"])
    assert not lines
    played = [parts.sampler.draw(table["seed"], round)[0] for round in range(6)]
    np.testing.assert_array_equal([row["clients/ids"] for row in found], played)
    ages = [parts.sampler.ages(table["seed"], round) for round in range(6)]
    assert np.max(ages) > 1
    assert [row["clients/age"] for row in found] == [each[:3].mean() for each in ages]
    assert [int(row["clients/reported"]) for row in figures] == [3] * 6
    compare_with_simulator(server, nodes, parts, want, exact=False)


def test_those_who_are_lost_stand_where_they_stood(ratings, tmp_path):
    """Client by client: some replies never come, some are refused, and every round goes on with three others."""
    table, lines = MF | ratings | BUFFERED | {"cohort": BUFFERED["cohort"] | {"max_age": 20}}, []
    gone = {1: None, 2: b"noise"}  # by the client's remainder

    def spoil(client, round, reply):
        return gone.get(client % 8, reply)

    server, _, parts, arrivals, asked = open_buffered(tmp_path, table, lines.append, spoil=spoil)
    found = [run_buffered_round(server, arrivals) for _ in range(8)]
    ids = np.concatenate([row["clients/ids"] for row in found])
    lost = [int(row["clients/dropped"]) for row in found]
    refused = [int(row["clients/refused"]) for row in found]
    assert sum(lost) == (ids % 8 == 1).sum() > 0  # 40, an empty slot, leaves none
    assert sum(refused) == (ids % 8 == 2).sum() > 0
    assert [int(row["clients/reported"]) + a + b for row, a, b in zip(found, lost, refused, strict=True)] == [
        int((row["clients/ids"] < parts.data.num_clients).sum()) for row in found
    ]
    assert all(server.counted[client] == -1 for client in range(40) if client % 8 in gone)
    assert lines
    assert all("cut" in line or "jaxfed" in line for line in lines), lines
    # the last round of each client that was counted is one in which it was asked
    assert all((client, server.counted[client]) in asked for client in range(40) if server.counted[client] >= 0)


def test_an_old_message_weighs_what_its_age_says(ratings, tmp_path):
    """By hand: an update of a model two rounds old moves the model by a third of what it would move its own."""
    small = {"cohort": {"name": "buffered", "size": 1, "concurrency": 2, "max_age": 4}}
    table = MF | ratings | BUFFERED | small | {"channel": [{"name": "mean"}], "server": {"name": "sgd"}}
    server, nodes, _, clocked, _ = open_buffered(tmp_path, table, print)
    waiting, sent = [], []

    def send(node, data):
        plan = read_plan(read_envelopes(data)[0].payload)
        if len(plan.asked):
            sent.append((plan.asked.tolist(), jax.device_get(server.state.shared)))
        waiting.append((len(sent), make_reply(nodes[node], data), bool(len(plan.asked))))
        return len(waiting) - 1

    first = []

    def receive():  # the message of the first client that was sent a model comes last
        for ticket, (_, reply, is_message) in enumerate(waiting):
            if reply is None:
                continue
            if is_message and not first:
                first.append(ticket)
            if first and ticket == first[0] and server.state.round < 2:
                continue
            waiting[ticket] = (0, None, False)
            return [(ticket, reply)]
        raise AssertionError("nobody is under way")

    arrivals = open_arrivals(server, RequestQueue(send, receive), lambda: [*nodes], lambda: None, clocked.members)
    states = [jax.device_get(server.state.shared)]
    for _ in range(3):
        info = run_buffered_round(server, arrivals)
        states.append(jax.device_get(server.state.shared))
    assert info["clients/age"] == 2.0
    [client] = sent[0][0]
    fresh, _, _, again, _ = open_buffered(tmp_path / "fresh", table, print)
    again.open_round.idle[:] = np.arange(40) == client
    run_buffered_round(fresh, again)
    moved = jax.tree.map(lambda a, b: a - b, jax.device_get(fresh.state.shared), states[0])
    late = jax.tree.map(lambda a, b: a - b, states[3], states[2])
    for got, whole in zip(jax.tree.leaves(late), jax.tree.leaves(moved), strict=True):
        np.testing.assert_allclose(got, whole / 3, atol=1e-6)
    assert max(np.abs(x).max() for x in jax.tree.leaves(moved)) > 1e-3


def test_a_server_goes_on_after_a_pause(ratings, tmp_path):
    """It ends while two messages wait for a third. Who was under way is asked anew, and no node refuses to answer."""
    table, lines = MF | ratings | BUFFERED | {"rounds": 5}, []
    _, nodes, parts = open_federation(tmp_path / "nodes", table, say=lines.append)
    clock = lognormal_times(parts.data.num_clients, parts.data.population.num_train)
    facts = find_facts(parts.data.population, parts.shapes.kinds, parts.data.source.items)

    def serve(last):
        queue, came = make_clocked_queue(nodes, clock, table["seed"])[0], itertools.count()

        def receive():
            [(ticket, reply)] = queue.receive()
            if read_envelopes(reply)[0].kind == EnvelopeKind.MESSAGE and next(came) == last:
                raise KeyboardInterrupt
            return [(ticket, reply)]

        network = Network(direct_exchange(nodes), lambda: [*nodes], lambda: None, RequestQueue(queue.send, receive))
        return serve_rounds(tmp_path / "server", make_config(table), facts, network, 5, lines.append)

    with pytest.raises(KeyboardInterrupt):
        serve(last=8)
    assert serve(last=None)["rounds"] == 5
    rows = [json.loads(line) for line in (tmp_path / "server" / "metrics.jsonl").read_text().splitlines()]
    assert [(row["round"], row["clients/reported"], row["clients/refused"]) for row in rows] == [
        (round, 3, 0) for round in range(1, 6)
    ]
    assert [line for line in lines if not line.startswith("round ")] == ["going on after round 2"]
    # for a run of the usual form, in which the simulator could go on, the newest model stands for the older ones
    config = make_config(table)
    state, progress = read_federation(tmp_path, config, initial_arrays(parts, table["seed"])["state"], facts, 5)
    assert progress.round == int(state.round) == 5
    for old, now in zip(jax.tree.leaves(state.model_history), jax.tree.leaves(state.shared), strict=True):
        np.testing.assert_array_equal(old, np.broadcast_to(now, (5, *now.shape)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"channel": [{"name": "weighted_mean"}, {"name": "clip", "bound": 1.0}, {"name": "ring"}]}, "sum"),
        ({"algorithm": {"name": "fedasync"}, "channel": []}, "mixing"),
        ({"cohort": {"name": "buffered", "size": 20, "concurrency": 10}}, "2 size"),
        ({"channel": [{"name": "weighted_mean"}, {"name": "staleness"}]}, "staleness after a mean"),
    ],
)
def test_what_does_not_go_with_several_ages_is_one_line(changes, words, ratings, tmp_path):
    server = {"server": {"name": "sgd", "learning_rate": 0.5, "lazy": False}}
    with pytest.raises(ValueError, match=words) as error:
        open_federation(tmp_path, MF | ratings | BUFFERED | server | changes)
    assert "\n" not in str(error.value)


def test_where_nobody_is_left_a_round_ends(ratings, tmp_path):
    """Two clients are at the only node that is there."""
    table, lines = MF | ratings | BUFFERED, []
    server, _, _, arrivals, asked = open_buffered(tmp_path, table, lines.append)
    arrivals.list_nodes = lambda: [0]
    arrivals.members[0] = two = arrivals.members[0][:2]
    info = run_buffered_round(server, arrivals)
    assert int(info["clients/reported"]) == 2 == len(asked)
    assert sorted(info["clients/ids"][:2].tolist()) == two.tolist() == sorted(client for client, _ in asked)


def test_nodes_that_refuse_at_once_use_up_no_rounds(ratings, tmp_path):
    """Three of five do; no client is asked twice in a round."""
    table, lines = MF | ratings | BUFFERED, []

    def spoil(client, round, reply):
        return reply if client % 5 < 2 else b"noise"  # clients are dealt to the five nodes in turn

    server, _, _, arrivals, asked = open_buffered(tmp_path, table, lines.append, spoil=spoil)
    found = [run_buffered_round(server, arrivals) for _ in range(6)]
    assert [int(row["clients/reported"]) for row in found] == [3] * 6
    assert len(asked) == len({*asked})
    assert all(client % 5 < 2 for client in np.flatnonzero(server.counted >= 0))
    assert lines


def test_where_all_are_lost_the_server_waits_and_asks_again(ratings, tmp_path):
    answers = []
    table = MF | ratings | BUFFERED

    def spoil(client, round, reply):
        return reply if answers else None

    server, _, _, arrivals, _ = open_buffered(tmp_path, table, print, spoil=spoil)
    arrivals.wait = lambda: answers.append(True)
    info = run_buffered_round(server, arrivals)
    assert answers
    assert int(info["clients/reported"]) == 3


def test_a_node_that_never_says_who_it_is_holds_nobody_up(ratings, tmp_path):
    """Node 9 is mute, node -1 cannot be reached, and the clients of node 4 come in the second round."""
    table, lines = MF | ratings | BUFFERED, []
    server, _, _, arrivals, asked = open_buffered(tmp_path, table, lines.append)
    late = set(arrivals.members.pop(4).tolist())
    arrivals.list_nodes = lambda: [*[0, 1, 2, 3, 9, -1], *([4] if int(server.state.round) else [])]
    found = [run_buffered_round(server, arrivals) for _ in range(8)]
    assert [int(row["clients/reported"]) for row in found] == [3] * 8
    assert not late & {client for client, round in asked if not round}
    assert late & {client for client, _ in asked}
    assert [*arrivals.hellos.values()] == [9]


def test_rows_that_nobody_asked_for_are_not_kept(ratings, tmp_path):
    """A dishonest node adds them to each message: rows of its client in the next round."""
    table, lines = MF | ratings | BUFFERED, []

    def spoil(client, round, reply):
        rows = np.arange(5, dtype="<i4").tobytes()
        planted = Envelope(EnvelopeKind.WANTED, round + 1, client, bytes(32), 5, rows)
        return pack_envelopes([*read_envelopes(reply), planted])

    server, _, _, arrivals, _ = open_buffered(tmp_path, table, lines.append, spoil=spoil)
    found = [run_buffered_round(server, arrivals) for _ in range(6)]
    assert [int(row["clients/reported"]) for row in found] == [3] * 6
    assert sum("rows that nobody asked for" in line for line in lines) >= 18
    kept = [(round, client) for round, rows in server.wanted.items() for client in rows]
    under_way = [(trip.round, trip.client) for trip in arrivals.in_flight.values() if trip.version is not None]
    assert sorted(kept) == sorted(under_way)


def test_a_message_that_is_too_old_counts_as_lost(ratings, tmp_path):
    strict = {"cohort": BUFFERED["cohort"] | {"max_age": 0}}
    table, lines = MF | ratings | BUFFERED | strict, []
    server, nodes, parts, arrivals, _ = open_buffered(tmp_path, table, lines.append)
    found = [run_buffered_round(server, arrivals) for _ in range(6)]
    assert not lines
    assert [int(row["clients/reported"]) for row in found] == [3] * 6
    assert sum(int(row["clients/dropped"]) for row in found) > 0
    assert not sum(int(row["clients/refused"]) for row in found)
    want, _ = simulate(parts, 6, table["seed"])
    compare_with_simulator(server, nodes, parts, want, exact=False)
