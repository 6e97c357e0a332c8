"""The law of deployment: what nodes and a server compute apart is what the simulator computes."""

import numpy as np
import pytest

from jaxfed.config.registry import CLOSED, REGISTRY
from jaxfed.config.schema import make_config
from jaxfed.deployment.node_data import PublicFacts, make_empty_population, wrap_population
from jaxfed.deployment.party import make_deployed_pieces
from tests.deployment.federation import (
    MF,
    RING,
    SILOS,
    compare_with_simulator,
    deal_clients,
    direct_exchange,
    open_federation,
    run_federation,
    simulate,
    write_ratings,
)

COUNTED = {"name": "mean", "count": 12}
CLIP = {"name": "clip", "bound": 0.5}
SASREC = {
    "model": {"name": "sasrec", "dim": 8, "length": 6, "blocks": 1, "dropout": 0.2},
    "work": {"negatives": 8, "optimizer": {"name": "sgd", "learning_rate": 0.1}},
    "channel": [{"name": "weighted_mean"}],
}
CASES = {
    "mf": {},
    "silos": SILOS,
    "ring": RING,
    "ring of silos": RING | SILOS,
    "clipped and noised": {"channel": [COUNTED, CLIP, {"name": "gaussian"}]},
    "clipped and quantized": {"channel": [{"name": "weighted_mean"}, CLIP, {"name": "quantize", "bits": 8}]},
    "skellam": {"channel": [COUNTED, CLIP, {"name": "skellam"}], "server": {"name": "sgd", "lazy": False}},
    "error feedback": {"channel": [{"name": "weighted_mean"}, {"name": "top_k", "share": 0.25}]},
    "scaffold": {"algorithm": {"name": "scaffold"}, "channel": [{"name": "per_row_mean"}]},
    "median": {"channel": [{"name": "median"}]},
    "sasrec": SASREC,
    "sasrec of silos": SASREC | SILOS,
}
INTEGERS = {"ring": 3, "ring of silos": 3, "skellam": 3, "median": 1}


@pytest.mark.parametrize("name", CASES)
def test_deployed_is_simulated(name, tmp_path):
    """Bit by bit where sums are of integers, and 1e-6 after a round where they are of floats."""
    table, lines = MF | CASES[name], []
    server, nodes, parts = open_federation(tmp_path, table, say=lines.append, compile_once=name != "mf")
    lengths = parts.data.population.num_train
    assert lengths.max() > (1.2 if "silo" in name else 3) * lengths.min()
    rounds = INTEGERS.get(name, 1)
    found = run_federation(server, nodes, rounds)
    want, figures = simulate(parts, rounds, table["seed"])
    assert not lines
    compare_with_simulator(server, nodes, parts, want, exact=name in INTEGERS)
    moved = np.abs(np.asarray(want.shared.params["tables"]["item"].rows) - np.asarray(first_items(parts, table)))
    assert moved.max() > 1e-4
    for mine, theirs in zip(found, figures, strict=True):
        for key in ("clients/reported", "clients/refused", "clients/dropped"):
            assert int(mine[key]) == int(theirs[key])
        if not server.party.whole:
            np.testing.assert_array_equal(mine["rows/sent"], theirs["rows/sent"])


OF_A_FILE = {
    "ratings": {
        "model": {"name": "mf", "dim": 4, "loss": "squared"},
        "work": {"batch_size": 16, "negatives": 0, "optimizer": {"name": "sgd", "learning_rate": 0.05}},
    },
    "times": SASREC | {"model": {"name": "hstu", "dim": 8, "length": 6, "blocks": 1, "time_bias": "known"}},
}


