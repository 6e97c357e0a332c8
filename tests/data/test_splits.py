"""Splits by chance and over all rows, and what is told of the order of a file."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from jaxfed.core.malicious import is_malicious
from jaxfed.data.clients import PROTOCOLS, partition
from jaxfed.data.given_parts import prepare_parts
from jaxfed.data.interactions import drop_repeats, select_rows
from jaxfed.data.preparation import prepare_population
from jaxfed.data.sources.files import from_arrow
from jaxfed.data.sources.synthetic import synthetic_data
from jaxfed.data.splits import PART, TEST, TRAIN, VALID, Protocol, split_histories
from tests.data.test_data import made
from tests.data.test_domains import two_domains

RATIO = (0.2, 0.3)
NEW = ("loo-random", "ratio-random", "global-random", "global-time")
CHANCE = NEW[:3]
histories = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9), st.integers(0, 30)), min_size=12, max_size=60)


def parts_of(data, protocol, seed=0):
    """{(user, item): part} of what stays, by ids."""
    data = prepare_parts(drop_repeats(data), protocol, RATIO, seed)
    part = split_histories(data, protocol, RATIO).part
    user, item = data.users[data.interactions.user], data.items[data.interactions.item]
    return dict(zip(zip(user.tolist(), item.tolist(), strict=True), part.tolist(), strict=True))


def prepared(rows):
    return made(*map(list, zip(*rows, strict=True)))


def refused(data, protocol, seed):
    """Whether data that hypothesis made are too few for a protocol."""
    try:
        parts_of(data, protocol, seed)
    except ValueError:
        return True
    return False


@settings(max_examples=60, deadline=None)
@given(histories, st.sampled_from(NEW), st.integers(0, 5))
def test_every_pair_is_in_one_part_and_every_user_trains(rows, protocol, seed):
    data = prepared(rows)
    if refused(data, protocol, seed):
        return
    found = parts_of(data, protocol, seed)
    by_user = {user: [part for (other, _), part in found.items() if other == user] for user, _ in found}
    assert all(TRAIN in parts for parts in by_user.values())
    assert {*found.values()} == {TRAIN, VALID, TEST}
    if protocol == "loo-random":
        assert all((parts.count(VALID), parts.count(TEST)) == (1, 1) for parts in by_user.values())
    if protocol == "ratio-random":
        clean = split_histories(prepare_parts(drop_repeats(data), "ratio-clean", RATIO, seed), "ratio-clean", RATIO)
        assert sorted(found.values()) == sorted(clean.part.tolist())


@settings(max_examples=40, deadline=None)
@given(histories, st.sampled_from(CHANCE), st.randoms(use_true_random=False))
def test_chance_is_a_function_of_the_seed_and_of_the_pairs_whatever_their_order(rows, protocol, random):
    rows = list({row[:2]: row for row in rows}.values())
    data = prepared(rows)
    if refused(data, protocol, 3):
        return
    shuffled = random.sample(rows, len(rows))
    assert parts_of(data, protocol, 3) == parts_of(data, protocol, 3) == parts_of(prepared(shuffled), protocol, 3)


@pytest.mark.parametrize("protocol", CHANCE)
def test_another_seed_is_another_split(protocol):
    data = synthetic_data(60, 50, mean_length=8)
    assert parts_of(data, protocol, 0) != parts_of(data, protocol, 1)


def test_each_row_of_a_user_is_as_likely_to_test():
    """Chi-square over seeds, of a user with ten rows; below 1e-4 by chance once in 10,000 versions of NumPy."""
    data = made([0] * 10 + [1] * 5, [*range(10), *range(5)])
    seeds = range(600)
    found = [parts_of(data, "loo-random", seed) for seed in seeds]
    for part in (VALID, TEST):
        counts = [sum(each["0", str(item)] == part for each in found) for item in range(10)]
        assert sum(counts) == len(seeds)
        assert stats.chisquare(counts).pvalue > 1e-4


def test_a_random_split_by_hand():
    """Two users' rows, ranked by the numbers of the seed in the order of (user, item): the largest rank tests."""
    data = made([1, 0, 0, 1, 0, 1, 1], [3, 5, 1, 1, 2, 2, 4])
    rank = np.random.default_rng([7, 7, 19]).permutation(7)
    pairs = [("0", "1"), ("0", "2"), ("0", "5"), ("1", "1"), ("1", "2"), ("1", "3"), ("1", "4")]
    found = parts_of(data, "loo-random", 7)
    for user in "01":
        mine = sorted((rank[place], pair) for place, pair in enumerate(pairs) if pair[0] == user)
        assert [found[pair] for _, pair in mine] == [TRAIN] * (len(mine) - 2) + [VALID, TEST]
    found = parts_of(data, "global-random", 7)  # of 7 rows, a fifth validates, 0.3 test: 1 and 2
    ordered = [found[pair] for _, pair in sorted(zip(rank.tolist(), pairs, strict=True))]
    assert ordered == [TRAIN] * 4 + [VALID] + [TEST] * 2


