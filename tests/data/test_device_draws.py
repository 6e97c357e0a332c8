"""Rounds that are drawn on the device: bijections, what a client's round holds, chances, and the host's rounds of the
same draws."""

import itertools
import json
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxfed.cli import main
from jaxfed.config.build import build_from_config, load_data
from jaxfed.config.schema import make_config
from jaxfed.core.tables import unwrap
from jaxfed.core.tree import count_bytes
from jaxfed.core.types import Cohort
from jaxfed.data import device_data
from jaxfed.data.batching import Batching, DrawnExamples, measure_clients
from jaxfed.data.bijections import BijectionKey, divide_integers, fold_in_number, permute_indices
from jaxfed.data.blocks import make_block_shapes, plan_blocks
from jaxfed.data.clients import Clients
from jaxfed.data.device_cohorts import bound_held_rows, make_drawer
from jaxfed.data.device_data import find_negatives, list_train_data, put_train_data
from jaxfed.data.draw_place import check_device_draws
from jaxfed.data.packing import lay_out_examples, list_cohort_rows, list_example_widths, pack_cohort, split_blocks
from jaxfed.data.preparation import prepare_population
from jaxfed.data.sources.synthetic import synthetic_data
from jaxfed.training.rounds import count_rows, initial_arrays, make_run_keys, prepare_round
from tests.laws.cover import parametrize_cover
from tests.small import close

DATA = synthetic_data(60, 50, mean_length=12)
POPULATION = prepare_population(DATA)[1]
ITEMS, CLIENTS = POPULATION.num_items, POPULATION.num_clients
ROWS = {"the cohort's rows": True, "all rows": False}  # whether a round holds only the cohort's rows
# of a client with 12 items: several steps; several passes; batches larger than what is left to draw; no negatives
BATCHINGS = {
    "usual": Batching(8, 4),
    "three epochs": Batching(16, 2, epochs=3),
    "every item comes again": Batching(32, 9),
    "steps wider than the catalogue": Batching(128, 7, epochs=2),
    "one batch": Batching(4096, 4),
    "no negatives": Batching(5, 0),
}


def key_of(seed, clients=1):
    words = np.random.default_rng(seed).integers(0, 1 << 32, (2, clients, 1), np.uint32)
    return BijectionKey(*map(jnp.array, words))


