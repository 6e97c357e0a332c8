"""Negatives by popularity that are drawn on the device: which item each number stands for, chances, and the host's
batches of the same draws."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxfed.data import packing
from jaxfed.data.batching import Batching, DrawnExamples
from jaxfed.data.bijections import BijectionKey
from jaxfed.data.device_cohorts import list_block_formats, make_round_key
from jaxfed.data.device_data import find_popular_negatives, list_train_data
from jaxfed.data.device_organisation_histories import draw_step_histories
from jaxfed.data.device_organisations import draw_examples_of_users
from jaxfed.data.draw_place import check_device_draws
from jaxfed.data.packing import pack_cohort
from jaxfed.data.popular_negatives import find_popular_items, make_popularity_index
from jaxfed.data.sequences import DrawnSequences
from tests.data import test_device_domains as domains
from tests.data.test_device_pairs import check_same_arrays
from tests.data.test_popular_negatives import KINDS, TABLE, build, count_popularity

LEVEL = 1e-4  # of each test of chances; all seeds are fixed
SILOS = KINDS["organisations"]
HISTORIES = {"name": "sasrec", "dim": 4, "length": 6, "loss": "bce"}
CASES = {
    "items": ({}, {}),
    "every item comes again": ({}, {"batch_size": 128, "negatives": 12, "epochs": 2}),
    "pairs": ({"model": {"name": "mf", "dim": 4, "loss": "bpr"}}, {"epochs": 2}),
    "devices": (KINDS["devices"], {}),
    "cold items": (KINDS["cold items"], {}),
    "items of organisations": (SILOS, {}),
    "pairs of organisations": (SILOS | {"model": {"name": "mf", "dim": 4, "loss": "bpr"}}, {}),
}
OF_HISTORIES = {
    "histories": ({}, {"negatives": 9, "epochs": 2}),
    "the same negatives": ({}, {"negatives": 9, "shared_negatives": True}),
    "histories of organisations": (SILOS, {"batch_size": 3, "negatives": 9}),
    "cold items among histories": (KINDS["cold items"], {"negatives": 9}),
}


def build_drawn(tables, work, lazy=True):
    """The parts of a run whose negatives by popularity are drawn on the device."""
    return build(
        tables | {"work": TABLE["work"] | {"draw_on": "device"} | work, "server": {"name": "sgd", "lazy": lazy}}
    )


def draw_longest(parts, draw, ids):
    """What a function of draws draws of some clients, in blocks of the longest kind: round 0 of seed 3."""
    *_, longest = list_block_formats(parts.data.population, parts.batching, parts.shapes).values()
    key = BijectionKey(*map(jnp.uint32, make_round_key(3, 0)))
    return jax.device_get(draw(longest, parts.drawer.train_data(), jnp.array(ids), key))


def check_all_numbers(population, batching):
    """Every number of every user, on the host and on the device."""
    index, most = population.popularity, int(population.excluded.counts.max())
    data = jax.tree.map(jnp.asarray, list_train_data(population, batching))
    user = np.flatnonzero(index.open)
    assert len(user) > len(index.open) // 2
    np.testing.assert_array_equal(data.popularity.open[user], index.open[user])
    rank = np.minimum(np.arange(index.open.max()), index.open[user][:, None] - 1)
    place = find_popular_items(index, population.excluded, user, rank)
    want = place if population.domains is None else population.domains.items[place]
    found = find_popular_negatives(data, jnp.asarray(user)[:, None], jnp.asarray(rank), most)
    np.testing.assert_array_equal(found, want)


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_of_interactions_are_those_of_the_host(kind):
    parts = build(KINDS[kind])
    check_all_numbers(parts.data.population, parts.batching)


def test_numbers_of_interactions_of_domains_are_those_of_the_host():
    population = domains.MERGED
    span = population.span(np.arange(len(population.user_names)))
    index = make_popularity_index(population.train, population.excluded, population.num_items, span, population.domains)
    check_all_numbers(population._replace(popularity=index), Batching(16, 4))


def draw_many(parts, draw, client, rounds):
    """What a function of draws draws of one client in many rounds."""
    *_, longest = list_block_formats(parts.data.population, parts.batching, parts.shapes).values()
    words = [make_round_key(0, round) for round in range(rounds)]
    keys = BijectionKey(*(jnp.array([key[i] for key in words]) for i in (0, 1)))
    one = partial(draw, longest, parts.drawer.train_data(), jnp.array([client]))
    return jax.device_get(jax.jit(jax.vmap(one))(keys))


def check_shares(items, weights):
    """Items that are drawn in proportion to their weights."""
    seen, likely = np.bincount(items, minlength=len(weights)), weights > 0
    assert not seen[~likely].any()
    want = weights[likely] / weights.sum() * seen.sum()
    assert stats.chisquare(seen[likely], want).pvalue > LEVEL
    assert stats.chisquare(seen[likely]).pvalue < LEVEL, "they differ from uniform ones"


def test_shares_are_those_of_popularity():
    parts = build_drawn({}, {})
    population = parts.data.population
    user = int(population.train.counts.argmax())
    item, _, _, batch = draw_many(parts, draw_examples_of_users, user, 1000)
    weights = count_popularity(population).astype(float)
    weights[population.excluded.of(user)] = 0
    check_shares(item[..., 0][(batch["weight"] > 0) & (batch["label"] == 0)], weights)


@pytest.mark.parametrize("shared", [False, True])
def test_shares_of_histories_are_those_of_popularity(shared):
    parts = build_drawn({"model": HISTORIES}, {"negatives": 20, "shared_negatives": shared})
    found = draw_many(parts, draw_step_histories, 3, 500)
    check_shares(found.negative[found.is_live].ravel(), count_popularity(parts.data.population).astype(float))


def list_examples(parts, clients):
    """The draws of the device, as the host draws for these clients."""
    population, batching = parts.data.population, parts.batching
    item, is_live, _, batch = draw_longest(parts, draw_examples_of_users, clients)
    epochs, live = batching.epochs, item[..., 0] < population.num_items
    of_epoch = is_live.sum(1) // epochs
    return DrawnExamples(
        np.repeat(np.arange(len(clients)), epochs),
        np.repeat(population.client_offsets[clients], epochs),
        (of_epoch[:, None] * np.arange(epochs)).ravel(),
        np.repeat(batching.examples(population.num_train[clients]), epochs),
        batch["user"][live],
        item[live],
        np.ones(live.sum(), bool) if batching.pairwise else batch["label"][live] > 0,
        batch["weight"][live] > 0,
    )


@pytest.mark.parametrize("lazy", [True, False], ids=["rows", "all rows"])
@pytest.mark.parametrize("name", CASES)
def test_the_arrays_are_those_of_the_host_from_the_same_draws(name, lazy, monkeypatch):
    """To the bit, but for the order in which a client lists its rows; so the same programs run both."""
    parts = build_drawn(*CASES[name], lazy)
    population, clients = parts.data.population, parts.data.num_clients
    ids = np.array([4, 1, clients - 1, clients])
    cohort = jax.device_get(parts.drawer.draw(ids, ids < clients, 3, 0))
    monkeypatch.setattr(packing, "draw_examples", lambda _, batching, some, *rest: list_examples(parts, some))
    host = pack_cohort(population, parts.batching, parts.shapes, ids, ids < clients, 3, 0)
    check_same_arrays(host, cohort, lazy)
    if name == "every item comes again":
        assert max(block.data.batch["weight"].max() for block in cohort.blocks) > 1


def list_histories(parts, clients):
    """As `list_examples`, of histories."""
    found = draw_longest(parts, draw_step_histories, clients)
    client, place = np.nonzero(found.is_live)
    user = found.user[client, place]
    step, slot = np.nonzero(user < len(parts.data.population.user_names))
    item, length = found.item[client, place][step, slot], parts.data.num_items
    return DrawnSequences(
        client,
        place,
        step,
        slot,
        (item < length).sum(-1),
        item[item < length],
        found.negative[client, place],
        np.zeros((len(step), 2), np.uint32),
        None,
    )


@pytest.mark.parametrize("lazy", [True, False], ids=["rows", "all rows"])
@pytest.mark.parametrize("name", OF_HISTORIES)
def test_arrays_of_histories_are_those_of_the_host_from_the_same_draws(name, lazy, monkeypatch):
    """To the bit, but for the keys of dropout."""
    tables, work = OF_HISTORIES[name]
    parts = build_drawn(tables | {"model": HISTORIES}, work, lazy)
    population, clients = parts.data.population, parts.data.num_clients
    ids = np.array([4, 1, clients - 1, clients])
    cohort = jax.device_get(parts.drawer.draw(ids, ids < clients, 3, 0))
    monkeypatch.setattr(packing, "draw_sequences", lambda _, batching, some, *rest: list_histories(parts, some))
    host = pack_cohort(population, parts.batching, parts.shapes, ids, ids < clients, 3, 0)
    assert jax.tree.structure(host) == jax.tree.structure(cohort)
    for (path, one), (_, other) in zip(*map(jax.tree_util.tree_leaves_with_path, (host, cohort)), strict=True):
        assert np.asarray(one).dtype == np.asarray(other).dtype, "the same programs run both"
        if "dropout" not in jax.tree_util.keystr(path):
            np.testing.assert_array_equal(one, other, err_msg=jax.tree_util.keystr(path))


def test_interactions_beyond_32_bits_are_refused():
    parts = build({})
    population = parts.data.population
    many = population.train._replace(values=np.broadcast_to(population.train.values[:1], 1 << 30))
    check_device_draws(population, parts.batching, parts.shapes)
    with pytest.raises(ValueError, match="counts in 32 bits"):
        check_device_draws(population._replace(train=many), parts.batching, parts.shapes)
