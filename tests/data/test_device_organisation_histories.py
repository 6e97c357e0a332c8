"""Histories of clients with several users that are drawn on the device: the laws of the host's, and its batches of the
same draws."""

import jax
import numpy as np
import pytest
from scipy import stats

from jaxfed.data import packing
from jaxfed.data.blocks import make_block_shapes
from jaxfed.data.device_cohorts import bound_cohort_rows, bound_held_rows, make_drawer
from jaxfed.data.packing import pack_cohort
from jaxfed.data.population import Times
from jaxfed.data.sequences import DrawnSequences
from tests.data.test_device_draws import ROWS
from tests.data.test_sequences_of_organisations import (
    ITEMS,
    LENGTH,
    POPULATION,
    check_three_epochs,
    make_batching,
    unpacked,
)
from tests.laws.cover import parametrize_cover

LEVEL = 1e-4  # of each test of chances; all seeds are fixed
EVERY = np.arange(5)
COLD = POPULATION._replace(cold_items=np.array([3, 20, 44], np.int32))


def draw_round(batching, ids=EVERY, round=0, lazy=True, steps_per_block=0, population=POPULATION):
    ids = np.array(ids)
    shapes = make_block_shapes(population, batching, len(ids), 1, steps_per_block, lazy)
    cohort = make_drawer(population, batching, shapes).draw(ids, ids < len(EVERY), 3, round)
    assert not any(x.weak_type for x in jax.tree.leaves(cohort) if isinstance(x, jax.Array))
    return jax.device_get(cohort), shapes


@pytest.mark.parametrize("size", [1, 4, 64])
@pytest.mark.parametrize("lazy", ROWS.values(), ids=ROWS)
def test_an_epoch_reads_each_history_once_in_an_order_of_its_own(size, lazy):
    found = unpacked(draw_round(make_batching(size, epochs=3), [*EVERY, 5, 5], lazy=lazy)[0])
    assert found.keys() == {*EVERY.tolist()}
    check_three_epochs(found, size)


