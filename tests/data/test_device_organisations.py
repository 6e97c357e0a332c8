"""Batches of clients with several users that are drawn on the device: what a round holds, chances, and the host's
batches of the same draws."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from jaxfed.data import packing
from jaxfed.data.batching import Batching, DrawnExamples
from jaxfed.data.bijections import BijectionKey, draw_below
from jaxfed.data.blocks import make_block_shapes
from jaxfed.data.device_cohorts import bound_held_rows, list_block_formats, make_drawer, make_round_key
from jaxfed.data.device_data import list_train_data, put_train_data
from jaxfed.data.device_organisations import draw_examples_of_users
from jaxfed.data.packing import pack_cohort
from jaxfed.data.preparation import prepare_population
from jaxfed.data.sources.synthetic import synthetic_data
from tests.data.test_device_draws import ROWS
from tests.data.test_device_pairs import check_same_arrays
from tests.data.test_sequences_of_organisations import POPULATION as REGIONS
from tests.laws.cover import parametrize_cover

LEVEL = 1e-4  # of each test of chances; all seeds are fixed
DATA = synthetic_data(60, 50, mean_length=12)
POPULATION = prepare_population(DATA, clients="silo", silos=7)[1]
ITEMS, CLIENTS = POPULATION.num_items, POPULATION.num_clients
BATCHINGS = {
    "items": Batching(8, 4),
    "one batch of three epochs": Batching(4096, 2, 3),
    "no negatives": Batching(5, 0),
    "pairs": Batching(7, 3, 2, pairwise=True),
    "one batch of pairs": Batching(4096, 4, pairwise=True),
}


def draw_round(batching, ids=np.arange(CLIENTS), seed=3, round=0, lazy=True, population=POPULATION, steps=16):
    ids = np.array(ids)
    shapes = make_block_shapes(population, batching, len(ids), 1, steps, lazy)
    drawer = make_drawer(population, batching, shapes)
    cohort = drawer.draw(ids, ids < population.num_clients, seed, round)
    assert not any(x.weak_type for x in jax.tree.leaves(cohort) if isinstance(x, jax.Array))
    return jax.device_get(cohort), shapes


def read_examples(cohort, shapes, pairwise):
    """{client: ([(user, item, label or other item) of each example] of each step, items held)}."""
    found = {}
    for block in cohort.blocks:
        rows = block.rows if cohort.rows is None else np.append(cohort.rows, shapes.end)[block.rows]
        batch = block.data.batch
        for lane, slot in enumerate(block.slots):
            held = rows[lane]
            own = held[held < ITEMS]
            assert (held[held >= ITEMS] >= shapes.end).all(), "unused: past the end of the tables"
            assert len(set(own.tolist())) == len(own), "rows that a client holds are distinct"
            dead = ~block.data.live[lane]
            assert not batch["weight"][lane, dead].any()
            assert (block.data.rows[lane, dead] == ITEMS).all()
            if slot == len(cohort.ids):
                assert dead.all()
                assert not len(own)
                continue
            steps = []
            for step in np.flatnonzero(block.data.live[lane]):
                at = block.data.rows[lane, step]
                used, is_example = at[at < ITEMS], batch["weight"][lane, step] > 0
                assert len(set(used.tolist())) == len(used), "rows of a step are distinct"
                item, last = (batch[x][lane, step, is_example] for x in ("item", "other" if pairwise else "label"))
                item, last = held[at[item]], held[at[last]] if pairwise else last
                named = {*item.tolist(), *(last.tolist() if pairwise else ())}
                assert named == set(held[used].tolist()), "no row that no example names"
                steps.append(list(zip(batch["user"][lane, step, is_example].tolist(), item, last, strict=True)))
            found[int(cohort.ids[slot])] = steps, set(own.tolist())
    return found


@parametrize_cover(name=list(BATCHINGS), lazy=ROWS)
def test_each_epoch_has_every_train_item_of_every_user_with_negatives_of_its_own(name, lazy):
    batching, k = BATCHINGS[name], BATCHINGS[name].negatives
    cohort, shapes = draw_round(batching, [*range(CLIENTS), CLIENTS, CLIENTS], lazy=lazy)
    found = read_examples(cohort, shapes, batching.pairwise)
    assert found.keys() == set(range(CLIENTS))
    for client, (steps, held) in found.items():
        first, end = POPULATION.client_offsets[client : client + 2]
        train = [(u - first, i) for u in range(first, end) for i in POPULATION.train.of(u).tolist()]
        examples = len(train) * batching.examples(1)
        of_epoch = -(-examples // batching.batch_size)
        assert len(steps) == batching.epochs * of_epoch
        everything = set()
        for epoch in range(batching.epochs):
            of_steps = steps[epoch * of_epoch : (epoch + 1) * of_epoch]
            assert {len(step) for step in of_steps[:-1]} <= {batching.batch_size}, "only the last step is short"
            user, item, last = map(np.array, zip(*(example for step in of_steps for example in step), strict=True))
            group = batching.examples(1)
            assert (user.reshape(-1, group) == user[::group, None]).all(), "an item is followed by its negatives"
            assert sorted(zip(user[::group].tolist(), item[::group].tolist(), strict=True)) == sorted(train)
            negative = np.stack([user, last], 1) if batching.pairwise else np.stack([user, item], 1)
            if not batching.pairwise:
                assert last.tolist() == [1.0, *[0.0] * k] * len(train)
                negative = negative[last == 0]
            assert len(negative) == len(train) * k
            assert not any(i in POPULATION.excluded.of(first + u) for u, i in negative)
            everything |= {*item.tolist(), *negative[:, 1].tolist()}
        assert held == everything
        assert len(held) <= bound_held_rows(POPULATION, batching, np.array([client]))[0]


def test_a_draw_is_a_function_of_seed_round_and_client_alone():
    batching = BATCHINGS["items"]._replace(epochs=3)
    whole = read_examples(*draw_round(batching), False)
    some = read_examples(*draw_round(batching, [4, 1, CLIENTS], steps=512), False)  # blocks of other kinds
    assert some == {client: whole[client] for client in (1, 4)}
    for other in ({"seed": 4}, {"round": 1}):
        changed = read_examples(*draw_round(batching, **other), False)
        assert not any(changed[client] == whole[client] for client in whole)


def test_an_epoch_of_one_step_is_as_narrow_as_its_block():
    """Also where clients of other kinds are in blocks of their own; the host runs the same programs."""
    batching = Batching(4096, 2, pairwise=True)
    cohort, shapes = draw_round(batching, np.arange(5), steps=1, population=REGIONS)
    host = pack_cohort(REGIONS, batching, shapes, np.arange(5), np.ones(5, bool), 3, 0)
    assert len({block.data.rows.shape for block in cohort.blocks}) > 1
    forms = [[(np.shape(x), np.asarray(x).dtype) for x in jax.tree.leaves(each)] for each in (host, cohort)]
    assert forms[0] == forms[1]


def test_clients_and_epochs_draw_independently():
    """The first negatives of two clients, and of two epochs: any two items together as often as by chance."""
    of_clients = [draw_rounds(Batching(4096, 1), client, 1500)[0][:, 1] for client in (1, 2)]
    of_epochs = draw_rounds(Batching(4096, 1, 2), 1, 1500, steps=2)[0][:, [1, -1]].T
    for one, other in (of_clients, of_epochs):
        both = np.bincount(one // 13 * 4 + other // 13, minlength=16).reshape(4, 4)
        assert stats.chi2_contingency(both).pvalue > LEVEL


def test_labels_of_rows_are_those_of_the_rows():
    rows = DATA.interactions
    rated = DATA._replace(
        interactions=rows._replace(rating=np.random.default_rng(0).integers(1, 6, len(rows.user)).astype(np.float32))
    )
    population = prepare_population(rated, clients="silo", silos=7, label="rating")[1]
    found = read_examples(*draw_round(BATCHINGS["no negatives"], population=population), False)
    for client, (steps, _) in found.items():
        first, end = population.client_offsets[client : client + 2]
        want = []
        for user in range(first, end):
            own = slice(*population.train.start[user : user + 2])
            items, labels = population.train.values[own].tolist(), population.labels.train[own].tolist()
            want += zip([user - first] * len(items), items, labels, strict=True)
        assert sorted(example for step in steps for example in step) == sorted(want)


def test_a_client_without_users_has_no_steps():
    """As where a random division leaves one empty: the first, the last, and one between."""
    offsets = POPULATION.client_offsets
    for at in (0, 3, CLIENTS):
        empty = POPULATION._replace(
            client_offsets=np.insert(offsets, at, offsets[at]),
            num_train=np.insert(POPULATION.num_train, at, 0),
            names=np.insert(POPULATION.names, at, "empty"),
        )
        for name in ("items", "pairs"):
            batching, ids = BATCHINGS[name], np.arange(CLIENTS + 1)
            cohort, shapes = draw_round(batching, ids, population=empty)
            host = pack_cohort(empty, batching, shapes, ids, np.ones(len(ids), bool), 3, 0)
            for one, other in zip(cohort.blocks, host.blocks, strict=True):
                np.testing.assert_array_equal(one.data.live, other.data.live)
                np.testing.assert_array_equal(one.num_train, other.num_train)
                np.testing.assert_array_equal(one.data.examples, other.data.examples)


# --- chances ------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(st.integers(1, (1 << 30) - 1), st.integers(0, (1 << 32) - 1))
def test_a_number_below_a_size_is_the_upper_word_of_a_product(size, word):
    key = BijectionKey(jnp.uint32(word), jnp.uint32(0))
    assert int(draw_below(jnp.int32(size), key)) == size * word >> 32


def draw_rounds(batching, client, rounds, steps=1):
    """(int [rounds, examples] items, int [rounds, examples] users) of a client, one epoch after the other, each of
    which is one step."""
    shapes = make_block_shapes(POPULATION, batching, CLIENTS, 1, 16, False)
    formats, data = (
        list_block_formats(POPULATION, batching, shapes),
        put_train_data(list_train_data(POPULATION, batching)),
    )
    words = [make_round_key(0, round) for round in range(rounds)]
    keys = BijectionKey(*(jnp.array([key[i] for key in words]) for i in (0, 1)))
    draw = partial(draw_examples_of_users, [*formats.values()][-1], data, jnp.array([client]))
    item, _, _, batch = jax.jit(jax.vmap(draw))(keys)
    n = int(POPULATION.num_train[client]) * batching.examples(1)
    found = np.asarray(item)[:, 0, :steps, :n, 0], np.asarray(batch["user"])[:, 0, :steps, :n]
    return [x.reshape(rounds, -1) for x in found]


def test_places_users_and_negatives_come_equally_often():
    client, rounds, k = 2, 3000, 2
    item, user = draw_rounds(Batching(4096, k), client, rounds)
    first, end = POPULATION.client_offsets[client : client + 2]
    lengths = POPULATION.train.counts[first:end]
    assert lengths.max() > 3 * lengths.min(), "users of very different lengths"
    for place in (0, k + 1, (k + 1) * (lengths.sum() - 1)):  # of a train item
        counts = np.bincount(user[:, place], minlength=len(lengths))
        assert stats.chisquare(counts, rounds * lengths / lengths.sum()).pvalue > LEVEL
    is_negative = np.arange(item.shape[1]) % (k + 1) > 0
    for number in (lengths.argmax(), lengths.argmin()):
        drawn = item[:, is_negative][user[:, is_negative] == number]
        others = np.setdiff1d(np.arange(ITEMS), POPULATION.excluded.of(first + number))
        assert np.isin(drawn, others).all()
        assert stats.chisquare(np.bincount(np.searchsorted(others, drawn), minlength=len(others))).pvalue > LEVEL
    both = np.searchsorted(others, item[:, 1:3][user[:, 1] == number])  # the two negatives of one train item
    counts = np.bincount(both[:, 0] // 8 * 8 + both[:, 1] // 8, minlength=64)
    size = np.bincount(np.arange(len(others)) // 8, minlength=8)
    expected = np.outer(size, size).ravel()[: len(counts)]
    kept = expected > 0
    assert stats.chisquare(counts[kept], expected[kept] * counts.sum() / expected.sum()).pvalue > LEVEL


# --- the host's batches of the same draws ----------------------------------------------------------------


def list_draws(found, batching, clients):
    """The draws of a device, as the host draws for these clients."""
    epochs, steps = batching.epochs, [found[int(client)][0] for client in clients]
    of_epoch = np.array([len(each) // epochs for each in steps])
    user, item, last = map(np.array, zip(*(e for each in steps for step in each for e in step), strict=True))
    return DrawnExamples(
        np.repeat(np.arange(len(clients)), epochs),
        np.repeat(POPULATION.client_offsets[clients], epochs),
        (of_epoch[:, None] * np.arange(epochs)).ravel(),
        np.repeat(batching.examples(POPULATION.num_train[clients]), epochs),
        user,
        (np.stack([item, last], 1) if batching.pairwise else item[:, None]).astype(np.int32),
        np.ones(len(item), bool) if batching.pairwise else last > 0,
    )


@parametrize_cover(name=list(BATCHINGS), lazy=ROWS, features={"": (), "features": ("user", "item")})
def test_the_arrays_are_those_of_the_host_from_the_same_draws(name, lazy, features, monkeypatch):
    """To the bit, but for the order in which a client lists its rows."""
    batching, ids = BATCHINGS[name]._replace(features=features), np.array([*range(0, CLIENTS, 2), CLIENTS, CLIENTS])
    cohort, shapes = draw_round(batching, ids, lazy=lazy)
    found = read_examples(cohort, shapes, batching.pairwise)
    monkeypatch.setattr(packing, "draw_examples", lambda _, *args: list_draws(found, *args[:2]))
    host = pack_cohort(POPULATION, batching, shapes, ids, ids < CLIENTS, 3, 0)
    check_same_arrays(host, cohort, lazy)


def test_attackers_have_labels_exchanged():
    """And everything else is as without them."""
    flipped = np.arange(CLIENTS) % 2 == 0
    for name in ("items", "pairs"):
        batching = BATCHINGS[name]
        plain = read_examples(*draw_round(batching), batching.pairwise)
        other = read_examples(
            *draw_round(batching, population=POPULATION._replace(label_flipped=flipped)), batching.pairwise
        )
        for client, (steps, held) in plain.items():
            if flipped[client]:
                steps = [[(u, j, i) if batching.pairwise else (u, i, 1 - j) for u, i, j in step] for step in steps]
            assert other[client] == (steps, held)
