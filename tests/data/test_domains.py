"""Two domains that share users: each has its items to itself, and a user is one person in both."""

import numpy as np
import pytest

from jaxfed.config.build import build_from_config
from jaxfed.config.schema import make_config
from jaxfed.data.batching import Batching, draw_examples, sample_untouched_items
from jaxfed.data.clients import Clients
from jaxfed.data.domains import select_domain
from jaxfed.data.features import encode_features
from jaxfed.data.preparation import prepare_population
from jaxfed.evaluation.split import make_eval_split
from jaxfed.training.rounds import evaluate_model, initial_arrays, make_run_keys, prepare_round, scored_model
from tests.data.test_data import made
from tests.small import same

KEY = make_run_keys(0).evaluation
USERS, ITEMS = 150, 50  # items of each domain; their ids are mixed
SHAPES = (USERS, 3), (2, ITEMS, 3)


def two_domains(many=14, few=3, seed=0):
    """A user has `many` rows in one domain and `few` in the other, of items that the user's taste, a direction in
    space, likes in both; all items are alike popular."""
    random = np.random.default_rng(seed)
    name, rows = random.permutation(2 * ITEMS), []
    taste, items = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in map(random.normal, (0, 0), (1, 1), SHAPES))
    for u in range(USERS):
        for domain in (0, 1):
            score = 6 * items[domain] @ taste[u] + random.gumbel(size=ITEMS)
            best = np.argsort(-score)[: many if domain == u % 2 else few]
            rows += [(u, name[domain * ITEMS + i], "ab"[domain]) for i in random.permutation(best)]
    user, item, domain = zip(*(rows[i] for i in random.permutation(len(rows))), strict=True)
    return made(user, item, columns={"domain": np.array(domain)})


SOURCE = two_domains()


def merged():
    return prepare_population(SOURCE, clients="domain", merge="domains")


def test_a_client_has_one_users_items_of_one_domain_and_is_offered_no_others():
    data, population = merged()
    rows = data.interactions
    of = {int(i): d for i, d in zip(rows.item, data.columns["domain"], strict=True)}
    assert population.num_clients == 2 * USERS
    drawn = draw_examples(population, Batching(16, 5), np.arange(population.num_clients), 0, 0)
    sides = np.repeat(population.names, np.bincount(drawn.client, drawn.examples).astype(int))
    sampled = sample_untouched_items(population, np.arange(population.num_clients), 2, 20, 0)
    for item, name, label in zip(drawn.item[:, 0], sides, drawn.label, strict=True):
        assert of[int(item)] == name[-1]
        client = np.flatnonzero(population.names == name)[0]
        assert (item in population.train.of(client)) == label
    test = make_eval_split(population, "test")
    for c, name in enumerate(population.names):
        own = {i for i in of if of[i] == name[-1]}
        had = {*population.train.of(c), *population.valid.of(c)}
        assert had | {*population.test.of(c)} <= own
        assert set(test.masked.of(c)) == had | (of.keys() - own)
        assert len(set(sampled[c, 0])) == 20
        assert set(sampled[c].ravel().tolist()) <= own - had - set(population.test.of(c))
        assert population.user_names[c] == name[:-2]
    assert population.owner.tolist() == np.repeat(np.arange(USERS), 2).tolist()


def test_negatives_are_uniform_over_a_domain():
    """Chi-square of one client's negatives; five standard deviations are one in a million."""
    _, population = merged()
    counts = np.zeros(population.num_items)
    for round in range(40):
        drawn = draw_examples(population, Batching(64, 40), np.array([7]), 0, round)
        counts += np.bincount(drawn.item[~drawn.label, 0], minlength=len(counts))
    free = np.setdiff1d(
        np.flatnonzero(population.domains.of == population.domains.of[population.train.of(7)[0]]),
        population.train.of(7),
    )
    assert counts.sum() == counts[free].sum()
    expected = counts.sum() / len(free)
    assert abs(((counts[free] - expected) ** 2 / expected).sum() - len(free) + 1) < 5 * np.sqrt(2 * len(free))


