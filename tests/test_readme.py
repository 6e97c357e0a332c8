"""The README's code runs, and its commands name what is there."""

import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

from jaxfed.config.build import build_experiment, load_data
from jaxfed.config.schema import make_config
from jaxfed.core.federate import federate
from jaxfed.training.rounds import initial_arrays, make_run_keys, prepare_round

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_three_examples_run_together(tmp_path):
    space = {}
    (tmp_path / "jaxfed").mkdir()
    for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(code, space)
        (tmp_path / "jaxfed" / "example.py").write_text(code)
        for check in (["check"], ["format", "--check"]):  # what is copied from here passes `make test`
            command = [sys.executable, "-m", "ruff", *check, "--config", str(ROOT / "pyproject.toml"), str(tmp_path)]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout
    data = load_data(make_config({"data": {"name": "synthetic", "users": 30, "items": 40, "mean_length": 5.0}}).data)
    made = build_experiment(make_config({"cohort": {"size": 10}, "model": {"dim": 4}}), data)
    model = space["scaled"](data.population.num_items, 1, dim=4)
    keys = make_run_keys(0)
    for algorithm in (
        space["clipped_fedadam"](model, 30),
        federate(
            space["local_steps"](model.loss, space["optax"].sgd(0.1), model.private),
            space["damped_mean"](), space["optax"].sgd(1.0), 30,
        ),
    ):  # fmt: skip
        state = algorithm.init(model.init(keys.model), keys.memory)
        before = np.asarray(state.shared.params["tables"]["item"].rows)
        state, info = algorithm.step(state, prepare_round(made, 0, 0).cohort, keys.rounds)
        assert (np.asarray(state.shared.params["tables"]["item"].rows) != before).any()
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(info))
    assert float(info["damped/clients"]) == 10
    assert initial_arrays(made, 0)


def test_what_the_readme_names_is_there():
    assert "@@" not in README
    for path in set(re.findall(r"(?:configs|tests|scripts|jaxfed)/[\w/]+\.(?:toml|py)", README)):
        assert (ROOT / path).exists() or "damped" in path, path  # the one that a reader would write
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"make (\w+)", README)) - {"nothing"}:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
