"""Figures of each user: their means are the figures of the run, and each is that of the user it stands beside."""

import numpy as np
import pytest

import jaxfed as jf
from jaxfed.core.link import link
from jaxfed.evaluation.evaluator import flatten_metrics, flatten_user_metrics, make_evaluator, make_user_evaluator
from jaxfed.evaluation.split import make_eval_split
from tests.evaluation.test_evaluator import CASES, KEY, reference, setting, table_model


def by_hand(population, scores, sampled, part, user):
    """(full, mean of the draws) of one user."""
    held = (population.valid if part == "val" else population.test).of(user).tolist()
    masked = {*population.train.of(user), *(population.valid.of(user) if part == "test" else ())}
    draws = [[i for i in each if i < population.num_items] for each in sampled[user]]
    drawn = [reference(scores[user], held, set(), each) for each in draws]
    full = reference(scores[user], held, masked, range(population.num_items))
    return full, {name: np.mean([each[name] for each in drawn]) for name in drawn[0]}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("part", ["val", "test"])
def test_each_user_against_numpy(case, part):
    """In chunks that do not divide the clients, or the users of a client."""
    population, scores, private, sampled = setting(**CASES[case])
    exam = make_eval_split(population, part)._replace(clients=7, users=3, chunks=8)
    found = flatten_user_metrics(part, make_user_evaluator(table_model(scores))((), private, exam))
    for user in range(len(scores)):
        full, drawn = by_hand(population, scores, sampled, part, user)
        for name in full:
            assert found[f"{part}/full/{name}"][user] == pytest.approx(full[name], rel=1e-5, abs=1e-6), name
            assert found[f"{part}/sampled/{name}"][user] == pytest.approx(drawn[name], rel=1e-5, abs=1e-6), name
    whole = flatten_metrics(part, make_evaluator(table_model(scores), link())((), private, exam, KEY))
    assert {name: value.mean() for name, value in found.items()} == pytest.approx(
        {name: whole[name] for name in found}, rel=1e-5
    )
    assert {"hr@20", "ndcg@10", "mrr", "auc"} <= {name.rpartition("/")[2] for name in found}


def uneven_rows(users=40, items=120):
    """Clients with 3 to 90 items; (users, items, times)."""
    random = np.random.default_rng(0)
    lengths = np.r_[90, 90, random.integers(3, 30, users - 2)]
    item = np.concatenate([random.permutation(items)[:length] for length in lengths])
    return np.repeat(np.arange(users), lengths), item, np.concatenate([np.arange(length) for length in lengths])


MODELS = {
    "mf": {"model": {"name": "mf", "dim": 4}},
    "ease": {
        "model": {"name": "ease"},
        "algorithm": {"name": "closed_form"},
        "channel": [{"name": "ring", "bound": 1.0}],
        "cohort": {"name": "everyone"},
    },
}


def train(tmp_path, words=(), model="mf"):
    user, item, time = uneven_rows()
    path = tmp_path / "rows.csv"
    path.write_text("user,item,time\n" + "".join(f"u{u},{i},{t}\n" for u, i, t in zip(user, item, time, strict=True)))
    run = jf.from_config({"data": {"name": "csv", "path": str(path)}, "rounds": 1, **MODELS[model]}, *words)
    list(run.train(evaluate_every=1))
    return run


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("mf", []),
        ("ease", []),
        ("mf", ["--data.clients", "silo", "--data.silos", "7"]),
        ("mf", ["--data.clients", "device", "--data.devices", "2"]),
        ("mf", ["--evaluation.clients", "11"]),
        ("mf", ["--data.protocol", "ratio-clean"]),
        ("mf", ["--run.client-store", "host"]),
        ("mf", ["--run.devices", "8"]),
        ("mf", ["--evaluation.at", "5", "10", "--evaluation.negatives", "0"]),
    ],
)
def test_their_means_are_the_figures_of_the_run(tmp_path, model, words):
    """1e-5: float32 sums of a few dozen users, in another order."""
    run = train(tmp_path, words, model)
    for part in ("val", "test"):
        each, whole = run.best.evaluate_users(part), run.evaluate(part)
        names = [name for name in each if name != "user"]
        assert {name: each[name].mean() for name in names} == pytest.approx({n: whole[n] for n in names}, rel=1e-5)
        assert len(set(each["user"].tolist())) == len(each["user"]) == (11 if "11" in words else 40)
        assert {*each["user"]} <= {*run.latest.user_ids}
        assert any("sampled" in name for name in names) == ("0" not in words)


def test_a_row_is_of_its_user(tmp_path):
    """Whose items are scored as for recommendations, and who is found by name among some of the clients."""
    run = train(tmp_path, ["--evaluation.clients", "11"])
    each, population = run.best.evaluate_users("test"), run._session.parts.data.population
    ranks = 1 / each["test/full/mrr"]
    for name, rank in zip(each["user"], ranks, strict=True):
        user = population.user_names.tolist().index(name)
        shown = [item for item, *_ in run.recommend(name, 120)]  # without what the user had, the test item among it
        target = run.best.item_ids[population.test.of(user)[0]]
        assert target not in shown
        assert 1 <= rank <= len(shown) + 1
    assert len(set(ranks.round(6))) > 3


def test_personal_copies_are_left_out(tmp_path):
    run = train(tmp_path, ["--work.keep-copy"])
    assert any("/personal/" in name for name in run.evaluate("test"))
    assert not any("/personal/" in name for name in run.best.evaluate_users("test"))


def test_users_without_a_test_row_are_left_out(tmp_path):
    user, item, _ = uneven_rows()
    free = [np.setdiff1d(item, item[user == each])[0] for each in (3, 5)]
    (tmp_path / "test.csv").write_text(f"user,item,time\nu3,{free[0]},100\nu5,{free[1]},100\n")
    run = train(tmp_path, ["--data.test", str(tmp_path / "test.csv")])
    each = run.best.evaluate_users("test")
    assert each["user"].tolist() == ["u3", "u5"]
    assert each["test/full/mrr"].mean() == pytest.approx(run.evaluate("test")["test/full/mrr"], rel=1e-5)


def test_what_cannot_be_is_said(tmp_path):
    run = train(tmp_path)
    with pytest.raises(ValueError, match="no part 'train': choose val or test"):
        run.best.evaluate_users("train")
    path = tmp_path / "rated.csv"
    lines = [f"{user},{item},{1 + item % 5}\n" for user in range(20) for item in range(user, user + 8)]
    path.write_text("user,item,rating\n" + "".join(lines))
    table = {"data": {"name": "csv", "path": str(path), "label": "rating"}, "work": {"negatives": 0}}
    table |= {"model": {"name": "mf", "loss": "squared"}, "cohort": {"name": "everyone"}}
    rated = jf.from_config(table | {"evaluation": {"select": "val/rating/rmse"}})
    with pytest.raises(ValueError, match="rows have labels, and no ranks"):
        rated.latest.evaluate_users("test")
