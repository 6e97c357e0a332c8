"""What functions of the registry leave in what they make."""

import ast
from functools import partial
from pathlib import Path

import optax
import pytest

from jaxfed.algorithms.group_rates import Rates, group_rates
from jaxfed.config.optax_functions import OPTIMIZERS
from jaxfed.config.optimizer_names import name_optimizer
from jaxfed.config.options import STEADY
from jaxfed.config.registry import REGISTRY
from jaxfed.core.recipe import find_recipe, named

ROOT = Path(__file__).parents[2] / "jaxfed"
NAMELESS = {("algorithm", "custom"), ("clock", "none"), ("parametrization", "identity"), ("server", "solve")}
NAMELESS |= {("parametrization", "codes")}  # which gives a model


def test_every_function_of_the_registry_leaves_its_own_name():
    """Files are read by `jaxfed.data.read`, works are parts of methods, optimisers are found by comparison."""
    for section in ("data", "model", "algorithm", "channel", "cohort", "clock", "parametrization", "server"):
        for name, function in REGISTRY[section].items():
            if (section, name) in NAMELESS or name in OPTIMIZERS or isinstance(function, partial):
                continue
            assert function.named_as == (section, name), name


def test_nothing_else_leaves_a_name():
    known = {id(function) for section in REGISTRY.values() for function in section.values()}
    others = {"group_rates", "read", "from_arrow"}
    for path in ROOT.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            calls = [each for each in getattr(node, "decorator_list", ()) if isinstance(each, ast.Call)]
            if any(getattr(call.func, "id", "") == "named" for call in calls) and node.name not in others:
                module = ".".join(("jaxfed", *path.relative_to(ROOT).with_suffix("").parts))
                assert id(getattr(__import__(module, fromlist=["x"]), node.name)) in known, (path, node.name)


def test_a_recipe_goes_with_what_it_was_made_of():
    @named("channel")
    def half(factor: float = 0.5):
        from jaxfed.core.channel import at_client

        return at_client(optax.scale(factor))

    made = half(factor=0.25)
    assert find_recipe(made)[:3] == ("channel", "half", {"factor": 0.25})
    assert find_recipe(made._replace(encode=lambda *_: None)) is None
    assert find_recipe(made._replace(claims=made.claims._replace(is_average=True))) is None


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimisers_of_optax_are_found_with_their_numbers(name):
    """By what they close over: optax's functions, with defaults and with other numbers."""
    make = OPTIMIZERS[name]
    for more in ({}, {"b1": 0.7, "b2": 0.98} if name in ("adam", "yogi", "adabelief", "radam", "nadam") else {}):
        found = name_optimizer(make(learning_rate=0.037, **more))
        assert found is not None
        numbers = {key: value for key, value in found.items() if key not in ("name", "weight_decay")}
        again = OPTIMIZERS[found["name"]](**numbers)
        assert name_optimizer(again) == found
        assert numbers["learning_rate"] == 0.037
        assert numbers.items() >= more.items()
    assert STEADY["optimizer"]["weight_decay"] != found["weight_decay"] == 0.0


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.adamw(0.1),
        optax.sgd(optax.cosine_decay_schedule(0.1, 10)),
        optax.chain(optax.clip(1.0), optax.sgd(0.1)),
        optax.inject_hyperparams(optax.sgd)(learning_rate=0.1),
        group_rates(optax.adamw, 0.1, item=Rates(1.0)),
    ],
    ids=["adamw", "schedule", "chain", "injected", "groups of adamw"],
)
def test_what_a_configuration_cannot_say_has_no_name(optimizer):
    assert name_optimizer(optimizer) is None
