"""Methods by one name are what [work], [[channel]] and [server] spell out."""

import jax
import numpy as np
import pytest

from jaxfed.config.build import build_from_config, load_data
from jaxfed.config.overrides import override_config
from jaxfed.config.registry import REGISTRY
from jaxfed.config.schema import make_config
from jaxfed.core.state import server_model
from jaxfed.training.rounds import initial_arrays, make_run_keys, prepare_round
from tests.small import OF_ADAPTERS

DATA = {"name": "synthetic", "users": 40, "items": 30, "mean_length": 9.0}
CONTENT = load_data(make_config({"data": DATA}).data)
TABLE = {"data": DATA, "model": {"dim": 4}, "cohort": {"name": "everyone", "dropout": 0.2}}
BUFFERED = {"name": "buffered", "size": 8, "concurrency": 12}
CLOCKED = {"cohort": BUFFERED, "clock": {"name": "lognormal"}}
MEAN = {"name": "weighted_mean"}
SAME = {  # ([algorithm], what is spelled out)
    "fedavg": ({}, {"channel": [MEAN]}),
    "fedsgd": ({}, {"work": {"name": "gradient"}, "channel": [MEAN]}),
    "fedprox": ({"proximal": 0.3}, {"work": {"proximal": 0.3}, "channel": [MEAN]}),
    "scaffold": ({}, {"work": {"name": "scaffold"}, "channel": [MEAN]}),
    "feddyn": (
        {"strength": 0.2},
        {"work": {"name": "dynamic", "strength": 0.2}, "channel": [{"name": "feddyn"}, MEAN]},
    ),
    "fednova": ({}, {"channel": [{"name": "fednova"}, MEAN]}),
    "mime": ({"correct": False}, {"work": {"name": "mime", "correct": False}, "channel": [MEAN]}),
    "qfedavg": ({"q": 0.5}, {"channel": [{"name": "fair", "q": 0.5}]}),
    "agnostic": ({"groups": 3}, {"channel": [{"name": "agnostic", "groups": 3}]}),
    "fedbuff": ({}, CLOCKED | {"channel": [{"name": "staleness"}, MEAN]}),
    "fedasync": (
        {},
        CLOCKED | {"cohort": BUFFERED | {"size": 1}, "channel": [{"name": "mixing"}, {"name": "mean"}]},
    ),
    "fedrecon": ({}, {"work": {"name": "reconstruct"}, "channel": [MEAN]}),
    "fedrep": ({}, {"work": {"name": "alternate"}, "channel": [MEAN]}),
    "ditto": ({}, {"work": {"name": "ditto"}, "channel": [MEAN]}),
    "apfl": ({}, {"work": {"name": "apfl"}, "channel": [MEAN]}),
    "ifca": ({}, {"work": {"name": "clustered"}, "channel": [{"name": "cluster_mean"}]}),
    "gpfedrec": ({}, {"work": {"name": "graph_guided"}, "channel": [MEAN]}),
    "closed_form": (
        {},
        {"model": {"name": "ease"}, "work": {"name": "statistics"}, "server": {"name": "solve"}, "channel": []},
    ),
}
OWN = ("feddyn", "fednova", "fair", "agnostic", "staleness", "mixing", "cluster_mean")  # links that a method brings


def after_two_rounds(table):
    it = build_from_config(make_config(TABLE | table), CONTENT)
    state = initial_arrays(it, 0)["state"]
    for t in range(2):
        state, _ = it.algorithm.step(state, prepare_round(it, 0, t).cohort, make_run_keys(0).rounds)
    return jax.tree.map(np.asarray, server_model(state))


def by_name(name):
    own, spelled = SAME[name]
    rest = {key: value for key, value in spelled.items() if key not in ("work", "server")}
    rest["channel"] = [each for each in rest["channel"] if each["name"] not in OWN]
    return rest | {"algorithm": {"name": name} | own}


@pytest.mark.parametrize("name", SAME)
def test_a_method_by_its_name_is_what_is_spelled_out(name):
    want, got = after_two_rounds(SAME[name][1]), after_two_rounds(by_name(name))
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_every_method_has_a_name_here():
    # central has no messages, ptf_fedrec no parameters in them
    of_widths = {
        "heterofl",
        "fedrolex",
        "hetefedrec",
        "layerdrop",
    }  # whose mean is made for the model: nothing spells it out
    assert SAME.keys() == REGISTRY["algorithm"].keys() - {"custom", "central", "ptf_fedrec"} - of_widths - set(
        OF_ADAPTERS
    )


WRONG = {
    "two works": ({"algorithm": {"name": "feddyn"}, "work": {"name": "scaffold"}}, "leave work.name out"),
    "a key of the method in work": (
        {"algorithm": {"name": "fedavg"}, "work": {"by_row": False}},
        "it is algorithm.by_row",
    ),
    "several passes of a method that has one": (
        {"algorithm": {"name": "fedrecon"}, "work": {"epochs": 2}},
        "leave it at 1",
    ),
    "a server that solves": (
        {
            "algorithm": {"name": "closed_form"},
            "model": {"name": "ease"},
            "server": {"learning_rate": 0.5},
            "channel": [],
        },
        "the server solves: leave it out",
    ),
    "two means": ({"algorithm": {"name": "qfedavg"}}, "fair and per_row_mean both make a mean"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_go_together_is_one_line(name):
    table, words = WRONG[name]
    with pytest.raises(ValueError, match=words) as error:
        build_from_config(make_config(TABLE | table), CONTENT)
    assert "\n" not in str(error.value)


def test_the_command_line_names_a_method():
    config = override_config({}, ["--algorithm.name", "feddyn", "--algorithm.strength", "0.3"])
    assert (config.algorithm.name, config.algorithm.strength) == ("feddyn", 0.3)
    with pytest.raises(ValueError, match='no algorithm "fedyn"; did you mean "feddyn"'):
        override_config({}, ["--algorithm.name", "fedyn"])
