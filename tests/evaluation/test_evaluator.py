"""Metrics against an independent NumPy implementation, on random scores full of ties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfed.channels.average import mean
from jaxfed.core.channel import chain
from jaxfed.core.link import link
from jaxfed.core.model import Model
from jaxfed.data.batching import sample_untouched_items
from jaxfed.data.population import SAMPLED
from jaxfed.data.preparation import prepare_population
from jaxfed.data.sources.synthetic import synthetic_data
from jaxfed.evaluation.evaluator import flatten_metrics, make_evaluator
from jaxfed.evaluation.metrics import ranking_metrics
from jaxfed.evaluation.split import DRAWS, make_eval_batches, make_eval_split

KEY = jax.random.key(0)


def table_model(scores):
    """A model whose private part is one row of scores a user."""
    return Model(lambda key: (), lambda key: (), lambda *_: None, lambda shared, private, user: private[user])


def reference(scores, targets, masked, others):
    """Per-user metrics, written from the definitions: sort candidates by score, ties with the targets last."""
    s = np.asarray(scores, np.float64)
    candidates = [i for i in others if i not in targets and i not in masked]
    everyone = [(-s[i] if not np.isnan(s[i]) else np.inf, 0, i) for i in candidates]
    everyone += [(-s[i] if not np.isnan(s[i]) else np.inf, 1, i) for i in targets]
    order = [(i, is_target) for _, is_target, i in sorted(everyone)]
    ranks = [place + 1 for place, (_, is_target) in enumerate(order) if is_target]
    t = len(targets)
    out = {"mrr": 1 / ranks[0]}
    beaten = [sum(s[c] < s[i] for c in candidates) / max(len(candidates), 1) for i in targets]
    out["auc"] = np.mean(beaten)
    for k in (10, 20):
        hits = sum(r <= k for r in ranks)
        out[f"hr@{k}"] = float(hits > 0)
        out[f"recall@{k}"], out[f"precision@{k}"] = hits / t, hits / k
        out[f"f1@{k}"] = 2 * hits / (t + k)
        dcg = sum(1 / np.log2(1 + r) for r in ranks if r <= k)
        out[f"ndcg@{k}"] = dcg / sum(1 / np.log2(1 + j) for j in range(1, min(t, k) + 1))
    return out


def drawn(population, seed, users=None):
    users = np.arange(len(population.user_names)) if users is None else users
    return sample_untouched_items(population, users, DRAWS, SAMPLED, seed)


def setting(protocol="loo-clean", **kw):
    _, population = prepare_population(
        synthetic_data(50, 120, mean_length=12), protocol=protocol, ratio=(0.2, 0.3), **kw
    )
    scores = (
        np.random.default_rng(1).integers(-4, 5, (len(population.user_names), population.num_items)).astype(np.float32)
    )
    private = np.zeros((population.num_clients, population.users_per_client, population.num_items), np.float32)
    for u in range(len(scores)):
        c = population.client_of[u]
        private[c, u - population.client_offsets[c]] = scores[u]
    return population, scores, private, drawn(population, 0)


CASES = {
    "leave one out": {},
    "ratio": {"protocol": "ratio-clean"},
    "silos": {"clients": "silo", "silos": 6},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("part", ["val", "test"])
def test_against_numpy(case, part):
    population, scores, private, sampled = setting(**CASES[case])
    got = flatten_metrics(
        part, make_evaluator(table_model(scores), link())((), private, make_eval_split(population, part), KEY)
    )
    full, drawn = [], [[] for _ in range(DRAWS)]
    counts = np.zeros((DRAWS, 4))
    for u in range(len(scores)):
        held = (population.valid if part == "val" else population.test).of(u).tolist()
        masked = set(population.train.of(u).tolist()) | (
            set(population.valid.of(u).tolist()) if part == "test" else set()
        )
        full.append(reference(scores[u], held, masked, range(population.num_items)))
        for d in range(DRAWS):
            others = [i for i in sampled[u, d] if i < population.num_items]
            drawn[d].append(reference(scores[u], held, set(), others))
            hit, wrong = sum(scores[u][i] > 0 for i in held), sum(scores[u][i] > 0 for i in others)
            counts[d] += hit, wrong, len(held), len(others)
    for name in full[0]:
        assert got[f"{part}/full/{name}"] == pytest.approx(np.mean([f[name] for f in full]), rel=1e-5), name
        by_draw = [np.mean([f[name] for f in draw]) for draw in drawn]
        assert got[f"{part}/sampled/{name}"] == pytest.approx(np.mean(by_draw), rel=1e-5), name
        assert got[f"{part}/sampled/{name}_sd"] == pytest.approx(np.std(by_draw, ddof=1), rel=1e-3, abs=1e-7), name
    tp, fp, p, n = counts.T
    wanted = {"accuracy": (tp + n - fp) / (p + n), "precision": tp / (tp + fp), "recall": tp / p}
    for name, want in (wanted | {"f1": 2 * tp / (tp + fp + p)}).items():
        assert got[f"{part}/sampled/{name}"] == pytest.approx(want.mean(), rel=1e-5), name


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("part", ["val", "test"])
@pytest.mark.parametrize("promoted", [[5], [40, 5, 77]])
def test_exposure_against_numpy(case, part, promoted):
    """Of each target the share of users without it whose first k hold it; held-out items are candidates like others."""
    population, scores, private, _ = setting(**CASES[case])
    run = make_evaluator(table_model(scores), link(), promoted=promoted)
    got = flatten_metrics(part, run((), private, make_eval_split(population, part), KEY))
    shares = {k: [] for k in (5, 10, 20)}
    for target in promoted:
        places = []
        for u in range(len(scores)):
            train, valid, test = (
                set(each.of(u).tolist()) for each in (population.train, population.valid, population.test)
            )
            masked = train if part == "val" else train | valid
            if target not in masked | (valid if part == "val" else test):
                rivals = [i for i in range(population.num_items) if i not in masked and i != target]
                places.append(1 + sum(scores[u][i] >= scores[u][target] for i in rivals))
        assert len(places) > 0
        for k in shares:
            shares[k].append(np.mean(np.array(places) <= k))
    for k, each in shares.items():
        assert got[f"{part}/full/er@{k}"] == pytest.approx(np.mean(each), rel=1e-5)
        assert (f"{part}/full/er@{k}_sd" in got) == (len(promoted) > 1)
    assert 0 < got[f"{part}/full/er@20"] < 1
    plain = flatten_metrics(
        part, make_evaluator(table_model(scores), link())((), private, make_eval_split(population, part), KEY)
    )
    assert {name: value for name, value in got.items() if "/er@" not in name} == pytest.approx(plain)


def test_clients_of_one_activity_are_in_one_decile():
    """One whose activity is a decile's bound is above it: beyond a tenth, two tenths, ... of all."""
    population, *_ = setting()
    num_train = np.repeat([4, 4, 4, 7, 9], len(population.num_train) // 5)
    found = make_eval_split(population._replace(num_train=num_train), "test")
    bounds = [np.quantile(num_train, tenth / 10) for tenth in range(1, 10)]
    want = [sum(bound <= each for bound in bounds) for each in num_train[found.who]]
    assert found.decile.tolist() == want
    assert sorted(set(want)) == [5, 7, 9]


def test_deciles_of_activity_add_up():
    population, scores, private, _ = setting()
    sums = make_evaluator(table_model(scores), link())((), private, make_eval_split(population, "test"), KEY)
    got = flatten_metrics("test", sums)
    order = np.argsort(population.num_train, kind="stable")
    deciles = np.asarray(sums["full/ndcg@10"].weight)
    assert deciles.sum() == 50
    least = order[: int(deciles[0])]
    assert population.num_train[least].max() <= population.num_train[order[int(deciles[0]) :]].min()
    alone = [
        reference(
            scores[u],
            population.test.of(u).tolist(),
            {*population.train.of(u), *population.valid.of(u)},
            range(population.num_items),
        )
        for u in least
    ]
    assert got["test/full/ndcg@10/decile_1"] == pytest.approx(np.mean([a["ndcg@10"] for a in alone]), rel=1e-5)


def test_a_tie_and_a_nan_count_against_the_target():
    def rank(target, others):
        return ranking_metrics(jnp.array([target]), jnp.array([True]), jnp.array(others), jnp.ones(len(others), bool))

    assert float(rank(1.0, [0.0, 0.0])["mrr"].total) == 1
    assert float(rank(1.0, [1.0, 0.0])["mrr"].total) == pytest.approx(1 / 2)
    assert float(rank(jnp.nan, [1.0, 0.0])["mrr"].total) == pytest.approx(1 / 3)
    assert float(rank(1.0, [jnp.nan, 0.0])["mrr"].total) == pytest.approx(1 / 2)
    constant = rank(0.0, [0.0] * 99)
    assert float(constant["hr@10"].total) == 0


def test_negatives_are_distinct_untouched_and_a_function_of_the_seed():
    population, _, _, sampled = setting()
    for u in range(50):
        touched = {*population.train.of(u), *population.valid.of(u), *population.test.of(u)}
        for d in range(DRAWS):
            real = sampled[u, d][sampled[u, d] < population.num_items]
            assert len(set(real.tolist())) == len(real) == min(SAMPLED, population.num_items - len(touched))
            assert not touched & set(real.tolist())
    assert (drawn(population, 0) == sampled).all()
    assert (drawn(population, 1) != sampled).any()
    some = np.array([3, 17, 44])
    assert (drawn(population, 0, some) == sampled[some]).all()


def test_sampled_candidates_are_uniform():
    """Chi-square of a user's candidates over many seeds; 5 sd above the mean is 1 in a million. Those of one draw are
    distinct, which makes the statistic smaller, by (free - SAMPLED) / (free - 1)."""
    population = prepare_population(synthetic_data(20, 300, mean_length=12))[1]
    counts = sum(np.bincount(drawn(population, seed, np.array([7])).ravel(), minlength=300) for seed in range(60))
    touched = np.concatenate([part.of(7) for part in (population.train, population.valid, population.test)])
    free = np.setdiff1d(np.arange(population.num_items), touched)
    assert counts[touched].sum() == 0
    expected = counts.sum() / len(free)
    chi = ((counts[free] - expected) ** 2 / expected).sum() * (len(free) - 1) / (len(free) - SAMPLED)
    assert abs(chi - len(free) + 1) < 5 * np.sqrt(2 * len(free))


def test_some_clients_asked_are_those_of_all():
    population, scores, private, _ = setting()
    one = make_evaluator(table_model(scores), link())
    some = make_eval_split(population, "test", most=11)
    assert len(set(some.who.tolist())) == 11
    got = flatten_metrics("test", one((), private, some, KEY))
    each = [make_eval_split(population, "test")._replace(who=np.array([c]), first=np.array([0, 1])) for c in some.who]
    whole = make_eval_split(population, "test")
    alone = [
        e._replace(
            num_train=whole.num_train[c : c + 1],
            decile=whole.decile[c : c + 1],
            targets=whole.targets.some(np.array([c])),
            masked=whole.masked.some(np.array([c])),
            sampled=whole.sampled[c : c + 1],
        )
        for c, e in zip(some.who, each, strict=True)
    ]
    hits = [flatten_metrics("test", one((), private, e, KEY))["test/full/ndcg@10"] for e in alone]
    assert got["test/full/ndcg@10"] == pytest.approx(np.mean(hits), rel=1e-5)


def test_memory_is_bounded_by_the_chunk_and_the_chunk_changes_nothing():
    population, scores, private, _ = setting()
    run = make_evaluator(table_model(scores), link())
    want = flatten_metrics("val", run((), private, make_eval_split(population, "val"), KEY))
    for chunk in (1, 7):
        each = population.num_items + (population.train.counts + population.valid.counts).max() + 1
        small = make_eval_split(population, "val", budget=chunk * each)
        assert (small.clients, small.users) == (chunk, 1)
        got = flatten_metrics("val", run((), private, small, KEY))
        assert got == pytest.approx(want, rel=1e-5, nan_ok=True)


@pytest.mark.parametrize("history", ["", "train", "all"])
def test_both_parts_are_asked_by_one_program(history):
    """Its shapes are those of the longer part; figures do not depend on them, as elsewhere each user is asked alone."""
    population, *_ = setting("ratio-clean")  # of a test that is longer than the validation
    parts = [make_eval_split(population, part, history=history) for part in ("val", "test")]
    assert parts[0].targets.counts.max() < parts[1].targets.counts.max()
    shapes = [jax.tree.map(np.shape, next(make_eval_batches(part))) for part in parts]
    assert shapes[0] == shapes[1]


def ring():
    """Fixed point in a ring of integers, as secure sums need it: exact for counts, 2^-16 for the rest."""
    return link(
        lambda u, sent, c: (jax.tree.map(lambda x: jnp.round(x * 2**16).astype(jnp.int32), u), c.link_state),
        lambda t, s, r: (jax.tree.map(lambda x: x / jnp.float32(2**16), t), s, {}),
        is_average=False,
    )


@pytest.mark.parametrize("channel", [link, mean, ring], ids=["sum", "mean", "ring"])
@pytest.mark.parametrize("case", CASES)
def test_on_the_clients_it_is_what_the_server_finds(channel, case):
    population, scores, private, _ = setting(**CASES[case])
    asked = make_eval_split(population, "test")
    server = flatten_metrics("test", make_evaluator(table_model(scores), link())((), private, asked, KEY))
    clients = flatten_metrics("test", make_evaluator(table_model(scores), chain(channel()))((), private, asked, KEY))
    assert clients == pytest.approx(server, abs=1e-4 if channel is ring else 1e-6)


def test_the_server_hears_only_sums_over_clients():
    population, scores, private, _ = setting()
    heard = []

    def spy(update, sent, client):
        heard.append([leaf.shape for leaf in jax.tree.leaves(update)])
        return update, client.link_state

    make_evaluator(table_model(scores), chain(link(spy)))((), private, make_eval_split(population, "test"), KEY)
    assert all(set(shapes) == {(10,), (DRAWS, 10)} for shapes in heard)  # by decile: nothing as long as the catalogue


def test_parts_that_are_not_there():
    population, *_ = setting()
    with pytest.raises(ValueError, match="choose val or test"):
        make_eval_split(population, "train")
