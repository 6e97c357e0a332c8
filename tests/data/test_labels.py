"""Ratings and clicks as labels: batches, errors of held-out rows, the choice of a round, and wrong combinations."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfed.cli import main
from jaxfed.config.build import build_from_config
from jaxfed.config.schema import make_config
from jaxfed.core.link import link
from jaxfed.core.model import Model
from jaxfed.data.batching import Batching
from jaxfed.data.blocks import make_block_shapes
from jaxfed.data.clients import Clients
from jaxfed.data.packing import pack_cohort
from jaxfed.data.preparation import prepare_population
from jaxfed.data.sources.synthetic import synthetic_data
from jaxfed.evaluation.evaluator import flatten_metrics, make_evaluator
from jaxfed.evaluation.metrics import classification_metrics, click_metrics
from jaxfed.evaluation.split import make_eval_split
from jaxfed.models.mf import mf
from jaxfed.training.records import lower_is_better
from jaxfed.training.rounds import Progress

KEY = jax.random.key(0)


def rated(**more):
    """Synthetic data with ratings in halves from .5 to 5, and the same rows by (user, item)."""
    data = synthetic_data(30, 50, mean_length=12)
    rating = np.random.default_rng(5).integers(1, 11, len(data.interactions.user)).astype(np.float32) / 2
    data = data._replace(interactions=data.interactions._replace(rating=rating))
    data, population = prepare_population(
        data, **{"protocol": "ratio-clean", "ratio": (0.2, 0.3), "label": "rating", **more}
    )
    user, item, rating, _ = data.interactions
    return data, population, dict(zip(zip(user.tolist(), item.tolist(), strict=True), rating.tolist(), strict=True))


def lists(population, part):
    """(users, items, labels) of a part, row by row."""
    each = getattr(population, part)
    users = np.repeat(np.arange(len(each.counts)), each.counts)
    return users, each.values, getattr(population.labels, part)


@pytest.mark.parametrize("clients", ["user", "silo"])
@pytest.mark.parametrize("label", ["rating", "click"])
def test_labels_stay_with_their_rows(clients, label):
    _, population, by_row = rated(clients=clients, silos=4, label=label, threshold=3.0)
    for part in ("train", "valid", "test"):
        for u, i, got in zip(*lists(population, part), strict=True):
            assert got == (by_row[u, i] if label == "rating" else by_row[u, i] >= 3)
    batching = Batching(8, negatives=0, epochs=2)
    ids = np.arange(population.num_clients)
    shapes = make_block_shapes(population, batching, len(ids), steps_per_block=16)
    cohort = pack_cohort(population, batching, shapes, ids, np.ones(len(ids), bool), 0, 0)
    train, rows = {(u, i): y for u, i, y in zip(*lists(population, "train"), strict=True)}, 0
    for block in cohort.blocks:
        for lane, step in np.argwhere(block.data.live):
            held = np.append(np.append(cohort.rows, population.num_items)[block.rows[lane]], population.num_items)
            batch = {name: x[lane, step] for name, x in block.data.batch.items()}
            at = np.minimum(block.data.rows[lane, step], len(held) - 1)
            at = at[batch["item"]] if "item" in batch else at
            first = population.client_offsets[ids[block.slots[lane]]]
            for place in np.flatnonzero(batch["weight"]):
                user = first + (batch["user"][place] if "user" in batch else 0)
                assert batch["label"][place] == train[user, held[at[place]]]
                assert batch["weight"][place] == 1
                rows += 1
    assert rows == 2 * len(population.train.values)


def test_labels_go_with_their_rows_to_a_users_devices():
    """A device has the ratings of what was dealt to it, and all ratings are with one."""
    _, population, by_row = rated(clients="device", devices=3)
    users, items, labels = lists(population, "train")
    assert len(labels) == len(population.people.labels.train)
    assert labels.tolist() == [by_row[row] for row in zip(population.owner[users], items, strict=True)]


def predicting(population):
    """(a model whose private part is the scores of each user, the scores [U, N], as a store)."""
    scores = np.random.default_rng(1).normal(3, 1, (len(population.user_names), population.num_items))
    scores = np.round(scores, 1).astype(np.float32)  # with ties
    private = np.zeros((population.num_clients, population.users_per_client, population.num_items), np.float32)
    for u, client in enumerate(population.client_of):
        private[client, u - population.client_offsets[client]] = scores[u]
    return Model(lambda key: (), lambda key: (), lambda *_: None, lambda s, mine, user: mine[user]), scores, private


@pytest.mark.parametrize("clients", ["user", "silo"])
@pytest.mark.parametrize("part", ["val", "test"])
def test_errors_of_ratings_against_numpy(clients, part):
    _, population, _ = rated(clients=clients, silos=4)
    model, scores, private = predicting(population)
    got = flatten_metrics(part, make_evaluator(model, link())((), private, make_eval_split(population, part), KEY))
    users, items, label = lists(population, "valid" if part == "val" else "test")
    gap = scores[users, items] - label
    assert got[f"{part}/rating/rmse"] == pytest.approx(np.sqrt(np.mean(gap**2)), rel=1e-5)
    assert got[f"{part}/rating/mae"] == pytest.approx(np.abs(gap).mean(), rel=1e-5)
    assert not any("hr@" in name for name in got)  # a held-out row with one star is nothing to rank first
    edges = np.quantile(population.num_train, np.arange(1, 10) / 10)
    decile = (population.num_train[:, None] >= edges).sum(1)[population.client_of[users]]  # 0: the least active
    of_most = np.sqrt(np.mean(gap[decile == decile.max()] ** 2))
    assert got[f"{part}/rating/rmse/decile_{decile.max() + 1}"] == pytest.approx(of_most, rel=1e-5)


@pytest.mark.parametrize("clients", ["user", "silo"])
def test_log_loss_and_auc_of_clicks_against_numpy(clients):
    _, population, _ = rated(clients=clients, silos=4, label="click", threshold=3.0)
    model, scores, private = predicting(population)
    private, scores = private - 3, scores - 3
    got = flatten_metrics("test", make_evaluator(model, link())((), private, make_eval_split(population, "test"), KEY))
    users, items, label = lists(population, "test")
    logit = scores[users, items].astype(np.float64)
    chance = 1 / (1 + np.exp(-logit))
    assert got["test/click/log_loss"] == pytest.approx(-np.log(np.where(label, chance, 1 - chance)).mean(), rel=1e-5)
    each = []
    for u in range(len(scores)):
        yes, no = (logit[(users == u) & (label == y)] for y in (1, 0))
        if len(yes) and len(no):
            each.append(np.mean([(a > b) + 0.5 * (a == b) for a in yes for b in no]))
    assert 5 < len(each) < len(scores)  # some users have one class alone
    assert got["test/click/auc"] == pytest.approx(np.mean(each), rel=1e-5)


def test_one_held_out_row_a_user_has_no_auc():
    _, population, _ = rated(protocol="loo-clean", label="click", threshold=3.0)
    model, _, private = predicting(population)
    got = flatten_metrics("val", make_evaluator(model, link())((), private, make_eval_split(population, "val"), KEY))
    assert {"val/click/log_loss"} == {name for name in got if "decile" not in name}


def test_ties_of_auc_count_half_and_padding_counts_nothing():
    score, label = jnp.array([1.0, 1.0, 0.0, 9.0]), jnp.array([1.0, 0.0, 0.0, 0.0])
    got = click_metrics(score, label, jnp.array([True, True, True, False]))
    assert float(got["auc"].value) == 0.75
    assert float(got["log_loss"].weight) == 3


def test_log_loss_of_sampled_candidates():
    score, others = np.array([2.0, -1.0]), np.array([0.5, -0.5, 3.0])
    got = classification_metrics(
        jnp.array(score), jnp.array([True, False]), jnp.array(others), jnp.array([True, True, False])
    )
    want = np.log1p(np.exp(-2.0)) + np.log1p(np.exp(0.5)) + np.log1p(np.exp(-0.5))
    assert float(got["log_loss"].value) == pytest.approx(want / 3, rel=1e-6)


def test_ratings_are_learned_by_their_squared_error():
    """The loss that is reported is the mean of squares, which that of clicks is not where labels are no shares."""
    data, population, _ = rated()
    table = {"model": {"dim": 3, "loss": "squared"}, "work": {"negatives": 0}, "data": {"label": "rating"}}
    table |= {"cohort": {"name": "everyone"}}
    made = build_from_config(make_config(table), Clients(data, population, "", False))
    shared, private = made.model.init(KEY), made.model.private(KEY)
    label = jnp.array(np.r_[[5.0, 0.5, 3.0], np.zeros(population.num_items - 3)])
    batch = {"label": label, "weight": (jnp.arange(len(label)) < 3) * 1.0}
    want = np.square(np.asarray(made.model.score(shared, private, 0))[:3] - label[:3]).mean()
    assert float(made.model.loss(shared, private, batch).value) == pytest.approx(float(want), rel=1e-5)
    clicked = mf(population.num_items, 1, 3, loss="squared")
    slopes = [jax.grad(lambda p, m=m: m.loss(p, private, batch).value)(shared) for m in (made.model, clicked)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), *slopes)


@pytest.mark.parametrize("name", ["val/rating/rmse", "val/rating/mae", "val/click/log_loss", "val/sampled/log_loss"])
def test_less_is_better_of_errors(name):
    standing = Progress()
    said = []
    for round, value in enumerate([3.0, 2.5, float("nan"), 2.7, 1.0, 1.0], 1):
        standing.round = round
        said.append(standing.judge(name, value))
    assert said == [True, True, False, False, True, False]
    assert (standing.best_round, standing.best_value, standing.stale) == (5, 1.0, 1)


@pytest.mark.parametrize("name", ["val/full/ndcg@10", "val/click/auc", "val/sampled/hr@10_sd"])
def test_more_is_better_of_the_others(name):
    standing = Progress()
    said = []
    for round, value in enumerate([float("nan"), 0.0, 0.2, 0.1], 1):
        standing.round = round
        said.append(standing.judge(name, value))
    assert said == [False, True, True, False]
    assert not lower_is_better(name)


SOURCE = {"name": "csv", "user_features": "people.csv", "item_features": "goods.csv", "protocol": "ratio-clean"}
WRONG = {
    "a loss of clicks": ({}, {"loss": "bce"}, {}, 'data.label = "rating": model.loss must be "squared", not "bce"'),
    "a loss of ratings": ({"label": "click"}, {}, {}, 'model.loss must be "bce", not "squared"'),
    "a loss of pairs": ({}, {"loss": "bpr"}, {}, 'model.loss must be "squared", not "bpr"'),
    "a model that counts": ({}, {"name": "ease"}, {}, 'the model "ease" counts rows, whatever their label'),
    "negatives": ({}, {}, {"work": {"negatives": 4}}, "rows have labels, none are drawn: set work.negatives to 0"),
    "folding in": ({}, {}, {"evaluation": {"fold_in": True}}, "histories are folded in as clicks: set evaluation.fold"),
    "reconstruction": ({}, {}, {"work": {"name": "reconstruct", "negatives": 0}}, "take a work that keeps private"),
    "a leak": ({"protocol": "compat-pfedrec"}, {}, {}, "no negatives are drawn that could leak"),
    "exchanged labels": ({"label_flip": True, "malicious": 0.2}, {}, {}, "data.label_flip exchanges clicks and neg"),
    "no ratings": ({"path": "plain.csv"}, {}, {}, 'data.label is "rating", but every rating is 1: the data have none'),
    "a threshold": (
        {"label": "click", "threshold": 9.0},
        {"loss": "bce"},
        {},
        "threshold is 9, ratings are 1 to 5: all would be one class; choose a threshold above 1 and at most 5",
    ),
    "no features": ({"user_features": ""}, {"features": "user"}, {}, 'model.features is "user", but the data have no'),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Rows, people and goods as files."""
    folder, random = tmp_path_factory.mktemp("files"), np.random.default_rng(2)
    pairs = [(u, i) for u in range(24) for i in random.permutation(18)[:10]]
    stars = [int(np.clip(1 + (u % 3) + (i % 3) + random.integers(0, 2), 1, 5)) for u, i in pairs]
    rows = [f"u{u},{i},{y},{t}" for t, ((u, i), y) in enumerate(zip(pairs, stars, strict=True))]
    (folder / "a.csv").write_text("\n".join(["user_id,item_id,rating,timestamp", *rows]) + "\n")
    (folder / "plain.csv").write_text("\n".join(f"u{u},{i}" for u, i in [("ser_id", "item_id"), *pairs]) + "\n")
    (folder / "people.csv").write_text("user_id,kind,age\n" + "".join(f"u{u},k{u % 3},{u}\n" for u in range(24)))
    (folder / "goods.csv").write_text("item_id,title,kind\n" + "".join(f"{i},T{i},g{i % 3}\n" for i in range(18)))
    return folder


