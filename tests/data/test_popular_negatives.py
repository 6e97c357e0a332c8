"""`work.negative_sampling = "popularity"`: items are drawn in proportion to their train interactions."""

from collections import Counter

import numpy as np
import pytest

from jaxfed.config.build import build_from_config, load_data
from jaxfed.config.schema import make_config
from jaxfed.data.batch_checks import check_batching
from jaxfed.data.batching import Batching, draw_examples, draw_negatives
from jaxfed.data.popular_negatives import find_popular_items, make_popularity_index
from jaxfed.data.ragged import make_domains, make_ragged
from jaxfed.data.sequences import draw_sequences
from tests.small import same

DATA = {"name": "synthetic", "users": 60, "items": 40, "mean_length": 8.0}
TABLE = {
    "model": {"name": "mf", "dim": 4},
    "work": {"batch_size": 16, "negatives": 4, "negative_sampling": "popularity", "optimizer": {"name": "sgd"}},
    "channel": [{"name": "per_row_mean"}],
    "cohort": {"name": "uniform", "size": 4},
}
KINDS = {
    "users": {},
    "organisations": {"data": DATA | {"clients": "silo", "silos": 5}},
    "devices": {"data": DATA | {"clients": "device"}},
    "cold items": {"data": DATA | {"cold_items": 0.2}},
    "cold clients": {"data": DATA | {"cold": 0.2}},
}


def build(more=()):
    table = TABLE | {"data": DATA} | dict(more)
    config = make_config(table)
    return build_from_config(config, load_data(config.data))


def count_popularity(population):
    return np.bincount(population.train.values, minlength=population.num_items)


@pytest.mark.parametrize("kind", KINDS)
def test_each_interaction_outside_a_users_list_is_one_chance(kind):
    """All numbers of interactions, user by user: each item comes as often as it was met, those on the list never."""
    population = build(KINDS[kind]).data.population
    index, popularity = population.popularity, count_popularity(population)
    for user in range(len(population.user_names)):
        rank = np.arange(index.open[user])
        found = find_popular_items(index, population.excluded, np.array([user]), rank[None])[0]
        want = popularity.copy()
        want[population.excluded.of(user)] = 0
        assert Counter(found.tolist()) == Counter(np.repeat(np.arange(len(want)), want).tolist())


def test_domains_by_hand():
    """Two domains of which the items alternate: a user is offered the interactions of its own domain alone."""
    train = make_ragged(np.array([0, 2, 2, 4, 1, 3, 3]), np.array([0, 0, 1, 1, 2, 2, 3]), 4)
    domains = make_domains(np.array([0, 1, 0, 1, 0, 1]))
    of = np.array([0, 0, 1, 1])
    span = domains.start[of], domains.start[of + 1] - domains.start[of]
    index = make_popularity_index(train, train, 6, span, domains)
    assert index.open.tolist() == [1, 1, 0, 1]  # item 4; item 0; users 2 and 3: items 1 and 3, item 1
    found = find_popular_items(index, train, np.array([0, 1, 3]), np.zeros((3, 1), np.int64))
    assert domains.items[found].tolist() == [[4], [0], [1]]


def test_shares_are_those_of_popularity():
    """Chi-square of many draws of one user, at six standard deviations, and uniform ones for a power of the test."""
    population = build().data.population
    user = int(np.argmax(population.train.counts))
    weights = count_popularity(population).astype(float)
    weights[population.excluded.of(user)] = 0
    random32 = np.random.default_rng(0).integers(0, 1 << 32, (1, 40_000), np.uint64)

    def chi_square(population):
        found = draw_negatives(population, np.array([user]), random32)[0]
        seen = np.bincount(found, minlength=len(weights))
        want = weights / weights.sum() * random32.size
        assert population.popularity is None or not seen[weights == 0].any()  # nor is any on the user's list
        likely = want > 0
        return np.square(seen - want)[likely] @ (1 / want[likely]), likely.sum() - 1

    found, freedom = chi_square(population)
    assert found < freedom + 6 * np.sqrt(2 * freedom)
    uniform, freedom = chi_square(population._replace(popularity=None))
    assert uniform > 10 * freedom


def test_examples_have_the_positives_of_uniform_ones():
    """Only the negatives differ, and none is on its user's list."""
    population = build().data.population
    batching, clients = Batching(16, 4), np.arange(10)
    drawn = draw_examples(population, batching, clients, 0, 3)
    other = draw_examples(population._replace(popularity=None), batching, clients, 0, 3)
    same(drawn.item[drawn.label], other.item[other.label])
    assert not np.array_equal(drawn.item, other.item)
    owner = np.repeat(drawn.first, drawn.examples)
    for user, item in zip(owner[~drawn.label], drawn.item[~drawn.label, 0], strict=True):
        assert item not in population.excluded.of(user)


@pytest.mark.parametrize("shared", [False, True])
def test_negatives_of_histories_are_popular_ones(shared):
    """Over all items that anybody met; those of the history may be among them, as where they are uniform."""
    model = {"name": "sasrec", "dim": 4, "length": 6, "loss": "bce"}
    work = TABLE["work"] | {"negatives": 200, "shared_negatives": shared}
    parts = build({"model": model, "work": work})
    population, weights = parts.data.population, count_popularity(parts.data.population).astype(float)
    rounds = range(20)
    drawn = [draw_sequences(population, parts.batching, np.arange(8), 0, round).negative for round in rounds]
    seen = np.bincount(np.concatenate([x[:1].ravel() for x in drawn]), minlength=len(weights))
    want, likely = weights / weights.sum() * seen.sum(), weights > 0
    assert not seen[~likely].any()
    freedom = likely.sum() - 1
    assert np.square(seen - want)[likely] @ (1 / want[likely]) < freedom + 6 * np.sqrt(2 * freedom)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"work": TABLE["work"] | {"negatives": 0}}, "no negatives are drawn here"),
        ({"work": TABLE["work"] | {"negative_sampling": "often"}}, "negative_sampling"),
        ({"model": {"name": "sasrec", "dim": 4, "length": 6, "loss": "softmax"}}, "no negatives are drawn here"),
        ({"model": {"name": "sasrec", "dim": 4, "length": 6, "loss": "gbce"}}, "right for uniform negatives alone"),
        (
            {"channel": [{"name": "clip"}, {"name": "gaussian", "multiplier": 1.0}]},
            "counted without noise, which epsilon does not cover",
        ),
    ],
)
def test_where_it_cannot_be_it_is_refused_in_a_line(more, words):
    with pytest.raises(ValueError, match=words) as error:
        build(more)
    assert "\n" not in str(error.value)


def test_a_user_who_has_all_that_anybody_has_is_named():
    population = build().data.population
    index = population.popularity._replace(open=np.where(np.arange(60) == 7, 0, population.popularity.open))
    with pytest.raises(ValueError, match=f"user {population.user_names[7]} has every item that anybody has"):
        check_batching(population._replace(popularity=index), Batching(16, 4, negative_sampling="popularity"))
