"""Models of features against naive sums, the laws that join them to their neighbours, and what leaves a client."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfed.channels.average import mean
from jaxfed.config.build import build_from_config, load_data
from jaxfed.config.schema import make_config
from jaxfed.core.channel import chain
from jaxfed.core.federate import federate
from jaxfed.core.link import link
from jaxfed.core.tables import take_rows, unwrap
from jaxfed.models.features import fm, two_tower
from jaxfed.models.mf import mf
from jaxfed.training.rounds import initial_arrays, make_run_keys, prepare_round
from tests.small import same

N, KEY, SIZES = 12, jax.random.key(1), (5, 7)
OF_USER = np.array([[0, 3, 5], [1, 2, 4], [4, 5, 5]])  # 5: unused
OF_ITEM = np.random.default_rng(0).integers(0, 8, (N, 3))
OF_ITEM[:, 1:][OF_ITEM[:, 1:] <= OF_ITEM[:, :1]] = 7  # sets, and 7: unused
OF_ITEM[:, 2][OF_ITEM[:, 2] == OF_ITEM[:, 1]] = 7


def parts(made):
    """Parameters that are nowhere zero."""
    both = made.init(KEY), made.private(KEY)
    return jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), both)


def naive(shared, private, user, item):
    """Rendle's equation 1: offset, weights, and every pair of the indicators that are 1, in float64."""
    params, tables, own = shared["params"], unwrap(shared)["tables"], private["private"]
    users = [int(i) for i in OF_USER[user] if i < SIZES[0]]
    items = [int(i) for i in OF_ITEM[item] if i < SIZES[1]]
    chosen = [(own["user"][user], own["bias"][user]), (tables["item"][item], tables["bias"][item])]
    chosen += [(params["user_features"][i], params["user_weights"][i]) for i in users]
    chosen += [(params["item_features"][i], params["item_weights"][i]) for i in items]
    logit = float(params["offset"]) + sum(float(weight) for _, weight in chosen)
    for i in range(len(chosen)):
        for j in range(i + 1, len(chosen)):
            logit += float(np.asarray(chosen[i][0], np.float64) @ np.asarray(chosen[j][0], np.float64))
    return logit


def test_the_machine_is_the_sum_over_all_pairs():
    made = fm(N, 3, dim=4, vocabulary=SIZES)
    shared, private = parts(made)
    assert made.features == ("user", "item")
    for user in range(3):
        want = [naive(shared, private, user, item) for item in range(N)]
        got = made.score(shared, private, jnp.int32(user), OF_USER[user], OF_ITEM)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    who, what = np.array([2, 0, 1, 1]), np.array([3, 3, 11, 0])  # examples that name their users and items
    batch = {"user": who, "item": what, "label": np.zeros(4), "weight": np.array([1.0, 2.0, 0.5, 0.0])}
    batch |= {"user_features": OF_USER[who], "item_features": OF_ITEM}
    logits = np.array([naive(shared, private, *each) for each in zip(who, what, strict=True)])
    lost = made.loss(shared, private, batch)
    np.testing.assert_allclose(lost.total, np.logaddexp(0, logits) @ batch["weight"], rtol=1e-5)


def test_towers_by_hand():
    made = two_tower(N, 3, dim=4, hidden=(6,), vocabulary=SIZES)
    shared, private = parts(made)
    net, tables, own = shared["params"], unwrap(shared)["tables"], private["private"]

    def tower(name, x, numbers, size):
        x = np.asarray(x, np.float64) + sum(np.asarray(net[f"{name}_features"][i]) for i in numbers if i < size)
        x = np.maximum(x @ net[f"{name}_0"]["kernel"] + net[f"{name}_0"]["bias"], 0)
        return x @ net[f"{name}_output"]["kernel"] + net[f"{name}_output"]["bias"]

    items = np.stack([tower("item", tables["item"][i], OF_ITEM[i], 7) for i in range(N)])
    for user in range(3):
        want = items @ tower("user", own["user"][user], OF_USER[user], 5)
        want += tables["bias"] + own["bias"][user] + net["offset"]
        got = made.score(shared, private, jnp.int32(user), OF_USER[user], OF_ITEM)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [fm, functools.partial(two_tower, hidden=())])