def test_a_split_by_time_over_all_rows_by_hand():
    user, item = [0, 1, 0, 1, 0, 1, 2, 2, 0, 1], [0, 0, 1, 1, 2, 2, 0, 1, 3, 3]
    time = [1, 2, 3, 4, 5, 5, 6, 7, 8, 8]  # of ten rows 2 validate and 3 test: from 7 on test, from 5 on validate
    data = prepare_parts(made(user, item, time), "global-time", RATIO, 0)
    assert data.notes == (
        '1 of 3 users with validation or test rows have no train row (the first: "2"): left out, with 2 rows',
    )
    parts = split_histories(data, "global-time", RATIO).part
    assert parts.tolist() == [TRAIN] * 4 + [VALID] * 2 + [TEST] * 2
    tied = made([0, 0, 1, 1], [0, 1, 0, 1], [1, 9, 9, 9])
    with pytest.raises(ValueError, match="too many of the 4 rows have equal times"):
        prepare_parts(tied, "global-time", RATIO, 0)
    with pytest.raises(ValueError, match="the data have no times: choose loo-random"):
        prepare_parts(made(user, item)._replace(has_times=False), "global-time", RATIO, 0)


@pytest.mark.parametrize("protocol", NEW)
def test_equal_times_are_in_one_part_and_training_keeps_its_order(protocol):
    random = np.random.default_rng(0)
    user, item = np.divmod(random.permutation(20 * 30)[:300], 30)
    source = made(user, item, random.integers(0, 40, 300))
    data, population = prepare_population(source, protocol=protocol, ratio=RATIO)
    assert PART not in data.columns
    assert population.protocol == protocol
    when = {}
    for row in zip(data.users[data.interactions.user], data.interactions.item, data.interactions.time, strict=True):
        when[row[:2]] = row[2]
    times = [
        [[when[name, i] for i in lists.of(u)] for u, name in enumerate(population.user_names)]
        for lists in (population.train, population.valid, population.test)
    ]
    assert all(each == sorted(each) for part in times for each in part)
    if protocol == "global-time":
        low, middle, high = (np.concatenate(part) for part in times)
        assert low.max() < middle.min() <= middle.max() < high.min()


def test_names_in_python_are_those_of_configurations():
    assert {*PROTOCOLS.values()} == {*Protocol.__args__}
    data = synthetic_data(60, 50, mean_length=8)
    for split, protocol in PROTOCOLS.items():
        clients = partition(data, split=split)
        assert clients.protocol == protocol
        assert clients.leaky == (split == "compat-pfedrec")
        same = prepare_population(data, protocol=protocol)[1]
        assert (clients.population.test.values == same.test.values).all()
    with pytest.raises(ValueError, match="no protocol 'x': choose loo-clean, .* or global-time"):
        prepare_population(data, protocol="x")


KINDS = {
    "silo": {"clients": "silo", "silos": 4},
    "device": {"clients": "device", "devices": 2},
    "devices": {"clients": "place", "merge": "devices"},
    "cold": {"cold": 0.25},
    "poisoned": {"malicious": 0.3, "promoted": ("7", "9"), "malice": 2},
}


def owned(population):
    """{(user, part): items}, of those who are asked, cold ones among them."""
    found = {}
    for group in filter(None, (population.asked, population.cold)):
        for part, lists in enumerate((group.train, group.valid, group.test)):
            found |= {(str(name), part): {*lists.of(u).tolist()} for u, name in enumerate(group.user_names)}
    return found


@pytest.mark.parametrize("protocol", NEW)
@pytest.mark.parametrize("kind", ["silo", "device", "devices", "cold"])
def test_who_a_client_is_changes_no_split(protocol, kind):
    data = synthetic_data(60, 50, mean_length=10)
    place = np.random.default_rng(1).choice(["home", "work"], len(data.interactions.user))
    data = data._replace(columns={"place": place})
    plain = prepare_population(data, protocol=protocol)
    other = prepare_population(data, protocol=protocol, **KINDS[kind])
    assert plain[0].items.tolist() == other[0].items.tolist()
    want, found = owned(plain[1]), owned(other[1])
    assert found == want


