"""What is read off data is what they were made of."""

import json
import re

import numpy as np
import pytest

import jaxfed as jf
from jaxfed.data.interactions import data_digest
from jaxfed.data.shape_estimates import search_strength
from jaxfed.data.sources.shaped import make_interactions
from jaxfed.data.sources.shapes import read_shape
from jaxfed.data.writing import write_rows
from tests.data.test_shapes import HEAVY


# Tolerances are twice the spread over seeds of data and of the estimate (some 100,000 rows). In dense data, and in a
# small catalogue with many loyal groups, a group runs out of items that a user lacks: loyalty is found 0.04 too high.
@pytest.mark.parametrize(
    ("name", "order", "groups", "loyalty"),
    [
        ("small", 0.3, 16, 0.5),
        ("small", 0.6, 6, 0.3),
        ("sparse-shop", 0.1, 30, 0.8),
        ("sparse-shop", 0.2, 24, 0.5),
        ("very-sparse-shop", 0.1, 30, 0.8),
    ],
)
def test_known_strengths_come_back(name, order, groups, loyalty):
    shape = read_shape(name)._replace(order=order, groups=groups, loyalty=loyalty)
    found = jf.data.describe(make_interactions(shape, 5))
    assert found["order"] == pytest.approx(order, abs=0.04)
    assert found["groups"] == pytest.approx(groups, abs=1)
    assert found["loyalty"] == pytest.approx(loyalty, abs=0.06)


@pytest.mark.parametrize("name", ["small", "sparse-shop"])
def test_where_there_is_nothing_nothing_is_found(name):
    found = jf.data.describe(make_interactions(read_shape(name)._replace(order=0, groups=1, loyalty=0), 5))
    assert (found["groups"], found["loyalty"]) == (1, 0)
    assert found["order"] < 0.05  # the root of a chance agreement, which is above zero by half


@pytest.mark.parametrize("name", ["small", "very-sparse-shop"])
def test_a_description_of_data_made_from_a_description_is_nearly_the_same(name):
    one = jf.data.describe(jf.data.load("shape", description=name, seed=1))
    two = jf.data.describe(jf.data.from_description(json.loads(json.dumps(one)), seed=2))
    for key in ("users", "items", "rows", "times", "ties"):
        assert one[key] == two[key]
    # of lengths that are rounded: half a row; the ten longest are rounded up or down together
    for (level, a), (same, b) in zip(one["lengths"], two["lengths"], strict=True):
        assert level == same
        assert b == pytest.approx(a, rel=0.03, abs=0.5)
    for (items, a), (same, b) in zip(one["popularity"], two["popularity"], strict=True):
        assert items == same
        assert b == pytest.approx(a, rel=0.01)
    assert two["order"] == pytest.approx(one["order"], abs=0.03)
    assert two["loyalty"] == pytest.approx(one["loyalty"], abs=0.04)
    # with a handful of rows a user the weakest of 24 groups do not stand out from chance
    assert two["groups"] == pytest.approx(one["groups"], abs=4)


def test_times_and_ties():
    tied = jf.data.describe(jf.data.from_description(HEAVY | {"ties": 0.3, "order": 0.5}))
    assert tied["times"]
    assert tied["ties"] == pytest.approx(0.3, abs=0.03)
    without = jf.data.describe(jf.data.from_description(HEAVY | {"times": False, "order": 0.5}))
    assert (without["times"], without["order"]) == (False, 0)
    rows = jf.data.from_description(HEAVY).interactions
    same = jf.data.describe(jf.data.from_arrays(rows.user, rows.item, times=np.full(5_000, 1_600_000_000)))
    assert (same["times"], same["order"]) == (False, 0)


def test_a_repeated_pair_counts_once():
    data = jf.data.from_description(HEAVY)
    rows = data.interactions
    twice = jf.data.from_arrays(*(np.concatenate([x, x]) for x in (rows.user, rows.item)))
    assert jf.data.describe(twice)["rows"] == 5_000


def test_nothing_of_a_single_person_is_told():
    users, items = np.repeat(np.arange(100), 5), np.tile(np.arange(5), 100)
    alone = np.arange(400)  # one user of 400 rows, most of them of items that nobody else has
    data = jf.data.from_arrays(
        [f"ann{u}" for u in users] + ["secret"] * 400, [f"book{i}" for i in items] + [f"book{i}" for i in alone]
    )
    found = jf.data.describe(data)
    assert found["lengths"][-1] == [1, pytest.approx((400 + 9 * 5) / 10)]
    text = json.dumps(found)
    assert "400.0" not in text
    assert not re.search("ann|secret|book", text)


def test_the_least_strength_is_found():
    assert search_strength(lambda x: x * x, 0.36) == pytest.approx(0.6, abs=0.01)
    assert search_strength(lambda x: x * (1 - x), 0.1875) == pytest.approx(0.25, abs=0.01)  # and not 0.75
    assert search_strength(lambda x: x, -1) == 0
    assert search_strength(lambda x: x * (1 - x), 5) == 0.5


def test_written_rows_are_the_same_data(tmp_path):
    data = jf.data.load("shape", description="small", seed=2)
    for name in ("rows.csv", "rows.parquet"):
        write_rows(data, str(tmp_path / name))
        again = jf.data.read(str(tmp_path / name))
        assert data_digest(again) == data_digest(data)
    without = jf.data.from_description(HEAVY | {"times": False})
    write_rows(without, str(tmp_path / "without.csv"))
    assert (tmp_path / "without.csv").read_text().startswith('"user","item"\n')
    for name, says in (("rows.csv", "is there already"), ("rows.txt", "ends in .csv"), ("no/rows.csv", "create it")):
        with pytest.raises(ValueError, match=says):
            write_rows(data, str(tmp_path / name))
