"""Histories as batches: each step has its client's latest items in their order, and the negatives that were drawn."""

import numpy as np
import pytest

from jaxfed.core.model import SequenceFormat
from jaxfed.core.streams import Stream
from jaxfed.data.batching import Batching, client_random_numbers
from jaxfed.data.blocks import make_block_shapes
from jaxfed.data.packing import empty_cohort, pack_cohort
from jaxfed.data.preparation import prepare_population
from jaxfed.data.ragged import make_ragged
from jaxfed.data.sequences import describe_cut_histories
from jaxfed.data.sources.synthetic import synthetic_data

DATA = synthetic_data(60, 50, mean_length=12)
POPULATION = prepare_population(DATA)[1]
LENGTH, NEGATIVES = 17, 9


def make_batching(**options):
    format = SequenceFormat(LENGTH, options.pop("whole_catalogue", False))
    return Batching(negatives=NEGATIVES, sequence=format, **options)


def packed(batching, ids, round=0, seed=3, lazy=True, steps_per_block=16):
    shapes = make_block_shapes(POPULATION, batching, len(ids), 1, steps_per_block, lazy)
    return pack_cohort(POPULATION, batching, shapes, np.array(ids), np.ones(len(ids), bool), seed, round), shapes


def unpacked(cohort):
    """{client: [(items read, {item: how often it is a negative}, dropout) of each step]} back from the blocks."""
    found = {}
    for block in cohort.blocks:
        rows = np.asarray(block.rows)
        if cohort.rows is not None:
            rows = np.append(cohort.rows, POPULATION.num_items)[rows]
        for lane, slot in enumerate(block.slots):
            held = np.append(rows[lane], POPULATION.num_items)
            real = held[held < POPULATION.num_items]
            assert len(set(real)) == len(real), "rows that a client holds are distinct"
            for step in np.flatnonzero(block.data.live[lane]):
                places = np.minimum(block.data.rows[lane, step], len(held) - 1)
                item = np.append(held[places], POPULATION.num_items)
                used = item[item < POPULATION.num_items]
                assert len(set(used)) == len(used), "rows of a step are distinct"
                batch = {name: values[lane, step] for name, values in block.data.batch.items()}
                assert len(batch["negative"]) == len(places)
                read = item[np.minimum(batch["sequence"], len(places))]
                negatives = {int(i): int(n) for i, n in zip(item, batch["negative"], strict=False) if n}
                steps = found.setdefault(int(cohort.ids[slot]), [])
                steps.append((read[read < POPULATION.num_items].tolist(), negatives, tuple(batch["dropout"])))
    return found


@pytest.mark.parametrize("lazy", [True, False], ids=["the cohort's rows", "all rows"])
def test_each_step_has_the_latest_items_and_the_negatives_drawn(lazy):
    batching, ids, seed, round = make_batching(epochs=2), list(range(0, 60, 2)), 3, 5
    cohort, _ = packed(batching, ids, round, seed, lazy)
    found, lengths = unpacked(cohort), POPULATION.num_train
    assert lengths[ids].min() < 5
    assert lengths[ids].max() > LENGTH, "clients of very different lengths"
    assert found.keys() == set(ids)
    for client, steps in found.items():
        history = POPULATION.train.of(client).tolist()
        assert [read for read, _, _ in steps] == [history[-LENGTH:]] * 2
        for epoch, (_, negatives, dropout) in enumerate(steps):
            one = np.array([client]), np.array([epoch]), np.array([1 + NEGATIVES])
            raw = client_random_numbers(seed, Stream.EXAMPLES, *one, round)
            drawn = (raw[1:] >> np.uint64(32)) * np.uint64(POPULATION.num_items) >> np.uint64(32)
            assert negatives == dict(zip(*map(np.ndarray.tolist, np.unique(drawn, return_counts=True)), strict=True))
            assert dropout == tuple(raw[:1].view(np.uint32))
    assert len({dropout for steps in found.values() for _, _, dropout in steps}) == 2 * len(ids)


def test_histories_that_are_cut_are_counted():
    long = int((POPULATION.num_train > LENGTH).sum())
    assert 0 < long < 60
    assert (
        describe_cut_histories(POPULATION, LENGTH)
        == f"{long} of 60 histories have more than 17 items: the latest are read"
    )
    assert describe_cut_histories(POPULATION, int(POPULATION.num_train.max())) == ""


