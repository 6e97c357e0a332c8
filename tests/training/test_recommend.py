"""What is recommended: to every user, whatever the work keeps, what evaluations would score highest."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfed.config.build import build_from_config, load_data
from jaxfed.config.registry import CLOSED, REGISTRY
from jaxfed.config.schema import make_config
from jaxfed.core.tables import map_tables
from jaxfed.data.interactions import Dataset, Interactions
from jaxfed.evaluation.evaluator import flatten_metrics
from jaxfed.training.recommend import locate_user, score_items, selected_view
from jaxfed.training.rounds import initial_arrays

CHANNEL = {"clustered": "cluster_mean"}
WORKS = [name for name in REGISTRY["work"] if name != "statistics"]


@functools.cache
def content(**more):
    table = {"name": "synthetic", "users": 24, "items": 40, "mean_length": 6.0} | more
    return load_data(make_config({"data": table}).data), table


def made(work="local_steps", model="mf", server=None, **data):
    found, table = content(**data)
    own = {} if model in CLOSED and model != "ials" else {"dim": 4}
    config = make_config(
        {
            "data": table,
            "model": {"name": model, **own},
            "work": {"name": work},
            "channel": [{"name": CHANNEL.get(work, "mean")}] if work != "statistics" else [],
            "cohort": {"name": "everyone"},
            "server": server or {"name": "solve" if work == "statistics" else "sgd"},
        }
    )
    experiment = build_from_config(config, found)
    return experiment, initial_arrays(experiment, 0)["best"]


def had(population, user):
    return np.concatenate([part.of(user) for part in (population.train, population.valid, population.test)])


def check(experiment, best, name):
    """All items but those of the user, and nothing that is not a number."""
    seat = locate_user(experiment.data.population, name, None)
    found = score_items(experiment, best, seat)
    rest = np.setdiff1d(np.arange(experiment.data.population.num_items), had(seat.population, seat.user))
    assert found.shape == (experiment.data.population.num_items,)
    assert np.array_equal(np.flatnonzero(np.isfinite(found)), rest)
    return found


@pytest.mark.parametrize("work", WORKS)
def test_every_work_recommends(work):
    experiment, best = made(work)
    a, b = (check(experiment, best, name) for name in experiment.data.population.user_names[:2])
    both = np.isfinite(a) & np.isfinite(b)
    assert (np.argsort(a[both]) != np.argsort(b[both])).any()


@pytest.mark.parametrize("model", CLOSED)
def test_closed_forms_recommend(model):
    experiment, best = made("statistics", model)
    check(experiment, best, experiment.data.population.user_names[3])


def test_edges_recommend_by_the_model_of_the_users_own():
    experiment, best = made(server={"name": "sgd", "edges": 3, "edge_rounds": 2})
    (shared, private), name = best, experiment.data.population.user_names[0]
    before = check(experiment, best, name)
    home = int(np.asarray(private.cluster)[0])

    def moved(edge):  # tables are [items, edges, ...]
        return map_tables(lambda x: x.at[:, edge].multiply(3), lambda x: x.at[edge].multiply(3), shared), private

    assert (check(experiment, moved(home), name) != before).any()
    np.testing.assert_array_equal(check(experiment, moved((home + 1) % 3), name), before)


def test_evaluations_find_the_same():
    """Hit rates of validation items, from `scores` of a user whose test item counts as had, ranked by hand."""
    experiment, best = made()
    population = experiment.data.population
    model, (shared, private) = experiment.model, best
    hits = []
    for user in range(len(population.user_names)):
        mine = jax.tree.map(lambda x, user=user: x[user], private)
        raw = np.array(model.score(shared, mine, np.int32(0)))
        found = check(experiment, best, population.user_names[user])
        seen = np.isfinite(found)
        np.testing.assert_array_equal(found[seen], raw[seen])
        target = population.valid.of(user)[0]
        rest = np.setdiff1d(np.arange(population.num_items), np.append(population.train.of(user), target))
        hits.append((raw[rest] >= raw[target]).sum() < 10)
    figures = flatten_metrics("val", experiment.evaluator(*best, experiment.eval_splits["val"], jax.random.key(0)))
    assert figures["val/full/hr@10"] == pytest.approx(np.mean(hits))


def test_who_never_took_part_is_ranked_from_what_he_did():
    experiment, best = made(cold=0.25)
    population = experiment.data.population
    cold = population.cold.user_names
    assert not set(cold) & set(population.user_names)
    for name in cold[:2]:
        assert locate_user(population, name, None).home is None
        check(experiment, best, name)


def test_a_private_part_that_nobody_keeps_is_made_of_all_that_a_user_did():
    experiment, best = made("reconstruct")
    seat = locate_user(experiment.data.population, experiment.data.population.user_names[0], None)
    found = score_items(experiment, best, seat)
    lists = seat.population
    for part in ("train", "valid", "test"):  # others' items in its place
        other = getattr(lists, part)
        moved = lists._replace(**{part: other._replace(values=(other.values + 1) % lists.num_items)})
        changed = score_items(experiment, best, seat._replace(population=moved))
        both = np.isfinite(found) & np.isfinite(changed)
        assert (changed[both] != found[both]).any(), part


def test_a_user_with_several_devices_is_one():
    experiment, best = made(clients="device", devices=2)
    population, (shared, private) = experiment.data.population, best
    for i, name in enumerate(population.people.user_names[:3]):
        found, home = check(experiment, best, name), population.homes[i]
        mine = jax.tree.map(lambda x, home=home: x[home], private)
        seen = np.isfinite(found)
        np.testing.assert_array_equal(found[seen], np.array(experiment.model.score(shared, mine, np.int32(0)))[seen])
    assert population.homes[2] != 2


def test_nothing_that_a_user_had_anywhere_is_offered():
    """One user of a column's clients, of whom some never took part."""
    experiment, best = made(clients="silo", silos=4, cold=0.25)
    population = experiment.data.population
    cold, warm = population.cold, population.user_names[0]
    both = population._replace(
        cold=cold._replace(user_names=np.where(np.arange(len(cold.user_names)) == 0, warm, cold.user_names))
    )
    there = experiment._replace(data=experiment.data._replace(population=both))
    client = str(population.names[population.client_of[0]])
    found = score_items(there, best, locate_user(both, warm, client))
    assert not np.isfinite(found[had(cold, 0)]).any()
    with pytest.raises(ValueError, match="pass one of them"):
        locate_user(both, warm, None)
    with pytest.raises(ValueError, match="pass one of them"):
        locate_user(population, warm, "nobody's")


