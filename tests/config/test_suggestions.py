"""What is suggested for data of several shapes, and that it can be trained."""

import pytest

import jaxfed as jf
from jaxfed.config.schema import make_config
from jaxfed.config.suggestions import (
    DataFacts,
    choose_model,
    make_suggested_table,
    read_file,
    suggest_config,
    suggest_table,
)
from tests.data.test_shapes import HEAVY

FACTS = DataFacts(users=8000, items=12_000, length=5, holders=13, pairs=500_000, has_order=True, order=0.3)


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
    ],
)
def test_the_model_follows_the_data(facts, model):
    assert choose_model(facts).value == model


def test_times_decide_what_is_held_out():
    assert suggested(order=0.5)[0]["data.protocol"] == "loo-clean"
    assert suggested(times=False)[0]["data.protocol"] == "loo-random"


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
