"""Pairs of a positive and a negative that are drawn on the device: what a step holds, chances, and the host's rounds of
the same draws."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxfed.config.build import build_from_config
from jaxfed.config.schema import make_config
from jaxfed.core.tables import unwrap
from jaxfed.data import packing
from jaxfed.data.batching import Batching, DrawnExamples
from jaxfed.data.bijections import BijectionKey
from jaxfed.data.blocks import make_block_shapes
from jaxfed.data.clients import Clients
from jaxfed.data.device_cohorts import bound_held_rows, list_block_formats, make_drawer, make_round_key
from jaxfed.data.device_data import list_train_data, put_train_data
from jaxfed.data.device_pairs import draw_pair_block
from jaxfed.data.packing import pack_cohort
from jaxfed.training.rounds import initial_arrays, make_run_keys
from tests.data.test_device_draws import CLIENTS, DATA, ITEMS, POPULATION, ROWS, TABLE
from tests.laws.cover import parametrize_cover
from tests.small import close

LEVEL = 1e-4  # of each test of chances; all seeds are fixed
# of a client with 12 items: steps that part the pairs of an item, and that do not; several passes; steps with more
# pairs than there are negatives; one pair of an item
BATCHINGS = {
    "usual": Batching(8, 4, pairwise=True),
    "parted": Batching(7, 3, 2, pairwise=True),
    "every item comes again": Batching(16, 9, 3, pairwise=True),
    "steps wider than the catalogue": Batching(128, 7, 2, pairwise=True),
    "one batch": Batching(4096, 4, pairwise=True),
    "one negative": Batching(5, 1, 2, pairwise=True),
}


def draw_round(batching, ids=np.arange(CLIENTS), seed=3, round=0, lazy=True, population=POPULATION, steps=16):
    shapes = make_block_shapes(population, batching, len(ids), 1, steps, lazy)
    ids = np.array(ids)
    drawer = make_drawer(population, batching, shapes)
    return jax.device_get(drawer.draw(ids, ids < population.num_clients, seed, round)), shapes


def read_pairs(cohort, shapes):
    """{client: ([(positive, negative) of each pair] of each step, items held)}."""
    found = {}
    for block in cohort.blocks:
        rows = block.rows if cohort.rows is None else np.append(cohort.rows, shapes.end)[block.rows]
        for lane, slot in enumerate(block.slots):
            held = rows[lane]
            own = held[held < ITEMS]
            assert len(set(own.tolist())) == len(own), "rows that a client holds are distinct"
            if slot == len(cohort.ids):
                assert not len(own)
                assert not block.data.live[lane].any()
                assert (block.data.rows[lane] == ITEMS).all()
                assert block.data.examples[lane] == 0
                continue
            steps, batch = [], block.data.batch
            for step in np.flatnonzero(block.data.live[lane]):
                at = block.data.rows[lane, step]
                used = at[at < ITEMS]
                assert len(set(used.tolist())) == len(used), "rows of a step are distinct"
                is_pair = batch["weight"][lane, step] > 0
                pairs = [held[at[batch[name][lane, step, is_pair]]].tolist() for name in ("item", "other")]
                assert {*pairs[0], *pairs[1]} == set(held[used].tolist()), "no row that no pair names"
                steps.append(list(zip(*pairs, strict=True)))
            dead = ~block.data.live[lane]
            assert not batch["weight"][lane, dead].any()
            assert (block.data.rows[lane, dead] == ITEMS).all()
            found[int(cohort.ids[slot])] = steps, set(own.tolist())
    return found


# --- what a client's round holds --------------------------------------------------------------------


@parametrize_cover(name=list(BATCHINGS), lazy=ROWS)
def test_each_epoch_has_every_train_item_with_negatives_of_others(name, lazy):
    batching = BATCHINGS[name]
    found = read_pairs(*draw_round(batching, [*range(CLIENTS), *[CLIENTS] * 5], lazy=lazy))
    assert found.keys() == set(range(CLIENTS))
    for client, (steps, held) in found.items():
        train, counts = POPULATION.train.of(client).tolist(), np.zeros(ITEMS)
        examples, k = len(train) * batching.negatives, batching.negatives
        of_epoch = -(-examples // batching.batch_size)
        assert len(steps) == batching.epochs * of_epoch
        for epoch in range(batching.epochs):
            of_steps = steps[epoch * of_epoch : (epoch + 1) * of_epoch]
            assert {len(step) for step in of_steps[:-1]} <= {batching.batch_size}, "only the last step is short"
            positive, negative = np.array(list(itertools.chain(*of_steps))).T
            assert sorted(positive[::k].tolist()) == sorted(train)
            assert (positive.reshape(-1, k) == positive[::k, None]).all(), "with its negatives one after the other"
            np.add.at(counts, negative, 1)
        assert not counts[train].any(), "no train item is a negative"
        others = np.delete(counts, train)
        assert others.sum() == batching.epochs * examples
        assert np.ptp(others) <= 1, "none comes again before all have come"
        assert held == set(train) | set(np.flatnonzero(counts).tolist())
        assert len(held) == bound_held_rows(POPULATION, batching, np.array([client]))[0]


def test_a_draw_is_a_function_of_seed_round_and_client_alone():
    batching = BATCHINGS["parted"]
    whole = read_pairs(*draw_round(batching))
    some = read_pairs(*draw_round(batching, [41, 7, 23, CLIENTS, CLIENTS], steps=64))
    assert some == {client: whole[client] for client in (41, 7, 23)}
    for other in ({"seed": 4}, {"round": 1}):
        changed = read_pairs(*draw_round(batching, **other))
        assert sum(changed[client] == whole[client] for client in whole) < 3


# --- chances ------------------------------------------------------------------------------------------


def draw_rounds(batching, clients, rounds, seed=0):
    """(int [rounds, clients, epochs, E], int of the same shape): items of pairs, whose clients have E an epoch."""
    shapes = make_block_shapes(POPULATION, batching, len(clients), 1, 16, False)
    block_format, data = (
        [*list_block_formats(POPULATION, batching, shapes).values()][-1],
        put_train_data(list_train_data(POPULATION, batching)),
    )
    batching = batching._replace(batch_size=shapes.kinds[-1][1])
    draw = partial(draw_pair_block, block_format, data, jnp.asarray(clients))
    words = [make_round_key(seed, round) for round in range(rounds)]
    keys = BijectionKey(*(jnp.array([key[i] for key in words]) for i in (0, 1)))

    def find_pairs(key):
        held, _, steps = draw(key)
        found = []
        for name in ("item", "other"):
            row = jnp.take_along_axis(steps.rows, steps.batch[name], 2)
            found.append(jnp.take_along_axis(held[:, None], row, 2, mode="clip"))
        return found

    pairs = int(POPULATION.num_train[clients[0]]) * batching.negatives
    assert pairs <= batching.batch_size, "an epoch is one step"
    return [np.asarray(x)[:, :, : batching.epochs, :pairs] for x in jax.jit(jax.vmap(find_pairs))(keys)]


def test_places_of_positives_and_items_of_negatives_come_equally_often():
    """Of one client over many rounds: each train item at each place of an epoch, each pair of two places, each item
    outside its train set, and these beside each train item."""
    client, rounds, k = int(np.argsort(POPULATION.num_train)[5]), 6000, 2
    train = POPULATION.train.of(client)
    others = np.setdiff1d(np.arange(ITEMS), train)
    n, free = len(train), len(others)
    item, other = (x[:, 0] for x in draw_rounds(Batching(4096, k, 2, pairwise=True), [client], rounds))
    place = {number: i for i, number in enumerate(train.tolist())}
    order = np.vectorize(place.get)(item[..., ::k])  # [rounds, 2, n]
    assert (np.sort(order, -1) == np.arange(n)).all()
    for epoch in (0, 1):
        for at in (0, n // 2, n - 1):
            assert stats.chisquare(np.bincount(order[:, epoch, at], minlength=n)).pvalue > LEVEL
        both = np.bincount(order[:, epoch, 0] * n + order[:, epoch, -1], minlength=n * n).reshape(n, n)
        assert stats.chisquare(both[~np.eye(n, dtype=bool)]).pvalue > LEVEL, "pairs of places"
    both = np.bincount(order[:, 0, 0] * n + order[:, 1, 0], minlength=n * n)
    assert stats.chisquare(both).pvalue > LEVEL, "epochs do not know of each other"
    number = np.searchsorted(others, other)
    assert (others[number] == other).all()
    for epoch, at in itertools.product((0, 1), (0, 1, k * n - 1)):
        assert stats.chisquare(np.bincount(number[:, epoch, at], minlength=free)).pvalue > LEVEL
    beside = np.bincount(order[:, 0, 0] * free + number[:, 0, 0], minlength=n * free)
    assert stats.chisquare(beside).pvalue > LEVEL, "which negative a train item has"


def test_clients_rounds_and_seeds_draw_independently():
    """The first negatives of two draws: as often equal, and as often any two items, as by chance."""
    lengths = POPULATION.num_train
    of_length = np.bincount(lengths).argmax()
    clients = np.flatnonzero(lengths == of_length)[:2]
    batching, rounds = Batching(4096, 1, pairwise=True), 6000
    first, second = (draw_rounds(batching, clients, rounds, seed)[1][:, :, 0, 0] for seed in (0, 1))
    free = ITEMS - int(of_length)
    ranks = np.stack(
        [
            np.searchsorted(np.setdiff1d(np.arange(ITEMS), POPULATION.train.of(c)), x)
            for c, x in zip(clients, first.T, strict=True)
        ]
    )
    others = np.searchsorted(np.setdiff1d(np.arange(ITEMS), POPULATION.train.of(clients[0])), second[:, 0])
    for one, two in ((ranks[0], ranks[1]), (ranks[0, :-1], ranks[0, 1:]), (ranks[0], others)):
        assert stats.chisquare(np.bincount(one * free + two, minlength=free * free)).pvalue > LEVEL


# --- the host's rounds of the same draws ----------------------------------------------------------------


def list_draws(found, batching, clients):
    """The draws of a device, as the host draws for these clients."""
    epochs, steps = batching.epochs, [found[int(client)][0] for client in clients]
    of_epoch = np.array([len(each) // epochs for each in steps])
    item = np.array([pair for each in steps for step in each for pair in step], np.int32)
    return DrawnExamples(
        np.repeat(np.arange(len(clients)), epochs),
        np.repeat(clients, epochs),
        (of_epoch[:, None] * np.arange(epochs)).ravel(),
        np.repeat(POPULATION.num_train[clients] * batching.negatives, epochs),
        np.zeros(len(item), int),
        item,
        np.ones(len(item), bool),
    )


def check_same_arrays(host, cohort, lazy):
    """Two cohorts to the bit, but for the order in which a client lists its rows."""
    assert jax.tree.structure(host) == jax.tree.structure(cohort)
    if lazy:
        np.testing.assert_array_equal(host.rows, cohort.rows)
    for one, other in zip(host.blocks, cohort.blocks, strict=True):
        lists = []
        for block in (one, other):
            unused = np.full((len(block.rows), 1), block.rows.max())
            at = np.minimum(block.data.rows, block.rows.shape[1]).reshape(len(block.rows), -1)
            lists.append(np.take_along_axis(np.concatenate([block.rows, unused], 1), at, 1))
        np.testing.assert_array_equal(*lists)
        one, other = (
            x._replace(rows=np.sort(x.rows, 1), data=x.data._replace(rows=x.data.rows < ITEMS)) for x in (one, other)
        )
        for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True):
            np.testing.assert_array_equal(a, b)
            assert a.dtype == b.dtype, "the same programs run both"


@parametrize_cover(name=list(BATCHINGS), lazy=ROWS)
def test_the_arrays_are_those_of_the_host_from_the_same_draws(name, lazy, monkeypatch):
    """To the bit, but for the order in which a client lists its rows."""
    batching, ids = BATCHINGS[name], np.array([*range(0, CLIENTS, 2), CLIENTS, CLIENTS])
    cohort, shapes = draw_round(batching, ids, lazy=lazy)
    found = read_pairs(cohort, shapes)
    monkeypatch.setattr(packing, "draw_examples", lambda _, *args: list_draws(found, *args[:2]))
    host = pack_cohort(POPULATION, batching, shapes, ids, ids < CLIENTS, 3, 0)
    check_same_arrays(host, cohort, lazy)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_round_of_the_same_draws_is_that_of_the_host(optimizer, monkeypatch):
    """With drop-outs, and steps that have an item in several pairs; up to the order of sums."""
    table = TABLE | {
        "model": TABLE["model"] | {"loss": "bpr"},
        "work": TABLE["work"] | {"negatives": 5, "optimizer": {"name": optimizer}},
    }
    parts = build_from_config(make_config(table), Clients(DATA, POPULATION, "", False))
    ids, present = parts.sampler.draw(0, 0)
    present[::5] = False
    cohort = parts.drawer.draw(ids, present, 0, 0)
    assert not any(x.weak_type for x in jax.tree.leaves(cohort) if isinstance(x, jax.Array))
    found = read_pairs(jax.device_get(cohort), parts.shapes)
    monkeypatch.setattr(packing, "draw_examples", lambda _, *args: list_draws(found, *args[:2]))
    host = pack_cohort(POPULATION, parts.batching, parts.shapes, ids, present, 0, 0)
    ends = []
    for each in (cohort, host):
        state, info = parts.algorithm.step(initial_arrays(parts, 0)["state"], each, make_run_keys(0).rounds)
        ends.append((unwrap(state.shared.params), state.client_states.work, info["train/loss"]))
    start = unwrap(initial_arrays(parts, 0)["state"].shared.params)
    assert max(np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (start, ends[0][0])), strict=True)) > 1e-3
    close(*ends)
