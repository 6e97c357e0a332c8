"""Low-rank and hashed tables against NumPy, and one step of a client against the gradient of the composed model."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxfed.algorithms.fedsgd import fedsgd
from jaxfed.algorithms.local_training import local_steps
from jaxfed.channels.average import mean
from jaxfed.config.build import build_from_config, load_data
from jaxfed.config.schema import make_config
from jaxfed.core.federate import federate
from jaxfed.core.method import Method
from jaxfed.core.model import Model
from jaxfed.core.parametrization import check_parametrization
from jaxfed.core.state import server_model
from jaxfed.core.tables import Table
from jaxfed.models.mf import mf
from jaxfed.models.neural import neumf
from jaxfed.models.parametrizations import hashed_tables, low_rank_tables
from jaxfed.training.loop import train_run
from jaxfed.training.rounds import initial_arrays
from tests.composed import TABLE, pack_small_run, round_and_gradient
from tests.small import BATCH, DATA, DIM, ITEMS, KEY, MARKED, USERS, WHO, bce, on_rows, row_cohort, run, user

MODEL = Model(lambda key: MARKED, user, bce, lambda shared, private, user: jnp.zeros(ITEMS))
MAKE = {
    "low_rank": lambda model: low_rank_tables(model, 2),
    "hashed": lambda model: hashed_tables(model, 23, 3, seed=5),
}
LOCAL, SERVER, ROUNDS = 0.1, 0.7, 3


# --- in NumPy, in float64, every client in turn ----------------------------------------


def public_constants(hashes, seed):
    return np.random.default_rng([seed, hashes]).integers(0, 2**32, (hashes, 2), np.uint32)


def buckets_of(buckets, hashes, seed):
    """int [hashes, ITEMS], in plain integers of Python."""
    out = []
    for multiplier, offset in public_constants(hashes, seed).tolist():
        column = []
        for item in range(ITEMS):
            x = (item * (multiplier | 1) + offset) % 2**32
            x = ((x ^ (x >> 16)) * 0x9E3779B1) % 2**32
            column.append((x ^ (x >> 16)) % buckets)
        out.append(column)
    return np.array(out)


class LowRank:
    def __init__(self, theta):
        factors = theta["item"]
        self.left, self.right = np.float64(factors.rows.rows), np.float64(factors.basis)

    def table(self):
        return self.left @ self.right

    def descend(self, update):
        self.left, self.right = (
            self.left - SERVER * update @ self.right.T,
            self.right - SERVER * self.left.T @ update,
        )


class Hashed:
    def __init__(self, theta):
        self.numbers, self.places = np.float64(theta["item"].buckets), buckets_of(23, 3, 5)

    def table(self):
        return sum(self.numbers[each] for each in self.places)

    def descend(self, update):
        for each in self.places:
            np.subtract.at(self.numbers, each, SERVER * update)


def slopes_by_hand(model, vector, items, labels):
    """Gradients of a batch's mean cross-entropy: (item rows, bias, scale, user vector)."""
    logit = model["scale"] * model["item"][items] @ vector + model["bias"][items]
    error = (1 / (1 + np.exp(-logit)) - labels) / len(items)
    return (
        model["scale"] * error[:, None] * vector,
        error,
        error @ (model["item"][items] @ vector),
        model["scale"] * error @ model["item"][items],
    )