@pytest.mark.parametrize("name", OF_A_FILE)
def test_ratings_and_times_are_in_the_file_of_a_node(name, tmp_path):
    write_ratings(path := tmp_path / "log.csv", users=30, items=40, lengths=(4, 20))
    data = {"name": "csv", "path": str(path)} | ({"label": "rating"} if name == "ratings" else {})
    table, lines = MF | OF_A_FILE[name] | {"data": data}, []
    server, nodes, parts = open_federation(tmp_path, table, say=lines.append)
    run_federation(server, nodes, 1)
    want, _ = simulate(parts, 1, table["seed"])
    assert not lines
    compare_with_simulator(server, nodes, parts, want, exact=False)


def test_nodes_choose_their_own_blocks(tmp_path):
    """Where nobody tells how much the longest clients have."""
    server, nodes, parts = open_federation(tmp_path, MF, kinds=())
    run_federation(server, nodes, 1)
    assert any(node.shapes.kinds != parts.shapes.kinds for node in nodes.values())
    want, _ = simulate(parts, 1, MF["seed"])
    compare_with_simulator(server, nodes, parts, want, exact=False)


def first_items(parts, table):
    state, _ = simulate(parts, 0, table["seed"])
    return state.shared.params["tables"]["item"].rows


@pytest.mark.parametrize("name", ["mf", "ring", "scaffold"])
def test_those_who_do_not_answer_drop_out(name, tmp_path):
    """Node 1 hears nothing in round 1, the reply of node 2 is lost in round 0 and in round 2: their clients stand where
    the simulator's absent clients do, in the rounds after too."""
    table, lines = MF | CASES[name] | {"cohort": {"name": "everyone"}}, []
    server, nodes, parts = open_federation(tmp_path, table, say=lines.append)
    gone = {(1, 1): "request", (0, 2): "reply", (2, 2): "reply"}
    dealt = deal_clients(parts, 5)

    def lost(round, node):
        return gone.get((round, node))

    def absent(round):
        return [client for (when, node) in gone if when == round for client in dealt[node]]

    found = run_federation(server, nodes, 4, direct_exchange(nodes, lost))
    want, figures = simulate(parts, 4, table["seed"], absent)
    assert not lines
    for mine, theirs in zip(found, figures, strict=True):
        assert int(mine["clients/reported"]) == int(theirs["clients/reported"])
    assert [int(each["clients/dropped"]) for each in found] == [8, 8, 8, 0]
    if name == "ring":
        compare_with_simulator(server, nodes, parts, want, exact=True)
    else:
        a, b = (x.shared.params["tables"]["item"].rows for x in (server.state, want))
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_a_round_without_anybody(tmp_path):
    """The model rests, and the next round goes on."""
    table = MF | {"server": {"name": "sgd", "learning_rate": 1.0}}
    server, nodes, parts = open_federation(tmp_path, table)
    found = run_federation(
        server, nodes, 2, direct_exchange(nodes, lambda round, node: "request" if not round else None)
    )
    assert int(found[0]["clients/reported"]) == 0
    assert int(found[1]["clients/reported"]) == 12
    want, _ = simulate(parts, 2, table["seed"], lambda round: range(40) if round == 0 else ())
    compare_with_simulator(server, nodes, parts, want, exact=False)


def test_keys_of_their_own(tmp_path):
    """By a secret of the node other noise, batches and private parts come out than the server can compute, again and
    again the same; nothing in a message or on the server tells of the secret."""
    table = MF | CASES["skellam"]
    outcomes = []
    for folder, keys in (("a", "own"), ("b", "own"), ("c", "reproducible")):
        server, nodes, _ = open_federation(tmp_path / folder, table, keys=keys)
        run_federation(server, nodes, 1)
        outcomes.append(np.asarray(server.state.shared.params["tables"]["item"].rows))
    assert np.abs(outcomes[0] - outcomes[1]).max() > 1e-3
    assert np.abs(outcomes[0] - outcomes[2]).max() > 1e-3
    secrets = [(tmp_path / "a" / str(node) / "states" / "secret").read_bytes() for node in range(5)]
    assert len({*secrets}) == 5
    assert {len(secret) for secret in secrets} == {32}
    assert (tmp_path / "a" / "0" / "states" / "secret").stat().st_mode & 0o077 == 0


