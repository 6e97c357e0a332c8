"""Histories whose negatives are drawn on the device: what a step holds, chances, and the host's rounds of the same
draws."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxfed.config.build import build_from_config
from jaxfed.config.schema import make_config
from jaxfed.core.model import SequenceFormat
from jaxfed.core.tables import unwrap
from jaxfed.data import packing
from jaxfed.data.batching import Batching
from jaxfed.data.bijections import BijectionKey, permute_indices
from jaxfed.data.blocks import make_block_shapes
from jaxfed.data.clients import Clients
from jaxfed.data.device_cohorts import (
    bound_cohort_rows,
    bound_held_rows,
    list_block_formats,
    make_drawer,
    make_round_key,
)
from jaxfed.data.device_data import list_train_data, put_train_data
from jaxfed.data.device_histories import draw_history_block, draw_history_rows
from jaxfed.data.draw_place import check_device_draws
from jaxfed.data.packing import pack_cohort
from jaxfed.data.preparation import prepare_population
from jaxfed.data.sequences import DrawnSequences, list_warm_items
from jaxfed.data.sources.synthetic import synthetic_data
from jaxfed.training.rounds import count_rows, initial_arrays, make_run_keys
from tests.data.test_device_draws import key_of
from tests.data.test_sequences import unpacked
from tests.laws.cover import parametrize_cover
from tests.small import close

DATA = synthetic_data(60, 50, mean_length=12)
DATA = DATA._replace(interactions=DATA.interactions._replace(time=3600 * DATA.interactions.time + 10**9))
POPULATION = prepare_population(DATA)[1]
COLD = prepare_population(DATA, cold_items=0.3)[1]
ITEMS, CLIENTS, LENGTH = POPULATION.num_items, POPULATION.num_clients, 17
LEVEL = 1e-4  # of each test of chances; all seeds are fixed


def make_batching(negatives=9, whole=False, compares=True, times="none", **options):
    format = SequenceFormat(LENGTH, whole, compares, times)
    return Batching(negatives=negatives, sequence=format, draw_on="device", **options)


# more than there are, in an epoch or in all; all items in each epoch; none
BATCHINGS = {
    "usual": make_batching(),
    "three epochs": make_batching(epochs=3),
    "every item comes again": make_batching(21, epochs=4),
    "steps wider than the catalogue": make_batching(128, epochs=2),
    "shared": make_batching(20, epochs=3, shared_negatives=True),
    "whole catalogue": make_batching(whole=True, epochs=2),
    "no negatives": make_batching(0, compares=False, epochs=2),
    "times": make_batching(times="known", epochs=2),
}


def draw_round(batching, ids=np.arange(CLIENTS), seed=3, round=0, lazy=True, population=POPULATION, steps=16, end=0):
    shapes = make_block_shapes(population, batching, len(ids), 1, steps, lazy, end=end)
    ids = np.array(ids)
    drawer = make_drawer(population, batching, shapes)
    return drawer.draw(ids, ids < population.num_clients, seed, round), shapes, drawer


@pytest.mark.parametrize("size", [1, 2, 5, 35, 36, 37, 97, 1682, 4097, 65_537])
def test_the_inverse_of_a_bijection(size):
    other = max(size - 3, 1)  # beside another size in the same call
    index, sizes = jnp.minimum(jnp.arange(size), jnp.array([[size - 1], [other - 1]])), jnp.array([[size], [other]])
    permute = jax.jit(permute_indices, static_argnums=(3, 4))
    for first, second in ((False, True), (True, False)):
        there = permute(index, sizes, key_of(3, 2), size, first)
        assert np.array_equal(permute(there, sizes, key_of(3, 2), size, second), index)


# --- what a client's round holds --------------------------------------------------------------------


@parametrize_cover(
    name=list(BATCHINGS),
    population={"all warm": POPULATION, "cold items": COLD},
    table={"the cohort's rows": (True, 0), "all rows": (False, 0), "of a longer table": (True, ITEMS + 14)},
)
def test_steps_have_the_latest_items_and_negatives_that_repeat_last_of_all(name, population, table):
    batching, (lazy, end) = BATCHINGS[name], table
    cohort, shapes, _ = draw_round(
        batching, [*range(CLIENTS), *[CLIENTS] * 5], population=population, lazy=lazy, end=end
    )
    cohort = jax.device_get(cohort)
    assert shapes.end == (end or ITEMS)
    found, warm = unpacked(cohort), set(list_warm_items(population).tolist())
    assert found.keys() == set(range(CLIENTS))
    for client, steps in found.items():
        assert len(steps) == batching.epochs
        counts = np.zeros(ITEMS)
        for read, negatives, _ in steps:
            assert read == population.train.of(client)[-LENGTH:].tolist()
            assert set(negatives) <= warm
            if batching.sequence.whole_catalogue:
                assert negatives == dict.fromkeys(warm, 1)
            else:
                assert sum(negatives.values()) == batching.negatives
            counts[list(negatives)] += list(negatives.values())
        assert np.ptp(counts[list(warm)]) <= 1, "none comes again before all have come"
    dropouts = [dropout for steps in found.values() for _, _, dropout in steps]
    assert len(set(dropouts)) == len(dropouts) == batching.epochs * CLIENTS


@pytest.mark.parametrize("name", BATCHINGS)
def test_the_arrays_are_those_of_the_host(name):
    """Their structure, shapes and types, the totals of clients, and what is the same whatever is drawn."""
    batching, ids = BATCHINGS[name], np.array([*range(0, CLIENTS, 2), CLIENTS, CLIENTS])
    cohort, shapes, _ = draw_round(batching, ids, population=COLD)
    host = pack_cohort(COLD, batching, shapes, ids, ids < CLIENTS, 3, 0)
    assert jax.tree.structure(host) == jax.tree.structure(cohort)
    forms = [[(np.shape(x), np.asarray(x).dtype) for x in jax.tree.leaves(each)] for each in (host, cohort)]
    assert forms[0] == forms[1], "the same programs run both"
    assert not any(x.weak_type for x in jax.tree.leaves(cohort) if isinstance(x, jax.Array)), "and no other ones"
    for one, other in zip(host.blocks, cohort.blocks, strict=True):
        for read in (
            lambda block: (block.slots, block.num_train, block.data.examples, block.data.live),
            lambda block: (block.data.batch["catalogue"], block.data.batch.get("time")),
            lambda block: block.data.batch["negative"].sum(-1),
            lambda block: (block.data.batch["sequence"] < ITEMS).sum(-1),
        ):
            jax.tree.map(np.testing.assert_array_equal, read(one), read(other))


def test_no_client_holds_more_rows_than_its_bound():
    for batching in BATCHINGS.values():
        for lazy in (True, False):
            cohort, shapes, _ = draw_round(batching, [5, 7, 31, CLIENTS], round=4, population=COLD, lazy=lazy)
            end = len(cohort.rows) if lazy else shapes.end
            held = np.concatenate([(np.asarray(block.rows) < end).sum(1) for block in cohort.blocks])
            slots = np.concatenate([block.slots for block in cohort.blocks])
            assert (held[np.argsort(slots)][:3] <= bound_held_rows(COLD, batching, np.array([5, 7, 31]))).all()
            if lazy:
                most = bound_cohort_rows(COLD, batching, np.array([5, 7, 31]))
                assert (np.asarray(cohort.rows) < ITEMS).sum() <= most


def test_clients_that_share_their_negatives():
    batching = BATCHINGS["shared"]
    found = [unpacked(jax.device_get(draw_round(batching, round=round)[0])) for round in (0, 1)]
    sets = [{tuple(tuple(sorted(s[1].items())) for s in steps) for steps in each.values()} for each in found]
    assert len(sets[0]) == len(sets[1]) == 1
    assert sets[0] != sets[1]
    own = unpacked(jax.device_get(draw_round(batching._replace(shared_negatives=False))[0]))
    assert len({tuple(sorted(steps[0][1].items())) for steps in own.values()}) == CLIENTS


def test_a_draw_is_a_function_of_seed_round_and_client_alone():
    """Whatever block a client lies in, and whoever is beside it."""
    batching = BATCHINGS["three epochs"]
    whole = unpacked(jax.device_get(draw_round(batching)[0]))
    some = unpacked(jax.device_get(draw_round(batching, [41, 7, 23, CLIENTS, CLIENTS], steps=64)[0]))
    assert some == {client: whole[client] for client in (41, 7, 23)}
    for other in ({"seed": 4}, {"round": 1}):
        changed = unpacked(jax.device_get(draw_round(batching, **other)[0]))
        for client in whole:
            assert all(one[1:] != two[1:] for one, two in zip(whole[client], changed[client], strict=True))


# --- chances ------------------------------------------------------------------------------------------


def draw_rounds(batching, clients, rounds, seed=0, population=POPULATION):
    """bool [rounds, clients, epochs, N]: the items that each client draws; uint32 [rounds, clients, epochs, 2]."""
    shapes = make_block_shapes(population, batching, len(clients), 1, 16, False)
    block_format, data = (
        [*list_block_formats(population, batching, shapes).values()][-1],
        put_train_data(list_train_data(population, batching)),
    )
    draw = partial(draw_history_block, block_format, data, jnp.asarray(clients))
    words = [make_round_key(seed, round) for round in range(rounds)]
    keys = BijectionKey(*(jnp.array([key[i] for key in words]) for i in (0, 1)))

    def find_drawn(key):
        held, _, steps = draw(key)
        rows = jnp.take_along_axis(held[:, None], steps.rows, 2, mode="clip")
        drawn = jnp.where(steps.batch["negative"] > 0, rows, ITEMS)
        return jax.vmap(jax.vmap(lambda at: jnp.zeros(ITEMS, bool).at[at].set(True, mode="drop")))(drawn), steps.batch[
            "dropout"
        ]

    return jax.device_get(jax.jit(jax.vmap(find_drawn))(keys))


def find_chance(counts, rounds, chance):
    """The p-value of counts of k things, each met with this chance in a round, always the same number in all: a
    chi-squared test, whose k - 1 degrees of freedom are those of drawing without repeats."""
    k, expected = len(counts), rounds * chance
    excess = ((counts - expected) ** 2).sum() / (expected * (1 - chance)) * (k - 1) / k
    return stats.chi2.sf(excess, k - 1)


def test_warm_items_are_drawn_equally_often_alone_and_in_pairs():
    """In each epoch, and in two epochs together: of clients with a short and with a long history."""
    rounds, n, warm = 4000, 9, list_warm_items(COLD)
    clients = np.argsort(COLD.num_train)[[3, -3]]
    drawn = draw_rounds(make_batching(epochs=2), clients, rounds, population=COLD)[0][..., warm]
    w = len(warm)
    assert (drawn.sum(-1) == n).all()
    for client, epoch in itertools.product(range(2), range(2)):
        assert find_chance(drawn[:, client, epoch].sum(0), rounds, n / w) > LEVEL
    assert find_chance(drawn[:, 0].any(1).sum(0), rounds, 2 * n / w) > LEVEL, "without repeats in a round"
    one, two = np.triu_indices(w, 1)
    for epochs in (drawn[:, 0, 0], drawn[:, 1, 1]):
        pairs = (epochs[:, one] & epochs[:, two]).sum(0)
        both = n * (n - 1) / (w * (w - 1))
        # pairs of one draw are not independent, so what the excess is by chance is simulated
        simulated = simulate_pairs(rounds, n, w, 200)
        excess = ((pairs - rounds * both) ** 2 / (rounds * both)).sum()
        assert abs(excess - simulated.mean()) < 4 * simulated.std()


def simulate_pairs(rounds, n, w, times):
    """float [times]: the same excess of draws by NumPy."""
    rng, found = np.random.default_rng(0), []
    one, two = np.triu_indices(w, 1)
    expected = rounds * n * (n - 1) / (w * (w - 1))
    for _ in range(times):
        drawn = np.zeros((rounds, w), np.float32)
        np.put_along_axis(drawn, np.argpartition(rng.random((rounds, w), np.float32), n, 1)[:, :n], 1, 1)
        found.append((((drawn.T @ drawn)[one, two] - expected) ** 2 / expected).sum())
    return np.array(found)


@pytest.mark.parametrize("shared", [False, True])
def test_clients_rounds_and_seeds_draw_independently(shared):
    """How many items two draws have in common: hypergeometric, as by chance, by a chi-squared test."""
    n, rounds = 12, 1500
    batching = make_batching(n, shared_negatives=shared)
    drawn, dropout = draw_rounds(batching, [4, 5, 40], rounds)
    other = draw_rounds(batching, [4, 5, 40], rounds, seed=1)[0]
    pairs = [(drawn[:-1, 0], drawn[1:, 0]), (drawn[:, 0], other[:, 0])]
    if shared:
        assert (drawn == drawn[:, :1]).all()
    else:
        pairs += [(drawn[:, 0], drawn[:, 1]), (drawn[:, 1], drawn[:, 2])]
    for one, two in pairs:
        common = np.bincount((one & two).sum((1, 2)), minlength=n + 1)
        expected = len(one) * stats.hypergeom(ITEMS, n, n).pmf(np.arange(n + 1))
        often = expected > 8
        table = np.append(common[often], common[~often].sum()), np.append(expected[often], expected[~often].sum())
        assert stats.chisquare(*table).pvalue > LEVEL
    bits = np.unpackbits(dropout.view(np.uint8), axis=-1).reshape(-1, 64)
    counts = bits.sum(0)
    assert stats.chi2.sf(((counts - len(bits) / 2) ** 2 / (len(bits) / 4)).sum(), 64) > LEVEL
    assert len(np.unique(dropout.reshape(-1, 2), axis=0)) == dropout.size // 2


def test_whether_a_history_is_drawn_from_does_not_depend_on_it():
    """An item that is read is a negative as often as any other."""
    rounds, n = 4000, 9
    client = int(np.argmax(POPULATION.num_train))
    drawn = draw_rounds(make_batching(), [client], rounds)[0][:, 0, 0]
    read = np.zeros(ITEMS, bool)
    read[POPULATION.train.of(client)[-LENGTH:]] = True
    common = np.bincount((drawn & read).sum(1), minlength=n + 1)
    expected = rounds * stats.hypergeom(ITEMS, int(read.sum()), n).pmf(np.arange(n + 1))
    often = expected > 8
    table = np.append(common[often], common[~often].sum()), np.append(expected[often], expected[~often].sum())
    assert stats.chisquare(*table).pvalue > LEVEL


# --- the host's rounds of the same draws ----------------------------------------------------------------


def list_draws(cohort, population, batching, clients):
    """The draws of a device, as the host draws for these clients."""
    found = unpacked(cohort)
    steps = [step for client in clients for step in found[int(client)]]
    epochs, lengths = batching.epochs, np.array([len(read) for read, _, _ in steps])
    place = np.tile(np.arange(epochs), len(clients))
    number = np.arange(len(steps))
    item = np.array([item for read, _, _ in steps for item in read], np.int32)
    negative = [[item for item, count in negatives.items() for _ in range(count)] for _, negatives, _ in steps]
    negative = np.array(negative, np.int32).reshape(len(steps), -1)
    time = None
    if batching.sequence.times != "none":
        time = np.concatenate(
            [population.time_lists[0].of(int(client))[-LENGTH:] for client in np.repeat(clients, epochs)]
        )
    dropout = np.array([dropout for _, _, dropout in steps], np.uint32)
    owner = np.repeat(np.arange(len(clients)), epochs)
    return DrawnSequences(owner, place, number, np.zeros(len(steps), int), lengths, item, negative, dropout, time)


CASES = {
    "sasrec": ({"name": "sasrec"}, {"negatives": 30, "epochs": 2}, True),
    "shared negatives of all rows": ({"name": "sasrec"}, {"negatives": 30, "shared_negatives": True}, False),
    "all items": ({"name": "sasrec", "loss": "softmax"}, {}, True),
    "times": ({"name": "hstu", "time_bias": "known"}, {"negatives": 9}, True),
    "masked": ({"name": "bert4rec"}, {"negatives": 9}, False),
    "adam": ({"name": "gru4rec"}, {"negatives": 60, "epochs": 2, "optimizer": {"name": "adam"}}, True),
}


@pytest.mark.parametrize("name", CASES)
def test_a_round_of_the_same_draws_is_that_of_the_host(name, monkeypatch):
    """With drop-outs and items that are read and drawn; up to the order of sums."""
    model, work, lazy = CASES[name]
    table = {
        "model": model | {"length": LENGTH - 1, "dim": 8},
        "work": {"draw_on": "device", "optimizer": {"name": "sgd"}} | work,
        "cohort": {"name": "uniform", "size": 24},
        "server": {"lazy": lazy},
    }
    parts = build_from_config(make_config(table), Clients(DATA, COLD, "", False))
    ids, present = parts.sampler.draw(0, 0)
    present[::5] = False
    cohort = parts.drawer.draw(ids, present, 0, 0)
    here = jax.device_get(cohort)
    monkeypatch.setattr(packing, "draw_sequences", lambda *args: list_draws(here, *args[:3]))
    host = pack_cohort(COLD, parts.batching, parts.shapes, ids, present, 0, 0)
    if not parts.batching.sequence.whole_catalogue:
        assert {tuple(sorted(s[1])) for s in itertools.chain(*unpacked(here).values())} == {
            tuple(sorted(s[1])) for s in itertools.chain(*unpacked(host).values())
        }
    np.testing.assert_array_equal(np.sort(count_rows(parts, cohort)[0]), np.sort(count_rows(parts, host)[0]))
    assert count_rows(parts, cohort)[1] == count_rows(parts, host)[1]
    ends = []
    for each in (cohort, host):
        state, info = parts.algorithm.step(initial_arrays(parts, 0)["state"], each, make_run_keys(0).rounds)
        ends.append((unwrap(state.shared.params), info["train/loss"]))
    start = unwrap(initial_arrays(parts, 0)["state"].shared.params)
    moved = zip(*map(jax.tree.leaves, (start, ends[0][0])), strict=True)
    assert max(np.abs(a - b).max() for a, b in moved) > 1e-4
    close(*ends, atol=2e-5)


def test_numbers_beyond_32_bits_are_refused():
    shapes = make_block_shapes(POPULATION, BATCHINGS["usual"], 4, 1)
    check_device_draws(POPULATION, make_batching(9, epochs=1 << 10), shapes)
    for wrong in (make_batching(9, epochs=1 << 27), make_batching(1 << 27)):
        with pytest.raises(ValueError, match="counts in 32 bits"):
            check_device_draws(POPULATION, wrong, shapes)


@pytest.mark.parametrize("name", ["three epochs", "shared"])
def test_rows_alone_are_those_of_the_block(name):
    """A program of many rounds asks for these before it draws the steps."""
    batching, population = BATCHINGS[name], COLD
    shapes = make_block_shapes(population, batching, 8, 1, 16)
    block_format = [*list_block_formats(population, batching, shapes).values()][-1]
    rows, block = (
        jax.jit(partial(draw, block_format, put_train_data(list_train_data(population, batching))))
        for draw in (draw_history_rows, draw_history_block)
    )
    args = jnp.array([3, 7, 11, CLIENTS]), make_round_key(0, 0)
    np.testing.assert_array_equal(rows(*args), block(*args)[0])
