"""What is suggested for data of several shapes, and that it can be trained."""

from types import SimpleNamespace

import numpy as np
import pytest

import jaxfed as jf
from jaxfed.config.schema import make_config
from jaxfed.config.suggestions import (
    DataFacts,
    choose_model,
    make_suggested_table,
    read_file,
    suggest_config,
    suggest_cutoffs,
    suggest_table,
)
from jaxfed.data.ragged import make_ragged
from tests.data.test_shapes import HEAVY

FACTS = DataFacts(users=8000, items=12_000, rows=48_000, length=5, holders=13, pairs=500_000, has_order=True, order=0.3)
TINY = SimpleNamespace(protocol="loo-clean", population=SimpleNamespace(asked=SimpleNamespace(negatives=None)))


def suggested(model="", **shape):
    made = suggest_config(jf.data.partition(jf.data.from_description(HEAVY | shape)), model)
    assert all(each.reason for each in made)
    return {each.key: each.value for each in made}, make_config(make_suggested_table(made))


@pytest.mark.parametrize(
    ("facts", "model"),
    [
        (FACTS, "ease"),  # of five items, hardly a successor is met twice
        (FACTS._replace(length=20.0), "transitions"),
        (FACTS._replace(length=20.0, order=0.02), "ease"),
        (FACTS._replace(has_order=False, order=0.0), "ease"),
        (FACTS._replace(pairs=900_000_000), "mf"),
        (FACTS._replace(length=20.0, items=65_535), "transitions"),
        (FACTS._replace(length=20.0, items=65_536), "mf"),
    ],
)
def test_the_model_follows_the_data(facts, model):
    assert choose_model(facts).value == model


def test_times_decide_what_is_held_out():
    assert suggested(order=0.5)[0]["data.protocol"] == "loo-clean"
    assert suggested(times=False)[0]["data.protocol"] == "loo-random"


def test_a_test_knows_the_validation_item_where_the_model_reads_histories():
    assert suggested("ease", order=0.5)[1].evaluation.history == "all"
    assert suggested("ease", times=False)[1].evaluation.history == "train"
    assert suggested("mf", order=0.5)[1].evaluation.history == "train"  # its vectors are trained, and know train items


@pytest.mark.parametrize("split", ["leave-one-out", "random-leave-one-out"])
def test_times_that_are_equal_say_nothing(split):
    data = jf.data.from_description(HEAVY | {"order": 0.5})
    same = data._replace(interactions=data.interactions._replace(time=np.zeros_like(data.interactions.time)))
    made = {each.key: each.value for each in suggest_config(jf.data.partition(same, split=split))}
    assert made["data.protocol"] == "loo-random"
    assert made["model.name"] == "ease"


@pytest.mark.parametrize(
    ("most", "cutoffs", "select"), [(99, None, None), (12, (5, 10), None), (6, (5,), 5), (3, (4,), 4)]
)
def test_cut_offs_are_below_the_given_negatives(most, cutoffs, select):
    asked = SimpleNamespace(negatives=make_ragged(np.arange(2 * most), np.repeat([0, 1], most), 2))
    made = suggest_cutoffs(SimpleNamespace(population=SimpleNamespace(asked=asked)))
    said = {each.key: each.value for each in made}
    assert said.get("evaluation.at") == cutoffs
    assert said.get("evaluation.select") == (f"val/full/ndcg@{select}" if select else None)


def test_what_is_suggested_is_a_configuration():
    for model in ("transitions", "ease", "mf"):
        config = suggested(model)[1]
        assert config.model.name == model
        assert config.rounds == (400 if model == "mf" else 1)
    # the penalties are around the number of holders of an interaction's item
    low, middle, high = suggested("ease")[0]["model.l2_grid"]
    assert 0 < low < middle < high
    assert 5 < middle < 500
    with pytest.raises(ValueError, match="choose one of transitions, ease, mf"):
        suggested("magic")


def test_a_sum_over_pairs_that_cannot_be_is_not_written(monkeypatch):
    monkeypatch.setattr("jaxfed.config.suggestions.collect_facts", lambda data: FACTS._replace(items=70_000))
    assert {each.key: each.value for each in suggest_config(TINY)}["model.name"] == "mf"
    with pytest.raises(ValueError, match="at most 65,535 items, there are 70,000"):
        suggest_config(TINY, "ease")


def test_what_was_asked_for_stays(tmp_path):
    """Also where it is the default."""
    path = tmp_path / "rows.csv"
    path.write_text("who,item\n" + "".join(f"u{user},i{item}\n" for user in range(9) for item in range(user, user + 5)))
    table, reasons = suggest_table(read_file(str(path), ["--user", "who"]))
    assert (table["data"]["protocol"], table["data"]["user"]) == ("loo-random", "who")
    assert "data.protocol" in reasons
    for words in (["--protocol", "loo-clean"], ["--data.protocol=loo-clean"]):
        table, reasons = suggest_table(read_file(str(path), ["--user", "who", *words]))
        assert table["data"]["protocol"] == "loo-clean"
        assert "data.protocol" not in reasons