# --- bijections -------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.integers(0, (1 << 20) - 1), st.integers(1, (1 << 30) - 1), st.sampled_from([0, 1, -1]), st.booleans())
def test_division_of_integers(quotient, size, step, small):
    size = size % 5000 + 1 if small else size
    quotient = min(quotient, ((1 << 31) - 1) // size - 1)
    index = max(quotient * size + step % size, 0)  # where floats are wrong: at multiples, and beside them
    assert [int(x) for x in divide_integers(jnp.int32(index), jnp.int32(size))] == [index // size, index % size]


@pytest.mark.parametrize("size", [*range(1, 40), 97, 982, 1682, 4095, 4096, 4097, 65_537, 1_000_003])
def test_every_number_comes_once(size):
    other = max(size - 3, 1)  # beside another size in the same call
    got = jax.jit(permute_indices, static_argnums=3)(
        jnp.minimum(jnp.arange(size), jnp.array([[size - 1], [other - 1]])),
        jnp.array([[size], [other]]),
        key_of(3, 2),
        size,
    )
    assert np.array_equal(np.sort(got[0]), np.arange(size))
    assert np.array_equal(np.sort(got[1, :other]), np.arange(other))


@pytest.mark.parametrize("size", [2, 3, 7, 12, 50])
def test_bijections_of_many_keys_are_uniform_in_pairs(size):
    """Where two numbers go together: each pair of places equally often, by a chi-squared test."""
    keys, pairs = 100_000, list(itertools.permutations(range(size), 2))
    indices, sizes = jnp.arange(size) + jnp.zeros((keys, 1), int), jnp.full((keys, 1), size)
    got = np.asarray(jax.jit(permute_indices, static_argnums=3)(indices, sizes, key_of(1, keys), size))
    for one, other in ((0, 1), (size - 1, 0)):
        counts = np.bincount(got[:, one] * size + got[:, other], minlength=size * size)
        counts = np.array([counts[a * size + b] for a, b in pairs])
        expected = keys / len(pairs)
        excess = ((counts - expected) ** 2 / expected).sum() - (len(pairs) - 1)
        assert abs(excess) < 4 * (2 * len(pairs)) ** 0.5


def test_keys_below_a_key_differ():
    below = fold_in_number(key_of(0), jnp.arange(100_000))
    words = np.asarray(below.even).astype(np.uint64) << np.uint64(32) | np.asarray(below.odd)
    assert len(np.unique(words)) == 100_000
    bits = np.unpackbits(words.view(np.uint8))
    assert abs(bits.mean() - 0.5) < 5 * 0.5 / len(bits) ** 0.5


# --- what a client's round holds --------------------------------------------------------------------


def draw_round(batching, ids=np.arange(CLIENTS), seed=3, round=0, lazy=True, population=POPULATION, end=0):
    shapes = make_block_shapes(population, batching, len(ids), 1, 16, lazy, end=end)
    cohort = make_drawer(population, batching, shapes).draw(ids, np.ones(len(ids), bool), seed, round)
    return jax.device_get(cohort), shapes


def read_steps(cohort, shapes, population=POPULATION):
    """{client: ([(item, label, weight) of each row] of each step, items held)}."""
    found = {}
    for block in cohort.blocks:
        rows = block.rows if cohort.rows is None else np.append(cohort.rows, shapes.end)[block.rows]
        for lane, slot in enumerate(block.slots):
            held = rows[lane]
            if slot == len(cohort.ids):
                assert not block.data.live[lane].any()
                assert (held >= (shapes.end if cohort.rows is None else population.num_items)).all()
                assert block.data.examples[lane] == 0
                continue
            own = held[held < population.num_items]
            assert (held[held >= population.num_items] >= shapes.end).all(), "unused: past the end of the tables"
            assert len(set(own.tolist())) == len(own), "rows that a client holds are distinct"
            steps = []
            for step in np.flatnonzero(block.data.live[lane]):
                at = block.data.rows[lane, step]
                used = at < len(held)
                assert (at[~used] >= population.num_items).all()
                assert len(set(at[used].tolist())) == used.sum(), "rows of a step are distinct"
                batch = block.data.batch
                assert not batch["weight"][lane, step, ~used].any()
                values = held[at[used]], batch["label"][lane, step, used], batch["weight"][lane, step, used]
                steps.append(list(zip(*(x.tolist() for x in values), strict=True)))
            client = int(cohort.ids[slot])
            found[client] = steps, set(own.tolist())
            assert block.num_train[lane] == population.num_train[client]
    return found


@parametrize_cover(
    name=list(BATCHINGS),
    table={
        "the cohort's rows": (True, 0),
        "all rows": (False, 0),
        "the cohort's of a longer table": (True, ITEMS + 14),
        "all of a longer table": (False, ITEMS + 14),
    },
)
def test_each_epoch_has_every_train_item_once_and_negatives_of_others(name, table):
    batching, (lazy, end) = BATCHINGS[name], table
    cohort, shapes = draw_round(batching, np.append(np.arange(CLIENTS), [CLIENTS] * 5), lazy=lazy, end=end)
    assert shapes.end == (end or ITEMS)
    found, lengths = read_steps(cohort, shapes), POPULATION.num_train
    assert lengths.max() > 4 * lengths.min(), "clients of very different lengths"
    assert found.keys() == set(range(CLIENTS))
    for client, (steps, held) in found.items():
        train = set(POPULATION.train.of(client).tolist())
        n = len(train)
        examples = n * (1 + batching.negatives)
        of_epoch = -(-examples // batching.batch_size)
        assert len(steps) == batching.epochs * of_epoch
        counts = np.zeros(ITEMS)
        for epoch in range(batching.epochs):
            of_steps = steps[epoch * of_epoch : (epoch + 1) * of_epoch]
            sizes = [sum(weight for _, _, weight in step) for step in of_steps]
            assert sizes[:-1] == [batching.batch_size] * (of_epoch - 1), "only the last step is short"
            assert sum(sizes) == examples
            rows = [row for step in of_steps for row in step]
            assert sorted(item for item, label, _ in rows if label == 1) == sorted(train)
            assert all(weight == 1 for _, label, weight in rows if label == 1)
            assert {label for _, label, _ in rows} <= {0.0, 1.0}
            for item, label, weight in rows:
                counts[item] += weight * (label == 0)
        assert not counts[list(train)].any(), "no train item is a negative"
        others = np.delete(counts, list(train))
        drawn = batching.epochs * n * batching.negatives
        assert others.sum() == drawn
        assert others.max() - others.min() <= 1, "none comes again before all have come"
        assert held == train | set(np.flatnonzero(counts).tolist())
        assert len(held) == bound_held_rows(POPULATION, batching, np.array([client]))[0]


def test_epochs_and_negatives_have_orders_of_their_own():
    """Of a long client: where train items lie in two epochs, and in which order negatives come, over many rounds."""
    client = int(POPULATION.num_train.argmax())
    n, batching = int(POPULATION.num_train[client]), Batching(4096, 1, epochs=2)
    shapes = make_block_shapes(POPULATION, batching, 1, 1, 16, False)
    drawer, found = make_drawer(POPULATION, batching, shapes), []
    for round in range(200):
        block = drawer.draw(np.array([client]), np.ones(1, bool), 0, round).blocks[0]
        rows, label = np.asarray(block.data.rows[0]), np.asarray(block.data.batch["label"][0])
        places = [np.argsort(rows[epoch, : 2 * n][label[epoch, : 2 * n] == 1]) for epoch in (0, 1)]
        negative = np.asarray(block.rows[0])[n : 2 * n]  # in the order in which they come
        found.append([*places, np.argsort(negative)])
    ranks = np.array(found) - (n - 1) / 2  # [rounds, 3, n]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        product = (ranks[:, one] * ranks[:, other]).mean()
        assert abs(product) < 5 * ((n**2 - 1) / 12) / (200 * n) ** 0.5, "uncorrelated"


def test_a_cohort_that_holds_more_rows_than_expected_gets_more_room():
    batching = BATCHINGS["usual"]
    shapes = make_block_shapes(POPULATION, batching, CLIENTS, 1, 16, True)._replace(room=3)
    cohort = make_drawer(POPULATION, batching, shapes).draw(np.arange(CLIENTS), np.ones(CLIENTS, bool), 3, 0)
    found = read_steps(jax.device_get(cohort), shapes)
    same = read_steps(*draw_round(batching))
    assert found == same


def test_negatives_by_search_are_those_of_the_list():
    """Where there are too many to be listed."""
    unlisted = POPULATION._replace(negative_index=POPULATION.negative_index._replace(negatives=None))
    data, client = put_train_data(list_train_data(POPULATION, Batching())), jnp.arange(CLIENTS)[:, None]
    free = ITEMS - POPULATION.excluded.counts
    rank = jnp.minimum(jnp.arange(ITEMS), free[:, None] - 1)
    longest = int(POPULATION.excluded.counts.max())
    got = find_negatives(put_train_data(list_train_data(unlisted, Batching())), client, rank, ITEMS, longest)
    assert np.array_equal(got, find_negatives(data, client, rank, ITEMS, longest))
    for user in range(CLIENTS):
        assert set(got[user].tolist()) == set(range(ITEMS)) - set(POPULATION.excluded.of(user).tolist())


def test_a_draw_is_a_function_of_seed_round_and_client_alone():
    batching = BATCHINGS["three epochs"]
    whole = read_steps(*draw_round(batching))
    some = read_steps(*draw_round(batching, np.array([41, 7, 23, CLIENTS, CLIENTS])))
    assert some == {client: whole[client] for client in (41, 7, 23)}
    for other in ({"seed": 4}, {"round": 1}):
        changed = read_steps(*draw_round(batching, **other))
        assert sum(changed[client] == whole[client] for client in whole) < 3


def test_labels_of_rows_are_those_of_the_rows():
    rated = DATA._replace(
        interactions=DATA.interactions._replace(
            rating=np.random.default_rng(0).integers(1, 6, len(DATA.interactions.user)).astype(np.float32)
        )
    )
    population = prepare_population(rated, label="rating")[1]
    batching = BATCHINGS["no negatives"]
    cohort, shapes = draw_round(batching, population=population)
    for client, (steps, _) in read_steps(cohort, shapes, population).items():
        first, end = population.train.start[client : client + 2]
        want = zip(
            population.train.values[first:end].tolist(), population.labels.train[first:end].tolist(), strict=True
        )
        assert sorted((item, label) for step in steps for item, label, _ in step) == sorted(want)


def test_devices_of_a_user_draw_for_themselves():
    population = prepare_population(DATA, clients="device", devices=3)[1]
    found = read_steps(
        *draw_round(BATCHINGS["usual"], np.arange(population.num_clients), population=population), population
    )
    for client, (steps, _) in found.items():
        train = set(population.train.of(client).tolist())
        assert {item for step in steps for item, label, _ in step if label == 1} == train
        assert not {item for step in steps for item, label, _ in step if label == 0} & train


# --- chances ------------------------------------------------------------------------------------------


def test_items_and_places_come_equally_often():
    """Of one client over many rounds: each item outside its train set, two of these together, and each place of a
    train item."""
    client = int(np.argsort(POPULATION.num_train)[5])
    batching = Batching(64, 2)
    shapes = make_block_shapes(POPULATION, batching, 1, 1, 16, False)
    drawer, rounds = make_drawer(POPULATION, batching, shapes), 3000
    n = int(POPULATION.num_train[client])
    free = ITEMS - n
    negatives, places = np.zeros(ITEMS), np.zeros((n, 3 * n))
    together = 0
    for round in range(rounds):
        block = drawer.draw(np.array([client]), np.ones(1, bool), 0, round).blocks[0]
        held, rows, label = (np.asarray(x)[0] for x in (block.rows, block.data.rows, block.data.batch["label"]))
        drawn = held[rows[0, : 3 * n][label[0, : 3 * n] == 0]]
        negatives[drawn] += 1
        places[rows[0, : 3 * n][label[0, : 3 * n] == 1], np.flatnonzero(label[0, : 3 * n] == 1)] += 1
        together += {0, 1} <= set(
            np.flatnonzero(np.isin(np.setdiff1d(np.arange(ITEMS), POPULATION.train.of(client)), drawn))
        )
    each = np.delete(negatives, POPULATION.train.of(client))
    chance = 2 * n / free
    assert abs(each - rounds * chance).max() < 5 * (rounds * chance * (1 - chance)) ** 0.5
    assert abs(places - rounds / (3 * n)).max() < 5 * (rounds / (3 * n)) ** 0.5
    both = 2 * n * (2 * n - 1) / (free * (free - 1))
    assert abs(together - rounds * both) < 5 * (rounds * both) ** 0.5


def test_clients_and_rounds_draw_independently():
    """How often one client and the next by number have the same negative: as by chance, and so for two rounds."""
    batching, rounds = Batching(64, 1), 400
    shapes = make_block_shapes(POPULATION, batching, CLIENTS, 1, 16, False)
    drawer, drawn = make_drawer(POPULATION, batching, shapes), np.zeros((rounds, CLIENTS, ITEMS))
    for round in range(rounds):
        for block in drawer.draw(np.arange(CLIENTS), np.ones(CLIENTS, bool), 0, round).blocks:
            for lane, slot in enumerate(block.slots):
                held, n = np.asarray(block.rows[lane]), int(block.num_train[lane])
                if slot < CLIENTS:
                    drawn[round, slot, held[n : 2 * n]] = 1
    chance = drawn.mean(0)  # of each client and item
    for one, other in ((drawn[:, :-1], drawn[:, 1:]), (drawn[:-1], drawn[1:])):
        product = (one * other).mean(0)
        expected = chance[:-1] * chance[1:] if one.shape[1] < CLIENTS else chance**2
        gap = (product - expected) / np.sqrt(np.maximum(expected * (1 - expected), 1e-9) / len(one))
        assert abs(gap.mean()) < 5 / gap.size**0.5 * gap.std()
        assert gap.std() < 1.2


# --- the host's rounds of the same draws ----------------------------------------------------------------


def pack_same_draws(cohort, population, batching, shapes):
    """The draws of a device as a cohort that the host lays out."""
    steps = read_steps(cohort, shapes, population)
    slots = np.flatnonzero(cohort.ids < population.num_clients)
    clients = cohort.ids[slots]
    where = plan_blocks(shapes, measure_clients(population, batching, clients), np.zeros(len(clients), int))
    ordered = clients[where.order]
    passes, examples = np.repeat(np.arange(len(ordered)), batching.epochs), population.num_train[ordered]
    examples = np.repeat(batching.examples(examples), batching.epochs)
    of_epoch = batching.steps(population.num_train[ordered]) // batching.epochs
    first_step = (np.arange(batching.epochs) * of_epoch[:, None]).ravel()
    item, label = [], []
    for client in ordered:
        for rows in steps[int(client)][0]:
            for each, its_label, weight in rows:
                item += [each] * int(weight)
                label += [bool(its_label)] * int(weight)
    drawn = DrawnExamples(
        passes,
        np.repeat(ordered, batching.epochs),
        first_step,
        examples,
        np.zeros(len(item), int),
        np.array(item, np.int32)[:, None],
        np.array(label),
    )
    laid = lay_out_examples(population, batching._replace(batch_size=shapes.kinds[-1][1]), drawn, where, shapes.end)
    rows = None
    if shapes.room:
        rows, held = list_cohort_rows(laid.held, shapes.end, shapes.room, lambda there: there)
        laid = laid._replace(held=held)

    def lanes(values, fill, dtype):
        out = np.full(where.sizes[0], fill, dtype)
        out[where.lane] = values[where.order]
        return out

    return Cohort(
        cohort.ids,
        cohort.present,
        split_blocks(
            where,
            laid,
            partial(list_example_widths, batching, True),
            lanes(slots, len(cohort.ids), np.int32),
            lanes(batching.epochs * batching.examples(population.num_train[clients]), 0, np.float32),
            lanes(population.num_train[clients], 0, np.float32),
        ),
        rows,
    )


TABLE = {
    "model": {"name": "mf", "dim": 8},
    "work": {"batch_size": 16, "negatives": 9, "epochs": 2, "draw_on": "device", "optimizer": {"name": "sgd"}},
    "channel": [{"name": "per_row_mean"}],
    "cohort": {"name": "uniform", "size": 24},
}


def make_parts(clients=None, **work):
    table = TABLE | {"work": TABLE["work"] | work}
    clients = clients or Clients(DATA, POPULATION, "", False)
    return build_from_config(make_config(table), clients)


@parametrize_cover(optimizer={"sgd": {"name": "sgd"}, "adam": {"name": "adam"}}, lazy={"rows": True, "all rows": False})
def test_a_round_of_the_same_draws_is_that_of_the_host(optimizer, lazy):
    """With drop-outs, and items that a client draws again; up to the order of sums."""
    table = TABLE | {"work": TABLE["work"] | {"optimizer": optimizer}, "server": {"lazy": lazy}}
    parts = build_from_config(make_config(table), Clients(DATA, POPULATION, "", False))
    ids, present = parts.sampler.draw(0, 0)
    present[::5] = False
    cohort = parts.drawer.draw(ids, present, 0, 0)
    again = pack_same_draws(jax.device_get(cohort), parts.data.population, parts.batching, parts.shapes)
    ends = []
    for each in (cohort, again):
        state, info = parts.algorithm.step(initial_arrays(parts, 0)["state"], each, make_run_keys(0).rounds)
        ends.append((unwrap(state.shared.params), state.client_states.work, info["train/loss"]))
    start = unwrap(initial_arrays(parts, 0)["state"].shared.params)
    assert max(np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (start, ends[0][0])), strict=True)) > 1e-3
    close(*ends)
    host = pack_cohort(parts.data.population, parts.batching, parts.shapes, ids, present, 0, 0)
    assert jax.tree.structure(host) == jax.tree.structure(cohort)
    shapes = [[(np.shape(x), np.asarray(x).dtype) for x in jax.tree.leaves(each)] for each in (host, cohort)]
    assert shapes[0] == shapes[1], "the same programs run both"
    assert not any(x.weak_type for x in jax.tree.leaves(cohort) if isinstance(x, jax.Array)), "and no other ones"


# --- as a user runs it ------------------------------------------------------------------------------------


@pytest.fixture
def program(monkeypatch, tmp_path):
    """Trains in this process, and returns the summary."""

    def call(out, rounds, *more):
        words = "--rounds", rounds, "--evaluation.every", 2, "--run.checkpoint-every", 2, "--work.draw-on", "device"
        words = "train", "synthetic_1k", "--out", tmp_path / out, *words, "--cohort.size", 24, *SMALL, *more
        monkeypatch.setattr(sys, "argv", ["jaxfed", *map(str, words)])
        monkeypatch.setattr(main, "set_up_process", lambda: None)
        main.main()
        return json.loads((tmp_path / out / "summary.json").read_text())

    return call


SMALL = "--data.users", 200, "--data.items", 150, "--data.mean-length", 10, "--work.batch-size", 64
SEVERAL_USERS = "--data.clients", "silo", "--data.silos", 20, "--cohort.size", 8


@pytest.mark.parametrize("more", [(), SEVERAL_USERS], ids=["", "several users"])
def test_a_run_goes_on_where_it_was_and_is_that_of_one_device_on_eight(program, more):
    whole = program("whole", 4, *more)
    program("resumed", 2, *more)
    assert program("resumed", 4, "--resume", *more)["params_sha256"] == whole["params_sha256"]
    assert program("host", 4, "--work.draw-on", "host", *more)["params_sha256"] != whole["params_sha256"]
    eight = program("eight", 4, "--run.devices", 8, *more)
    for name in ("bytes_up_total", "bytes_down_total"):
        assert eight[name] == whole[name]
    assert eight["test/full/mrr"] == pytest.approx(whole["test/full/mrr"], rel=1e-3)  # sums in another order


def test_the_bytes_are_those_of_the_rows_that_clients_hold():
    """Counted without a look at what was drawn; each client is sent its rows, and sends them."""
    parts = make_parts()
    ready = prepare_round(parts, 0, 0)
    held = [(np.asarray(block.rows) < len(ready.cohort.rows)).sum(1) for block in ready.cohort.blocks]
    counted = count_rows(parts, ready.cohort)
    assert counted[0].tolist() == np.concatenate(held)[: len(counted[0])].tolist()
    rows = [np.append(ready.cohort.rows, ITEMS)[np.asarray(block.rows)] for block in ready.cohort.blocks]
    assert counted[1] == len({*np.concatenate([x.ravel() for x in rows]).tolist()} - {*range(ITEMS, 2 * ITEMS + 2000)})


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ({"work": TABLE["work"] | {"draw_on": "gpu"}}, "host or device|'host', 'device'|one of host, device"),
    ],
)
def test_what_cannot_be_drawn_there_is_refused(table, reason):
    data = {"name": "synthetic", "users": 60, "items": 50}

    def build():
        config = make_config(TABLE | table | {"data": data | table.get("data", {})})
        return build_from_config(config, load_data(config.data))

    with pytest.raises(ValueError, match=reason):
        build()


