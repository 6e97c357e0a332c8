"""Scores in place of parameters: what is sent, and what the server learns from it, against NumPy."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfed.algorithms.predictions import (
    LEAST_SHARE,
    MOST_RATIO,
    Predictions,
    choose_received_items,
    choose_sent_items,
    swap_scores,
)
from jaxfed.algorithms.ptf_fedrec import ClientPredictions
from jaxfed.config.build import build_from_config, load_data
from jaxfed.config.schema import make_config
from jaxfed.core.types import Broadcast
from jaxfed.core.wire import pack_message, unpack_message
from jaxfed.training.rounds import evaluate_model, initial_arrays, make_run_keys, prepare_round, scored_model
from tests.small import KEY, close, same

DATA = {"name": "synthetic", "users": 24, "items": 50, "mean_length": 7.0}
CONTENT = load_data(make_config({"data": DATA}).data)
ITEMS, USERS, SENT, RECEIVED = CONTENT.num_items, CONTENT.num_clients, 12, 6
RATE, SERVER_RATE, STEPS = 0.3, 0.7, 3
TABLE = {
    "data": DATA,
    "model": {"name": "mf", "dim": 3, "init_scale": 0.5},
    "algorithm": {
        "name": "ptf_fedrec",
        "items_sent": SENT,
        "items_received": RECEIVED,
        "server_steps": STEPS,
        "confident": 0.34,
        "swap": 0.5,
    },
    "work": {"batch_size": 16, "negatives": 2, "optimizer": {"name": "sgd", "learning_rate": RATE}},
    "channel": [],
    "server": {"name": "sgd", "learning_rate": SERVER_RATE},
    "cohort": {"name": "everyone", "dropout": 0.3},
}


def merged(table, more):
    """A table with some of its sections' keys replaced."""
    both = table.keys() | more.keys()
    pairs = {key: (table.get(key), more.get(key)) for key in both}
    return {
        key: {**a, **b} if isinstance(a, dict) and isinstance(b, dict) else (a if b is None else b)
        for key, (a, b) in pairs.items()
    }


def build(**more):
    return build_from_config(make_config(merged(TABLE, more)), CONTENT)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


class Round:
    """One round of the package: what was held before, what each client sent through the real blocks, and what is held
    after."""

    def __init__(self, it, state, number):
        cohort = prepare_round(it, 0, number).cohort
        self.before = jax.tree.map(np.array, state)
        programs = it.algorithm.step.args[1]
        self.sent, self.batches = {}, {}
        for block in cohort.blocks:
            part = programs.run_client_block(
                state, cohort.ids, cohort.present, cohort.rows, cohort.ages, make_run_keys(0).rounds, block, None
            )
            for place, client in enumerate(np.asarray(part.ids)):
                if client < USERS:
                    self.sent[int(client)] = jax.tree.map(lambda x, at=place: np.array(x[at]), part.messages.params)
            for lane, slot in enumerate(np.asarray(block.slots)):
                if slot < len(cohort.ids):
                    one = jax.tree.map(lambda x, at=lane: np.array(x[at]), block)
                    self.batches[int(cohort.ids[slot])] = one
        self.present = {int(i) for i, there in zip(cohort.ids, cohort.present, strict=True) if there}
        state, self.info = it.algorithm.step(state, cohort, make_run_keys(0).rounds)
        self.state, self.after = state, jax.tree.map(np.array, state)


@pytest.fixture(scope="module")
def rounds():
    it = build()
    first = Round(it, initial_arrays(it, 0)["state"], 0)
    return it, first, Round(it, first.state, 1)


def step_by_hand(items, bias, user, rows, label, weight, rate):
    """A step of gradient descent on the mean cross-entropy of some rows."""
    gap = (sigmoid(items[rows] @ user + bias[rows]) - label) * weight / max(weight.sum(), 1)
    items, bias = items.copy(), bias.copy()
    new_user = user - rate * gap @ items[rows]
    items[rows] -= rate * np.outer(gap, user)
    bias[rows] -= rate * gap
    return items, bias, new_user


