"""Packing: every example is where it belongs, negatives are uniform, shapes are few."""

from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxfed.config.build import build_from_config, load_data
from jaxfed.config.schema import make_config
from jaxfed.data import blocks
from jaxfed.data.batching import Batching, draw_examples
from jaxfed.data.blocks import block_kinds, history_kinds, make_block_shapes
from jaxfed.data.packing import empty_cohort, pack_cohort
from jaxfed.data.population import ProcessShare
from jaxfed.data.preparation import prepare_population
from jaxfed.data.ragged import sort_pairs
from jaxfed.data.sources.synthetic import synthetic_data
from jaxfed.training.rounds import initial_arrays, make_run_keys, prepare_round
from tests.small import close

POPULATION = prepare_population(synthetic_data(60, 50, mean_length=10))[1]
SILOS = prepare_population(synthetic_data(60, 50, mean_length=10), clients="silo", silos=7)[1]


def packed(population, batching, ids, round=0, seed=0, devices=1, steps_per_block=16):
    shapes = make_block_shapes(population, batching, len(ids), devices, steps_per_block)
    return pack_cohort(population, batching, shapes, np.array(ids), np.ones(len(ids), bool), seed, round), shapes


def unpacked(population, cohort, batching):
    """{client: list of steps, each a sorted list of (user, item, label, weight)} back from the blocks."""
    out = {}
    for block in cohort.blocks:
        if cohort.rows is not None:
            block = block._replace(rows=np.append(cohort.rows, population.num_items)[block.rows])
        for j, slot in enumerate(block.slots):
            if slot == len(cohort.ids):
                assert not block.data.live[j].any()
                assert (block.rows[j] == population.num_items).all()
                continue
            steps = []
            held = np.append(block.rows[j], population.num_items)
            real = held[held < population.num_items]
            assert len(set(real.tolist())) == len(real)
            for s in np.flatnonzero(block.data.live[j]):
                at = block.data.rows[j, s]
                used = at[at < population.num_items]
                assert len(set(used.tolist())) == len(used)  # distinct in a step
                items = np.append(block.rows[j], population.num_items)[np.minimum(at, block.rows.shape[1])]
                batch = {name: values[j, s] for name, values in block.data.batch.items()}
                first = population.client_offsets[cohort.ids[slot]]
                local = batch.get("user", np.zeros(len(batch["weight"]), int))
                item = items[np.minimum(batch["item"], len(items) - 1)] if "item" in batch else items
                other = items[np.minimum(batch["other"], len(items) - 1)] if "other" in batch else batch["label"]
                some = batch["weight"] > 0
                steps.append(
                    list(zip(first + local[some], item[some], other[some], batch["weight"][some], strict=True))
                )
            out[int(cohort.ids[slot])] = steps
            assert block.data.examples[j] == sum(x[3] for step in steps for x in step)
    return out


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 7)), max_size=50), st.sampled_from([8, 1 << 40, 1 << 59]))
def test_sorted_pairs_is_a_stable_sort_of_pairs(pairs, values):
    group, value = (np.array([pair[i] for pair in pairs], np.int64) for i in (0, 1))
    keys, order = sort_pairs(group, value, 6, values)
    assert order.tolist() == sorted(range(len(pairs)), key=lambda i: pairs[i])
    assert keys.tolist() == [pairs[i][0] * values + pairs[i][1] for i in order]


