"""`work.negative_sampling = "in_batch"`: negatives are other positives of a batch, on the host and the device."""

import jax
import numpy as np
import pytest
from scipy import stats

from jaxfed.data import packing
from jaxfed.data.batch_negatives import draw_batch_negatives, mark_excluded_items
from jaxfed.data.batching import draw_examples
from jaxfed.data.device_organisations import draw_examples_of_users
from jaxfed.data.packing import pack_cohort
from jaxfed.data.ragged import make_ragged
from jaxfed.data.sequences import draw_sequences
from tests.data.test_device_organisations import LEVEL
from tests.data.test_device_pairs import check_same_arrays
from tests.data.test_device_popular_negatives import HISTORIES, draw_many, list_examples
from tests.data.test_popular_negatives import DATA, TABLE, build

SILOS = {"data": DATA | {"clients": "silo", "silos": 5}}
PAIRS = {"model": {"name": "mf", "dim": 4, "loss": "bpr"}}
CASES = {
    "items": ({}, {"batch_size": 16, "negatives": 4, "epochs": 2}),
    "one batch": ({}, {"batch_size": 4096, "negatives": 3}),
    "batches that cut groups": ({}, {"batch_size": 14, "negatives": 5}),
    "pairs": (PAIRS, {"batch_size": 7, "negatives": 3}),
}


def build_in_batch(tables=(), **work):
    chosen = TABLE["work"] | {"negative_sampling": "in_batch"} | work
    return build(SILOS | dict(tables) | {"work": chosen})


def group_examples(drawn, batching):
    """For each pass, [[(number of its positive, positive, item, user, whether it is a negative, whether it counts) of
    each example] of each step]."""
    each, at = batching.examples(1), 0
    for client, count in zip(drawn.client, drawn.examples, strict=True):
        examples = []
        for place in range(count):
            first = at + place // each * each  # of the group
            item = drawn.item[at + place]
            positive, other = item if batching.pairwise else (drawn.item[first, 0], item[0])
            is_negative = batching.pairwise or place % each > 0
            facts = place // each, positive, other, drawn.user[at + place], is_negative, drawn.is_learned[at + place]
            examples.append(facts)
        yield client, [examples[i : i + batching.batch_size] for i in range(0, count, batching.batch_size)]
        at += count


@pytest.mark.parametrize("name", CASES)
def test_a_negative_is_another_positive_of_its_batch(name):
    """And counts where its user does not have it; positives always count."""
    tables, work = CASES[name]
    parts = build_in_batch(tables, **work)
    population, batching = parts.data.population, parts.batching
    drawn, seen = draw_examples(population, batching, np.arange(5), 3, 0), []
    for client, steps in group_examples(drawn, batching):
        first = population.client_offsets[client]
        for step in steps:
            groups = {number: positive for number, positive, *_ in step}
            for number, positive, item, user, is_negative, counts in step:
                if not is_negative:
                    assert counts
                    assert item == positive
                    continue
                others = [other for group, other in groups.items() if group != number]
                assert item in others or (not others and item == positive)
                assert counts == (item not in population.excluded.of(first + user))
                seen.append(counts)
    assert any(seen)
    assert not all(seen), "some are on the list of their user"


def test_others_of_a_batch_come_equally_often():
    """By hand: 6 positives with 2 negatives each, in batches of 7: the second has examples of positives 2 to 4."""
    rng = np.random.default_rng(0)
    random32 = rng.integers(0, 1 << 32, (4000, 6, 2), np.uint64)
    found = np.stack([draw_batch_negatives(np.array([6]), each, 3, 7) for each in random32])
    for number, place, others in ((0, 0, [1, 2]), (2, 0, [3, 4]), (2, 1, [3, 4]), (3, 1, [2, 4]), (5, 1, [4])):
        seen = found[:, number, place]
        assert set(seen.tolist()) == set(others), (number, place)
        if len(others) > 1:
            assert stats.chisquare(np.bincount(seen)[others]).pvalue > LEVEL
    alone = draw_batch_negatives(np.array([1, 2]), random32[0, :3], 3, 64)
    assert alone[0].tolist() == [0, 0], "a positive without others"
    assert alone[1:].tolist() == [[2, 2], [1, 1]], "never of another client"


def test_items_on_lists_by_hand():
    lists = make_ragged(np.array([1, 4, 0, 3]), np.array([0, 0, 2, 2]), 3)
    item = np.array([[0, 1, 4], [0, 1, 4], [0, 3, 4], [4, 1, 2]])
    want = [[False, True, True], [False] * 3, [True, True, False], [True, True, False]]
    assert mark_excluded_items(lists, np.array([0, 1, 2, 0]), item, 5).tolist() == want