def own_model(state, client):
    shared, private = state.client_states.work.model
    return shared["tables"]["item"][client], shared["tables"]["bias"][client], private["private"]["user"][client][0]


def hidden_model(state, client):
    hidden = state.shared.params
    tables, private = hidden.shared["tables"], hidden.private
    return tables["item"].rows, tables["bias"].rows, private["private"]["user"][client][0]


def known_by_hand(state, client):
    """(items, scores) that the server sends a client, one after the other."""
    hidden = state.shared.params
    items, bias, user = hidden_model(state, client)
    score, latest = sigmoid(items @ user + bias), {int(i) for i in hidden.latest[client] if i < ITEMS}
    if not latest:
        return [], score
    free = [i for i in range(ITEMS) if i not in latest]
    often = sorted(free, key=lambda i: (-hidden.uploads[i], i))[: round(0.34 * RECEIVED)]
    high = sorted((i for i in free if i not in often), key=lambda i: (-score[i], i))[: RECEIVED - len(often)]
    return often + high, score


def trained_by_hand(it, one, client):
    """(items that the client took, those that it drew, its model after a round)."""
    block = one.batches[client]
    rows = np.append(block.rows, ITEMS)[np.minimum(block.data.rows, len(block.rows))]  # of the catalogue
    weight, label = block.data.batch["weight"], block.data.batch["label"]
    took, drew = ({*rows[(weight > 0) & (label == wanted)].tolist()} for wanted in (1, 0))
    model = own_model(one.before, client)
    known, score = known_by_hand(one.before, client)
    soft = np.array([i for i in known if i not in took], int)
    if len(soft):
        model = step_by_hand(*model, soft, score[soft], np.ones(len(soft)), RATE)
    for at, y, w, live in zip(rows, label, weight, block.data.live, strict=True):
        if live:
            model = step_by_hand(*model, at[w > 0], y[w > 0], w[w > 0], RATE)
    return took, drew, model


