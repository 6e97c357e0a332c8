"""Adapters on clients by a configuration: whole runs that stop and go on, their rows, and what is refused."""

import json

import jax
import numpy as np
import pytest

pytest.importorskip("safetensors", reason="the extra `text` is not installed")
pytest.importorskip("tokenizers", reason="the extra `text` is not installed")

from jaxfed.config.build import build_from_config, load_data
from jaxfed.config.schema import make_config
from jaxfed.training.best_model import open_best_model
from jaxfed.training.loop import train_run
from tests.config.test_text_parametrizations import files, table

__all__ = ["files"]  # a fixture


def configure(files, silos=0, **more):
    model = {"name": "text_lora", "dim": 4, "folder": str(files / "model"), "lora_rank": 2} | more.pop("model", {})
    made = table(files, None, model=model, **more)
    made["data"] |= {"clients": "silo", "silos": silos} if silos else {}
    return make_config(made)


def test_a_run_goes_on_as_if_it_had_not_stopped(files):
    """Of a rule whose server has more than the model's parameters."""

    def train(out, rounds):
        more = {"run": {"out": str(files / out)}, "evaluation": {"every": 1}, "server": {"name": "sgd"}}
        config = configure(files, algorithm={"name": "fedex_lora"}, channel=[], rounds=rounds, **more)
        return train_run(config, resume=True)

    whole = train("whole", 2)
    train("parts", 1)
    assert train("parts", 2)["params_sha256"] == whole["params_sha256"]
    rows = [json.loads(line) for line in (files / "whole" / "metrics.jsonl").open()]
    assert all(row["lora/discordance"] > 0 for row in rows if "train/loss" in row)
    it, _, (shared, private) = open_best_model(files / "whole")
    assert np.isfinite(it.model.score({**shared, **it.model.frozen}, jax.tree.map(lambda x: x[0], private), 0)).all()


def test_rank_groups_and_bottlenecks_by_name(files):
    """A client of half the ranks sends half of the factors; a bottleneck is all that is sent of the encoder."""
    ranks = configure(files, algorithm={"name": "raflora", "ranks": [2, 1]}, channel=[])
    data = load_data(ranks.data)
    up = build_from_config(ranks, data).wire.up(np.full(12, 3), 0, np.arange(12))
    assert set(np.diff(np.unique(up))) == {4 * 2 * (2 * 12)}  # A and B of queries and values, of one rank
    model = {"adapter": "bottleneck", "adapter_size": 2, "adapter_pattern": "/output"}
    it = build_from_config(configure(files, model=model), data)
    shapes = jax.eval_shape(it.model.init, jax.random.key(0))["params"]
    assert {str(path[0].key) for path, _ in jax.tree_util.tree_leaves_with_path(shapes["adapter"])} == {"layer_1"}
    assert shapes.keys() == {"kernel", "shift", "adapter"}


def test_organisations_train_whole_layers(files):
    """Some of them are absent, the layers have a rate of their own, and the run stops and goes on."""
    rates = {"name": "adam", "layers": ["params/kernel", "params/adapter"], "layer_decay": 0.01}

    def train(out, rounds):
        model = {"adapter": "full", "trained_layers": 1}
        run = {
            "run": {"out": str(files / out)},
            "evaluation": {"every": 1},
            "server": {"name": "sgd"},
            "rounds": rounds,
        }
        run |= {"cohort": {"size": 3, "dropout": 0.3}, "work": {"batch_size": 8, "optimizer": rates}, "model": model}
        config = configure(files, **run, silos=4)
        return train_run(config, resume=True)

    whole = train("whole", 2)
    train("parts", 1)
    assert train("parts", 2)["params_sha256"] == whole["params_sha256"]
    _, _, (shared, _) = open_best_model(files / "whole")
    assert shared["params"]["adapter"].keys() == {"layer_1"}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            {"algorithm": {"name": "flora"}, "channel": [{"name": "clip", "bound": 1.0}, {"name": "ring"}]},
            "flora needs each client's message as it was sent, and .* hides or changes it: take rolora",
        ),
        ({"algorithm": {"name": "rolora"}, "server": {"edges": 2}}, "this rule for adapters: leave cohort.buffered"),
        ({"model": {"adapter": "prefix"}}, "model.adapter: 'prefix' is none of"),
        ({"model": {"adapter": "full", "base_dtype": "int8"}}, "leave base_dtype out"),
        ({"model": {"adapter": "full", "adapter_pattern": "layer_1"}}, "leave adapter_pattern out"),
        ({"model": {"adapter": "full"}, "algorithm": {"name": "rolora"}}, "factors"),
        ({"model": {"adapter": "full"}, "algorithm": {"name": "flexlora"}, "channel": []}, "factors"),
        ({"model": {"adapter": "bitfit", "adapter_pattern": "nothing"}}, "is in the path of no layer"),
    ],
)
def test_what_is_refused(files, more, said):
    def build():
        config = configure(files, **more)
        build_from_config(config, load_data(config.data))

    with pytest.raises(ValueError, match=said) as error:
        build()
    assert "\n" not in str(error.value)