def test_who_was_left_out_is_called_left_out():
    experiment, _ = made()
    population = experiment.data.population
    rows = [("shy", "a"), ("shy", "b"), ("shy", "b"), ("odd", "a"), ("odd", "b"), ("odd", "c")]
    names, number = np.unique([user for user, _ in rows], return_inverse=True)
    items, item = np.unique([item for _, item in rows], return_inverse=True)
    source = Dataset(Interactions(number, item, np.ones(6, np.float32), np.arange(6)), names, items)
    for name, words in (
        ("shy", 'user "shy" was left out: fewer than 3 interactions'),
        ("odd", r'user "odd" was left out: the k-core \(data.user_core, data.item_core\)'),
        ("nobody", 'no user "nobody" in the data'),
    ):
        with pytest.raises(ValueError, match=words):
            locate_user(population, name, None, lambda: source)
    with pytest.raises(ValueError, match='no user "x{77}\\.\\.\\." in the data'):
        locate_user(population, "x" * 10_000, None, lambda: source)


def test_a_run_chosen_by_a_view_recommends_by_it():
    experiment, (shared, private) = made("ditto")
    assert selected_view(experiment, "val/personal/full/ndcg@10") == "personal"
    assert selected_view(experiment, "val/full/ndcg@10") == ""
    other = private._replace(
        copy=jax.tree.map(lambda x: x + 1.0, private.copy), written=jax.tree.map(jnp.ones_like, private.written)
    )
    seat = locate_user(experiment.data.population, experiment.data.population.user_names[0], None)
    a, b = (score_items(experiment, (shared, each), seat, "personal") for each in (private, other))
    assert (a != b).any()
    np.testing.assert_array_equal(*(score_items(experiment, (shared, each), seat) for each in (private, other)))