def table(folder, data=(), model=(), more=()):
    source = {"path": "a.csv", "label": "rating"} | SOURCE | dict(data)
    source |= {key: str(folder / source[key]) for key in ("path", "user_features", "item_features") if source[key]}
    own = {"name": "fm", "dim": 3, "loss": "squared"} | dict(model)
    own = {"name": own["name"]} if own["name"] == "ease" else own
    return {"data": source, "model": own, "work": {"negatives": 0}, "cohort": {"name": "everyone"}} | dict(more)


@pytest.mark.parametrize("name", WRONG)
def test_wrong_combinations_say_what_is_wrong(folder, name):
    from jaxfed.config.build import load_data

    data, model, more, words = WRONG[name]
    config = make_config(table(folder, data, model, more))
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        build_from_config(config, load_data(config.data))
    assert "\n" not in str(error.value)


def test_a_run_on_files_with_features_and_ratings(folder, tmp_path, capsys, monkeypatch):
    """From the command line: it trains, chooses the round of least error, evaluates again, and recommends."""
    import tomli_w

    more = {
        "rounds": 6,
        "work": {
            "negatives": 0,
            "batch_size": 16,
            "optimizer": {"name": "sgd", "learning_rate": 0.05, "item": {"learning_rate": 1.0}},
        },
        "channel": [{"name": "per_row_mean"}],
        "cohort": {"name": "everyone"},
        "evaluation": {"every": 2, "select": "val/rating/rmse"},
    }
    source = table(folder, {"user_features": "", "item_features": ""}, more=more)
    (tmp_path / "a.toml").write_text(tomli_w.dumps(source))
    out = str(tmp_path / "run")

    def jaxfed(*words):
        monkeypatch.setattr("sys.argv", ["jaxfed", *words])
        main.main()
        return capsys.readouterr().out

    files = ["--data.user-features", str(folder / "people.csv"), "--data.item-features", str(folder / "goods.csv")]
    told = jaxfed("train", str(tmp_path / "a.toml"), "--out", out, *files)
    assert "rmse" in told
    assert "hr@10" not in told
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    errors = {row["round"]: row["val/rating/rmse"] for row in rows if "val/rating/rmse" in row}
    assert summary["best_round"] == min(errors, key=errors.get) == 6
    assert errors[6] < errors[2]
    again = json.loads(jaxfed("evaluate", out, "--json"))
    assert again["test/rating/rmse"] == pytest.approx(summary["test/rating/rmse"], rel=1e-6)
    assert len(jaxfed("recommend", out, "--user", "u3", "-k", "4").splitlines()) == 4
    with pytest.raises(SystemExit) as stop:
        jaxfed("train", str(tmp_path / "a.toml"), "--out", f"{out}2", "--evaluation.select", "val/full/ndcg@10")
    assert stop.value.code == 2
    assert "no metric" in capsys.readouterr().err