def test_weights_count_targets():
    cohort, _ = packed(make_batching(), list(range(60)))
    for block in cohort.blocks:
        ids = np.append(cohort.ids, 60)[block.slots]
        read = np.minimum(np.append(POPULATION.num_train, 1)[ids], LENGTH)
        np.testing.assert_array_equal(block.data.examples, read - 1)


def test_what_a_client_trains_on_does_not_depend_on_the_cohort():
    every, _ = packed(make_batching(), list(range(60)))
    some, _ = packed(make_batching(), [7, 41, 3], steps_per_block=64)
    assert unpacked(some) == {client: unpacked(every)[client] for client in (7, 41, 3)}
    assert unpacked(packed(make_batching(), [7, 41, 3], round=1)[0])[7] != unpacked(some)[7]


def test_shared_negatives_are_the_same_for_all_clients_of_a_round():
    batching = make_batching(epochs=2, shared_negatives=True)
    found = unpacked(packed(batching, list(range(30)))[0])
    sets = {tuple(tuple(sorted(negatives.items())) for _, negatives, _ in steps) for steps in found.values()}
    assert len(sets) == 1
    first, second = next(iter(sets))
    assert first != second, "each epoch has its own"
    assert sum(count for _, count in first) == NEGATIVES
    other = unpacked(packed(batching, [0], round=1)[0])
    assert other[0][0][1] != dict(first)
    own = unpacked(packed(make_batching(epochs=2), list(range(30)))[0])
    assert len({tuple(sorted(steps[0][1].items())) for steps in own.values()}) == 30


def test_whole_catalogue_gives_each_step_every_item_once():
    found = unpacked(packed(make_batching(whole_catalogue=True), list(range(10)))[0])
    assert all(steps[0][1] == dict.fromkeys(range(POPULATION.num_items), 1) for steps in found.values())
    assert found[4][0][0] == POPULATION.train.of(4)[-LENGTH:].tolist()


def test_negatives_are_uniform_over_the_catalogue():
    counts = np.zeros(POPULATION.num_items)
    for round in range(40):
        for steps in unpacked(packed(make_batching(), list(range(60)), round)[0]).values():
            for item, count in steps[0][1].items():
                counts[item] += count
    expected = counts.sum() / len(counts)
    deviations = (counts - expected) / np.sqrt(expected)
    assert np.abs(deviations).max() < 4.5  # of 50 normal numbers one in 3,000 times above 4


@pytest.mark.parametrize("whole", [True, False], ids=["all items", "drawn ones"])
def test_cold_items_are_nobodys_negatives(whole):
    population = prepare_population(DATA, cold_items=0.3)[1]
    cold = set(population.cold_items.tolist())
    assert len(cold) >= 15
    batching = make_batching(whole_catalogue=whole)
    shapes = make_block_shapes(population, batching, 20, 1, 16)
    cohort = pack_cohort(population, batching, shapes, np.arange(20), np.ones(20, bool), 0, 0)
    negatives = {item for steps in unpacked(cohort).values() for item in steps[0][1]}
    assert negatives
    assert not negatives & cold


def test_few_shapes_and_an_empty_cohort_for_each():
    batching = make_batching()
    _, shapes = packed(batching, list(range(60)))
    empty = empty_cohort(POPULATION, batching, shapes)
    assert len(empty.blocks) == len(shapes.kinds) <= 4
    assert not any(block.data.live.any() for block in empty.blocks)


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({}, {"negatives": 0}, "set work.negatives"),
        ({"label": "rating"}, {}, "counts rows"),
    ],
)
def test_clients_without_histories_are_refused(options, change, message):
    rows = DATA.interactions
    rated = DATA._replace(interactions=rows._replace(rating=rows.item % 5 + np.float32(1)))
    population = prepare_population(rated, **options)[1]
    with pytest.raises(ValueError, match=message):
        make_block_shapes(population, make_batching()._replace(**change), 10)


def test_histories_of_one_item_teach_nothing():
    lists = [[user] for user in range(60)]
    train = make_ragged(np.concatenate(lists), np.arange(60), 60)
    for clients in (np.arange(61), np.array([0, 20, 60])):
        short = POPULATION._replace(train=train, client_offsets=clients, num_train=np.diff(clients))
        with pytest.raises(ValueError, match="no user has two train items"):
            make_block_shapes(short, make_batching(), 2)


def test_a_negative_number_of_epochs_is_refused():
    with pytest.raises(ValueError, match=r"work\.epochs"):
        make_block_shapes(POPULATION, make_batching(epochs=0), 10)
