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
CASES = {
    "rolora": {"algorithm": {"name": "rolora"}},
    "fedex_lora": {"algorithm": {"name": "fedex_lora"}, "channel": [], "server": {"name": "sgd"}},
    "raflora": {"algorithm": {"name": "raflora", "ranks": [2, 1]}, "channel": []},
    "bottleneck": {"model": {"adapter": "bottleneck", "adapter_size": 2, "adapter_pattern": "/output"}},
}


def configure(files, **more):
    model = {"name": "text_lora", "dim": 4, "folder": str(files / "model"), "lora_rank": 2} | more.pop("model", {})
    return make_config(table(files, None, model=model, **more))


@pytest.mark.parametrize("name", CASES)
def test_a_run_goes_on_as_if_it_had_not_stopped(files, name):
    more = CASES[name]

    def train(out, rounds):
        run = {"out": str(files / out), "checkpoint_every": 1}
        return train_run(configure(files, run=run, rounds=rounds, **more), resume=True)

    whole = train("whole", 3)
    train("parts", 2)
    assert train("parts", 3)["params_sha256"] == whole["params_sha256"]
    rows = [json.loads(line) for line in (files / "whole" / "metrics.jsonl").open()]
    if name in ("rolora", "fedex_lora"):
        seen = [row["lora/discordance"] for row in rows if "lora/discordance" in row]
        assert len(seen) == 3
        assert (max(seen) < 1e-5) == (name == "rolora")
    it, _, (shared, private) = open_best_model(files / "whole")
    of_first = jax.tree.map(lambda x: x[0], private)
    assert np.isfinite(it.model.score({**shared, **it.model.frozen}, of_first, 0)).all()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            {"algorithm": {"name": "flora"}, "channel": [{"name": "clip", "bound": 1.0}, {"name": "ring"}]},
            "flora needs each client's message as it was sent, and .* hides or changes it: take rolora",
        ),
        ({"algorithm": {"name": "rolora"}, "server": {"edges": 2}}, "this rule for adapters: leave cohort.buffered"),
        ({"model": {"adapter": "prefix"}}, "no adapter 'prefix': choose one of lora, bottleneck, bitfit"),
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