@pytest.mark.parametrize("place", ["host", "device"])
@pytest.mark.parametrize("tables", [{}, PAIRS, {"model": HISTORIES}], ids=["items", "pairs", "histories"])
def test_a_client_holds_no_row_for_a_negative(tables, place):
    parts = build_in_batch(tables, draw_on=place)
    population = parts.data.population
    ids, present = np.arange(5), np.ones(5, bool)
    draw = parts.drawer.draw if parts.drawer else lambda *args: pack(parts, *args)
    cohort = draw(ids, present, 3, 0)
    for block in jax.device_get(cohort.blocks):
        rows = np.append(cohort.rows, population.num_items)[np.minimum(block.rows, len(cohort.rows))]
        for slot, held in zip(block.slots, rows, strict=True):
            if slot < 5:
                users = range(*population.client_offsets[slot : slot + 2])
                own = {item for user in users for item in population.train.of(user).tolist()}
                assert {item for item in held.tolist() if item < population.num_items} <= own


def pack(parts, ids, present, seed, round):
    return pack_cohort(parts.data.population, parts.batching, parts.shapes, ids, present, seed, round)


@pytest.mark.parametrize("lazy", [True, False], ids=["rows", "all rows"])
@pytest.mark.parametrize("name", CASES)
def test_the_arrays_are_those_of_the_host_from_the_same_draws(name, lazy, monkeypatch):
    """To the bit, but for the order in which a client lists its rows."""
    tables, work = CASES[name]
    parts = build_in_batch(dict(tables) | {"server": {"name": "sgd", "lazy": lazy}}, draw_on="device", **work)
    ids = np.array([4, 1, 0, 5])
    cohort = jax.device_get(parts.drawer.draw(ids, ids < 5, 3, 0))
    monkeypatch.setattr(packing, "draw_examples", lambda _, batching, some, *rest: list_examples(parts, some))
    check_same_arrays(pack(parts, ids, ids < 5, 3, 0), cohort, lazy)


def test_others_of_a_batch_come_equally_often_on_the_device():
    """A client whose positives are all of one batch: the first negative of each round, among all the others."""
    parts = build_in_batch({}, batch_size=4096, negatives=1, draw_on="device")
    population, rounds = parts.data.population, 3000
    item, _, _, batch = draw_many(parts, draw_examples_of_users, 2, rounds)
    positive, negative = item[:, 0, 0, 0, 0], item[:, 0, 0, 1, 0]
    users = np.arange(*population.client_offsets[2:4])
    copies = np.bincount(np.concatenate([population.train.of(user) for user in users]))
    n, used = copies.sum(), copies > 0
    seen = np.bincount(negative, minlength=len(copies))
    assert stats.chisquare(seen[used], rounds * copies[used] / n).pvalue > LEVEL
    same = (copies * (copies - 1)).sum() / (n * (n - 1))  # another user has the same item
    assert stats.binomtest(int((positive == negative).sum()), rounds, same).pvalue > LEVEL
    assert set(np.unique(batch["weight"])) == {0.0, 1.0}


@pytest.mark.parametrize("place", ["host", "device"])
def test_negatives_of_histories_are_all_that_the_step_reads(place):
    """Each as often as the step reads it."""
    parts = build_in_batch({"model": HISTORIES}, batch_size=3, draw_on=place)
    assert parts.batching.negatives == 0
    ids, present = np.arange(5), np.ones(5, bool)
    draw = parts.drawer.draw if parts.drawer else lambda *args: pack(parts, *args)
    for block in jax.device_get(draw(ids, present, 3, 0)).blocks:
        batch, rows = block.data.batch, block.data.rows
        for lane, step in zip(*np.nonzero(block.data.live), strict=True):
            read = batch["sequence"][lane, step].ravel()
            want = np.bincount(read[read < rows.shape[-1]], minlength=rows.shape[-1])
            np.testing.assert_array_equal(batch["negative"][lane, step], want)
        assert not batch["negative"][~block.data.live].any()


def test_histories_are_those_of_uniform_negatives():
    parts, uniform = (build_in_batch({"model": HISTORIES}, negative_sampling=how) for how in ("in_batch", "uniform"))
    one, other = (draw_sequences(each.data.population, each.batching, np.arange(5), 3, 0) for each in (parts, uniform))
    assert sorted(map(tuple, np.split(one.item, one.length.cumsum()[:-1]))) == sorted(
        map(tuple, np.split(other.item, other.length.cumsum()[:-1]))
    )


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({"data": DATA}, "each client has one user"),
        ({"data": DATA | {"clients": "device"}}, "each client has one user"),
        ({"work": TABLE["work"] | {"negative_sampling": "in_batch", "batch_size": 9}}, "set work.batch_size to 10"),
        (
            {"work": TABLE["work"] | {"negative_sampling": "in_batch", "batch_size": 1}, "model": HISTORIES},
            "set work.batch_size to 2",
        ),
        ({"model": HISTORIES | {"loss": "sampled_softmax"}}, "right for uniform negatives alone"),
        ({"model": HISTORIES | {"loss": "softmax"}}, "no negatives are drawn here"),
        ({"model": {"name": "bert4rec", "dim": 4, "length": 6, "loss": "softmax"}}, "no negatives are drawn here"),
    ],
)
def test_where_it_cannot_be_it_is_refused_in_a_line(tables, words):
    with pytest.raises(ValueError, match=words) as error:
        build(SILOS | {"work": TABLE["work"] | {"negative_sampling": "in_batch"}} | tables)
    assert "\n" not in str(error.value)