def test_without_features_and_layers_it_is_a_factorisation_with_biases(make):
    made, plainly = make(N, 2, dim=4), mf(N, 2, dim=4)
    assert made.features == ()
    shared, private = parts(made)
    alike = {"params": {}, "tables": shared["tables"]}, {"private": {"user": private["private"]["user"]}}
    for user in range(2):
        got = made.score(shared, private, jnp.int32(user))
        more = shared["params"]["offset"] + private["private"]["bias"][user]
        np.testing.assert_allclose(got, plainly.score(*alike, jnp.int32(user)) + more, rtol=1e-5, atol=1e-6)


def test_one_feature_a_side_makes_machine_and_towers_differ_by_what_each_side_has_alone():
    """fm - two_tower without layers = weights + <own vector, vector of its feature>, on either side."""
    machine, towers = fm(N, 1, dim=3, vocabulary=SIZES), two_tower(N, 1, dim=3, hidden=(), vocabulary=SIZES)
    shared, private = parts(machine)
    user, item = np.array([2]), np.arange(N)[:, None] % 7
    gap = machine.score(shared, private, 0, user, item) - towers.score(shared, private, 0, user, item)
    net, table = shared["params"], unwrap(shared)["tables"]["item"]
    want = net["user_weights"][2] + private["private"]["user"][0] @ net["user_features"][2]
    want += net["item_weights"][item[:, 0]] + (table * net["item_features"][item[:, 0]]).sum(1)
    np.testing.assert_allclose(gap, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [fm, two_tower])
def test_one_user_s_merged_batch_is_its_examples_with_features(make):
    made = make(N, 1, dim=3, loss="squared", vocabulary=SIZES)
    params = take_rows(parts(made), np.array([4, 9, 1, N]))  # the last is padding
    of_item = np.append(OF_ITEM, [[7, 7, 7]], 0)[[4, 9, 1, N]]
    merged = {"label": np.array([0.5, 1.0, 0.0, 0.0]), "weight": np.array([2.0, 1.0, 3.0, 0.0])}
    item, label = np.array([0, 0, 1, 2, 2, 2]), np.array([1.0, 0.0, 1.0, 0.0, 0.0, 0.0])
    named = {"item": item, "label": label, "weight": np.ones(6), "user": np.zeros(6, int)}
    merged |= {"user_features": OF_USER[0], "item_features": of_item}
    named |= {"user_features": np.repeat(OF_USER[:1], 6, 0), "item_features": of_item}
    value = lambda batch: lambda p: made.loss(*unwrap(p), batch).value
    gradients = [jax.grad(value(batch))(params) for batch in (merged, named)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *gradients)


@pytest.mark.parametrize("make", [fm, two_tower])
def test_sides_that_are_read(make):
    assert make(N, 1, vocabulary=(5, 0)).features == ("user",)
    assert make(N, 1, vocabulary=SIZES, features="item").features == ("item",)
    assert make(N, 1, vocabulary=SIZES, features="none").features == ()
    with pytest.raises(ValueError, match='model.features is "user", but the data have no user features: name a file'):
        make(N, 1, vocabulary=(0, 7), features="user")


# --- in a round ------------------------------------------------------------------------------------------------


@functools.cache
def data(clients="user"):
    table = {"name": "synthetic", "users": 30, "items": 40, "mean_length": 6.0, "clients": clients, "silos": 6}
    return load_data(make_config({"data": table}).data), table


def made(name="fm", clients="user", source=None, optimizer=None, **model):
    content, table = data(clients)
    config = {
        "data": table,
        "model": {"name": name, "dim": 4, **model},
        "work": {"batch_size": 64, "negatives": 2, "optimizer": optimizer or {"name": "sgd", "learning_rate": 0.1}},
        "cohort": {"name": "everyone"},
    }
    return build_from_config(make_config(config), source or content)