@pytest.mark.parametrize("population", [POPULATION, SILOS], ids=["users", "silos"])
@pytest.mark.parametrize("batching", [Batching(8, 3), Batching(8, 3, 2), Batching(6, 0), Batching(1, 1)])
def test_pointwise_blocks_hold_every_positive_once_an_epoch_and_its_negatives(population, batching):
    ids = [5, 2, 0, 6]
    cohort, _ = packed(population, batching, ids)
    for client, steps in unpacked(population, cohort, batching).items():
        flat = [x for step in steps for x in step]
        positives, negatives = {}, 0.0
        for user, item, label, weight in flat:
            if label > 0:
                positives[user, item] = positives.get((user, item), 0) + label * weight
            negatives += (1 - label) * weight
        users = range(population.client_offsets[client], population.client_offsets[client + 1])
        want = {(u, i): batching.epochs for u in users for i in population.train.of(u).tolist()}
        assert positives == pytest.approx(want)
        count = sum(want.values())
        assert negatives == pytest.approx(batching.negatives * count)
        assert len(steps) == batching.steps(np.array(count // batching.epochs))
        per_step = [sum(x[3] for x in step) for step in steps]
        assert max(per_step) == min(batching.batch_size, max(per_step))
        assert all(item not in population.excluded.of(user) for user, item, label, _ in flat if label == 0)
    assert sorted(unpacked(population, cohort, batching)) == sorted(ids)


@pytest.mark.parametrize("population", [POPULATION, SILOS], ids=["users", "silos"])
def test_pairwise_blocks_pair_positives_with_negatives(population):
    batching = Batching(8, 2, 1, True)
    cohort, _ = packed(population, batching, [1, 3])
    for client, steps in unpacked(population, cohort, batching).items():
        flat = [x for step in steps for x in step]
        users = range(population.client_offsets[client], population.client_offsets[client + 1])
        pairs = sorted((u, i) for u in users for i in population.train.of(u).tolist() for _ in range(2))
        assert sorted((u, i) for u, i, _, _ in flat) == pairs
        assert all(other not in population.excluded.of(user) for user, _, other, _ in flat)


def test_a_clients_examples_are_a_function_of_seed_round_and_client():
    batching = Batching(8, 3)

    def of(ids, **kw):
        return unpacked(POPULATION, packed(POPULATION, batching, ids, **kw)[0], batching)

    alone, among = of([7]), of([3, 9, 7, 20, 31])
    assert alone[7] == among[7]
    assert of([7], steps_per_block=64, devices=2)[7] == alone[7]
    assert of([7], round=1)[7] != alone[7]
    assert of([7], seed=1)[7] != alone[7]


def test_negatives_are_uniform_over_what_is_not_avoided():
    """Chi-square of one client's negatives over many rounds: mean = degrees of freedom, 5 sd is 1 in a million."""
    client = int(np.argmin(np.abs(POPULATION.num_train - 12)))
    batching = Batching(8, 20)
    counts = np.zeros(POPULATION.num_items)
    for round in range(40):
        drawn = draw_examples(POPULATION, batching, np.array([client]), 0, round)
        np.add.at(counts, drawn.item[~drawn.label, 0], 1)
    free = np.setdiff1d(np.arange(POPULATION.num_items), POPULATION.excluded.of(client))
    assert counts.sum() == counts[free].sum()
    expected = counts.sum() / len(free)
    chi, df = ((counts[free] - expected) ** 2 / expected).sum(), len(free) - 1
    assert abs(chi - df) < 5 * np.sqrt(2 * df)


def test_order_is_shuffled_anew_each_round():
    client = int(np.argmax(POPULATION.num_train))
    orders = {
        tuple(draw_examples(POPULATION, Batching(8, 0), np.array([client]), 0, t).item.ravel().tolist())
        for t in range(5)
    }
    assert len(orders) == 5
    assert len({tuple(sorted(order)) for order in orders}) == 1


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_blocks_come_in_the_shapes_that_were_announced(devices):
    batching = Batching(8, 3)
    shapes = make_block_shapes(POPULATION, batching, 40, devices, 16)
    announced = {(shapes.clients(s), s, shapes.rows(s, size)) for s, size in shapes.kinds}
    wide, long = shapes.padded_shape
    for round in range(5):
        ids = np.random.default_rng(round).permutation(60)[:40]
        cohort = pack_cohort(POPULATION, batching, shapes, ids, np.ones(40, bool), 0, round)
        for block in cohort.blocks:
            assert (*block.data.live.shape, block.rows.shape[1]) in announced
            assert block.slots.size % devices == 0
            assert block.slots.size <= wide
            assert block.rows.size <= long
        slots = np.concatenate([b.slots for b in cohort.blocks])
        assert sorted(slots[slots < 40].tolist()) == list(range(40))
    empty = empty_cohort(POPULATION, batching, shapes)
    assert {(*b.data.live.shape, b.rows.shape[1]) for b in empty.blocks} == announced


@pytest.mark.parametrize("population", [POPULATION, SILOS], ids=["users", "silos"])
@pytest.mark.parametrize("batching", [Batching(40, 3, 3), Batching(10**6, 3), Batching(40, 3, 2, True)])
def test_narrow_steps_hold_what_wide_ones_do(population, batching):
    """Clients whose epoch is one batch have steps of their own width, and nothing else changes."""
    ids = np.arange(population.num_clients)[:40]
    shapes = make_block_shapes(population, batching, len(ids), steps_per_block=16)
    narrow = shapes._replace(kinds=block_kinds(batching, population.num_train, 8))
    args = ids, np.ones(len(ids), bool), 0, 3
    wide, cut = (pack_cohort(population, batching, each, *args) for each in (shapes, narrow))
    assert unpacked(population, cut, batching) == unpacked(population, wide, batching)
    most = batching.largest(population.num_train)
    assert shapes.kinds[-1][1] == narrow.kinds[-1][1] == most.max()  # no wider than anybody's
    assert len(narrow.kinds) > len(shapes.kinds) or population is SILOS
    for block in cut.blocks:
        there = block.slots < len(ids)
        size = block.data.batch["weight"].shape[-1]
        assert size in (most.max(), *(8 << i for i in range(20)))
        assert size < 2 * max(8, most[block.slots[there]].max())
        assert block.data.rows.shape[-1] == size * (2 if batching.pairwise else 1)


def test_a_round_on_narrow_steps_is_the_round_on_wide_ones(monkeypatch):
    """A run's whole state, but for the order of sums: narrower padding moves XLA's partial sums."""
    config = make_config(
        {
            "data": {"name": "synthetic", "users": 40, "items": 60, "mean_length": 12.0},
            "model": {"name": "mf", "dim": 4},
            "work": {"batch_size": 40, "epochs": 2},
            "cohort": {"name": "everyone"},
        }
    )
    data, made = load_data(config.data), []
    for narrow in (256, 16):
        monkeypatch.setattr(blocks, "block_kinds", partial(block_kinds, narrow=narrow))
        it = build_from_config(config, data)
        state = initial_arrays(it, 0)["state"]
        for t in range(3):
            state, _ = it.algorithm.step(state, prepare_round(it, 0, t).cohort, make_run_keys(0).rounds)
        made.append((it.shapes.kinds, state.shared.params, state.client_states))
    assert len(made[1][0]) > len(made[0][0])
    close(made[1][1:], made[0][1:])


def test_kinds_of_blocks():
    num_train = np.array([3, 100, 101, 400, 600, 2000])
    assert block_kinds(Batching(2048, 4), num_train) == (
        (1, 256),
        (1, 512),
        (1, 2048),
        (2, 2048),
        (3, 2048),
        (4, 2048),
        (6, 2048),
    )
    assert block_kinds(Batching(2048, 4, 3), num_train[:4]) == ((1, 256), (2, 256), (3, 256), (3, 512), (3, 2000))
    assert block_kinds(Batching(256, 4), num_train[:3]) == ((1, 256), (2, 256))
    assert block_kinds(Batching(10**9, 0), num_train) == ((1, 256), (1, 512), (1, 1024), (1, 2000))


def test_empty_slots_and_empty_cohorts():
    batching = Batching(8, 3)
    shapes = make_block_shapes(POPULATION, batching, 3)
    some = pack_cohort(POPULATION, batching, shapes, np.array([60, 4, 60]), np.array([False, True, False]), 0, 0)
    assert list(unpacked(POPULATION, some, batching)) == [4]
    none = pack_cohort(POPULATION, batching, shapes, np.full(3, 60), np.zeros(3, bool), 0, 0)
    assert unpacked(POPULATION, none, batching) == {}
    assert len(none.blocks) == 1


@pytest.mark.parametrize(
    ("batching", "words"),
    [
        (Batching(0), "work.batch_size is 0: it must be at least 1"),
        (Batching(epochs=0), "at least 1"),
        (Batching(negatives=-1), "work.negatives is -1: it must be at least 0"),
        (Batching(negatives=0, pairwise=True), "set work.negatives to 1 or more"),
    ],
)
def test_batches_that_cannot_be(batching, words):
    with pytest.raises(ValueError, match=words):
        make_block_shapes(POPULATION, batching, 4)


def test_negatives_of_a_user_who_has_every_item():
    from tests.data.test_data import made

    rows = [(u, i) for u in range(3) for i in range(4 + (u == 0))]
    # user 0 has train items 0..2 of 5: free; so shrink the catalogue by hand
    population = prepare_population(made(*map(list, zip(*rows, strict=True))))[1]
    few = population._replace(num_items=int(population.excluded.counts.max()))
    with pytest.raises(ValueError, match=r"user 0 has every item.*work.negatives = 0"):
        make_block_shapes(few, Batching(), 1)
    assert make_block_shapes(few, Batching(negatives=0), 1)


def test_kinds_of_whole_histories():
    """A program is worth compiling where it saves more padding than it costs: not for a thousand short histories."""
    short = np.full(1000, 5)
    assert history_kinds(np.append(short, 165), 2000, pairs=True) == ((168, 1),)
    assert history_kinds(np.append(short, 165), 166, pairs=True) == ((166, 1),)  # never more than there are items
    many = np.concatenate([np.full(100_000, 5), np.full(100_000, 30), [165]])
    assert history_kinds(many, 2000, pairs=True) == ((8, 1), (32, 1), (168, 1))
    assert history_kinds(many, 2000, pairs=False) == ((64, 1), (192, 1))
    assert history_kinds(short, 2000, pairs=False) == ((64, 1),)


@pytest.mark.parametrize("devices", [1, 2])
def test_a_limit_of_clients_side_by_side_changes_no_batch(devices):
    ids, batching = np.arange(40), Batching(8, 3)
    shapes = make_block_shapes(POPULATION, batching, 40, devices, 64)
    limited = shapes._replace(most_clients=2)
    assert max(limited.clients(steps) for steps, _ in limited.kinds) == 2 * devices
    assert limited.clients(1) < shapes.clients(1)
    args = ids, np.ones(len(ids), bool), 0, 3
    wide, narrow = (pack_cohort(POPULATION, batching, each, *args) for each in (shapes, limited))
    assert unpacked(POPULATION, narrow, batching) == unpacked(POPULATION, wide, batching)
    assert len(narrow.blocks) > len(wide.blocks)


def test_a_limit_holds_for_the_parts_of_all_processes():
    """Two processes with two devices each, one client a device: equal blocks, and together each client once."""
    ids, batching = np.arange(40), Batching(8, 3)
    args = ids, np.ones(len(ids), bool), 0, 3
    found, dims = {}, []
    for rank in range(2):
        shapes = make_block_shapes(POPULATION, batching, 40, 4, 64, share=ProcessShare(rank, 2))._replace(
            most_clients=1
        )
        cohort = pack_cohort(POPULATION, batching, shapes, *args)
        own = unpacked(POPULATION, cohort, batching)
        assert not own.keys() & found.keys()
        found |= own
        dims.append([block.data.live.shape for block in cohort.blocks])
    assert dims[0] == dims[1]
    assert {clients for clients, _ in dims[0]} == {2}
    alone = make_block_shapes(POPULATION, batching, 40, 1, 64)
    assert found == unpacked(POPULATION, pack_cohort(POPULATION, batching, alone, *args), batching)
