"""How many clients lie side by side follows from what a step of one costs."""

import jax.numpy as jnp
import pytest

from jaxfed.config.build import build_from_config, load_data
from jaxfed.config.schema import make_config
from jaxfed.config.stages import count_useful_clients
from jaxfed.core.tables import Table
from jaxfed.data.batching import Batching
from jaxfed.models.mf import mf

DATA = {"name": "synthetic", "users": 60, "items": 50, "mean_length": 10.0}


def make_model(numbers, frozen=0):
    dense = {"params": {"kernel": jnp.zeros(numbers)}, "tables": {"item": Table(jnp.zeros((50, 10_000)))}}
    return mf(50)._replace(init=lambda key: dense, frozen={"base": jnp.zeros(frozen)} if frozen else ())


@pytest.mark.parametrize(
    ("numbers", "frozen", "clients"), [(0, 0, 0), (10**3, 0, 2048), (10**5, 0, 32), (10**7, 0, 1), (10, 10**7, 1)]
)
def test_the_costlier_a_step_the_fewer_clients_side_by_side(numbers, frozen, clients, monkeypatch):
    """6 x numbers x 64 examples against 10^9, as a power of two: rows of tables cost next to nothing."""
    monkeypatch.setattr("jax.default_backend", lambda: "cpu")
    population = load_data(make_config({"data": DATA}).data).population
    assert count_useful_clients(make_model(numbers, frozen), Batching(64, 9), population) == clients
    assert count_useful_clients(make_model(numbers, frozen), Batching(64, 9, ordered=True), population) == 0


def test_an_area_that_is_set_is_kept():
    config = {"data": DATA, "model": {"name": "metamf", "hidden": 5000}, "work": {"batch_size": 500}}
    chosen, fixed = (
        build_from_config(made, load_data(made.data)).shapes
        for made in (make_config(config), make_config({**config, "run": {"area": 512}}))
    )
    assert chosen.most_clients == 1
    assert fixed.most_clients == 0
