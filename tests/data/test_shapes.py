"""Data made to a description: what was asked for is what there is."""

import json
import re
import time

import numpy as np
import pytest

import jaxfed as jf
from jaxfed.data.interactions import data_digest
from jaxfed.data.sources.example_shapes import SHAPES
from jaxfed.data.sources.shaped import make_interactions
from jaxfed.data.sources.shapes import (
    LEVELS,
    history_lengths,
    make_item_counts,
    parse_shape,
    quantiles_of_lengths,
    read_shape,
    shares_of_items,
)

# one row in three a user of 2, half of the items with one or two rows
HEAVY = {
    "users": 500,
    "items": 400,
    "rows": 5_000,
    "lengths": [[0, 1], [0.1, 1], [0.3, 2], [0.5, 4], [0.9, 25], [0.99, 90], [1, 110]],
    "popularity": [[1, 0.05], [10, 0.3], [100, 0.88], [200, 0.95], [400, 1]],
}


def counts(data):
    rows = data.interactions
    return np.bincount(rows.user, minlength=len(data.users)), np.bincount(rows.item, minlength=len(data.items))


@pytest.mark.parametrize("name", [name for name in SHAPES if name != "dense-films"])
def test_the_numbers_are_those_of_the_description(name):
    shape = read_shape(name)
    data = jf.data.load("shape", description=name)
    length, count = counts(data)
    assert (len(length), len(count), length.sum()) == (shape.users, shape.items, shape.rows)
    rows = data.interactions
    assert len(np.unique(rows.user.astype(np.int64) * shape.items + rows.item)) == shape.rows
    # ten users stand for a quantile; a length is rounded, so one row off is allowed where lengths are short
    for (_, now), (_, asked) in zip(quantiles_of_lengths(length), shape.lengths, strict=True):
        assert now == pytest.approx(asked, rel=0.04, abs=0.6)
    for (_, now), (_, asked) in zip(shares_of_items(count), shape.popularity, strict=True):
        assert now == pytest.approx(asked, rel=0.01)


def test_dense_data_have_the_popularity_but_for_what_no_exchange_can_place():
    shape = read_shape("dense-films")._replace(users=2000, rows=327_152)
    length, count = counts(make_interactions(shape))
    assert length.sum() == 327_152
    assert np.sort(length).tolist() == np.sort(history_lengths(shape)).tolist()
    assert np.abs(np.sort(count) - np.sort(make_item_counts(shape))).sum() / 2 < 0.01 * shape.rows


def test_short_histories_and_rare_items_are_there():
    length, count = counts(make_interactions(parse_shape(HEAVY, "")))
    assert 0.25 < (length <= 2).mean() < 0.45  # asked: 30 %, then up to 4 at the half
    assert length.max() > 10 * np.median(length)
    assert 0.4 < (count <= 2).mean() < 0.7  # the last 200 items share 5 % of the rows: 1.25 each


def test_a_function_of_description_and_seed():
    make = [make_interactions(parse_shape(HEAVY | more, ""), seed) for more, seed in (({}, 0), ({}, 0), ({}, 1))]
    one, same, other = map(data_digest, make)
    assert one == same != other


