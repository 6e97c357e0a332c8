"""Histories of clients with several users: each epoch reads each user's history once, in batches of different users."""

import numpy as np
import pytest

from jaxfed.core.model import SequenceFormat
from jaxfed.data.batching import Batching
from jaxfed.data.blocks import make_block_shapes
from jaxfed.data.packing import empty_cohort, pack_cohort
from jaxfed.data.preparation import prepare_population
from jaxfed.data.sources.synthetic import synthetic_data

DATA = synthetic_data(60, 50, mean_length=12)
REGION = np.searchsorted([1, 3, 8, 25], DATA.interactions.user, "right")  # of 1, 2, 5, 17 and 35 users
POPULATION = prepare_population(DATA._replace(columns={"region": REGION}), clients="region")[1]
USERS = np.diff(POPULATION.client_offsets)
LENGTH, NEGATIVES, ITEMS = 17, 9, POPULATION.num_items


def make_batching(batch_size=4, **options):
    format = SequenceFormat(LENGTH, options.pop("whole_catalogue", False))
    return Batching(batch_size, **{"negatives": NEGATIVES} | options, sequence=format)


def packed(batching, ids=range(5), round=0, lazy=True, steps_per_block=0):
    ids = np.array(ids)
    shapes = make_block_shapes(POPULATION, batching, len(ids), 1, steps_per_block, lazy)
    return pack_cohort(POPULATION, batching, shapes, ids, np.ones(len(ids), bool), 3, round), shapes


def unpacked(cohort):
    """{client: [([items read of each history], {item: how often it is a negative}, [key of each]) of each step]}."""
    found = {}
    for block in cohort.blocks:
        for lane, slot in enumerate(block.slots):
            held = np.asarray(block.rows[lane])
            held = held if cohort.rows is None else np.append(cohort.rows, ITEMS)[held]
            real = held[held < ITEMS]
            assert len(set(real)) == len(real), "rows that a client holds are distinct"
            for step in np.flatnonzero(block.data.live[lane]):
                places = block.data.rows[lane, step]
                item = np.append(held, ITEMS)[np.minimum(places, len(held))]
                used = item[item < ITEMS]
                assert len(set(used)) == len(used), "rows of a step are distinct"
                batch = {name: values[lane, step] for name, values in block.data.batch.items()}
                assert batch["catalogue"] == ITEMS
                reads, keys = np.atleast_2d(batch["sequence"]), np.atleast_2d(batch["dropout"])
                reads = [np.append(item, ITEMS)[np.minimum(each, len(item))] for each in reads]
                reads = [each[each < ITEMS].tolist() for each in reads]
                negatives = {int(i): int(n) for i, n in zip(item, batch["negative"], strict=True) if n}
                keys = [tuple(key) for key, each in zip(keys, reads, strict=True) if each]
                steps = found.setdefault(int(cohort.ids[slot]), [])
                steps.append(([each for each in reads if each], negatives, keys))
    return found


def histories(client):
    """The latest items of each user of a client, sorted."""
    users = range(POPULATION.client_offsets[client], POPULATION.client_offsets[client + 1])
    return sorted(POPULATION.train.of(user)[-LENGTH:].tolist() for user in users)