def rounds_by_hand(held, sends_gradient, present):
    """{name: parameters} after some rounds of a mean over those who report."""
    bias, scale = np.zeros(ITEMS), 1.0
    users = {c: np.float64(user(jax.random.fold_in(KEY, c))["user"]) for c in WHO}
    for _ in range(ROUNDS):
        start = {"item": held.table(), "bias": bias, "scale": scale}
        total = {"item": np.zeros((ITEMS, DIM)), "bias": np.zeros(ITEMS), "scale": 0.0}
        for c, there in zip(WHO, present, strict=True):
            if not there:
                continue
            items, labels = DATA[c]
            model = {name: np.array(x) for name, x in start.items()}
            size = len(items) if sends_gradient else BATCH
            for low in range(0, len(items), size):
                at = items[low : low + size]
                rows, biases, factor, own = slopes_by_hand(model, users[c], at, labels[low : low + size])
                rate = 1.0 if sends_gradient else LOCAL
                model["item"][at] -= rate * rows
                model["bias"][at] -= rate * biases
                model["scale"] = model["scale"] - rate * factor
                users[c] = users[c] - LOCAL * own
            for name in total:
                total[name] = total[name] + (start[name] - model[name]) / sum(present)
        held.descend(total["item"])
        bias, scale = bias - SERVER * total["bias"], scale - SERVER * total["scale"]
    return {"item": held.table(), "bias": bias, "scale": scale}


@pytest.mark.parametrize("rows", [False, True], ids=["all", "rows"])
@pytest.mark.parametrize("sends_gradient", [False, True], ids=["fedavg", "fedsgd"])
@pytest.mark.parametrize("name", MAKE)
def test_rounds_against_numpy(name, sends_gradient, rows):
    """float32 against float64, three rounds."""
    made, present = MAKE[name](MODEL), [True, True, False, True, True, True, True, False]
    theta = made.init(jax.random.key(3))
    method = fedsgd(MODEL, optax.sgd(LOCAL)) if sends_gradient else Method(local_steps(MODEL, optax.sgd(LOCAL)))
    method = method._replace(server=optax.sgd(SERVER), parametrization=made)
    cohort = row_cohort(present=present)
    state, _ = run(federate(method, mean(), USERS), on_rows(cohort) if rows else cohort, theta, ROUNDS)
    want = rounds_by_hand({"low_rank": LowRank, "hashed": Hashed}[name](theta), sends_gradient, present)
    got = server_model(state, made)
    for part in ("item", "bias", "scale"):
        np.testing.assert_allclose(got[part], want[part], atol=5e-6, rtol=2e-5)
    assert np.abs(want["item"] - np.asarray(made.forward(theta, None)["item"].rows)).max() > 0.05


# --- the law: a local gradient is the gradient of the whole composed model ----------------------------------------


@pytest.fixture(scope="module")
def packed():
    return pack_small_run()


@pytest.mark.parametrize("name", [*MAKE, "identity"])
def test_a_gradient_is_that_of_the_composed_model(name, packed):
    """To 1e-6 of the sum over all who reported: one client's message is what the others' are not."""
    made = MAKE[name](packed[0].model) if name != "identity" else None
    theta = (made or packed[0].model).init(jax.random.key(7))
    got, want = round_and_gradient(*packed, made, theta)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6 * max(1, np.abs(b).max()))
    assert max(np.abs(x).max() for x in jax.tree.leaves(want)) > 0.01


# --- what they are made for ----------------------------------------


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("model", [mf(50, 2, dim=6), mf(50, 1, dim=6, table_dtype="bfloat16"), neumf(50, 1, 6)])
def test_they_fit_any_model_with_tables(name, model):
    made = MAKE[name](model)
    check_parametrization(made, model)
    ours, theirs = (jax.tree.leaves(each) for each in (made.forward(made.init(KEY), None), model.init(KEY)))
    for a, b in zip(ours, theirs, strict=True):  # as large as the model's own numbers: of 300, within a factor
        assert np.std(np.float32(a)) == pytest.approx(np.std(np.float32(b)), rel=0.5, abs=1e-6)


def test_hashes_spread_items_and_tell_them_apart():
    made = hashed_tables(mf(5000, 1, dim=2), buckets=512, hashes=2)
    places = np.asarray(made.forward(one_hot(made, 512), None)["tables"]["item"].rows)
    assert (places.sum(1) == 2).all()
    counts = places.sum(0)  # Poisson with a mean of 19.5
    assert counts.min() > 2
    assert counts.max() < 45
    assert len(np.unique(places, axis=0)) > 4850  # pairs of 512: 48 of 5,000 meet by chance


