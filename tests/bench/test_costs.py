"""What a client update costs, beside counts by hand."""

import numpy as np
import pytest

from jaxfed.bench.costs import count_block_flops, count_update_bytes, count_update_flops, estimate_costs
from jaxfed.bench.workloads import SEED, Workload, make_bench_experiment
from jaxfed.data.batching import draw_examples
from jaxfed.data.packing import pack_cohort

DIM, BATCH = 64, 64


@pytest.fixture(scope="module")
def experiment():
    return make_bench_experiment(Workload(items=90, users=60, cohort=9))


@pytest.fixture(scope="module")
def cohort(experiment):
    ids = experiment.sampler.draw(SEED, 0)
    return pack_cohort(experiment.data.population, experiment.batching, experiment.shapes, *ids, SEED, 0)


def test_bytes_are_those_of_a_count_by_hand(experiment, cohort):
    """From the examples as they are drawn, client by client: sets of items, and no blocks."""
    drawn = draw_examples(experiment.data.population, experiment.batching, cohort.ids, SEED, 0)
    clients = np.split(drawn.item[:, 0], np.cumsum(drawn.examples)[:-1])
    assert len(clients) == 9
    row, user, expected = 4 * (DIM + 1), 4 * DIM, 0
    for items in clients:
        expected += 2 * len({*items.tolist()}) * row + 2 * user
        for low in range(0, len(items), BATCH):
            distinct = len({*items[low : low + BATCH].tolist()})
            expected += 4 * (distinct * row + user) + distinct * (4 + 4 + 4)
    assert count_update_bytes(experiment, cohort) == expected / 9


def test_padding_and_empty_places_are_no_bytes(experiment):
    """A cohort of one client costs what this client does, in blocks that are made for nine."""
    population, alone = experiment.data.population, np.full(9, experiment.data.population.num_clients)
    shortest = alone.copy()
    alone[4], shortest[4] = population.num_train.argmax(), population.num_train.argmin()

    def predict(ids):
        present = ids < population.num_clients
        packed = pack_cohort(population, experiment.batching, experiment.shapes, ids, present, SEED, 0)
        return count_update_bytes(experiment, packed)

    few = int(population.num_train.min()) * 5
    least, most = (passes * few * 4 * (DIM + 1) for passes in (1, 7))
    assert least < predict(shortest) < most
    assert predict(alone) > 1.5 * predict(shortest)


@pytest.mark.optimised
def test_operations_are_those_of_the_real_program_and_of_every_step(experiment, cohort):
    """A product of two vectors, their gradients and the update take 8 operations for each number of a row, by hand; the
    program that rounds run counts the body of its loop once."""
    (block,) = cohort.blocks
    clients, steps, width = block.data.rows.shape
    flops, once = count_update_flops(experiment, cohort), count_block_flops(experiment, cohort, block) / clients
    assert steps > 2
    assert 8 < (flops - once) / (steps - 1) / (width * DIM) < 10


def test_figures_of_a_second_are_those_of_an_update(experiment, monkeypatch):
    monkeypatch.setattr("jaxfed.bench.costs.count_update_flops", lambda parts, cohort: 2e6)
    figures = estimate_costs(experiment, SEED, 500.0)
    assert figures["gigaflops_per_second"] == 1.0
    assert figures["gigabytes_per_second"] == pytest.approx(figures["predicted_bytes_per_update"] * 5e-7, abs=1e-3)
    monkeypatch.setattr("jaxfed.bench.costs.count_update_flops", lambda parts, cohort: None)
    figures = estimate_costs(experiment, SEED, 500.0)
    assert figures["gigaflops_per_second"] is figures["measured_flops_per_update"] is None


def test_a_program_that_does_not_say_gives_no_figure(experiment, cohort, monkeypatch):
    monkeypatch.setattr("jax.stages.Compiled.cost_analysis", lambda self: None)
    assert count_update_flops(experiment, cohort) is None
