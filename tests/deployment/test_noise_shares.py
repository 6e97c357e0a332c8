"""Noise that nodes add in shares to a secure sum."""

import copy
from functools import partial

import jax
import numpy as np
import pytest

from jaxfed.channels.integer_noise import draw_skellam
from jaxfed.config.schema import make_config
from jaxfed.core.link import list_mechanisms
from jaxfed.deployment import secure_node
from jaxfed.deployment.collected_run import lay_out_federation
from jaxfed.deployment.envelope import pack_envelopes
from jaxfed.deployment.node import make_reply
from jaxfed.deployment.node_data import find_facts, read_facts
from jaxfed.deployment.noise_shares import draw_noise_share, find_share_variance
from jaxfed.deployment.opened_node import open_node
from jaxfed.deployment.opened_server import open_server
from jaxfed.deployment.roster import find_threshold
from tests.deployment.federation import MF, RING, make_parts, open_federation, run_federation
from tests.deployment.test_dishonest_servers import start_round
from tests.deployment.test_secure import SKELLAM, secure_exchange

TABLE = MF | SKELLAM
FRACTION_BITS, COUNT = 12, 12  # of SKELLAM


def list_numbers(server):
    """The server's parameters, float64, one after the other."""
    leaves = jax.tree.leaves(jax.device_get(server.state.shared.params))
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in leaves])


def record_share(found, channel, nodes, length, secret, session):
    """`draw_noise_share`; (secret, share) is added to `found`."""
    share = draw_noise_share(channel, nodes, length, secret, session)
    found.append((secret, share.astype(np.int32)))
    return share


@pytest.mark.parametrize("lost", [(), (2, 4)])
def test_the_noise_of_a_sum_is_that_of_the_nodes_that_stayed(lost, tmp_path, monkeypatch):
    """A round with shares and the same one without differ by the shares of those who stayed, and nothing else: the
    server adds no noise."""
    moved, added = [], []
    for shares in (True, False):
        with monkeypatch.context() as patched:
            folder = tmp_path / str(shares)
            for node in range(7):
                (folder / f"{node}" / "states").mkdir(parents=True)
                (folder / f"{node}" / "states" / "secret").write_bytes(bytes([node] * 32))
            server, nodes, _ = open_federation(folder, TABLE, 7, "own", secure=True, shares=True)
            asked = []
            draw = partial(record_share, asked) if shares else lambda *known: np.uint32(0)
            patched.setattr(secure_node, "draw_noise_share", draw)
            exchange = secure_exchange(nodes, lambda round, step, node: "reply" if node in lost and step == 1 else None)
            run_federation(server, nodes, 1, exchange)
            moved.append(list_numbers(server))
            added = asked or added
    drawn = [share for secret, share in added if secret[0] not in lost]
    assert len(added) == len(nodes)
    assert np.abs(np.sum(drawn, 0)).max() > 1000
    found = (moved[1] - moved[0]) * COUNT * 2**FRACTION_BITS
    rounding = COUNT * 2**FRACTION_BITS * np.abs(moved[0]).max() * 2.0**-22  # a few operations in float32
    np.testing.assert_allclose(found, np.sum(drawn, 0), rtol=0, atol=rounding)
    assert rounding < np.std(found) / 20


def test_shares_of_as_many_nodes_as_must_stay_are_the_noise_of_the_accountant():
    """Their variance, and that none of them depends on another. 1,000,000 numbers: the error of a variance is 1/700."""
    _, parts = make_parts(TABLE)
    (mechanism,) = list_mechanisms(parts.channel)
    length, asked = 1_000_000, (mechanism.multiplier * mechanism.l2) ** 2
    drawn = [
        draw_noise_share(parts.channel, 7, length, secret * 32, session * 32).astype(np.int32).astype(np.float64)
        for secret, session in [(b"a", b"0"), (b"a", b"1"), (b"b", b"0"), (b"c", b"0"), (b"d", b"0")]
    ]
    assert find_threshold(7) == len(drawn)
    assert np.sum(drawn, 0).var() == pytest.approx(asked, rel=5 / 700)
    assert np.sum(drawn, 0).mean() == pytest.approx(0, abs=5 * np.sqrt(asked / length))
    between = np.corrcoef(drawn) - np.eye(len(drawn))
    assert np.abs(between).max() < 5 / np.sqrt(length)


def test_a_share_is_skellam_noise():
    """As the noise of the simulator is, of its own variance: quantiles of both."""
    _, parts = make_parts(TABLE)
    share = draw_noise_share(parts.channel, 4, 200_000, b"a" * 32, bytes(32)).astype(np.int32)
    other = draw_skellam(jax.random.key(1), find_share_variance(parts.channel, 4), (200_000,))
    at = np.linspace(0.01, 0.99, 50)
    largest = 5 * np.std(share) / np.sqrt(200_000) / 0.026  # the density of a normal at its 1st percentile
    np.testing.assert_allclose(np.quantile(share, at), np.quantile(other, at), rtol=0, atol=largest)


def test_both_ends_agree_on_who_adds_the_noise(tmp_path):
    """It is in the facts, and these are in the digest that a hello compares: never nobody, never both."""
    config, parts = make_parts(TABLE)
    own = lay_out_federation(tmp_path / "own", config, parts, 3, "own")
    assert own.noise_shares
    assert read_facts(tmp_path / "own" / "server" / "facts.json") == own
    same = lay_out_federation(tmp_path / "same", config, parts, 3, "reproducible")
    assert not same.noise_shares
    with pytest.raises(ValueError, match="set keys to own"):
        open_node(tmp_path / "own" / "nodes" / "0", config, own, "reproducible")
    bare = same._replace(keys=own.keys)
    digests = {open_server(config, facts, 5, print).party.digest for facts in (own, bare)}
    assert len(digests) == 2
    ring, ring_parts = make_parts(MF | RING)
    assert not lay_out_federation(tmp_path / "ring", ring, ring_parts, 3, "own").noise_shares


def test_shares_that_nobody_can_add_are_refused():
    config, parts = make_parts(TABLE)
    facts = find_facts(parts.data.population, parts.shapes.kinds, parts.data.source.items)._replace(noise_shares=True)
    with pytest.raises(ValueError, match="the link skellam and the nodes' keys"):
        open_server(config, facts, 5, print)
    with pytest.raises(ValueError, match="the link skellam and the nodes' keys"):
        open_server(make_config(MF | RING), facts._replace(keys=("00" * 32,)), 5, print)
    table = copy.deepcopy(TABLE)
    table["channel"][2] |= {"multiplier": 1.0, "fraction_bits": 5}
    _, few = make_parts(table)
    with pytest.raises(ValueError, match="raise skellam.fraction_bits"):
        find_share_variance(few.channel, 40)


def test_no_two_secure_sums_have_the_same_noise(tmp_path, monkeypatch):
    """Neither two of one round, nor those of two configurations in one folder: their difference would be bare."""
    found = []
    monkeypatch.setattr(secure_node, "draw_noise_share", partial(record_share, found))
    for rate in (1.0, 0.5):
        table = TABLE | {"server": {"name": "sgd", "lazy": False, "learning_rate": rate}}
        server, nodes, _ = open_federation(tmp_path / "a", table, 4, "own", secure=True, shares=True)
        for nonce in (b"first", b"second"):
            for node, words in start_round(server, nodes, nonce)[1].items():
                make_reply(nodes[node], pack_envelopes(words))
    shares = {share.tobytes() for _, share in found}
    assert len(found) == len(shares) == 2 * 2 * 4