def check_three_epochs(found, size):
    """Of each client, with steps of so many histories."""
    for client, steps in found.items():
        every = -(-USERS[client] // size)
        assert len(steps) == 3 * every
        epochs = [steps[low : low + every] for low in range(0, len(steps), every)]
        orders = [[each for reads, _, _ in epoch for each in reads] for epoch in epochs]
        assert all(sorted(order) == histories(client) for order in orders)
        assert all(len(reads) == size for epoch in epochs for reads, _, _ in epoch[:-1]), "only the last step is short"
        assert all(sum(negatives.values()) == NEGATIVES for _, negatives, _ in steps)
        assert len({tuple(sorted(negatives.items())) for _, negatives, _ in steps}) == len(steps)
        keys = [key for _, _, each in steps for key in each]
        assert len(set(keys)) == len(keys) == 3 * USERS[client], "each history drops out by a key of its own"
        if USERS[client] > 4:
            assert orders[0] != orders[1] != orders[2]


@pytest.mark.parametrize("size", [1, 4, 64])
@pytest.mark.parametrize("lazy", [True, False], ids=["the cohort's rows", "all rows"])
def test_an_epoch_reads_each_history_once_in_an_order_of_its_own(size, lazy):
    assert USERS.tolist() == [1, 2, 5, 17, 35], "clients of very different sizes"
    assert POPULATION.train.counts.max() > LENGTH
    assert POPULATION.train.counts.min() < 5
    found = unpacked(packed(make_batching(size, epochs=3), lazy=lazy)[0])
    assert found.keys() == set(range(5))
    check_three_epochs(found, size)


def test_the_order_is_uniform():
    """The place of the first user of a client of five, over many rounds: none is taken more often than by chance."""
    first = POPULATION.train.of(POPULATION.client_offsets[2])[-LENGTH:].tolist()
    places = np.zeros(5)
    for round in range(400):
        steps = unpacked(packed(make_batching(1), [2], round)[0])[2]
        places[[reads[0] for reads, _, _ in steps].index(first)] += 1
    assert np.square(places - 80).sum() / 80 < 18.5  # chi-squared of 4 degrees, one in a thousand


def test_what_a_client_trains_on_does_not_depend_on_the_cohort():
    every, some = unpacked(packed(make_batching())[0]), unpacked(packed(make_batching(), [3, 1], steps_per_block=40)[0])
    assert some == {client: every[client] for client in (3, 1)}
    assert unpacked(packed(make_batching(), [3], round=1)[0])[3] != some[3]


def test_a_client_with_one_user_has_what_it_has_where_users_are_clients():
    alone = prepare_population(DATA)[1]
    user = int(np.flatnonzero(alone.user_names == POPULATION.user_names[0])[0])
    assert user == 0, "draws are by the number of the client"
    batching = make_batching(epochs=2)
    shapes = make_block_shapes(alone, batching, 1)
    as_user = unpacked(pack_cohort(alone, batching, shapes, np.array([user]), np.ones(1, bool), 3, 0))
    assert unpacked(packed(batching, [0])[0])[0] == as_user[0]


def test_weights_count_the_targets_of_all_users():
    for epochs in (1, 3):
        cohort, _ = packed(make_batching(epochs=epochs))
        pairs = [pair for block in cohort.blocks for pair in zip(block.slots, block.data.examples, strict=True)]
        found = {int(cohort.ids[slot]): weight for slot, weight in pairs if slot < len(cohort.ids)}
        want = {client: epochs * sum(len(each) - 1 for each in histories(client)) for client in range(5)}
        assert found == want


def test_shared_negatives_are_those_of_the_epoch():
    found = unpacked(packed(make_batching(epochs=2, shared_negatives=True))[0])
    sets = [{tuple(sorted(s[1].items())) for s in steps} for steps in found.values()]
    assert all(each == sets[0] for each in sets)
    assert len(sets[0]) == 2, "each epoch has its own"


def test_whole_catalogue_gives_each_step_every_item_once():
    found = unpacked(packed(make_batching(whole_catalogue=True))[0])
    assert all(negatives == dict.fromkeys(range(ITEMS), 1) for steps in found.values() for _, negatives, _ in steps)
    assert sorted(each for reads, _, _ in found[4] for each in reads) == histories(4)


def test_blocks_are_of_few_shapes_and_cost_alike():
    batching = make_batching()
    cohort, shapes = packed(batching)
    assert [steps for steps, _ in shapes.kinds] == [1, 2, 6, 12], "of 1, 1, 2, 5 and 9 steps"
    assert {width for _, width in shapes.kinds} == {LENGTH}
    assert all(block.data.live.shape[0] * block.data.live.shape[1] <= 16 for block in cohort.blocks)
    assert all(block.data.batch["sequence"].shape[2:] == (4, LENGTH) for block in cohort.blocks)
    assert all(block.data.batch["dropout"].shape[2:] == (4, 2) for block in cohort.blocks)
    empty = empty_cohort(POPULATION, batching, shapes)
    assert len(empty.blocks) == len(shapes.kinds)
    assert not any(block.data.live.any() for block in empty.blocks)


def test_rows_of_a_cohort_have_room():
    """In a catalogue of which a cohort has a part: for what its users read, and for the negatives of all steps."""
    large = POPULATION._replace(num_items=20_000)
    for options in ({"batch_size": 2, "epochs": 2}, {"batch_size": 1, "negatives": 60}):
        batching = make_batching(**options)
        shapes = make_block_shapes(large, batching, 3)
        cohort = pack_cohort(large, batching, shapes, np.array([4, 0, 3]), np.ones(3, bool), 0, 0)
        assert 1000 < shapes.room < 10_000
        assert len(cohort.rows) == shapes.room, "it did not have to grow"
