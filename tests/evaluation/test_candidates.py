"""Candidates of sampled figures by popularity, their number and draws, and cut-offs."""

import itertools
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxfed.config.evaluation_stages import check_cutoffs, choose_samples, count_candidates, describe_candidates
from jaxfed.config.settings import Evaluation
from jaxfed.core.link import link
from jaxfed.data.population import SAMPLED, ProcessShare
from jaxfed.data.preparation import prepare_population
from jaxfed.data.sources.synthetic import synthetic_data
from jaxfed.evaluation import candidates
from jaxfed.evaluation.candidates import DRAWS, SampleOptions, count_train_interactions, make_candidates
from jaxfed.evaluation.evaluator import flatten_metrics, make_evaluator
from jaxfed.evaluation.metrics import CUTOFFS, exposure_at_k, ranking_metrics
from jaxfed.evaluation.split import make_eval_split
from tests.data.test_data import made
from tests.data.test_domains import two_domains
from tests.evaluation.test_evaluator import KEY, setting, table_model


def touched(population, user):
    return {*np.concatenate([part.of(user) for part in (population.train, population.valid, population.test)]).tolist()}


def popular(population, users, size=20, draws=3, seed=0):
    options = SampleOptions(size, draws, count_train_interactions(population))
    return make_candidates(population, np.asarray(users), options, seed)


@pytest.mark.parametrize("tries", [0, 1, 4])
@pytest.mark.parametrize("size", [5, 60, 119])
def test_popular_candidates_are_distinct_untouched_and_a_function_of_the_seed(size, tries, monkeypatch):
    monkeypatch.setattr(candidates, "TRIES", tries)
    population, *_ = setting()
    everyone = np.arange(50)
    found, weights = popular(population, everyone, size), count_train_interactions(population)
    assert found.shape == (50, 3, size)
    for user in range(50):
        free = {*np.flatnonzero(weights > 0).tolist()} - touched(population, user)
        for draw in found[user]:
            real = draw[draw < population.num_items].tolist()
            assert (draw[len(real) :] == population.num_items).all()
            assert len({*real}) == len(real) == min(size, len(free))
            assert {*real} <= free
    some = np.array([44, 3, 17])
    assert (popular(population, some, size) == found[some]).all()
    assert (popular(population, everyone, size, seed=1) != found).any()
    monkeypatch.setattr(candidates, "AT_ONCE", 1000)
    assert (popular(population, everyone, size) == found).all()


def exact(weights, size):
    """{ordered sample: its probability} of draws one after the other from what is left."""
    found = {}
    for sample in itertools.permutations(range(len(weights)), size):
        left, chance = sum(weights), 1.0
        for item in sample:
            chance *= weights[item] / left
            left -= weights[item]
        found[sample] = chance
    return found


@pytest.mark.parametrize("tries", [0, 1, 4])
def test_popular_candidates_follow_popularity(tries, monkeypatch):
    """Chi-square of ordered samples of two of four items with 1, 2, 3 and 6 train rows, over many draws; below 1e-4 by
    chance once in 10,000 versions of NumPy. The items' rows are those of users who took each of them, and the user who
    is asked took none."""
    monkeypatch.setattr(candidates, "TRIES", tries)
    rows = [(1 + number, item) for item, weight in enumerate((1, 2, 3, 6)) for number in range(weight)]
    rows += [(user, item) for user in range(7) for item in (20 + user, 30 + user, 40 + user)]  # train, and held out
    data = made([0, 0, 0] + [user for user, _ in rows], [10, 11, 12] + [item for _, item in rows])
    population = prepare_population(data)[1]
    weights = count_train_interactions(population)
    weights[4:] = 0
    assert weights[:4].tolist() == [1, 2, 3, 6]
    draws = 6_000
    found = make_candidates(population, np.array([0]), SampleOptions(2, draws, weights), 0)[0]
    want = exact(weights[:4].tolist(), 2)
    counts = [int((found == np.array(sample)).all(1).sum()) for sample in want]
    assert sum(counts) == draws
    assert stats.chisquare(counts, draws * np.array([*want.values()])).pvalue > 1e-4


def test_popular_candidates_are_of_the_users_domain():
    data, population = prepare_population(two_domains(), clients="domain", merge="domains")
    domain = dict(zip(data.interactions.item.tolist(), data.columns["domain"].tolist(), strict=True))
    found = popular(population, np.arange(population.num_clients), 10)
    for client, name in enumerate(population.names):
        real = found[client][found[client] < population.num_items].tolist()
        assert {domain[item] for item in real} == {name[-1]}
        assert not {*real} & touched(population, client)


def test_the_defaults_are_what_they_were():
    """To the candidate: figures without these options are those of before."""
    population, _, _, drawn = setting()
    split = make_eval_split(population, "test")
    assert (split.sampled == drawn).all()
    settings = Evaluation()
    assert (settings.negatives, settings.draws, settings.at, settings.negative_sampling) == (
        SAMPLED, DRAWS, CUTOFFS, "uniform",
    )  # fmt: skip
    fewer = make_eval_split(population, "test", candidates=SampleOptions(7, 2))
    assert fewer.sampled.shape == (50, 2, 7)


def evaluate(size, draws, at):
    population, scores, private, _ = setting()
    split = make_eval_split(population, "test", candidates=SampleOptions(size, draws))
    run = make_evaluator(table_model(scores), link(), promoted=[5], cutoffs=at)
    return flatten_metrics("test", run((), private, split, KEY))


