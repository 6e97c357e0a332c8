"""Models: scores by hand, and the split between what is shared, private, and a table."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxfed.algorithms.group_rates import Rates, group_rates
from jaxfed.config.registry import CLOSED, REGISTRY
from jaxfed.core.tables import Table, is_table, take_rows, unwrap
from jaxfed.models.baselines import counter, popularity
from jaxfed.models.metamf import metamf
from jaxfed.models.mf import mf
from jaxfed.models.neural import NeuralFactorization, fedrap, neumf, pfedrec
from tests.laws.cover import parametrize_cover
from tests.small import BY_TEXT, SEQUENCES

N, KEY = 30, jax.random.key(1)
ROWS = np.array([4, 9, 17, N])  # the last is padding


def parts(model):
    return model.init(KEY), model.private(KEY)


# the others fold in a user
@pytest.mark.parametrize("name", [name for name in REGISTRY["model"] if name not in (*CLOSED, *SEQUENCES, *BY_TEXT)])
@pytest.mark.parametrize("users", [1, 3])
def test_scores_of_rows_are_rows_of_scores(name, users):
    """A model must not care whether it is given the catalogue or a client's slice."""
    model = REGISTRY["model"][name](N, users)
    shared, private = parts(model)
    fresh = jax.tree.map(lambda x: x + jax.random.normal(KEY, x.shape), (shared, private))
    for user in range(users):
        every = model.score(*fresh, jnp.int32(user))
        some = model.score(*take_rows(fresh, ROWS), jnp.int32(user))
        assert every.shape == (N,)
        np.testing.assert_allclose(some[:3], every[ROWS[:3]], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in REGISTRY["model"] if name not in BY_TEXT])
def test_tables_lead_with_the_catalogue_and_nothing_else_is_marked(name):
    for tree in parts(REGISTRY["model"][name](N, 1)):
        for leaf in jax.tree.leaves(tree, is_leaf=is_table):
            if is_table(leaf):
                assert leaf.rows.shape[0] == N
            else:
                assert N not in leaf.shape


@pytest.mark.parametrize("make", [mf, neumf, metamf])
@pytest.mark.parametrize("loss", ["bce", "squared"])
def test_a_loss_of_one_user_equals_the_loss_that_names_its_examples(make, loss):
    """Merged rows (weight, mean label) against one entry an example: the same value and the same gradient."""
    model = make(N, 1, loss=loss)
    params = take_rows(parts(model), ROWS)
    merged = {"label": jnp.array([0.5, 1.0, 0.0, 0.0]), "weight": jnp.array([2.0, 1.0, 3.0, 0.0])}
    item = jnp.array([0, 0, 1, 2, 2, 2])
    label = jnp.array([1.0, 0.0, 1.0, 0.0, 0.0, 0.0])
    named = {"item": item, "label": label, "weight": jnp.ones(6), "user": jnp.zeros(6, int)}
    value = lambda batch: lambda p: model.loss(*unwrap(p), batch).value
    gradients = [jax.grad(value(batch))(params) for batch in (merged, named)]
    off = 5e-6 if make is metamf else 1e-6  # float32; a logit of the former is a product of five factors
    for a, b in zip(*map(jax.tree.leaves, gradients), strict=True):  # sums in another order, of terms that may cancel
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7 + off * np.abs(b).max())
    np.testing.assert_allclose(value(merged)(params), value(named)(params), rtol=off)


@pytest.mark.parametrize("users", [1, 2])
def test_bpr_by_hand(users):
    model = mf(N, users, dim=3, loss="bpr")
    shared, private = parts(model)
    batch = {"item": jnp.array([0, 1]), "other": jnp.array([2, 0]), "weight": jnp.array([1.0, 2.0])}
    who = jnp.array([0, users - 1])
    if users > 1:
        batch["user"] = who
    item, bias = shared["tables"]["item"].rows, shared["tables"]["bias"].rows
    own = private["private"]["user"]
    score = lambda i, u: item[i] @ own[u] + bias[i]
    gaps = [score(p, u) - score(n, u) for p, n, u in zip([0, 1], [2, 0], who, strict=True)]
    want = -jax.nn.log_sigmoid(gaps[0]) - 2 * jax.nn.log_sigmoid(gaps[1])
    got = model.loss(*unwrap((shared, private)), batch)
    np.testing.assert_allclose(got.total, want, rtol=1e-5)
    assert float(got.weight) == 3


