"""The types of a configuration: static dataclasses, completed by an editor, pickled and copied like any value."""

import copy
import dataclasses
import pickle
import subprocess
import sys
import typing

import jax
import numpy as np
import pytest

from jaxfed.config.overrides import override_config
from jaxfed.config.registry import REGISTRY
from jaxfed.config.schema import argument_types, config_to_table, make_config
from jaxfed.config.settings import (
    Config,
    Evaluation,
    GroupRates,
    Privacy,
    Run,
    Section,
    replace_arguments,
    with_patience,
)

TABLE = {
    "model": {"name": "neumf", "hidden": [8, 4]},
    "work": {"optimizer": {"name": "adam", "item": {"learning_rate": 2.0}}},
    "channel": [{"name": "clip", "bound": 2.0}, {"name": "promote", "targets": ["7"]}],
    "evaluation": {"where": "clients", "channel": [{"name": "clip"}]},
}


@pytest.mark.parametrize("args", [[], ["--channel.1.name", "mean", "--model.dim", "4"]], ids=["a file", "overrides"])
def test_every_part_is_of_the_type_that_an_editor_is_told(args):
    config = override_config(copy.deepcopy(TABLE), args)
    assert type(config) is Config
    for name, kind in typing.get_type_hints(Config).items():
        value = getattr(config, name)
        if typing.get_origin(kind) is tuple:
            assert all(type(each) is Section for each in value), name
        else:
            assert type(value) is kind, name
    assert type(config.work.optimizer) is Section
    assert type(config.work.optimizer.item) is GroupRates
    assert [type(each) for each in config.evaluation.channel] == [Section]


@pytest.mark.parametrize("part", ["", "work", "channel", "evaluation"])
def test_what_is_pickled_is_read_by_a_process_that_has_made_no_configuration(part):
    config = make_config(TABLE)
    value = getattr(config, part) if part else config
    code = "import pickle, sys; value = pickle.load(sys.stdin.buffer)\n"
    code += "assert 'jaxfed.config.schema' not in sys.modules  # which makes configurations\n"
    code += "sys.stdout.buffer.write(pickle.dumps((value, repr(value))))"
    done = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(value), capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert pickle.loads(done.stdout) == (value, repr(value))


def test_configurations_are_equal_and_hashed_by_what_they_say():
    config, same = make_config(TABLE), make_config(copy.deepcopy(TABLE))
    assert (config, hash(config)) == (same, hash(same))
    assert copy.deepcopy(config) == config
    assert make_config(config_to_table(config)) == config
    other = dataclasses.replace(config, model=replace_arguments(config.model, dim=5))
    assert other != config
    assert other == make_config({**TABLE, "model": {**TABLE["model"], "dim": 5}})


def test_nothing_of_a_configuration_can_be_changed_in_place():
    config = make_config(TABLE)
    for part, name in ((config, "seed"), (config.model, "dim"), (config.run, "out")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, name, 3)


def test_a_section_lists_its_arguments():
    model = make_config(TABLE).model
    assert {"name", "dim", "hidden"} <= {*dir(model)}
    assert all(hasattr(model, name) for name in dir(model))
    with pytest.raises(AttributeError, match='neumf has no argument "dmi"; there are name, dim, '):
        _ = model.dmi
    with pytest.raises(AttributeError, match='neumf has no argument "dmi"'):
        replace_arguments(model, dmi=3)


def test_the_settings_that_a_program_makes_are_those_of_an_empty_file():
    config = make_config({"work": {"optimizer": {"name": "sgd"}}})  # of which no rule says how it trains
    assert (config.evaluation, config.privacy, config.run) == (with_patience(Evaluation(), False), Privacy(), Run())


@pytest.mark.parametrize("section", [name for name in REGISTRY if name not in ("optimizer", "channel")])
def test_the_sections_are_those_of_the_registry(section):
    assert typing.get_type_hints(Config)[section] is Section


def test_a_number_that_may_also_be_an_array_is_a_number(monkeypatch):
    """optax writes `jax.Array | float` for its rates, of which a file holds the number."""

    def make(rate: jax.Array | np.ndarray | float = 0.9, bits: int | str = "auto"):
        """Something of a registry."""

    monkeypatch.setitem(REGISTRY["server"], "made_up", make)
    kinds = argument_types("server", "made_up")
    assert kinds["rate"] is float
    assert kinds["bits"] == int | str
    config = override_config({}, ["--server.name", "made_up", "--server.rate", ".5", "--server.bits", "3"])
    assert (config.server.rate, config.server.bits) == (0.5, 3)
