"""Recommenders of sequences: losses against NumPy, padding that changes nothing, causality, folding in, learning."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxfed as jf
from jaxfed.core.tables import unwrap
from jaxfed.core.types import History
from jaxfed.models.dropout import drop_out
from jaxfed.models.sequence import take_latest
from jaxfed.models.sequence_losses import Comparison, bce_loss, bpr_loss, find_sequence_loss, softmax_loss
from tests.small import close

N, DIM, LENGTH = 30, 8, 12
MODELS = {
    "sasrec": lambda **more: jf.models.sasrec(N, dim=DIM, length=LENGTH, heads=2, **more),
    "sasrec, authors_code": lambda **more: jf.models.sasrec(N, dim=DIM, length=LENGTH, block="authors_code", **more),
    "sasrec, ligr": lambda **more: jf.models.sasrec(N, dim=DIM, length=LENGTH, block="ligr", **more),
    "bert4rec": lambda **more: jf.models.bert4rec(N, dim=DIM, length=LENGTH, **{"loss": "sampled_softmax"} | more),
    "gru4rec": lambda **more: jf.models.gru4rec(N, dim=DIM, length=LENGTH, hidden=6, **more),
    "hstu": lambda **more: jf.models.hstu(N, dim=DIM, length=LENGTH, heads=2, **more),
}


def make_history(items, places=LENGTH):
    rows = np.full(places, 1 << 30)
    rows[: len(items)] = items
    return History(jnp.array(rows), jnp.array(rows), N)


def make_batch(items, places, seed=5):
    """A step over the first rows of a table: those of the items read, and some more as negatives."""
    sequence = np.full(places, N, np.int32)
    sequence[: len(items)] = items
    drawn = np.zeros(N, np.float32)
    drawn[[1, 4, 9, 20]] = 1, 2, 1, 3
    dropout = np.array([seed, 99], np.uint32)
    batch = {"sequence": jnp.array(sequence), "negative": jnp.array(drawn), "dropout": jnp.array(dropout)}
    return batch | {"catalogue": jnp.float32(N)}


def shared_of(model, seed=0):
    """Its shared parameters, of a size at which nothing is linear."""
    shared = unwrap(model.init(jax.random.key(seed)))
    keys = iter(jax.random.split(jax.random.key(seed + 1), 200))
    return jax.tree.map(lambda x: x + 0.3 * jax.random.normal(next(keys), x.shape), shared)


# --- losses -------------------------------------------------------------------------------------


LOGITS = np.array([1.5, -0.3, 0.8, 2.0, 0.0], np.float32)


def test_softmax_over_every_other_item_is_the_cross_entropy():
    drawn = np.array([1, 1, 0, 1, 1], np.float32)
    want = -(LOGITS[2] - np.log(np.exp(LOGITS).sum()))
    assert softmax_loss(Comparison(LOGITS[2], LOGITS, drawn, 5)) == pytest.approx(want, rel=1e-6)


def test_sampled_softmax_stands_for_all_items():
    """Two draws of one row and one of another stand for 99 others: by hand."""
    drawn = np.array([2, 0, 0, 1, 0], np.float32)
    others = (2 * np.exp(1.5) + np.exp(2.0)) * 99 / 3
    want = -np.log(np.exp(0.8) / (np.exp(0.8) + others))
    assert softmax_loss(Comparison(LOGITS[2], LOGITS, drawn, 100)) == pytest.approx(want, rel=1e-6)


def test_sampled_softmax_estimates_the_gradient_of_the_full_one():
    generator, table = np.random.default_rng(0), np.random.default_rng(1).normal(size=200).astype(np.float32)

    def slope(drawn):
        return jax.grad(lambda z: softmax_loss(Comparison(z[0], z, drawn.at[0].set(0), 200)))(jnp.array(table))

    full = slope(jnp.ones(200))
    counts = np.stack([np.bincount(generator.integers(0, 200, 400), minlength=200) for _ in range(400)])
    mean = jax.vmap(slope)(jnp.array(counts, jnp.float32)).mean(0)
    # 400 means of ratios: their bias is about 1 / draws of the value, their error 1 / sqrt(400 * 2)
    np.testing.assert_allclose(mean[0], full[0], rtol=0.02)
    assert np.corrcoef(mean[1:], full[1:])[0, 1] > 0.99


def test_binary_losses_by_hand():
    drawn = np.array([2, 0, 0, 1, 0], np.float32)
    softplus = lambda x: np.log1p(np.exp(x))
    negatives = 2 * softplus(1.5) + softplus(2.0)
    one = Comparison(LOGITS[2], LOGITS, drawn, 11)
    assert bce_loss(one) == pytest.approx((softplus(-0.8) + negatives) / 4, rel=1e-6)
    beta = 1 - 0.75 * (1 - 3 / 10)
    assert bce_loss(one, 0.75) == pytest.approx((beta * softplus(-0.8) + negatives) / 4, rel=1e-6)
    assert find_sequence_loss("gbce", 0.0).value(one) == bce_loss(one)
    want = (2 * softplus(1.5 - 0.8) + softplus(2.0 - 0.8)) / 3
    assert bpr_loss(one) == pytest.approx(want, rel=1e-6)


def test_calibrated_gbce_gives_the_probability():
    """With t = 1 the best logit of an item has a sigmoid equal to its share (Petrov and Macdonald 2023)."""
    share, items, drawn = np.array([0.5, 0.3, 0.15, 0.05]), 4, 2.0
    rate = drawn / (items - 1)  # each other item is drawn so often
    logits = jnp.zeros(4)

    def expected(logits):
        beta = 1 - (1 - rate)
        positive = share * beta * jax.nn.softplus(-logits)
        return jnp.sum(positive + (1 - share) * rate * jax.nn.softplus(logits))

    slope = jax.jit(jax.grad(expected))
    for _ in range(3000):
        logits -= 2.0 * slope(logits)
    np.testing.assert_allclose(jax.nn.sigmoid(logits), share, atol=1e-3)


@pytest.mark.parametrize("loss", ["sampled_softmax", "bce", "gbce", "bpr"])
def test_a_negative_that_is_the_target_is_none(loss):
    model = jf.models.sasrec(N, dim=DIM, length=LENGTH, loss=loss, dropout=0.0)
    shared, batch = shared_of(model), make_batch([3, 1, 4], 4)
    seen = model.loss(shared, (), batch)
    cleared = batch | {"negative": batch["negative"].at[1].set(0)}  # a target, and a negative of the other one alone
    assert seen.weight == 2
    assert model.loss(shared, (), cleared).total != seen.total
    alone = make_batch([3, 1], 2)
    value = model.loss(shared, (), alone).total
    assert model.loss(shared, (), alone | {"negative": alone["negative"].at[1].set(7)}).total == value


# --- laws of every model --------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_padding_changes_no_loss_and_no_gradient(name):
    """With dropout on: the numbers of a place are its own, whatever a block pads histories to."""
    model = MODELS[name](dropout=0.3)
    shared, items = shared_of(model), [3, 7, 1, 12, 5, 28]
    look = jax.jit(jax.value_and_grad(lambda shared, batch: model.loss(shared, (), batch).value))
    found = [look(shared, make_batch(items, places)) for places in (6, 9, 13)]
    for value, slope in found[1:]:
        close((value, slope), found[0])
    other = model.loss(shared, (), make_batch(items, 6, seed=6)).value
    assert abs(other - found[0][0]) > 1e-4, "another key drops other numbers"


@pytest.mark.parametrize("name", MODELS)
def test_rows_that_a_step_does_not_use_get_no_gradient(name):
    model = MODELS[name](dropout=0.0)
    slope = jax.grad(lambda s: model.loss(s, (), make_batch([3, 7, 1], 5)).value)(shared_of(model))
    used = np.flatnonzero(np.abs(slope["tables"]["item"]).sum(1))
    assert set(used) <= {1, 3, 4, 7, 9, 20}
    assert {4, 9, 20} <= set(used)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(slope))


@pytest.mark.parametrize("name", [name for name in MODELS if name != "bert4rec"])
def test_a_place_does_not_see_what_comes_later(name):
    """By the logits of a history and those of the same with other items after it."""
    model = MODELS[name](dropout=0.0)
    shared = shared_of(model)

    def losses(items):
        batch = make_batch(items, 6)
        return [
            float(model.loss(shared, (), batch | {"sequence": jnp.array(items[:n] + [N] * (6 - n))}).total)
            for n in (2, 3, 4)
        ]

    one, other = losses([3, 7, 1, 12, 5, 2]), losses([3, 7, 1, 12, 9, 4])
    assert one == other

    # and through the gradient: the loss of the first targets does not read later vectors
    def first_target(table):
        batch = make_batch([3, 7, 1, 12], 4)
        whole = {**shared, "tables": {"item": table}}
        part = model.loss(
            whole, (), batch | {"sequence": jnp.array([3, 7, N, N]), "negative": jnp.zeros(N).at[9].set(1)}
        )
        return part.total

    slope = jax.grad(first_target)(shared["tables"]["item"])
    assert not np.abs(slope[jnp.array([1, 12])]).sum()


@pytest.mark.parametrize("name", MODELS)
def test_a_history_is_folded_in_by_its_latest_items(name):
    model = MODELS[name](dropout=0.5)
    shared = model.init(jax.random.key(2))
    long = list(range(20))
    vector = model.fold_in(shared, make_history(long, 25))
    close(vector, model.fold_in(shared, make_history(long[-LENGTH:])))
    close(vector, model.fold_in(shared, make_history(long[-LENGTH:], 40)))
    scores = model.score(shared, vector, 0)
    assert scores.shape == (N,)
    assert np.ptp(scores) > 0
    other = model.score(shared, model.fold_in(shared, make_history(long[::-1], 25)), 0)
    assert not np.allclose(scores, other), "order counts"
    assert not np.any(model.score(shared, model.fold_in(shared, make_history([])), 0))


@pytest.mark.parametrize("make", [jf.models.sasrec, jf.models.bert4rec, jf.models.gru4rec, jf.models.hstu])
def test_places_beyond_the_histories_take_no_memory(make):
    """A model of 20,000 places would have 1.6 GB of attention weights for each user."""
    model = make(N, length=20_000)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(2)))
    made = jax.make_jaxpr(model.fold_in)(shapes, make_history([1, 2, 3], 5))
    sizes = [var.aval.size for equation in made.jaxpr.eqns for var in equation.outvars if var.aval.ndim]
    assert max(sizes) < 20_000 * 64


@pytest.mark.parametrize("name", MODELS)
def test_what_is_trained_is_what_scores(name):
    """The loss of a single target is that of the scores after the items before it."""
    model = MODELS[name](dropout=0.0, loss="softmax")
    # positions of sasrec are counted from the end, so that each target of a long history has others than in scoring
    items = [3, 7] if name.startswith("sasrec") else [3, 7, 1, 12]
    shared = shared_of(model)
    scores = model.score(shared, model.fold_in(shared, make_history(items[:-1])), 0)
    want = jax.nn.logsumexp(scores) - scores[items[-1]]
    batch = make_batch(items, len(items)) | {"negative": jnp.ones(N)}
    if name == "bert4rec":  # where the last item alone is masked, that is a history of the others with a mask after it
        seed = next(seed for seed in range(400) if only_last_is_masked(seed, len(items)))
        seen = model.loss(shared, (), batch | {"dropout": jnp.array([seed, 99], jnp.uint32)})
        assert seen.weight == len(items) - 1
        close(seen.value, want, rtol=1e-4)
    else:
        before = model.loss(shared, (), batch | {"sequence": jnp.array([*items[:-1], N])}).total
        close(model.loss(shared, (), batch).total - before, want, rtol=1e-4, atol=1e-5)


def only_last_is_masked(seed, places):
    from jaxfed.models.sequence import choose_masked

    key = jax.random.wrap_key_data(jnp.array([seed, 99], jnp.uint32), impl="threefry2x32")
    return choose_masked(jnp.ones(places, bool), key, 0.2).tolist() == [False] * (places - 1) + [True]


@pytest.mark.parametrize("name", MODELS)
def test_an_order_is_learnt_by_federated_rounds(name):
    """Items follow each other in a circle: after i comes i + 1. Popularity says nothing, and the latest item all."""
    users, generator = 40, np.random.default_rng(0)
    starts, lengths = generator.integers(0, N, users), generator.integers(4, 14, users)
    user = np.repeat(np.arange(users), lengths)
    step = np.concatenate([np.arange(n) for n in lengths])
    data = jf.data.from_arrays(user, (np.repeat(starts, lengths) + step) % N, times=step)
    clients = jf.data.partition(data, by="user", split="leave-one-out")
    rate, rounds = (0.03, 300) if name in ("hstu", "gru4rec", "bert4rec") else (0.01, 120)
    model = MODELS[name](dropout=0.0, loss="softmax")
    method = jf.algorithms.fedsgd(model, optax.sgd(0.1), optax.adam(rate))
    channel, cohort = jf.channels.weighted_mean(), jf.sampling.uniform(20)
    run = jf.Experiment(clients, model, method, channel=channel, cohort=cohort)
    for _ in run.train(rounds=rounds, evaluate_every=rounds):
        pass
    assert run.evaluate("val")["val/full/hr@10"] > 0.9  # by chance, or by popularity, a third


# --- pieces -----------------------------------------------------------------------------------------


def test_dropout_keeps_the_mean_and_belongs_to_places():
    x = jnp.ones((50, 400))
    dropped = drop_out(x, 0.3, jax.random.key(0))
    assert abs(float(dropped.mean()) - 1) < 4 * (0.3 / 0.7 / x.size) ** 0.5
    np.testing.assert_array_equal(drop_out(x[:7], 0.3, jax.random.key(0)), dropped[:7])
    assert len(np.unique(np.asarray(dropped == 0), axis=0)) == 50, "no two places drop the same numbers"
    weights = jnp.ones((9, 9, 2))
    some = drop_out(weights[:5, :5], 0.3, jax.random.key(0))
    np.testing.assert_array_equal(drop_out(weights, 0.3, jax.random.key(0))[:5, :5], some)
    assert drop_out(x, 0.3, None) is x


def test_the_latest_items():
    assert take_latest(make_history([4, 5, 6], 8), 2).tolist() == [5, 6]
    latest = take_latest(make_history([4, 5, 6], 8), 5)
    assert latest[:3].tolist() == [4, 5, 6]
    assert (latest[3:] >= N).all()


def test_sasrec_against_numpy():
    """One pre-norm block of one head, from the equations."""
    model = jf.models.sasrec(N, dim=4, length=5, blocks=1, dropout=0.0)
    shared = shared_of(model)
    p = jax.tree.map(np.asarray, shared["params"]["encoder"])
    table = np.asarray(shared["tables"]["item"])

    def norm(x, of):
        mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return (x - mean) / np.sqrt(var + 1e-6) * of["scale"] + of["bias"]

    items = [3, 7, 1]
    x = 2.0 * table[items] + p["position"][[2, 1, 0]]
    block = p["block_0"]
    y = norm(x, block["norm_1"])
    attention = block["attention"]
    q, k, v = (y @ attention[n]["kernel"][:, 0] + attention[n].get("bias", [0])[0] for n in ("query", "key", "value"))
    logits = np.where(np.tril(np.ones((3, 3))) > 0, q @ k.T / 2.0, -np.inf)
    weights = np.exp(logits - logits.max(1, keepdims=True))
    weights /= weights.sum(1, keepdims=True)
    x = x + (weights @ v) @ attention["output"]["kernel"][0] + attention["output"]["bias"]
    feed = block["feed_forward"]
    y = np.maximum(norm(x, block["norm_2"]) @ feed["inner"]["kernel"] + feed["inner"]["bias"], 0)
    x = x + y @ feed["output"]["kernel"] + feed["output"]["bias"]
    want = norm(x, p["norm"])[-1] @ table.T
    scores = model.score(shared, model.fold_in(shared, make_history(items)), 0)
    np.testing.assert_allclose(scores, want, rtol=1e-4, atol=1e-4)


def test_remat_and_half_precision():
    shared = shared_of(MODELS["sasrec"]())
    batch = make_batch([3, 7, 1, 12], 6)

    def slope(**options):
        model = MODELS["sasrec"](dropout=0.2, **options)
        return jax.grad(lambda s: model.loss(s, (), batch).value)(shared)

    close(slope(remat=True), slope())
    half, whole = slope(compute_dtype="bfloat16"), slope()
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(half))
    size = optax.tree.norm(whole)
    assert 0 < optax.tree.norm(optax.tree.sub(half, whole)) / size < 0.1  # 8 bits of mantissa, some layers deep


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jf.models.sasrec(N, dim=10, heads=4), "set a dim that the heads divide"),
        (lambda: jf.models.sasrec(N, dropout=1.0), "model.dropout"),
        (lambda: jf.models.sasrec(N, length=0), "model.length"),
        (lambda: jf.models.sasrec(N, loss="cross"), "model.loss"),
        (lambda: jf.models.sasrec(N, loss="gbce", calibration=2.0), "model.calibration"),
        (lambda: jf.models.bert4rec(N, mask_share=0.0), "model.mask_share"),
        (lambda: jf.models.gru4rec(N, hidden=0), "model.hidden"),
        (lambda: jf.models.hstu(N, temperature=-1.0), "model.temperature"),
    ],
)
def test_sizes_that_no_model_has(make, message):
    with pytest.raises(ValueError, match=message):
        make()
