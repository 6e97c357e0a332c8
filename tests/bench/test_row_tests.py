"""What the table says of hand-made users."""

import json

import numpy as np
import pytest
from scipy import stats

from jaxfed.bench.own_table_text import (
    difference_cells,
    figure_cells,
    format_p,
    list_table_notes,
    own_table_markdown,
    print_own_table,
)
from jaxfed.bench.row_tests import COMPARED, add_row_tests, average_users
from jaxfed.training.records import HEADLINES

RANDOM = np.random.default_rng(0)
USERS = np.array([f"u{each}" for each in range(400)])
EASE = RANDOM.uniform(0, 1, 400)
COMPARED_VALUES = {
    "popularity": RANDOM.uniform(0, 0.4, 400),
    "item-kNN": EASE - 0.1 + RANDOM.normal(0, 0.1, 400),
    "EASE": EASE,
    "iALS": EASE + RANDOM.normal(0, 0.2, 400),
}


def figures(values, users=USERS):
    return {"user": users} | {name: values + 0.01 * place for place, name in enumerate(HEADLINES)} | {COMPARED: values}


def row(name, values, **more):
    facts = {"protocol": "loo-clean", "negatives": "99 uniform, 5 draws", "leaky": False, "best_round": 3.0}
    facts |= {"all_users": 400, "bytes_up": 1.5e6, "bytes_down": 2e3, "seconds": 4.0, "seeds": 1}
    return {"name": name, **facts, **{each: float(figures(values)[each].mean()) for each in HEADLINES}, **more}


def made(values=COMPARED_VALUES, **more):
    users = {name: figures(each) for name, each in values.items()}
    return add_row_tests([row(name, each, **more) for name, each in values.items()], users)


def test_the_numbers_are_those_of_numpy_and_scipy():
    rows = {each["name"]: each for each in made()}
    for name, values in COMPARED_VALUES.items():
        each = rows[name]
        assert each["users"] == 400
        for figure in HEADLINES:
            assert each[f"{figure}_se"] == pytest.approx(np.std(figures(values)[figure], ddof=1) / 20)
        for base in ("popularity", "item-kNN", "EASE"):
            if base == name:
                assert f"minus {base}" not in each
                continue
            other = COMPARED_VALUES[base]
            assert each[f"minus {base}"] == pytest.approx((values - other).mean())
            assert each[f"minus {base}_se"] == pytest.approx(np.std(values - other, ddof=1) / 20)
            assert each[f"minus {base}_p"] == pytest.approx(stats.ttest_rel(values, other).pvalue)
            alone = each[f"minus {base}_p"]  # three rows are compared with each baseline
            assert alone <= each[f"minus {base}_p_holm"] <= min(3 * alone, 1)
    assert rows["item-kNN"]["minus EASE_p_holm"] < 1e-6
    assert rows["iALS"]["minus EASE_p_holm"] > 0.05
    assert json.dumps(made())


def test_the_best_and_its_equals_are_marked():
    places = {each["name"]: each["place"] for each in made()}
    best, equal = sorted(("EASE", "iALS"), key=lambda name: -COMPARED_VALUES[name].mean())
    assert places == {"popularity": "", "item-kNN": "", best: "best", equal: "equal"}
    alone = add_row_tests([row("EASE", EASE)], {"EASE": figures(EASE)})
    assert alone[0]["place"] == "best"
    assert not any(name.startswith("minus") for name in alone[0])
    assert add_row_tests([], {}) == []


def test_users_are_paired_by_their_names():
    """One row has its users in another order, and lacks some."""
    values = COMPARED_VALUES["item-kNN"]
    order = np.random.default_rng(1).permutation(400)[:300]
    users = {"EASE": figures(EASE), "item-kNN": figures(values[order], USERS[order])}
    found = add_row_tests([row("EASE", EASE), row("item-kNN", values)], users)[1]
    assert found["users"] == 300
    assert found["minus EASE_p"] == pytest.approx(stats.ttest_rel(values[order], EASE[order]).pvalue)
    assert found["minus EASE"] == pytest.approx((values - EASE)[order].mean())


def test_seeds_are_averaged_user_by_user():
    one, other = figures(EASE), figures(COMPARED_VALUES["iALS"])
    mean = average_users([one, other])
    assert mean[COMPARED] == pytest.approx((EASE + COMPARED_VALUES["iALS"]) / 2)
    assert mean["user"] is one["user"]
    with pytest.raises(AssertionError):
        average_users([one, figures(EASE, USERS[::-1])])


def test_the_text_of_the_table(capsys):
    rows = made(quick=True)
    heads, *lines = figure_cells(rows)
    assert heads[:6] == ["", "method", "HR@10, full", "NDCG@10, full", "HR@10, 99", "NDCG@10, 99"]
    ease = next(line for line in lines if line[1] == "EASE: QUICK")
    se = np.std(EASE, ddof=1) / 20
    assert ease[3] == f"{EASE.mean():.4f} ± {se:.4f}".replace("0.", ".")
    assert ease[6:] == ["3", "1.50", "0.00", "4.0", "1"]
    heads, *lines = difference_cells(rows)
    assert heads[2:] == ["minus popularity", "p, popularity", "minus item-kNN", "p, item-kNN", "minus EASE", "p, EASE"]
    knn = next(line for line in lines if line[1] == "item-kNN: QUICK")
    assert knn[4:6] == ["", ""]
    assert knn[6].startswith("-.1")
    assert knn[7] == "<.0001"
    text = own_table_markdown(rows)
    assert len({line.count("|") for line in text.splitlines()[:6]}) == 1
    for words in (
        "400 users; protocol loo-clean",
        "paired t-test over users, with Holm's correction in each",
        "standard error over users",
    ):
        assert words in text
    print_own_table(rows, "my.csv")
    shown = capsys.readouterr().out
    for words in ("my.csv", ease[3], "<.0001", "(p ≥ 0.05)", "400 users"):
        assert words in shown


def test_small_and_missing_numbers():
    assert [format_p(p) for p in (0.5, 1.0, 0.00005, float("nan"))] == [".5000", "1.0000", "<.0001", ""]
    one = add_row_tests([row("EASE", EASE[:1])], {"EASE": figures(EASE[:1], USERS[:1])})
    assert figure_cells(one)[1][3] == f"{EASE[0]:.4f}".replace("0.", ".")  # a single user has no error
    leaky = figure_cells(made({"EASE": EASE}, leaky=True, negatives="given, 40 to 99 a user"))
    assert leaky[1][1] == "EASE: LEAKY"
    assert leaky[0][4] == "HR@10, sampled"
    assert difference_cells(made({"EASE": EASE})) == []
    assert (
        list_table_notes(made(all_users=2000))[0]
        == "400 of 2,000 users; protocol loo-clean; negatives: 99 uniform, 5 draws."
    )