def successors(data):
    """The share of steps that are among the five most frequent steps from their item."""
    user, item = data.interactions.user, data.interactions.item
    order = np.argsort(user, kind="stable")
    user, item = user[order], item[order]
    step = (item[:-1].astype(np.int64) * len(data.items) + item[1:])[user[1:] == user[:-1]]
    pair, count = np.unique(step, return_counts=True)
    rank = np.lexsort((-count, pair // len(data.items)))
    start = np.searchsorted(pair[rank] // len(data.items), pair[rank] // len(data.items))
    return count[rank][np.arange(len(rank)) - start < 5].sum() / count.sum()


def test_order_is_there_when_it_is_asked_for():
    shape = read_shape("small")
    none, some, all_of_it = (successors(make_interactions(shape._replace(order=x))) for x in (0, 0.3, 1))
    assert none + 0.05 < some < all_of_it - 0.2


def test_loyal_users_share_more_items():
    def agreement(loyalty):
        rows = make_interactions(read_shape("small")._replace(loyalty=loyalty, groups=6)).interactions
        taken = np.zeros((1336, 2068))
        taken[rows.user, rows.item] = 1
        return np.square(taken.T @ taken / np.sqrt(np.outer(taken.sum(0), taken.sum(0)))).sum()

    none, some, much = map(agreement, (0.0, 0.4, 0.8))
    assert none * 1.02 < some < much / 1.1


def test_times():
    shape = parse_shape(HEAVY | {"ties": 0.3}, "")
    data = make_interactions(shape)
    rows = data.interactions
    assert (np.diff(rows.time) >= 0).all()
    order = np.argsort(rows.user, kind="stable")
    later = np.diff(rows.user[order]) == 0
    tied = (np.diff(rows.time[order]) == 0)[later].mean()
    assert tied == pytest.approx(0.3, abs=0.03)  # four standard deviations of 4,500 steps
    without = make_interactions(shape._replace(times=False))
    assert without.interactions.time.tolist() == list(range(5_000))
    assert "no time" in without.notes[0]
    assert (np.diff(without.interactions.user) == 0).mean() < 0.1  # the file's order says nothing


def test_the_curves_come_back():
    for name in SHAPES:
        shape = read_shape(name)
        assert history_lengths(shape).sum() == make_item_counts(shape).sum() == shape.rows
        assert make_item_counts(shape).min() >= 1
        assert {level for level, _ in shape.lengths} <= {0, *LEVELS, 1}


def test_a_million_rows_take_seconds():
    shape = read_shape("check-ins")
    begin = time.process_time()
    make_interactions(shape)
    assert time.process_time() - begin < 20  # 1 to 2 s; twenty where six processes share the caches


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"usres": 3}, "unknown key 'usres'; did you mean 'users'"),
        ({"users": "many"}, "users is 'many': it must be a whole number"),
        ({"users": -1}, "users is -1"),
        ({"users": 1e12}, "users is 1000000000000.0"),
        ({"users": float("nan")}, "users is nan"),
        ({"rows": 400_000}, "there must be 500 to 200,000"),
        ({"rows": 100}, "there must be 500 to 200,000"),
        ({"rows": 50_000}, "lengths add up to"),
        ({"order": 2}, "order is 2: it must be a number from 0 to 1"),
        ({"loyalty": None}, "loyalty is None"),
        ({"times": 1}, "times is 1: it must be true or false"),
        ({"groups": 0}, "groups is 0"),
        ({"groups": 500}, "500 groups of 400 items"),
        ({"lengths": [[0, 1], [1]]}, "lengths is"),
        ({"lengths": [[0, 5], [1, 2]]}, "lengths must not fall"),
        ({"lengths": [[0, 1], [1, 500]]}, "must lie in 1 to 400"),
        ({"popularity": [[1, 0.1]]}, "the last pair must be [400, 1]"),
        ({"popularity": [[1, 0.5], [2, 0.4], [400, 1]]}, "not fall"),
        ({"popularity": "steep"}, "popularity is 'steep'"),
        ({"popularity": [[1.5, 0.1], [400, 1]]}, "1.5 items: numbers must be whole"),
        ({"popularity": [[2, 0.3], [400, 1]]}, "2 items cannot have 30.0% of the rows: 500 users have"),
    ],
)
def test_what_is_no_description_is_named(more, says):
    with pytest.raises(ValueError, match=re.escape("my.json: ")) as error:
        parse_shape(HEAVY | more, "my.json")
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_what_the_machine_cannot_hold_is_refused_before_it_is_made(monkeypatch):
    parse_shape(HEAVY, "my.json")
    monkeypatch.setattr("jaxfed.data.room.free_memory", lambda: 300_000)  # 5,000 rows take 500 kB
    with pytest.raises(ValueError, match=r"GB are free: lower users, items and rows of my.json"):
        parse_shape(HEAVY, "my.json")


def test_a_file_that_is_none(tmp_path):
    with pytest.raises(ValueError, match=r"no description .*: give a JSON file .* or one of dense-films"):
        read_shape(str(tmp_path / "nothing.json"))
    (tmp_path / "bad.json").write_text("user,item\n1,2\n")
    with pytest.raises(ValueError, match="not JSON"):
        read_shape(str(tmp_path / "bad.json"))
    (tmp_path / "list.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="an object with keys"):
        read_shape(str(tmp_path / "list.json"))
    (tmp_path / "few.json").write_text(json.dumps({"users": 3}))
    with pytest.raises(ValueError, match="the key 'items' is missing"):
        read_shape(str(tmp_path / "few.json"))
    (tmp_path / "good.json").write_text(json.dumps(HEAVY | {"derived": {"density": 0.1}}))
    assert read_shape(str(tmp_path / "good.json")) == parse_shape(HEAVY, "")