def test_cut_offs_negatives_and_draws_in_figures():
    usual, other = evaluate(99, 5, CUTOFFS), evaluate(99, 5, (3, 10, 50))
    assert {name for name in other if "full/hr@" in name and "decile" not in name} == {
        f"test/full/hr@{k}" for k in (3, 10, 50)
    }
    shared = {name for name in usual if name in other}
    assert {name: usual[name] for name in shared} == pytest.approx({name: other[name] for name in shared})
    assert {name for name in usual if name not in other} == {name for name in usual if "@20" in name}
    assert other["test/full/hr@3"] < other["test/full/hr@10"] < other["test/full/hr@50"]
    assert {name.rpartition("@")[2] for name in other if "/er@" in name} == {"3", "5", "10", "50"}
    alone = evaluate(99, 1, CUTOFFS)
    assert alone.keys() == {name for name in usual if not name.endswith("_sd")}
    assert not any("sampled" in name for name in evaluate(0, 5, CUTOFFS))
    assert evaluate(9, 5, (5,))["test/sampled/hr@5"] > evaluate(60, 5, (5,))["test/sampled/hr@5"]


@pytest.mark.parametrize("k", [1, 3, 7])
def test_a_cut_off_by_hand(k):
    """Two targets, of ranks 2 and 5 among six."""
    scores = jnp.array([9.0, 8.0, 7.0, 6.0, 5.0, 4.0])
    mark = jnp.array([0, 1, 0, 0, 1, 0], bool)
    found = ranking_metrics(scores[mark], jnp.ones(2, bool), scores, ~mark, (k,))
    hits = sum(rank <= k for rank in (2, 5))
    assert float(found[f"hr@{k}"].total) == (hits > 0)
    assert float(found[f"recall@{k}"].total) == pytest.approx(hits / 2)
    assert float(found[f"precision@{k}"].total) == pytest.approx(hits / k)
    assert float(found[f"f1@{k}"].total) == pytest.approx(2 * hits / (2 + k))
    dcg = sum(1 / np.log2(1 + rank) for rank in (2, 5) if rank <= k)
    best = sum(1 / np.log2(1 + place) for place in range(1, min(k, 2) + 1))
    assert float(found[f"ndcg@{k}"].total) == pytest.approx(dcg / best)
    exposed = exposure_at_k(scores, jnp.ones(6, bool), jnp.array([4]), jnp.ones(1, bool), (k,))
    assert exposed.keys() == {f"er@{k}", "er@5"}
    assert float(exposed[f"er@{k}"].total[0]) == (k >= 5)


GIVEN = prepare_population(synthetic_data(60, 120, mean_length=8))[1]._replace(num_items=120)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (Evaluation(at=(10, 121)), "evaluation.at: 121 is beyond the catalogue of 120 items: lower it"),
        (
            Evaluation(at=(10, 101)),
            "evaluation.at: 101 is beyond the 100 candidates of `sampled` figures: lower it, rai",
        ),
        (Evaluation(negatives=10), "evaluation.at: 20 is beyond the 11 candidates of `sampled` figures"),
        (Evaluation(negatives=120), "evaluation.negatives is 120, the catalogue has 120 items: lower it"),
        (Evaluation(at=(5, 10, 5)), "evaluation.at is [5, 10, 5]: a cut-off comes twice"),
        (Evaluation(at=()), "evaluation.at is []: cut-offs are whole numbers from 1"),
        (Evaluation(at=(0, 10)), "evaluation.at is [0, 10]: cut-offs are whole numbers from 1"),
    ],
)
def test_what_no_ranking_reaches_is_refused_in_a_line(settings, words):
    with pytest.raises(ValueError, match=".") as error:
        check_cutoffs(settings, GIVEN)
    assert str(error.value).startswith(words)
    assert "\n" not in str(error.value)


def test_popularity_is_known_to_one_process_alone():
    def choose(processes, population=GIVEN):
        runtime = SimpleNamespace(share=ProcessShare(0, processes))
        return choose_samples(Evaluation(negative_sampling="popularity", draws=2), population, runtime)

    assert choose(1)[:2] == (99, 2)
    assert (choose(1).popularity == np.bincount(GIVEN.train.values, minlength=120)).all()
    with pytest.raises(ValueError, match="popularity is counted over all clients, and of several processes each knows"):
        choose(2)


def test_cut_offs_that_can_be():
    check_cutoffs(Evaluation(at=(1, 120), negatives=0), GIVEN)
    check_cutoffs(Evaluation(at=(100,)), GIVEN)
    check_cutoffs(Evaluation(), prepare_population(synthetic_data(20, 12, mean_length=4))[1])  # as ever


def test_what_held_out_items_are_ranked_among_in_words():
    def words(**more):
        return describe_candidates(Evaluation(**more), GIVEN)

    assert words() == "99 uniform, 5 draws"
    assert words(negatives=1000, draws=1, negative_sampling="popularity") == "1,000 by popularity, 1 draw"
    assert words(negatives=0) == ""
    lists = GIVEN.train._replace(values=np.zeros(120, np.int32), start=np.arange(61) * 2)
    given = GIVEN._replace(negatives=lists)
    assert describe_candidates(Evaluation(), given) == "given, 2 a user"
    start = np.append(lists.start[:-1], lists.start[-1] - 1)
    given = given._replace(negatives=lists._replace(start=start))
    assert describe_candidates(Evaluation(), given) == "given, 1 to 2 a user"
    assert count_candidates(Evaluation(), given) == (1, 2)
    assert count_candidates(Evaluation(negatives=0), given) == (0, 0)
    with pytest.raises(
        ValueError, match=r"10 is beyond the 3 candidates of `sampled` figures: lower it or leave these"
    ):
        check_cutoffs(Evaluation(at=(10,)), given)