def test_mf_by_hand():
    model = mf(N, 1, dim=4)
    shared, private = parts(model)
    want = shared["tables"]["item"].rows @ private["private"]["user"][0] + shared["tables"]["bias"].rows
    np.testing.assert_allclose(model.score(shared, private, jnp.int32(0)), want, rtol=1e-6)
    assert "bias" not in mf(N, 1, bias=False).init(KEY)["tables"]
    assert float(jnp.std(mf(5000, 1, init_scale=0.3).init(KEY)["tables"]["item"].rows)) == pytest.approx(0.3, rel=0.02)


def test_neumf_is_the_network_of_the_paper():
    """The first layer in two halves is the layer on [user, item] joined."""
    model = neumf(N, 1, dim=3, hidden=(5, 4))
    shared, private = jax.tree.map(lambda x: x + 0.3, parts(model))
    table, net, own = unwrap(shared)["tables"], shared["params"], private["private"]
    weights = jnp.concatenate([net["user_half"]["kernel"], net["item_half"]["kernel"]])
    joined = jnp.concatenate([jnp.broadcast_to(own["user_network"][0], (N, 3)), table["item_network"]], 1)
    x = jax.nn.relu(joined @ weights + net["item_half"]["bias"])
    x = jax.nn.relu(x @ net["hidden_0"]["kernel"] + net["hidden_0"]["bias"])
    both = jnp.concatenate([own["user_product"][0] * table["item_product"], x], 1)
    want = (both @ net["output"]["kernel"] + net["output"]["bias"])[:, 0]
    np.testing.assert_allclose(model.score(shared, private, jnp.int32(0)), want, rtol=1e-5)