REFUSED = {
    "algorithm": {"agnostic", "gpfedrec", "heterofl", "fedrolex", "hetefedrec", "ptf_fedrec", "closed_form", "central"},
    "channel": {"agnostic", "random_k", "pads"},
    "model": {*CLOSED, "fm", "two_tower", "text_lora", "decoder_lora", "code_decoder"},
}
OWN_MODEL = {"rolora", "fedask", "raflora", "flora", "fedex_lora", "flexlora", "layerdrop", "custom"}
BEFORE = {
    **{name: [COUNTED, CLIP] for name in ("gaussian", "ring", "skellam", "discrete_gaussian")},
    "pads": [COUNTED, CLIP, {"name": "densify"}, {"name": "ring"}],
    "local_gaussian": [COUNTED, CLIP, {"name": "densify"}],
}
ALONE = {
    "mean",
    "weighted_mean",
    "per_row_mean",
    "fair",
    "agnostic",
    "median",
    "trimmed_mean",
    "geometric_median",
    "krum",
}


def registered():
    for section in REFUSED:
        for name in REGISTRY[section]:
            if not (section == "algorithm" and name in OWN_MODEL) and name not in ("cluster_mean", "correlated"):
                yield section, name


@pytest.mark.parametrize(("section", "name"), registered())
def test_what_cannot_be_deployed_is_refused_in_one_line(section, name):
    """The whole registry: what is not refused makes a server that holds nobody's data."""
    facts = PublicFacts(40, 1, "implicit", "loo-clean", (), tuple(map(str, range(60))))
    more = {"algorithm": {"algorithm": {"name": name}}, "model": {"model": {"name": name}}}
    more["channel"] = {"channel": [*([] if name in ALONE else BEFORE.get(name, [COUNTED])), {"name": name}]}
    if name in ("mixing", "feddyn", "fednova"):
        more["channel"] = {"channel": [{"name": name}]}
    table = MF | more[section] | {"server": {"name": "sgd", "lazy": name not in ("ring", "skellam", "pads")}}
    if section == "algorithm" and name in ("closed_form", "central"):
        table["model"] = {"name": "ease"} if name == "closed_form" else {"name": "mf"}
        table.pop("server")
    if name in CLOSED:
        table |= {"work": {"name": "statistics"}, "server": {"name": "solve"}, "channel": []}
    if section == "algorithm":
        table["channel"] = []
    clients = wrap_population(make_empty_population(facts), facts)
    if name in REFUSED[section]:
        with pytest.raises(ValueError, match=r"^deploy: [^\n]*$"):
            make_deployed_pieces(make_config(table), facts, clients)
        return
    party = make_deployed_pieces(make_config(table), facts, clients)
    assert party.wire.sees in ("update+rows", "update", "sum")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"cohort": {"name": "deadline"}}, 'cohort "deadline"'),
        ({"cohort": {"name": "uniform", "size": 4, "dropout": 0.1}}, "set cohort.dropout to 0"),
        ({"cohort": {"name": "uniform", "holders": 3.0}}, "set cohort.size"),
        ({"server": {"name": "sgd", "edges": 2}}, "server.edges"),
        ({"download": [{"name": "quantize"}]}, "download"),
        ({"parametrization": {"name": "hashed"}}, 'parametrization "hashed"'),
        (RING | {"server": {"name": "sgd"}}, "set server.lazy = false"),
        ({"channel": [*RING["channel"][:2], {"name": "ring", "union": True}]}, "set ring.union to false"),
        ({"data": {**MF["data"], "label": "rating"}, "model": {"name": "mf", "loss": "squared"}}, "data.label"),
    ],
)
def test_sections_that_are_refused(more, said):
    facts = PublicFacts(40, 1, "implicit", "loo-clean", (), tuple(map(str, range(60))))
    with pytest.raises(ValueError, match=said):
        make_deployed_pieces(make_config(MF | more), facts, wrap_population(make_empty_population(facts), facts))