def test_numbers_beyond_32_bits_are_refused():
    shapes = make_block_shapes(POPULATION, BATCHINGS["usual"], 4, 1)
    check_device_draws(POPULATION, Batching(8, 9, epochs=1 << 10), shapes)
    for wrong in (Batching(8, 9, epochs=1 << 26), Batching(8, 1 << 26)):
        with pytest.raises(ValueError, match="counts in 32 bits"):
            check_device_draws(POPULATION, wrong, shapes)


def test_a_closed_form_and_an_unknown_place_are_refused():
    batching = Batching(1, 0, ordered=True)
    shapes = make_block_shapes(POPULATION, batching, 4, 1)
    with pytest.raises(ValueError, match="sums for a closed form"):
        make_drawer(POPULATION, batching, shapes)
    with pytest.raises(ValueError, match="choose host, device or auto"):
        make_block_shapes(POPULATION, Batching(draw_on="gpu"), 4, 1)


def test_data_that_do_not_fit_the_device_are_refused(monkeypatch):
    """The bytes are those of the arrays that are put there."""
    need = count_bytes(put_train_data(list_train_data(POPULATION, Batching())))
    monkeypatch.setattr(device_data, "device_memory", lambda: 2 * need)
    put_train_data(list_train_data(POPULATION, Batching()))
    monkeypatch.setattr(device_data, "device_memory", lambda: 2 * need - 1)
    with pytest.raises(ValueError, match="takes .* GB there, and may take half of its .*: take a device with room"):
        put_train_data(list_train_data(POPULATION, Batching()))
