"""Items that nobody trains on: which rows test, what is drawn as a negative, and what is refused."""

import numpy as np
import pytest

from jaxfed.config.build import build_from_config, load_data
from jaxfed.config.schema import make_config
from jaxfed.data.cold_items import exclude_untrained_items
from jaxfed.data.interactions import Dataset
from jaxfed.data.loading import from_arrays
from jaxfed.data.preparation import prepare_population
from jaxfed.data.sources.synthetic import synthetic_data
from jaxfed.training.rounds import evaluate_model, initial_arrays, make_run_keys, prepare_round, scored_model

SOURCE = synthetic_data(60, 40, mean_length=9.0)


def histories(lists):
    """{user: set of item ids}."""
    return lambda data: {
        name: {data.items[item] for item in lists.of(number)} for number, name in enumerate(data.users)
    }


@pytest.mark.parametrize("protocol", ["loo-clean", "loo-random", "ratio-clean", "ratio-random"])
def test_all_rows_of_cold_items_test_and_no_others(protocol):
    data, population = prepare_population(SOURCE, cold_items=0.2, protocol=protocol)
    had = {name: set() for name in data.users}
    for user, item in zip(SOURCE.interactions.user, SOURCE.interactions.item, strict=True):
        if SOURCE.users[user] in had:
            had[SOURCE.users[user]].add(SOURCE.items[item])
    train, valid, test = (histories(each)(data) for each in (population.train, population.valid, population.test))
    cold = set().union(*test.values())
    assert len(cold) == 8
    for name, items in had.items():
        assert test[name] == items & cold
        assert train[name] | valid[name] == items - cold
        assert len(valid[name]) >= min(1, len(items - cold) - 1)
    assert population.protocol == f"cold items, validation {protocol}"
    assert "8 of 40 items are cold" in " ".join(data.notes)


def test_which_items_are_cold_is_a_function_of_the_seed_and_the_ids():
    def cold(data: Dataset, **more):
        made, population = prepare_population(data, cold_items=0.2, **more)
        return {made.items[item] for item in population.test.values}

    rows = SOURCE.interactions
    turned = SOURCE._replace(interactions=rows.at(np.arange(len(rows.user))[::-1]))
    assert cold(SOURCE) == cold(turned)
    assert cold(SOURCE) != cold(SOURCE, deal=1)


def test_nobody_draws_a_cold_item_as_a_negative():
    """Nor is it in a message: over rounds in which every other item is."""
    table = {"data": {"name": "synthetic", "users": 60, "items": 40, "mean_length": 9.0, "cold_items": 0.2}}
    config = make_config(table | {"cohort": {"name": "everyone"}, "work": {"negatives": 3}, "model": {"dim": 4}})
    it = build_from_config(config, load_data(config.data))
    cold = np.unique(it.data.population.test.values)
    state = initial_arrays(it, 0)["state"]
    start, seen = np.asarray(state.shared.params["tables"]["item"].rows), set()
    for t in range(4):
        cohort = prepare_round(it, 0, t).cohort
        seen |= set(np.asarray(cohort.rows).tolist()) if cohort.rows is not None else set()
        state, _ = it.algorithm.step(state, cohort, make_run_keys(0).rounds)
    moved = (np.asarray(state.shared.params["tables"]["item"].rows) != start).any(1)
    assert not moved[cold].any()
    assert moved.sum() == 40 - len(cold)
    values = evaluate_model(it, scored_model(it, state), "test", make_run_keys(0).evaluation)
    assert 0 <= values["test/full/hr@10"] <= 1


def test_users_of_cold_items_alone_are_left_out():
    users, items = [1, 1, 1, 2, 2, 2, 3], ["a", "b", "c", "a", "b", "d", "c"]
    for seed in range(20):
        try:
            data, population = prepare_population(from_arrays(users, items), cold_items=0.25, deal=seed)
        except ValueError:
            continue
        if set(data.items[population.test.values]) == {"c"}:
            assert data.users.tolist() == ["1", "2"]
            assert "have no train row" in " ".join(data.notes)
            return
    raise AssertionError("the item c was never the cold one")


def test_excluded_items_are_those_without_a_train_row():
    population = prepare_population(SOURCE, cold_items=0.2)[1]
    again = exclude_untrained_items(population)
    np.testing.assert_array_equal(again.excluded.values, population.excluded.values)
    for user in range(len(population.user_names)):
        want = np.union1d(population.train.of(user), np.setdiff1d(np.arange(40), population.train.values))
        np.testing.assert_array_equal(population.excluded.of(user), want)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"cold_items": 1.0}, "data.cold_items is 1: a share of 40 items, set it above 0 and below 1"),
        ({"cold_items": -0.1}, "data.cold_items is -0.1"),
        ({"cold_items": 0.001}, "data.cold_items is 0.001"),
        ({"cold_items": 0.2, "protocol": "global-time"}, 'does not go with data.protocol = "global-time"'),
        ({"cold_items": 0.2, "protocol": "compat-pfedrec"}, 'does not go with data.protocol = "compat-pfedrec"'),
    ],
)
def test_what_cannot_be_is_refused(more, said):
    with pytest.raises(ValueError, match=said) as error:
        prepare_population(SOURCE, **more)
    assert "\n" not in str(error.value)


def test_data_that_say_which_rows_test_are_refused():
    given = from_arrays([1, 1, 1, 2, 2], ["a", "b", "c", "a", "b"], parts=["train", "train", "test", "train", "train"])
    with pytest.raises(ValueError, match="the data say which rows test"):
        prepare_population(given, cold_items=0.4)


@pytest.mark.parametrize("more", [{"clients": "device"}, {"promoted": ("3",), "malicious": 0.2}])
def test_what_would_bring_cold_items_back_is_refused(more):
    with pytest.raises(ValueError, match="bring cold items back into training"):
        prepare_population(synthetic_data(60, 50, mean_length=12), cold_items=0.3, **more)