def one_hot(made, buckets):
    """Theta whose bucket b is the b-th unit vector."""
    theta = made.init(KEY)
    return theta | {"tables": theta["tables"] | {"item": type(theta["tables"]["item"])(jnp.eye(buckets))}}


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: low_rank_tables(mf(9, 1, dim=4), 5), "parametrization.rank is 5: vectors have 4 numbers"),
        (lambda: low_rank_tables(mf(9, 1, dim=4), 0), "from 1 to 4"),
        (lambda: hashed_tables(mf(9, 1, dim=4), 0), "parametrization.buckets is 0"),
        (lambda: hashed_tables(mf(9, 1, dim=4), 4, 0), "parametrization.hashes is 0"),
        (lambda: low_rank_tables(dense_model()), "no table of item vectors"),
        (lambda: hashed_tables(dense_model()), "no table of item vectors"),
    ],
)
def test_what_cannot_be_is_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def dense_model():
    return MODEL._replace(init=lambda key: {"w": jnp.zeros(3), "bias": Table(jnp.zeros(9))})


# --- from a configuration ----------------------------------------

SECTIONS = {
    "low_rank": {"name": "low_rank", "rank": 2},
    "hashed": {"name": "hashed", "buckets": 30, "hashes": 2},
    "identity": {"name": "identity"},
}


def trained(folder, name, rounds=4, **more):
    """The summary of a small run."""
    table = TABLE | {"rounds": rounds, "work": {"batch_size": 8}, "channel": [{"name": "per_row_mean"}]}
    table |= {"server": {"name": "adam"}, "evaluation": {"every": 2}, "cohort": {"size": 8}}
    table |= {"parametrization": SECTIONS[name], "run": {"out": str(folder / name)}} | more
    return train_run(make_config(table), resume=True)


@pytest.mark.parametrize("name", MAKE)
def test_runs_go_on_and_cost_what_the_model_costs(name, tmp_path):
    """A run that is resumed comes to the same bits; a client sends and receives what it does without."""
    plain = trained(tmp_path / "plain", "identity")
    trained(tmp_path / "two", name, rounds=2)
    longer, whole = trained(tmp_path / "two", name), trained(tmp_path / "whole", name)
    assert longer["params_sha256"] == whole["params_sha256"] != plain["params_sha256"]
    for key in ("bytes_up_total", "bytes_down_total", "server_sees"):
        assert whole[key] == plain[key]


def test_what_is_scored_is_what_is_broadcast():
    config = make_config(TABLE | {"parametrization": SECTIONS["low_rank"]})
    it = build_from_config(config, load_data(config.data))
    arrays = initial_arrays(it, 0)
    want = it.method.parametrization.forward(arrays["state"].shared.params, None)
    assert jax.tree.structure(want) == jax.tree.structure(jax.eval_shape(it.model.init, KEY))
    for a, b in zip(jax.tree.leaves(arrays["best"][0]), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"parametrization": {"name": "low_rank", "rank": 9}}, "parametrization.rank is 9"),
        ({"parametrization": {"name": "low"}}, 'no parametrization "low"; there are identity, low_rank, hashed'),
        ({"parametrization": SECTIONS["hashed"], "server": {"edges": 2}}, "server.edges"),
        ({"parametrization": SECTIONS["hashed"], "model": {"name": "popularity"}}, "no table of item vectors"),
        (
            {"parametrization": SECTIONS["hashed"], "model": {"name": "ease"}, "algorithm": {"name": "closed_form"}},
            "parametrization: a closed form",
        ),
        (
            {
                "parametrization": SECTIONS["hashed"],
                "cohort": {"name": "buffered", "size": 4},
                "clock": {"name": "constant"},
            },
            "of a parametrization the server keeps none",
        ),
    ],
)
def test_what_does_not_go_together_is_said_in_one_line(more, said):
    table = TABLE | {"work": {"batch_size": 8}} | more

    def build():
        config = make_config(table)
        return build_from_config(config, load_data(config.data))

    with pytest.raises(ValueError, match=said) as error:
        build()
    assert "\n" not in str(error.value)