@parametrize_cover(
    backend=["cpu", "gpu"],  # on which users are scored in turn, and at once
    hidden={"5": (5,), "6,4": (6, 4), "7,5,3": (7, 5, 3)},
    table_dtype=["float32", "bfloat16"],
)
def test_neumf_scores_a_catalogue_as_its_module_does(monkeypatch, backend, hidden, table_dtype):
    """Alone, and mapped over clients and their users, as evaluations do; to the rounding of sums in another order."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    model = neumf(N, 2, dim=3, hidden=hidden, table_dtype=table_dtype)
    module = NeuralFactorization(N, 2, 3, hidden, 0.1, table_dtype)
    shared = jax.tree.map(lambda x: x + jnp.asarray(0.3, x.dtype), model.init(KEY))
    private = jax.vmap(model.private)(jax.random.split(KEY, 4))
    users = jnp.array([[0, 1], [1, 0], [1, 1], [0, 0]])

    def apply(own, user):
        return module.apply({**unwrap(shared), **unwrap(own)}, user, None)

    def score(own, user):
        return model.score(shared, own, user)

    over_users = lambda f: jax.vmap(lambda own, users: jax.vmap(lambda user: f(own, user))(users))
    want = over_users(apply)(private, users)
    for got in (over_users(score)(private, users), jax.jit(over_users(score))(private, users)):
        assert (got.shape, got.dtype) == (want.shape, jnp.float32)
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    own = jax.tree.map(lambda x: x[2], private)
    np.testing.assert_allclose(score(own, jnp.int32(1)), want[2, 0], rtol=1e-6, atol=1e-6)


def test_metamf_scores_many_clients_as_it_scores_one():
    model = metamf(N, 1, dim=4, code=3, rank=2, hidden=5)
    shared, private = model.init(KEY), jax.vmap(model.private)(jax.random.split(KEY, 4))
    got = jax.vmap(lambda own: model.score(shared, own, jnp.int32(0)))(private)
    for client in range(4):
        want = model.score(shared, jax.tree.map(lambda x: x[client], private), jnp.int32(0))
        np.testing.assert_allclose(got[client], want, rtol=1e-6, atol=1e-6)


def test_metamf_makes_items_and_score_function_from_a_code():
    """Loops over every index."""
    model = metamf(N, 3, dim=4, code=3, rank=2, hidden=5)
    shared, private = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(KEY, x.shape), parts(model))
    net, low, codes = (
        jax.tree.map(lambda x: np.asarray(x, np.float64), unwrap(part))
        for part in (shared["params"], shared["tables"]["item"], private["private"]["code"])
    )
    want = np.zeros((3, N))
    for user in range(3):
        picks = np.exp([sum(codes[user, i] * net["keys"][i, j] for i in range(3)) for j in range(3)])
        mixed = 3 * sum(picks[j] / picks.sum() * net["memories"][j] for j in range(3))
        for item in range(N):
            few = [sum(low[item, r, c] * mixed[c] for c in range(3)) for r in range(2)]
            made = [sum(few[r] * mixed[c] * net["rise"][c, r, d] for r in range(2) for c in range(3)) for d in range(4)]
            for h in range(5):
                first = sum(mixed[c] * net["first"][c, :, h] for c in range(3))
                before = np.dot(made, first[:4]) + first[4]
                want[user, item] += max(before, 0) * sum(mixed[c] * net["last"][c, h] for c in range(3))
    got = np.stack([model.score(shared, private, jnp.int32(user)) for user in range(3)])
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    batch = {"user": jnp.array([2, 0]), "item": jnp.array([7, 1]), "label": jnp.zeros(2), "weight": jnp.ones(2)}
    each = np.logaddexp(0, [want[2, 7], want[0, 1]])
    np.testing.assert_allclose(model.loss(*unwrap((shared, private)), batch).total, each.sum(), rtol=1e-4)


def test_popularity_counts_clicks_and_the_counter_counts_draws():
    batch = {"label": jnp.array([1.0, 0.25, 0.0]), "weight": jnp.array([1.0, 4.0, 2.0])}
    for model, want in ((popularity(3, 1), [1, 1, 0]), (counter(3, 1), [0, -3, -2])):
        params = parts(model)
        step = jax.grad(lambda p, model=model: model.loss(*unwrap(p), batch).total)(params)
        moved = optax.apply_updates(params, jax.tree.map(jnp.negative, step))
        np.testing.assert_allclose(model.score(*moved, jnp.int32(0)), want)


def test_a_loss_that_is_not_there():
    with pytest.raises(ValueError, match="no loss 'huber': choose one of bce, bpr, squared"):
        mf(N, 1, loss="huber")


def test_fedrap_adds_a_private_table_and_keeps_the_two_apart():
    """Logits, and what the loss of each example has beside it, by hand."""
    plainly, model = fedrap(N, 1, 3), fedrap(N, 1, 3, apart=0.3, sparse=0.7)
    shared, private = (jax.tree.map(lambda x: x + jax.random.normal(KEY, x.shape), part) for part in parts(model))
    common, own = shared["tables"]["item"].rows, private["private_tables"]["item"].rows
    head, bias = private["private"]["head"][0], private["private"]["bias"][0]
    np.testing.assert_allclose(model.score(shared, private, 0), (common + own) @ head + bias, rtol=1e-5, atol=1e-5)
    weight = jnp.arange(N, dtype=jnp.float32)
    batch = {"label": jnp.arange(N) % 2.0, "weight": weight}
    more = 0.7 * np.abs(common).mean(1) - 0.3 * np.square(own - common).mean(1)
    got = model.loss(shared, private, batch).total - plainly.loss(shared, private, batch).total
    np.testing.assert_allclose(got, (more * weight).sum(), rtol=1e-3)
    picked = {"user": jnp.zeros(4, int), "item": jnp.array([3, 3, 7, 9]), "label": jnp.ones(4), "weight": jnp.ones(4)}
    got = model.loss(shared, private, picked).total - plainly.loss(shared, private, picked).total
    np.testing.assert_allclose(got, more[np.array([3, 3, 7, 9])].sum(), rtol=1e-3)


def test_pfedrec_scores_by_a_head_of_the_client_s_own():
    shared, private = parts(pfedrec(N, 2, 3))
    want = shared["tables"]["item"].rows @ private["private"]["head"][1]
    np.testing.assert_allclose(pfedrec(N, 2, 3).score(shared, private, 1), want, rtol=1e-5, atol=1e-6)
    assert not jax.tree.leaves(shared["params"])


def test_groups_of_a_client_s_optimiser():
    """`item` is for tables of either part, `user` for the rest of the private part; a step is rate (g - decay p)."""
    pace = group_rates(
        REGISTRY["optimizer"]["sgd"],
        0.5,
        0.0,
        Rates(2.0, 0.1),
        Rates(3.0),
    )
    both = {"t": Table(jnp.ones(2)), "w": jnp.ones(())}
    params = both, both
    got, _ = pace.update(params, pace.init(params), params)
    for part, rest in zip(got, (-0.5, -3.0), strict=True):
        np.testing.assert_allclose(part["t"].rows, 2.0 * (-1 - 0.1), rtol=1e-6)
        np.testing.assert_allclose(part["w"], rest, rtol=1e-6)