def spied(experiment):
    """(the messages of a round as trees of [clients, ...], the state after it)."""
    messages = []

    def spy(update, sent, client):
        jax.debug.callback(lambda id, tree: messages.append((int(id), tree)), client.id, update.params)
        return update, client.link_state

    clients = experiment.data.population.num_clients
    algorithm = federate(experiment.method._replace(server=jax_sgd()), chain(link(spy), mean()), clients)
    keys = make_run_keys(0)
    state = algorithm.init(experiment.model.init(keys.model), keys.memory)
    state, _ = algorithm.step(state, prepare_round(experiment, 0, 0).cohort, keys.rounds)
    jax.effects_barrier()
    return [(id, jax.tree.map(np.asarray, tree)) for id, tree in messages if id < clients], state


def jax_sgd():
    import optax

    return optax.sgd(1.0)


def marked():
    """The data with feature numbers of users that occur nowhere else: 77 and more."""
    content, _ = data()
    known = content.population.user_features
    named = np.array([f"x={i}" for i in range(77 + len(known.names))])
    moved = known._replace(numbers=known.numbers + 77, names=named)
    return content._replace(population=content.population._replace(user_features=moved)), moved


@functools.cache
def told(name):
    """The messages of a round of a model on marked data, and the state after it."""
    return spied(made(name, source=marked()[0]))


@pytest.mark.parametrize("name", ["fm", "two_tower"])
def test_user_features_never_occur_in_a_message(name):
    """Values, not names: numbers that mean a user's features are nowhere in what is sent, which is shaped as the shared
    part is and holds no integer. What a message does say: see below."""
    _, known = marked()
    messages, state = told(name)
    assert len(messages) == 30
    for _, message in messages:
        shared = state.shared.params
        assert jax.tree.structure(unwrap(message)) == jax.tree.structure(unwrap(shared))
        for leaf in jax.tree.leaves(message):
            assert np.issubdtype(leaf.dtype, np.floating)
            assert not np.isin(leaf, known.numbers).any()


def test_an_update_shows_which_vectors_moved():
    """The honest part of it: of the vectors of user features, a client's update moves its own alone. Whoever sees
    single updates can read the features off them; a sum over clients hides them."""
    source, known = marked()
    messages, _ = told("fm")
    for id, message in messages:
        moved = np.flatnonzero(np.abs(message["params"]["user_features"]).sum(1))
        first = source.population.client_offsets[id]
        assert moved.tolist() == sorted(set(known.numbers[first].tolist()))


@pytest.mark.parametrize("name", ["fm", "two_tower"])
def test_features_are_data_that_nothing_moves(name):
    """Weight decay and steps move parameters; features are none: after rounds the arrays are what they were, and no
    state holds an integer but the count of rounds."""
    experiment = made(name, optimizer={"learning_rate": 0.1, "weight_decay": 0.5})
    before = jax.tree.map(np.copy, tuple(experiment.data.population.user_features))
    keys, state = make_run_keys(0), initial_arrays(experiment, 0)["state"]
    for t in range(2):
        state, _ = experiment.algorithm.step(state, prepare_round(experiment, 0, t).cohort, keys.rounds)
    same(before, tuple(experiment.data.population.user_features))
    assert [x.shape for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.integer)] == [()]


def test_silos_are_given_the_features_of_each_of_their_users():
    """A step of a silo moves what the loss, user by user, moves."""
    experiment = made("fm", "silo", optimizer={"name": "sgd", "learning_rate": 0.5})
    messages, _ = spied(experiment)
    population = experiment.data.population
    for id, message in messages:
        users = np.arange(population.client_offsets[id], population.client_offsets[id + 1])
        moved = np.flatnonzero(np.abs(message["params"]["user_weights"]))
        assert moved.tolist() == np.unique(population.user_features.numbers[users]).tolist()


def test_features_that_say_nothing_change_nothing():
    """The neutral setting: one feature that all users have, whose vector and weight stand still at zero."""
    silent, none = made("fm", features="item"), made("fm", features="none")
    start = [initial_arrays(each, 0)["state"].shared.params for each in (silent, none)]
    at_rest = {key: jnp.zeros_like(x) for key, x in start[0]["params"].items() if key.startswith("item")}
    shared = {**start[1], "params": start[1]["params"] | at_rest}
    private = none.model.private(KEY)
    nothing = np.zeros(0, np.int32)
    same(silent.model.score(shared, private, 0, nothing), none.model.score(start[1], private, 0))