def test_users_and_negatives_come_equally_often():
    """The place of the first user of a client of five, the negatives of its steps, and those of two steps together."""
    first = POPULATION.train.of(POPULATION.client_offsets[2])[-LENGTH:].tolist()
    batching = make_batching(1)
    drawer = make_drawer(POPULATION, batching, make_block_shapes(POPULATION, batching, 1))
    places, items = [], []
    for round in range(400):
        steps = unpacked(jax.device_get(drawer.draw(np.array([2]), np.ones(1, bool), 3, round)))[2]
        places.append([reads[0] for reads, _, _ in steps].index(first))
        items.append([np.repeat([*negatives], [*negatives.values()]) for _, negatives, _ in steps])
    assert stats.chisquare(np.bincount(places, minlength=5)).pvalue > LEVEL
    items = np.array(items)  # [rounds, steps, negatives], ascending
    assert stats.chisquare(np.bincount(items.ravel(), minlength=ITEMS)).pvalue > LEVEL
    low = (items < ITEMS // 2).sum(-1)  # how many of a step are among the first half of the items
    for one, other in ((low[:, 0], low[:, 1]), (low[:-1, 0], low[1:, 0])):
        assert abs(np.corrcoef(one, other)[0, 1]) < 4 / len(one) ** 0.5, "steps and rounds draw independently"


def test_what_a_client_trains_on_does_not_depend_on_the_cohort():
    every, some = (
        unpacked(draw_round(make_batching())[0]),
        unpacked(draw_round(make_batching(), [3, 1], 0, True, 40)[0]),
    )
    assert some == {client: every[client] for client in (3, 1)}
    assert unpacked(draw_round(make_batching(), [3], round=1)[0])[3] != some[3]


def test_shared_negatives_are_those_of_the_epoch():
    found = unpacked(draw_round(make_batching(epochs=2, shared_negatives=True))[0])
    sets = [{tuple(sorted(s[1].items())) for s in steps} for steps in found.values()]
    assert all(each == sets[0] for each in sets)
    assert len(sets[0]) == 2, "each epoch has its own"


def test_no_client_holds_more_rows_than_its_bound():
    for options in ({}, {"shared_negatives": True}, {"whole_catalogue": True}):
        batching = make_batching(epochs=2, **options)
        cohort = draw_round(batching, [*EVERY, 5], round=5)[0]
        held = {}
        for block in cohort.blocks:
            counts = (block.rows < len(cohort.rows)).sum(1)
            held |= {int(cohort.ids[slot]): n for slot, n in zip(block.slots, counts, strict=True) if slot < 6}
        assert all(held[client] <= bound_held_rows(POPULATION, batching, EVERY)[client] for client in EVERY)
        assert (cohort.rows < ITEMS).sum() <= bound_cohort_rows(POPULATION, batching, EVERY)


# --- the host's batches of the same draws ----------------------------------------------------------------


def list_draws(cohort, population, batching, clients):
    """The draws of a device, as the host draws for these clients."""
    found = unpacked(cohort)
    steps = [(c, place, *step) for c, client in enumerate(clients) for place, step in enumerate(found[int(client)])]
    reads, keys = ([each for step in steps for each in step[at]] for at in (2, 4))
    drawn = 0 if batching.sequence.whole_catalogue else batching.negatives
    negative = [[item for item, count in step[3].items() for _ in range(count)][:drawn] for step in steps]
    user = {tuple(population.train.of(u)[-LENGTH:].tolist()): u for u in range(len(population.user_names))}
    assert len(user) == len(population.user_names)
    time = None
    if batching.sequence.times != "none":
        time = np.concatenate([population.time_lists[0].of(user[tuple(each)])[-LENGTH:] for each in reads])
    return DrawnSequences(
        np.array([step[0] for step in steps]),
        np.array([step[1] for step in steps]),
        np.repeat(np.arange(len(steps)), [len(step[2]) for step in steps]),
        np.concatenate([np.arange(len(step[2])) for step in steps]),
        np.array([len(each) for each in reads]),
        np.concatenate(reads).astype(np.int32),
        np.array(negative, np.int32).reshape(len(steps), drawn),
        np.array(keys, np.uint32),
        time,
    )


CASES = {
    "usual": {},
    "one user a step": {"batch_size": 1, "epochs": 2},
    "shared negatives": {"shared_negatives": True, "epochs": 2},
    "more negatives than items": {"negatives": 70, "batch_size": 64},
    "whole catalogue": {"whole_catalogue": True, "batch_size": 2},
}


@parametrize_cover(
    name=list(CASES),
    lazy=ROWS,
    population={"all warm": POPULATION, "cold items": COLD},
    times=["none", "known"],
)
def test_the_arrays_are_those_of_the_host_from_the_same_draws(name, lazy, population, times, monkeypatch):
    """To the bit."""
    time = np.arange(len(population.train.values), dtype=np.int32) * 7 % 1000
    population = population._replace(times=Times(time, time[:0], time[:0]))
    batching, ids = make_batching(**CASES[name]), np.array([*EVERY, 5, 5])
    batching = batching._replace(sequence=batching.sequence._replace(times=times))
    cohort, shapes = draw_round(batching, ids, lazy=lazy, population=population)
    draws = read_steps(cohort, len(population.cold_items) if population.cold_items is not None else 0)
    monkeypatch.setattr(packing, "draw_sequences", lambda _, *args: list_draws(draws, population, *args[:2]))
    host = pack_cohort(population, batching, shapes, ids, ids < 5, 3, 0)
    assert jax.tree.structure(host) == jax.tree.structure(cohort)
    for (path, a), (_, b) in zip(*map(jax.tree_util.tree_leaves_with_path, (host, cohort)), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))
        assert np.asarray(a).dtype == np.asarray(b).dtype, "the same programs run both"


def read_steps(cohort, cold):
    """The cohort with the number of items in place of what may be a negative, as `unpacked` reads it."""
    blocks = []
    for block in cohort.blocks:
        catalogue = block.data.batch["catalogue"]
        assert (catalogue[block.data.live] == ITEMS - cold).all()
        blocks.append(
            block._replace(data=block.data._replace(batch=block.data.batch | {"catalogue": catalogue + cold}))
        )
    return cohort._replace(blocks=tuple(blocks))