@pytest.mark.parametrize("protocol", NEW)
def test_several_clients_of_a_user_and_domains_are_split_by_themselves(protocol):
    domains = two_domains()
    data, population = prepare_population(domains, clients="domain", merge="domains", protocol=protocol)
    assert population.num_clients == 2 * len(domains.users) or protocol.startswith("global")
    split = [{*np.concatenate([lists.of(c) for lists in (population.train, population.valid, population.test)])} for
             c in range(population.num_clients)]  # fmt: skip
    assert sum(map(len, split)) == len(data.interactions.user)
    assert (population.train.counts > 0).all()


@pytest.mark.parametrize("protocol", NEW)
def test_rows_of_poisoned_histories_train(protocol):
    data = synthetic_data(60, 50, mean_length=8)
    honest = prepare_population(data, protocol=protocol)[1]
    source, poisoned = prepare_population(data, protocol=protocol, **KINDS["poisoned"])
    bad = is_malicious(np.arange(poisoned.num_clients), 0.3, 2)
    want, found = owned(honest), owned(poisoned)
    assert {key: items for key, items in want.items() if key[1]} == {k: v for k, v in found.items() if k[1]}
    more = [len(found[str(name), 0]) > len(want[str(name), 0]) for name in poisoned.user_names]
    assert any(more)
    assert not np.array(more)[~bad].any()
    assert any("malicious" in note for note in source.notes)


# --- the order of a file --------------------------------------


def table(order, count=8, digits=False):
    """Rows of six users without times: items in a random order, by their ids, or by the numbers in them."""
    random = np.random.default_rng(3)
    users, items = [], []
    for user in range(6):
        mine = random.choice(200, count, replace=False)
        users += [user] * count
        items += np.sort(mine).tolist() if order == "numbers" else mine.tolist()
    name = [f"item {i}" if digits else str(i) for i in items]
    return {"user": np.array(users), "item": np.array(name)}


@pytest.mark.parametrize("split", ["leave-one-out", "ratio", "compat-pfedrec"])
def test_rows_without_times_are_told(split):
    clients = partition(from_arrow(table("chance")), split=split)
    assert clients.protocol == f"{PROTOCOLS[split]} (order of the file)"
    (note,) = [note for note in clients.notes if "there are no times" in note]
    chance = "ratio-random" if split == "ratio" else "loo-random"
    assert note.startswith("there are no times: the order of the file stands for time")
    assert f'data.protocol = "{chance}"' in note


@pytest.mark.parametrize("digits", [False, True])
@pytest.mark.parametrize("backwards", [False, True])
def test_rows_by_item_id_are_told_louder(digits, backwards):
    rows = table("numbers", digits=digits)
    rows = {name: column[::-1] for name, column in rows.items()} if backwards else rows
    clients = partition(from_arrow(rows))
    assert clients.protocol == "loo-clean (rows sorted by item id)"
    assert sum(note.startswith("CAUTION: there are no times, and the rows") for note in clients.notes) == 1


def test_times_that_are_equal_are_no_times():
    rows = table("numbers") | {"time": np.repeat(7, 48)}
    assert partition(from_arrow(rows)).protocol == "loo-clean (rows sorted by item id)"
    assert "CAUTION: most times are equal" in "".join(partition(from_arrow(rows)).notes)
    by_chance = partition(from_arrow(table("chance") | {"time": np.repeat(7, 48)}))
    assert by_chance.protocol == "loo-clean (order of the file)"
    assert "most times are equal: the order of the file stands for time" in "".join(by_chance.notes)
    rows = table("numbers") | {"time": np.arange(48)}
    clients = partition(from_arrow(rows))
    assert clients.protocol == "loo-clean"
    assert not any("order of the file stands" in note or "CAUTION" in note for note in clients.notes)


@pytest.mark.parametrize("split", ["random-leave-one-out", "random-ratio", "global-random"])
def test_chance_needs_no_times(split):
    clients = partition(from_arrow(table("numbers")), split=split)
    assert clients.protocol == PROTOCOLS[split]
    assert not any("there are no times" in note for note in clients.notes)


def test_selected_rows_keep_their_parts():
    data = prepare_parts(synthetic_data(60, 50, mean_length=8), "loo-random", RATIO, 0)
    keep = np.arange(len(data.interactions.user)) % 2 == 0
    assert (select_rows(data, keep).columns[PART] == data.columns[PART][keep]).all()
