"""Parts of a model: rate 1 is FedAvg, two clients by hand, what nobody holds rests, bytes are those of the parts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxfed as jf
from jaxfed.algorithms.hetefedrec import assign_activity_groups
from jaxfed.algorithms.submodels import cut_shapes, mark_held_coordinates, mark_held_units
from jaxfed.config.build import build_from_config, load_data
from jaxfed.config.schema import make_config
from jaxfed.core.state import server_model
from jaxfed.core.tables import Table, take_rows
from jaxfed.core.types import Broadcast, Weights
from jaxfed.training.rounds import Progress, evaluate_model, initial_arrays, make_run_keys, prepare_round, scored_model
from tests.small import close, same

DATA = {"name": "synthetic", "users": 24, "items": 30, "mean_length": 6.0}
CONTENT = load_data(make_config({"data": DATA}).data)
KEY = jax.random.key(0)


def build(algorithm, model="mf", **more):
    table = {
        "data": DATA,
        "model": {"name": model} | ({} if model == "popularity" else {"dim": 5}),
        "algorithm": algorithm,
        "work": {"batch_size": 8, "optimizer": {"name": "sgd", "learning_rate": 0.5}},
        "channel": [] if algorithm["name"] in ("heterofl", "fedrolex", "hetefedrec") else [{"name": "per_row_mean"}],
        "cohort": {"name": "everyone", "dropout": 0.2},
    }
    return build_from_config(make_config(table | more), CONTENT)


def rounds_of(it, rounds=2):
    state, booked = initial_arrays(it, 0)["state"], Progress()
    for t in range(rounds):
        ready = prepare_round(it, 0, t)
        booked.count_request(ready)
        state, info = it.algorithm.step(state, ready.cohort, make_run_keys(0).rounds)
        booked.record_round(it.wire, info | {"clients/ids": ready.cohort.ids})
    return state, booked


@pytest.mark.parametrize(("name", "model"), [("heterofl", "neumf"), ("fedrolex", "mf"), ("hetefedrec", "mf")])
def test_rate_1_is_fedavg_to_the_last_bit(name, model):
    """Whose mean is that by row. What is evaluated is the same, too."""
    only = {"rates": (1.0,)} | ({"shares": (1.0,)} if name == "hetefedrec" else {})
    runs = build({"name": name} | only, model), build({"name": "fedavg"}, model)
    (got, _), (want, _) = (rounds_of(it) for it in runs)
    same(server_model(got), server_model(want))
    same(got.client_states.work.private, want.client_states.work)
    figures = [
        evaluate_model(it, scored_model(it, state), "test", KEY) for it, state in zip(runs, (got, want), strict=True)
    ]
    assert figures[0] == figures[1]


@pytest.mark.parametrize("model", ["mf", "neumf", "two_tower"])
def test_rate_1_beside_others_is_fedavg(model):
    """Where nobody has another rate; then it is the masks that leave all as it is. To the order of sums."""
    work = jf.algorithms.heterofl(
        build({"name": "fedavg"}, model).model, optax.sgd(0.1), num_clients=9, rates=(1.0, 0.3)
    ).work
    plain = jf.algorithms.fedavg(build({"name": "fedavg"}, model).model, optax.sgd(0.1)).work
    it = build({"name": "fedavg"}, model)
    block = prepare_round(it, 0, 0).cohort.blocks[0]
    shared = initial_arrays(it, 0)["state"].shared
    rows = take_rows(shared, block.rows[0])
    steps, private = jax.tree.map(lambda x: x[0], block.data), it.model.private(KEY)
    _, member = work.init(shared.params, KEY)
    want = plain.update(rows, private, steps, KEY)
    got = work.update(rows, member._replace(private=private), steps, KEY)
    close((got.update.params, got.client_state.private), (want.update.params, want.client_state))
    assert got.update.extra.tolist() == [1, 0]


@pytest.mark.parametrize("name", ["heterofl", "fedrolex", "hetefedrec"])
def test_two_clients_by_hand(name):
    """One step of two clients of matrix factorisation, of rates 1 and 1/2, in NumPy, in the second round."""
    dim, rate, rolls = 4, 0.5, name == "fedrolex"
    model = jf.models.mf(num_items=3, dim=dim, loss="squared", bias=False)
    make = getattr(jf.algorithms, name)
    if name == "hetefedrec":  # the second client has fewer interactions
        method = make(model, optax.sgd(0.25), num_train=[5, 2], rates=(rate, 1.0), shares=(0.5, 0.5))
        rates = rate, 1.0
    else:
        method, rates = make(model, optax.sgd(0.25), num_clients=2, rates=(1.0, rate), seed=4), (1.0, rate)
    assert sorted(method.submodels.groups) == [0, 1]
    items = np.random.default_rng(0).normal(size=(3, dim)).astype(np.float32)
    params = jax.tree.unflatten(jax.tree.structure(model.init(KEY)), [items])
    algorithm = jf.federate(method, jf.link(), 2)
    state = algorithm.init(params, KEY)
    users = np.asarray(state.client_states.work.private["private"]["user"])[:, 0]
    for t in range(2):
        cohort, want, moved = cohort_of_two(), np.zeros((3, dim)), users.copy()
        count = np.zeros((3, dim))
        for client, (item, label) in enumerate(((0, 1.0), (0, 0.0))):
            p = rates[method.submodels.groups[client]]
            scale = 1 if name == "hetefedrec" else p
            shift = t if rolls else 0
            held = ((np.arange(dim) - shift) % dim) < np.ceil(p * dim)
            error = 2 * (items[item] * held / scale @ (users[client] * held) - label)
            want[item] += 0.25 * error * users[client] * held / scale
            moved[client] -= 0.25 * error * items[item] * held / scale
            count[item] += held
        items, users = items - want / np.maximum(count, 1), moved
        state, _ = algorithm.step(state, cohort, KEY)
        np.testing.assert_allclose(server_model(state)["tables"]["item"], items, atol=2e-6)
        np.testing.assert_allclose(
            np.asarray(state.client_states.work.private["private"]["user"])[:, 0], users, atol=2e-6
        )


def cohort_of_two():
    """Both clients hold item 0, one example each."""
    from jaxfed.core.client_work import Batches
    from jaxfed.core.types import Block, Cohort

    batch = {"item": np.zeros((2, 1, 1), np.int32), "label": np.array([1, 0], np.float32).reshape(2, 1, 1)}
    batch |= {"weight": np.ones((2, 1, 1), np.float32), "user": np.zeros((2, 1, 1), np.int32)}
    steps = Batches(np.zeros((2, 1, 1), np.int32), np.ones((2, 1), bool), batch, np.ones(2, np.float32))
    block = Block(np.arange(2, dtype=np.int32), np.zeros((2, 1), np.int32), np.ones(2, np.float32), steps)
    return Cohort(np.arange(2, dtype=np.int32), np.ones(2, bool), (block,))


def test_which_units_are_held():
    assert mark_held_units((1.0, 0.5, 0.1), (5,), 0).astype(int).tolist() == [[1] * 5, [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]
    assert mark_held_units((0.5,), (5,), 3).astype(int).tolist() == [[1, 0, 0, 1, 1]]
    assert mark_held_units((0.5,), (2, 3), 0).astype(int).tolist() == [[1, 0, 1, 1, 0]]


@pytest.mark.parametrize("model", ["mf", "neumf", "two_tower"])
def test_what_is_held_is_as_large_as_what_is_sent(model):
    """And what nobody holds in a round rests: of rates below 1, the outer units in the first round."""
    it = build({"name": "fedrolex", "rates": (0.5, 0.3)}, model)
    start = initial_arrays(it, 0)["state"]
    before = jax.tree.map(np.asarray, server_model(start))
    shared = start.shared.params
    masks = mark_held_coordinates((0.5, 0.3), True, shared, 0)
    for group in (0, 1):
        cut = cut_shapes((0.5, 0.3), group, Broadcast(shared)).params
        for mask, part, leaf in zip(*map(jax.tree.leaves, (masks, cut, shared)), strict=True):
            rows = leaf.shape[0] if mask.ndim == leaf.ndim else 1
            assert int(mask[group].sum()) * rows == part.size
    after = server_model(rounds_of(it, 1)[0])
    for old, new, mask in zip(*map(jax.tree.leaves, (before, after, masks)), strict=True):
        held = np.broadcast_to(np.asarray(mask).any(0), old.shape)
        np.testing.assert_array_equal(np.asarray(new)[~held], old[~held])
    assert any((np.asarray(a) != b).any() for a, b in zip(*map(jax.tree.leaves, (after, before)), strict=True))


def test_bytes_are_those_of_the_parts():
    """Down: ids, columns, a bias; up also what they weigh by row and group, and by group."""
    it = build({"name": "heterofl", "rates": (1.0, 0.3)})
    columns = np.where(it.method.submodels.groups == 0, 5, 2)
    rows, every = np.arange(24) + 1, np.arange(24)
    np.testing.assert_array_equal(it.wire.down(rows, 0, every), rows * (columns + 1 + 1) * 4)
    np.testing.assert_array_equal(it.wire.up(rows, 0, every), rows * (columns + 1 + 1 + 2) * 4 + 2 * 4)
    whole, parts = (rounds_of(each)[1] for each in (build({"name": "heterofl", "rates": (1.0,)}), it))
    assert 0.5 * whole.bytes_down < parts.bytes_down < whole.bytes_down


def test_a_mean_by_coordinates_by_hand():
    """Weights of rows and groups meet in each coordinate; a row that nobody holds rests."""
    masks = Table(jnp.array([[True, True], [True, False]]))
    link = jf.channels.coordinate_mean(lambda params, round: masks)
    held = Weights(Table(jnp.array([[1.0, 2.0], [0.0, 4.0], [0.0, 0.0]])))
    total = Broadcast(Table(jnp.array([[6.0, 5.0], [8.0, 0.0], [0.0, 0.0]]))), held, jnp.array([1.0, 6.0])
    made, number, _ = link.decode(total, jnp.int32(4), None)
    assert made.params.rows.tolist() == [[2.0, 5.0], [2.0, 0.0], [0.0, 0.0]]
    assert int(number) == 5


def test_clients_with_fewer_interactions_have_shorter_vectors():
    """Half of the clients the first size, and so on; equal ones in their order."""
    assert assign_activity_groups([9, 1, 5, 5, 7, 2, 3, 8, 6, 4], (0.5, 0.3, 0.2)).tolist() == [
        2,
        0,
        0,
        1,
        1,
        0,
        0,
        2,
        1,
        0,
    ]
    it = build({"name": "hetefedrec"})
    rows, every = np.full(24, 3), np.arange(24)
    down = it.wire.down(rows, 0, every)
    lengths, order = np.ceil([0.25 * 5, 0.5 * 5, 5]), np.argsort(CONTENT.population.num_train, kind="stable")
    np.testing.assert_array_equal(down[order], 3 * 4 * (1 + 1 + np.repeat(lengths, (12, 7, 5))))


@pytest.mark.parametrize(
    ("algorithm", "model", "more", "said"),
    [
        ({"rates": (0.5, 1.5)}, "mf", {}, "rates are 0.5, 1.5: set each above 0, up to 1"),
        ({"name": "hetefedrec", "shares": (0.5, 0.5)}, "mf", {}, "one above 0 for each of the 3 rates"),
        ({"rates": (0.5, 0.25)}, "mf", {}, "nobody would train the rest of the model"),
        ({}, "mf", {"channel": [{"name": "sign"}]}, "sub-models: sign would change coordinates"),
        ({}, "mf", {"channel": [{"name": "median"}]}, "sub-models: median would change coordinates"),
        ({}, "mf", {"channel": [{"name": "top_k"}]}, "sub-models: top_k would change coordinates"),
        ({}, "mf", {"channel": [{"name": "quantize", "keep_error": True}]}, "set keep_error = false"),
        ({}, "mf", {"download": [{"name": "quantize"}]}, r"leave \[\[download\]\] out"),
        ({}, "metamf", {}, "nobody knows the widths of params"),
        ({}, "fedrap", {}, "keeps tables on clients"),
        ({}, "popularity", {}, "no widths to cut"),
        ({}, "mf", {"server": {"edges": 2}}, "leave cohort.buffered, server.edges and the parametrization out"),
        ({}, "mf", {"parametrization": {"name": "low_rank", "rank": 2}}, "the parametrization out"),
        ({}, "mf", {"channel": [{"name": "mean"}]}, "both make a mean"),
    ],
)
def test_what_cannot_be_is_one_line(algorithm, model, more, said):
    with pytest.raises(ValueError, match=said) as error:
        initial_arrays(build({"name": "heterofl"} | algorithm, model, **more), 0)
    assert "\n" not in str(error.value)