def swapped_by_hand(items, score, took):
    """Half of the positives, from the highest score on, change scores with the highest others."""
    own = dict(zip(items, score, strict=True))
    positives, others = (
        sorted((i for i in items if (i in took) == wanted), key=lambda i: -own[i]) for wanted in (True, False)
    )
    for a, b in list(zip(positives, others, strict=False))[: max(len(positives) // 2, 1)]:
        own[a], own[b] = own[b], own[a]
    return np.array([own[i] for i in items])


@pytest.mark.parametrize("number", [0, 1])
def test_what_is_sent_is_that_of_numpy(rounds, number):
    """Own steps on the scores that came and on the data, and the message: in the second round with soft labels."""
    it, one = rounds[0], rounds[1 + number]
    heard = 0
    for client in one.present:
        took, drew, model = trained_by_hand(it, one, client)
        for got, want in zip(own_model(one.after, client), model, strict=True):
            np.testing.assert_allclose(got, want, atol=2e-6)
        item, score = one.sent[client]
        items = item[item < ITEMS].tolist()
        assert len(set(items)) == len(items)
        assert set(items) <= took | drew
        assert 1 <= len(took & {*items}) <= max(SENT // 2, 1)
        want = swapped_by_hand(items, sigmoid(model[0] @ model[2] + model[1])[items], took)
        np.testing.assert_allclose(score[item < ITEMS], want, atol=2e-6)
        assert (score[item >= ITEMS] == 0).all()
        heard += len(known_by_hand(one.before, client)[0])
    assert len(one.present) > 3
    assert (heard > 0) == (number > 0)


@pytest.mark.parametrize("number", [0, 1])
def test_the_server_learns_from_scores_as_numpy_does(rounds, number):
    one = rounds[1 + number]
    hidden, after = one.before.shared.params, one.after.shared.params
    items, bias, _ = hidden_model(one.before, 0)
    users = hidden.private["private"]["user"][:, 0].copy()
    total = sum((sent.item < ITEMS).sum() for sent in one.sent.values())
    for _ in range(STEPS):
        d_items, d_bias, d_users = np.zeros_like(items), np.zeros_like(bias), np.zeros_like(users)
        for client, (item, score) in one.sent.items():
            item, score = item[item < ITEMS], score[item < ITEMS]
            gap = (sigmoid(items[item] @ users[client] + bias[item]) - score) / total
            d_items[item] += np.outer(gap, users[client])
            d_bias[item] += gap
            d_users[client] += gap @ items[item]
        items, bias, users = (x - SERVER_RATE * d for x, d in ((items, d_items), (bias, d_bias), (users, d_users)))
    np.testing.assert_allclose(after.shared["tables"]["item"].rows, items, atol=2e-6)
    np.testing.assert_allclose(after.shared["tables"]["bias"].rows, bias, atol=2e-6)
    np.testing.assert_allclose(after.private["private"]["user"][:, 0], users, atol=2e-6)
    moved = np.abs(users - hidden.private["private"]["user"][:, 0]).max(1) > 0
    assert {*np.flatnonzero(moved).tolist()} == one.present  # who was absent is where it was
    counts = np.bincount(np.concatenate([x.item for x in one.sent.values()]), minlength=ITEMS + 1)[:ITEMS]
    np.testing.assert_array_equal(after.uploads - hidden.uploads, counts)
    for client in range(USERS):
        latest = one.sent[client].item if client in one.present else hidden.latest[client]
        np.testing.assert_array_equal(after.latest[client], latest)


def test_absent_clients_keep_their_model_and_vector(rounds):
    one, absent = rounds[2], [i for i in range(USERS) if i not in rounds[2].present]
    assert absent
    for client in absent:
        same(own_model(one.before, client), own_model(one.after, client))


def test_a_momentum_of_the_server_leaves_absent_clients_alone():
    it = build(server={"name": "adam", "learning_rate": 0.1})
    first = Round(it, initial_arrays(it, 0)["state"], 0)
    second = Round(it, first.state, 1)
    users = [x.shared.params.private["private"]["user"][:, 0] for x in (second.before, second.after)]
    assert {*np.flatnonzero((users[0] != users[1]).any(1)).tolist()} == second.present


def test_no_parameter_leaves_and_bytes_are_those_of_the_packer(rounds):
    it, one = rounds[0], rounds[2]
    sent = one.sent[min(one.present)]
    data = pack_message(Broadcast(sent), np.zeros(0, np.int32))
    assert len(data) == 8 * SENT == it.wire.up(7) == it.wire.up(30)
    back, _ = unpack_message(data, Broadcast(sent), 0, ITEMS)
    same(back.params, sent)
    client = SimpleNamespace(id=jnp.int32(3), rows=jnp.arange(4))
    down = it.method.send_to_client(jax.tree.map(jnp.array, one.before.shared), client)
    assert type(down.params) is Predictions
    assert jax.tree.map(jnp.shape, down.params) == ((RECEIVED,), (RECEIVED,))
    assert 8 * RECEIVED == it.wire.down(7) == it.wire.down(30)
    known, score = known_by_hand(one.before, 3)
    assert down.params.item.tolist() == (known or [ITEMS] * RECEIVED)
    np.testing.assert_allclose(down.params.score, score[known] if known else 0, atol=2e-6)
    assert it.wire.sees == "update"
    assert it.wire.frozen == 0
    assert it.account.mechanisms == ()


def test_sent_items_are_within_their_ranges():
    """Over many keys and clients of very different lengths."""
    random, end, count = np.random.default_rng(0), 40, 16
    for number in range(60):
        num_took, num_drew = [(1, 3), (2, 30), (12, 28), (30, 10), (0, 5), (7, 0)][number % 6]
        order = random.permutation(end)
        took, drew = (np.isin(np.arange(end), x) for x in (order[:num_took], order[num_took:][:num_drew]))
        item, positive = map(
            np.asarray, choose_sent_items(jax.random.key(number), jnp.array(took), jnp.array(drew), count)
        )
        live = item < end
        assert len({*item[live].tolist()}) == live.sum()
        assert (took[item[live]] == positive[live]).all()
        assert not positive[~live].any()
        assert (took | drew)[item[live]].all()
        positives = int(positive.sum())
        assert min(num_took, 1, int(LEAST_SHARE * num_took) or 1) <= positives <= min(num_took, count // 2)
        assert live.sum() - positives == min(num_drew, count - positives)
    took = jnp.arange(end) < 15
    many = [choose_sent_items(jax.random.key(i), took, ~took, count) for i in range(200)]
    share = np.mean([positive for _, positive in many], 0)  # of each place: the order says nothing
    assert np.ptp(share) < 0.2
    assert 0 < share.min() <= share.max() < 1 - 1 / (1 + MOST_RATIO)


@pytest.mark.parametrize(("share", "swapped"), [(0.0, 0), (0.1, 1), (0.5, 2), (1.0, 3)])
def test_exchanged_scores_are_those_of_numpy(share, swapped):
    score = np.array([0.3, 0.9, 0.5, 0.2, 0.8, 0.7, 0.1, 0.0], np.float32)
    positive = np.array([0, 1, 1, 0, 1, 1, 0, 0], bool)
    live = np.arange(8) < 7  # three others: 0, 3 and 6
    want, pairs = score.copy(), [(1, 0), (4, 3), (5, 6)][:swapped]
    for a, b in pairs:
        want[a], want[b] = score[b], score[a]
    np.testing.assert_array_equal(swap_scores(jnp.array(score), jnp.array(positive), jnp.array(live), share), want)
    np.testing.assert_array_equal(swap_scores(jnp.array(score), jnp.ones(8, bool), jnp.array(live), share), score)


def test_a_client_that_sent_nothing_is_sent_nothing():
    nothing = choose_received_items(jnp.arange(9.0), jnp.ones(9), jnp.full(4, 9), 5, 0.5)
    assert nothing.tolist() == [9] * 5
    few = choose_received_items(jnp.arange(9.0), jnp.ones(9), jnp.arange(7), 5, 0.4)  # two items are left
    assert few.tolist() == [7, 8, 9, 9, 9]


def test_laplace_noise_has_its_scale_and_stays_between_0_and_1():
    plain, noised = (build(algorithm={"noise": noise}) for noise in (0.0, 0.05))
    one, other = (Round(it, initial_arrays(it, 0)["state"], 0) for it in (plain, noised))
    gaps = []
    for client, (item, score) in one.sent.items():
        np.testing.assert_array_equal(item, other.sent[client].item)
        changed = other.sent[client].score
        assert (changed[item >= ITEMS] == 0).all()
        assert (changed >= 0).all()
        assert (changed <= 1).all()
        inside = (item < ITEMS) & (score > 0.3) & (score < 0.7)
        gaps.append((changed - score)[inside])
    gaps = np.concatenate(gaps)
    assert len(gaps) > 80
    assert np.abs(gaps).mean() == pytest.approx(0.05, rel=0.35)
    assert abs(gaps.mean()) < 0.02
    same(*(jax.tree.map(np.asarray, x.after.client_states.work.model) for x in (one, other)))  # of what is sent alone


def test_it_is_evaluated_twice(rounds):
    it, one = rounds[0], rounds[2]
    values = evaluate_model(it, scored_model(it, one.state), "val", KEY)
    assert {"val/full/hr@10", "val/personal/full/hr@10", "val/personal/sampled/ndcg@10"} <= values.keys()
    _, own = scored_model(it, one.state)
    mine = jax.tree.map(lambda x: x[5], own)
    assert int(mine.number) == 5
    views = it.method.work.views
    shared, private = views[""](one.state.shared.params, mine)
    items, bias, user = hidden_model(one.after, 5)
    close(it.model.score(shared, private, jnp.int32(0)), items @ user + bias)
    items, bias, user = own_model(one.after, 5)
    close(it.model.score(*views["personal"](one.state.shared.params, mine), jnp.int32(0)), items @ user + bias)


OTHERS = {
    "neumf": {"name": "neumf", "dim": 4},
    "pfedrec": {"name": "pfedrec", "dim": 4},
    "bfloat16": TABLE["model"] | {"table_dtype": "bfloat16"},
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_and_stored_types(name):
    it = build_from_config(make_config(TABLE | {"model": OTHERS[name]}), CONTENT)
    one = Round(it, initial_arrays(it, 0)["state"], 0)
    assert one.info["clients/refused"] == 0
    assert np.isfinite(float(one.info["train/loss"]))
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(one.after.client_states.work.model))


def test_predictions_of_nobody_move_nothing(rounds):
    it = rounds[0]
    hidden = jax.tree.map(jnp.array, rounds[1].after.shared.params)
    server = it.method.make_server(it.method.server)
    heard = ClientPredictions(
        jnp.full(4, USERS), Predictions(jnp.zeros((4, SENT), jnp.int32), jnp.full((4, SENT), 0.5))
    )
    delta, _ = server.update(heard, server.init(hidden), hidden)
    assert all(not np.asarray(x).any() for x in jax.tree.leaves(delta))


WRONG = {
    "a mean": ({"channel": [{"name": "mean"}]}, r"mean is made for parameters.* leave \[\[channel\]\] out"),
    "secure sums": ({"channel": [{"name": "clip"}, {"name": "ring"}]}, "different reductions"),
    "codes": ({"channel": [{"name": "quantize"}]}, r"leave \[\[channel\]\] out"),
    "a clip": ({"channel": [{"name": "clip"}]}, "leave clip out"),
    "a rule": ({"channel": [{"name": "median"}]}, "different reductions"),
    "a server's link": ({"channel": [{"name": "at_server"}]}, r"leave \[\[channel\]\] out"),
    "codes of the download": ({"download": [{"name": "quantize"}]}, "sends no parameters"),
    "edges": ({"server": {"edges": 2}}, "sends no parameters"),
    "asynchronous clients": (
        {"cohort": {"name": "buffered", "size": 4, "concurrency": 8, "dropout": 0.0}, "clock": {"name": "lognormal"}},
        "sends no parameters",
    ),
    "low-rank tables": ({"parametrization": {"name": "low_rank", "rank": 2}}, "sends no parameters"),
    "no negatives": ({"work": {"negatives": 0}}, "work.negatives"),
    "pairs": ({"model": {"loss": "bpr"}}, 'loss = "bce"'),
    "squares": ({"model": {"loss": "squared"}}, 'loss = "bce"'),
    "histories": ({"model": {"name": "sasrec", "dim": 4, "length": 6}}, 'loss = "bce"'),
    "a share": ({"algorithm": {"swap": 1.5}}, "swap is 1.5: it must be at least 0 and at most 1"),
    "no items": ({"algorithm": {"items_sent": 0}}, "items_sent is 0: it must be at least 1"),
    "negative noise": ({"algorithm": {"noise": -1.0}}, "noise is -1"),
    "a copy": ({"work": {"keep_copy": True}}, "keep_copy"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_go_with_scores_is_one_line(name):
    more, words = WRONG[name]
    table = merged(TABLE, more) if "model" not in more or "name" not in more["model"] else TABLE | more
    with pytest.raises(ValueError, match=words) as error:
        build_from_config(make_config(table), CONTENT)
    assert "\n" not in str(error.value)


def test_organisations_and_ratings_are_refused():
    silos = DATA | {"clients": "silo", "silos": 3}
    with pytest.raises(ValueError, match='data.clients = "user"'):
        build_from_config(make_config(TABLE | {"data": silos}), load_data(make_config({"data": silos}).data))