def test_one_domain_is_no_domain():
    one = SOURCE._replace(columns={"domain": np.full(len(SOURCE.interactions.user), "x")})
    (_, got), (_, want) = prepare_population(one, clients="domain", merge="domains"), prepare_population(SOURCE)
    batching, everyone = Batching(16, 5), np.arange(want.num_clients)
    same(draw_examples(got, batching, everyone, 0, 3), draw_examples(want, batching, everyone, 0, 3))
    same(sample_untouched_items(got, everyone, 2, 20, 0), sample_untouched_items(want, everyone, 2, 20, 0))
    same(make_eval_split(got, "test")[:-1], make_eval_split(want, "test")[:-1])


def trained(population, data, rounds=40, **more):
    pace = {
        "name": "sgd",
        "item": {"learning_rate": 16.0, "weight_decay": 1e-3},
        "user": {"learning_rate": 6.0, "weight_decay": 1e-2},
    }
    table = {
        "model": {"name": "mf", "dim": 4, "bias": False, "init_scale": 0.3},
        "work": {"batch_size": 64, "optimizer": pace},
        "channel": [{"name": "per_row_mean"}],
        "cohort": {"name": "everyone"},
    }
    it = build_from_config(make_config(table | more), Clients(data, population, "", False))
    state = initial_arrays(it, 0)["state"]
    for t in range(rounds):
        state, _ = it.algorithm.step(state, prepare_round(it, 0, t).cohort, make_run_keys(0).rounds)
    return it, state


def test_who_has_few_rows_in_a_domain_gains_from_the_other():
    """HR@10 of the clients with one train row: the same run, with a user's part merged and without."""
    data, population = merged()
    found = []
    for each in (population, population._replace(owner=None)):
        it, state = trained(each, data)
        values = evaluate_model(it, scored_model(it, state), "test", KEY)
        few, _ = (values[name] for name in values if name.startswith("test/full/hr@10/decile_"))  # the least active
        found.append(few)
        vectors = np.asarray(state.client_states[0]["private"]["user"][:, 0]).reshape(USERS, 2, -1)
        assert (vectors[:, 0] == vectors[:, 1]).all() == (each.owner is not None)
    assert found[0] > found[1] + 0.15  # a third of the users more, when this was written


def test_domains_that_cannot_be():
    columns = {"domain": np.array(list("aaabbb"))}
    twice = made([0, 0, 0, 1, 1, 1], ["x", "y", "z", "x", "v", "w"], columns=columns)
    with pytest.raises(ValueError, match='"x" is in a and in b'):
        prepare_population(twice, clients="domain", merge="domains")
    data, population = merged()
    with pytest.raises(ValueError, match="folded in from one catalogue"):
        trained(population, data, 0, evaluation={"fold_in": True})


def test_a_domain_is_the_items_with_some_features():
    """Of three items two are dramas, of which one is a comedy, too."""
    of_item = encode_features({"genre": np.array(["Drama", "Comedy Drama", "Comedy"])})
    items = [name for _ in range(4) for name in "xyz"]
    data = made(np.repeat(range(4), 3), items)._replace(item_features=of_item, titles=np.array(["X", "Y", "Z"]))
    for wanted, unwanted, left in (
        (["genre=Drama"], [], ["x", "y"]),
        ([], ["genre=Drama"], ["z"]),
        (["genre=Drama"], ["genre=Comedy"], ["x"]),
        (["genre=Comedy", "genre=Drama"], [], ["x", "y", "z"]),
    ):
        domain = select_domain(data, wanted, unwanted)
        assert domain.items.tolist() == left
        assert domain.titles.tolist() == [name.upper() for name in left]
        assert len(domain.interactions.user) == 4 * len(left)
        assert f"{len(left)} of 3 items" in domain.notes[-1]
    assert select_domain(data, [], []) is data
    with pytest.raises(ValueError, match='items_with: no item has "genre=War"; there are genre=Comedy, genre=Drama'):
        prepare_population(data, items_with=["genre=War"])
    with pytest.raises(ValueError, match="no row is left"):
        prepare_population(data, items_with=["genre=Drama"], items_without=["genre=Drama"])
    with pytest.raises(ValueError, match="items_without: the data have no features of items"):
        prepare_population(data._replace(item_features=None), items_without=["genre=Drama"])
