"""How many blocks are held at once, and what is suggested where they do not fit."""

import re
from itertools import pairwise

import numpy as np
import pytest

from jaxfed.config import memory
from jaxfed.config.build import build_from_config, load_data
from jaxfed.config.memory import check_examples, choose_chunk
from jaxfed.config.schema import make_config
from jaxfed.core.model import SequenceFormat
from jaxfed.data.batching import Batching
from jaxfed.data.blocks import BlockShapes, make_block_shapes
from jaxfed.data.devices import select_clients
from jaxfed.data.preparation import prepare_population
from jaxfed.data.sources.files import from_arrow
from tests.data.test_packing import POPULATION
from tests.data.test_sequences_of_organisations import POPULATION as ORGANISATIONS


def test_organisations_of_many_users_need_the_most_blocks(monkeypatch):
    """Two have more interactions, and two have more steps: of these a cohort of two needs two blocks."""
    monkeypatch.setattr(memory, "device_memory", lambda: 16_000)  # one block is held at a time, of 1 kB
    users, items = np.array([2, 2, 8, 8]), np.array([20, 20, 5, 5])  # of each organisation; items of each user
    user = np.repeat(np.arange(20), np.repeat(items, users))
    table = {"user": user, "item": np.arange(len(user)) % 30, "time": np.arange(len(user))}
    table["region"] = np.repeat(np.arange(4), users * items)
    population = prepare_population(from_arrow(table, keep="region"), clients="region")[1]
    assert population.num_train.argmin() == 2
    batching = Batching(1, 3, sequence=SequenceFormat(18))
    shapes = make_block_shapes(population, batching, 2, steps_per_block=8)
    assert shapes.kinds == ((2, 18), (8, 18))
    assert choose_chunk(population, batching, shapes, lambda shapes: 1000, 0, True) == 1
    alike = select_clients(population, np.array([0, 1]))
    assert choose_chunk(alike, batching, shapes, lambda shapes: 1000, 0, True) == 0  # two lie side by side in one


def test_examples_of_histories_are_what_is_read_and_the_negatives_of_each_step(monkeypatch):
    """Of the largest cohort: whole histories up to the length that is read; by hand."""
    monkeypatch.setattr(memory, "machine_memory", lambda: 0)
    lengths = [ORGANISATIONS.train.counts[low:high] for low, high in pairwise(ORGANISATIONS.client_offsets)]
    for sizes, batch_size in ((POPULATION.num_train[:, None], 64), (lengths, 4)):
        population = POPULATION if batch_size == 64 else ORGANISATIONS
        read = sorted(int(np.minimum(each, 9).sum()) for each in sizes)[-3:]
        steps = sorted(-(-len(each) // batch_size) for each in sizes)[-3:]
        want = 2 * (sum(read) + 7 * sum(steps))
        with pytest.raises(ValueError, match=f"^a round may have {want:,} examples"):
            check_examples(population, Batching(batch_size, 7, 2, sequence=SequenceFormat(9)), 3)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("clients", ["user", "silo"])
def test_a_batch_of_nothing_is_one_line(clients):
    """Without a warning before it."""
    data = {"name": "synthetic", "users": 30, "items": 40, "clients": clients}
    model = {"name": "sasrec", "dim": 4, "length": 6}
    for name in ("mf", "sasrec"):
        config = make_config({"data": data, "work": {"batch_size": 0}} | ({"model": model} if name != "mf" else {}))
        with pytest.raises(ValueError, match=r"^work.batch_size is 0: it must be at least 1$"):
            build_from_config(config, load_data(config.data))


def make_shapes(most):
    kinds = ((1, 8), (32, 8))
    return BlockShapes(kinds, 64, slots=64, devices=1, columns=1, num_items=50, room=0, end=50, most_clients=most)


@pytest.mark.parametrize("most", [0, 4])
def test_the_area_that_is_suggested_fits(most, monkeypatch):
    """A message of 1 kB from each client side by side: with an area that is set, nothing else limits how many."""
    monkeypatch.setattr(memory, "device_memory", lambda: 9_000)

    def block_bytes(shapes):
        return 1000 * max(shapes.clients(steps) for steps, _ in shapes.kinds)

    with pytest.raises(ValueError, match="set run.area to") as error:
        choose_chunk(POPULATION, Batching(8, 3), make_shapes(most), block_bytes, 0, True)
    area = int(re.search(r"run.area to (\d+)", str(error.value))[1])
    assert area == 2
    set_by_hand = make_shapes(0)._replace(steps_per_block=area)
    choose_chunk(POPULATION, Batching(8, 3), set_by_hand, block_bytes, 0, True)
