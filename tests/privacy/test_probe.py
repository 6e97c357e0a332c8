"""No client changes more than the noise was made for: every private link, in real rounds, through the packer."""

import math
import sys

import jax.numpy as jnp
import pytest

from jaxfed.channels.average import per_row_mean
from jaxfed.channels.clip import clip
from jaxfed.cli import main
from jaxfed.config.build import load_data
from jaxfed.config.registry import REGISTRY
from jaxfed.config.schema import make_config
from jaxfed.core import channel as channels
from jaxfed.core.tables import Table
from jaxfed.core.types import Weights
from jaxfed.training.privacy_probe import TOLERANCE, ReleaseChange, probe_rounds
from tests.small import private_links

MEAN, CLIP = {"name": "mean", "count": 12}, {"name": "clip", "bound": 0.02}  # less than what any client sends
POISSON = {"name": "poisson", "size": 12, "dropout": 0.2}
CHAINS = {  # the links, and how many steps a block has: another layout of the same cohort
    "gaussian": ([MEAN, CLIP, "gaussian"], 4),
    "denominators under noise": ([{"name": "per_row_mean", "floor": 4.0}, CLIP, "gaussian"], 16),
    "denominators, small blocks": ([{"name": "per_row_mean", "floor": 4.0}, CLIP, "gaussian"], 4),
    "adaptive clip": ([MEAN, {"name": "adaptive_clip", "bound": 0.02, "count": 12}, "gaussian"], 16),
    "outliers left out": ([MEAN, {"name": "zero_out", "bound": 1.0}, "gaussian"], 4),
    "skellam": ([MEAN, CLIP, {"name": "skellam", "fraction_bits": 16}], 16),
    "discrete gaussian": ([MEAN, CLIP, {"name": "discrete_gaussian", "fraction_bits": 14}], 4),
    "local": ([MEAN, CLIP, "densify", "local_gaussian"], 4),
    "dp-ftrl": ([MEAN, CLIP, {"name": "correlated", "kind": "tree"}], 16),
}


def probed(links, steps_per_block, clients=4, cohort=POISSON, work="local_steps", rounds=1):
    """What some clients of very different lengths change, in a round in which some drop out."""
    table = {
        "rounds": 4,
        "data": {"name": "synthetic", "users": 24, "items": 300, "mean_length": 12.0},
        "model": {"dim": 4},
        "work": {"name": work, "batch_size": 16, "negatives": 1, "optimizer": {"learning_rate": 0.5}},
        "channel": [each if isinstance(each, dict) else {"name": each} for each in links],
        "cohort": {"name": "cyclic", "size": 12} if "correlated" in str(links) else cohort,
        "run": {"area": steps_per_block},
    }
    config = make_config(table)
    return list(probe_rounds(config, load_data(config.data), clients, rounds=rounds))


@pytest.mark.parametrize("name", CHAINS)
def test_no_client_changes_more_than_is_claimed(name):
    """And clients whose updates are clipped change as much, or the search would be blind."""
    links, steps_per_block = CHAINS[name]
    found = probed(links, steps_per_block)
    assert max(each.ratio for each in found) <= 1 + TOLERANCE
    assert max(each.interactions for each in found) >= 8 * min(each.interactions for each in found)
    assert {each.done for each in found} == ({"sent"} if name == "local" else {"removed", "replaced"})
    if name != "outliers left out":
        assert max(each.ratio for each in found) > (0.5 if "fraction_bits" in str(links) else 0.99)


@pytest.mark.parametrize("work", ["scaffold", "ditto", "clustered"])
def test_no_client_changes_more_whatever_the_work(work):
    """In a second round as well, when clients and links remember something."""
    mean = "cluster_mean" if work == "clustered" else {"name": "per_row_mean", "floor": 4.0}
    found = probed(
        [mean, "difference", CLIP, "gaussian"] if work == "ditto" else [mean, CLIP, "gaussian"],
        4,
        2,
        work=work,
        rounds=2,
    )
    assert {each.round for each in found} == {0, 1}
    assert max(each.ratio for each in found) <= 1 + TOLERANCE


def test_every_private_link_is_probed():
    probed_links = {each if isinstance(each, str) else each["name"] for links, _ in CHAINS.values() for each in links}
    assert private_links() <= probed_links


def test_a_link_that_claims_half_of_what_it_does_is_found(monkeypatch):
    def halved(bound: float = 1.0):
        made = clip(bound)
        return made._replace(claims=made.claims._replace(l2_gain=lambda before: bound / 2))

    monkeypatch.setitem(REGISTRY["channel"], "clip", halved)
    assert max(each.ratio for each in probed([MEAN, CLIP, "gaussian"], 4)) == pytest.approx(2, rel=TOLERANCE)


def test_weights_of_padding_are_found(monkeypatch):
    """A mean by row whose padding weighs as much as rows do, and a chain that lets the clip see it: how much of a
    client's message is left then depends on the clients beside it."""

    def padded(floor: float = 0.0):
        def encode(update, sent, client):
            return (update, Weights(Table(jnp.ones(client.rows.shape))), jnp.ones(())), client.link_state

        return per_row_mean(floor=floor)._replace(encode=encode)

    monkeypatch.setitem(REGISTRY["channel"], "per_row_mean", padded)
    case = CHAINS["denominators under noise"][0], 32, 8, {"name": "poisson", "size": 16}
    assert max(each.ratio for each in probed(*case)) <= 1 + TOLERANCE
    monkeypatch.setattr(channels, "clear_padding", lambda tree, held: tree)
    assert max(each.ratio for each in probed(*case)) > 1.1


CONFIG = """
[data]
name = "synthetic"
users = 20
items = 60
[model]
dim = 2
[cohort]
name = "poisson"
size = 8
[[channel]]
name = "mean"
count = 8
[[channel]]
name = "clip"
bound = 0.01
[[channel]]
name = "gaussian"
"""


def asked(capsys, *words):
    """(exit code, output, errors) of `jaxfed privacy probe`."""
    sys.argv = ["jaxfed", "privacy", "probe", *words]
    try:
        main.main()
        code = 0
    except SystemExit as end:
        code = end.code
    return (code, *capsys.readouterr())


def test_the_command_tells_the_worst_and_exits_with_1_for_a_violation(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(main, "set_up_process", lambda: None)
    config = tmp_path / "private.toml"
    config.write_text(CONFIG)
    code, told, _ = asked(capsys, str(config), "--clients", "2", "--rounds", "1")
    assert code == 0
    assert "gaussian: the largest change over its bound is 1.0000 (client " in told
    assert "no violation among 2 clients of 1 rounds proves nothing" in told
    code, _, errors = asked(capsys, str(config), "--rounds", "1", "--cohort.dropout", "0.999999")
    assert (code, "no client reported in 1 rounds, so nothing was tried" in errors) == (2, True)
    for ratios, want in (((0.5, 0.999), 0), ((0.5, 1.2), 1), ((math.nan, 0.5), 1)):
        changes = [ReleaseChange("gaussian", 1, 3, 0, "removed", ratio) for ratio in ratios]
        monkeypatch.setattr("jaxfed.training.privacy_probe.probe_rounds", lambda *_, changes=changes: iter(changes))
        code, told, errors = asked(capsys, str(config))
        assert (code, "one client changed a sum by more than the bound" in errors) == (want, want == 1)
    assert "is inf (client" in told
