"""Personal works: neighbours at their neutral setting, and one client's round by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxfed.algorithms.apfl import apfl
from jaxfed.algorithms.ditto import ditto
from jaxfed.algorithms.fedrecon import fedrecon
from jaxfed.algorithms.fedrep import fedrep
from jaxfed.algorithms.local_training import loss_of_pair, train_locally
from jaxfed.algorithms.own_model import OwnModel, keep_own_copy, own_copy
from jaxfed.channels.average import mean
from jaxfed.config.build import build_from_config, load_data
from jaxfed.config.schema import make_config
from jaxfed.core.client_work import Batches, local_sgd
from jaxfed.core.federate import federate
from jaxfed.core.state import server_model
from jaxfed.core.tables import take_rows, unwrap
from jaxfed.core.types import Broadcast, History, Mean
from jaxfed.training.rounds import evaluate_model, initial_arrays, make_run_keys, prepare_round, scored_model
from tests.small import (
    BATCH,
    DATA,
    ITEMS,
    KEY,
    MARKED,
    USERS,
    WHO,
    bce,
    close,
    loss_model,  # fmt: skip
    row_block,
    row_cohort,
    run,
    same,
    slopes,
    user,
)

SGD = optax.sgd(0.1)
PLAIN = train_locally(loss_model(bce, user), SGD)
TABLE = {"name": "synthetic", "users": 40, "items": 30, "mean_length": 9.0}
CONTENT = load_data(make_config({"data": TABLE}).data)


def algorithm(method):
    return federate(method, mean(), USERS)


def alone(slot=0):
    """(slices, steps) of one client of WHO, with nothing left unused but the end."""
    block = row_block([slot])
    shared = Broadcast(take_rows(MARKED, block.rows[0]))
    return shared, jax.tree.map(lambda x: x[0], block.data)


@pytest.mark.optimised
@pytest.mark.parametrize(
    "work",
    [keep_own_copy(PLAIN), ditto(loss_model(bce, user), SGD), apfl(loss_model(bce, user), SGD)],
    ids=["keep", "ditto", "apfl"],
)
def test_a_copy_of_ones_own_changes_nothing_for_the_server(work):
    got, want = (run(algorithm(each), row_cohort())[0] for each in (work, PLAIN))
    same(server_model(got), server_model(want))
    same(got.client_states[0].private, want.client_states[0])


def view(work, state, client, name="personal"):
    """A client's own (shared, private), whole tables."""
    own = jax.tree.map(lambda x: x[client], state.client_states[0])
    return work.work.views[name](state.shared.params, own)


def test_a_model_without_shared_tables_can_be_copied():
    """Whose rows are all private, or that has none."""
    it, state = trained(work={"name": "ditto"}, model={"name": "counter"})
    assert evaluate_model(it, scored_model(it, state), "val", KEY)["val/personal/full/hr@10"] >= 0


def test_who_never_took_part_has_the_server_s_model():
    away = next(c for c in range(USERS) if c not in WHO)
    for work in (
        keep_own_copy(PLAIN),
        ditto(loss_model(bce, user), SGD),
        apfl(loss_model(bce, user), SGD, mixture=0.7),
    ):
        state, _ = run(algorithm(work), row_cohort())
        close(view(work, state, away)[0], state.shared.params)  # a mixture of a model with itself


def test_rows_that_a_client_does_not_hold_are_the_server_s():
    for work in (keep_own_copy(PLAIN), ditto(loss_model(bce, user), SGD)):
        state, _ = run(algorithm(work), row_cohort())
        held = np.unique(DATA[WHO[0]][0])
        others = np.setdiff1d(np.arange(ITEMS), held)
        own, server = view(work, state, WHO[0])[0]["item"].rows, state.shared.params["item"].rows
        same(own[others], server[others])
        assert (np.abs(own[held] - server[held]).max(1) > 0).all()


def test_keep_is_where_training_ended():
    """One client alone: the server's model after its round is what it kept."""
    work = keep_own_copy(PLAIN)
    cohort = row_cohort(present=[i == 2 for i in range(len(WHO))])
    state, _ = run(algorithm(work), cohort, rounds=1)
    close(view(work, state, WHO[2])[0], state.shared.params)


def test_kept_rows_of_an_earlier_round_are_forgotten():
    rows = jnp.arange(4.0)[:, None]
    from jaxfed.core.tables import Table

    own = OwnModel((), {"t": Table(rows + 10)}, (), Table(jnp.array([0.0, 1.0, 2.0, 2.0])), jnp.float32(2))
    server = {"t": Table(rows)}
    np.testing.assert_array_equal(own_copy(own, server, latest=True)["t"].rows[:, 0], [0, 1, 12, 13])
    np.testing.assert_array_equal(own_copy(own, server)["t"].rows[:, 0], [0, 11, 12, 13])


def test_ditto_without_a_pull_is_training_alone_and_with_a_strong_one_the_server():
    loose, firm = (
        ditto(loss_model(bce, user), optax.sgd(0.01), by_row=False, strength=strength) for strength in (0.0, 99.0)
    )  # on whole slices
    cohort, lone = row_cohort(), train_locally(loss_model(bce, user), optax.sgd(0.01))
    state, _ = run(algorithm(loose), cohort, rounds=1)
    shared, steps = alone()
    start = jax.tree.map(lambda x: x[WHO[0]], algorithm(lone).init(MARKED, KEY).client_states[0])
    (end, _), _, _ = local_sgd(loss_of_pair(bce), optax.sgd(0.01), (shared.params, start), steps, False)
    held = DATA[WHO[0]][0]
    own = view(loose, state, WHO[0])[0]["item"].rows
    close(own[held], end["item"].rows[: len(held)])
    bound, _ = run(algorithm(firm), cohort, rounds=1)
    near, first = view(firm, bound, WHO[0])[0]["item"].rows, held[:4]  # rows of the first step, pulled back ever since
    moved = [np.abs(each[first] - MARKED["item"].rows[first]).max() for each in (near, own)]
    assert moved[0] < 0.1 * moved[1]


def test_ditto_pulls_a_copy_to_the_model_that_the_server_sends_now():
    """The second round of one client by hand: from its own copy, pulled to the server's model of after the first."""
    strength, client = 0.7, WHO[0]
    work = ditto(loss_model(bce, user), SGD, by_row=False, strength=strength)
    before, after = (run(algorithm(work), row_cohort(), rounds=n)[0] for n in (1, 2))
    (copy, own), anchor = view(work, before, client), before.shared.params
    (copy, anchor), (items, labels) = (unwrap(x) for x in (copy, anchor)), DATA[client]
    for s in range(0, len(items), BATCH):
        g, h = slopes(copy, own, items[s : s + BATCH], labels[s : s + BATCH])
        copy = jax.tree.map(lambda x, g, a: x - 0.1 * (g + strength * (x - a)), copy, g, anchor)
        own = jax.tree.map(lambda x, g: x - 0.1 * g, own, h)
    got, beside = view(work, after, client)
    close(unwrap(got)["item"][items], copy["item"][items])
    close(got["scale"], copy["scale"])
    close(beside, own)


@pytest.mark.parametrize("mixture", [0.0, 1.0])
def test_apfl_at_its_ends(mixture):
    """0: the server's model with a private part of its own; 1: training alone."""
    work, cohort = apfl(loss_model(bce, user), SGD, mixture=mixture), row_cohort()
    state, _ = run(algorithm(work), cohort, rounds=2)
    got = view(work, state, WHO[0])[0]
    if mixture == 0:
        close(got, state.shared.params)
        return
    shared, steps = alone()
    own = shared.params, jax.tree.map(lambda x: x[WHO[0]], algorithm(PLAIN).init(MARKED, KEY).client_states[0])
    for _ in range(2):
        own, _, _ = local_sgd(loss_of_pair(bce), SGD, own, steps)
    held = DATA[WHO[0]][0]
    close(got["item"].rows[held], own[0]["item"].rows[: len(held)])
    close(view(work, state, WHO[0])[1], own[1])


def test_apfl_is_that_of_the_paper():
    """Algorithm 1 by hand, two steps of rate 1/2 from 0 on (x - 1)^2 / 2: v by the slope at (v + w) / 2, w moving."""

    def half_square(params, private, batch):
        return Mean(0.5 * (params["x"] - 1) ** 2, 1.0)

    steps = Batches(jnp.zeros((2, 0), int), jnp.ones(2, bool), jnp.zeros(2), 2.0)
    work = apfl(loss_model(half_square), optax.sgd(0.5), mixture=0.5)
    shared, own = work.work.init({"x": jnp.zeros(())}, KEY)
    w = v = 0.0
    for _ in range(2):
        w, v = w - 0.5 * (w - 1), v - 0.5 * 0.5 * ((v + w) / 2 - 1)
    report = work.work.update(shared, own, steps, KEY)
    close((shared.params["x"] - report.update.params["x"], report.client_state.copy["x"]), (w, v))


def test_alternate_moves_first_the_private_part_then_the_shared():
    shared, steps = alone()
    mine = user(KEY)
    report = fedrep(loss_model(bce, user), SGD).work.update(shared, mine, steps, KEY)
    private_only = optax.multi_transform({"a": optax.set_to_zero(), "b": SGD}, ("a", "b"))
    (_, head), _, _ = local_sgd(loss_of_pair(bce), private_only, (shared.params, mine), steps)
    shared_only = optax.multi_transform({"a": SGD, "b": optax.set_to_zero()}, ("a", "b"))
    (end, _), _, _ = local_sgd(loss_of_pair(bce), shared_only, (shared.params, head), steps)
    close(report.client_state, head)
    close(report.update.params, jax.tree.map(jnp.subtract, shared.params, end))


def test_reconstruction_knows_nothing_of_the_past():
    """What a client held before, and other seeds of the memory, do not matter; half of the steps are of each kind."""
    shared, steps = alone(int(np.argmax([len(DATA[c][0]) for c in WHO])))
    work = fedrecon(loss_model(bce, user), SGD)
    report = work.work.update(shared, (), steps, KEY)
    assert not jax.tree.leaves(report.client_state)
    odd = np.arange(len(steps.live)) % 2 == 1
    both = shared.params, user(KEY)
    private_only = optax.multi_transform({"a": optax.set_to_zero(), "b": SGD}, ("a", "b"))
    shared_only = optax.multi_transform({"a": SGD, "b": optax.set_to_zero()}, ("a", "b"))
    support, query = (steps._replace(live=steps.live & half) for half in (~odd, odd))
    both, _, _ = local_sgd(loss_of_pair(bce), private_only, both, support)
    (end, _), _, _ = local_sgd(loss_of_pair(bce), shared_only, both, query)
    close(report.update.params, jax.tree.map(jnp.subtract, shared.params, end))
    assert float(report.steps) == (steps.live & odd).sum()


@pytest.mark.parametrize(("live", "query"), [(1, 1), (2, 1), (3, 1), (4, 2)])
def test_a_client_with_steps_has_a_query(live, query):
    """Every second step is one; who has one step has it in both halves."""
    shared, steps = alone(int(np.argmax([len(DATA[c][0]) for c in WHO])))
    report = fedrecon(loss_model(bce, user), SGD).work.update(
        shared, (), steps._replace(live=np.arange(len(steps.live)) < live), KEY
    )
    assert float(report.steps) == query
    assert float(optax.tree.norm(report.update)) > 0


def trained(rounds=6, **table):
    table = {"cohort": {"name": "everyone"}, "model": {"name": "mf", "dim": 4}, "channel": [{"name": "mean"}]} | table
    it = build_from_config(make_config({"data": TABLE} | table), CONTENT)
    state = initial_arrays(it, 0)["state"]
    for t in range(rounds):
        state, _ = it.algorithm.step(state, prepare_round(it, 0, t).cohort, make_run_keys(0).rounds)
    return it, state


@pytest.mark.parametrize("work", ["ditto", "apfl"])
def test_an_own_copy_is_evaluated_as_personal(work):
    it, state = trained(work={"name": work})
    values = evaluate_model(it, scored_model(it, state), "val", KEY)
    assert {"val/full/hr@10", "val/personal/full/hr@10", "val/personal/sampled/ndcg@10"} <= values.keys()


def test_keep_copy_gives_both_modes_at_once():
    it, state = trained(work={"name": "local_steps", "keep_copy": True})
    plain, other = trained(work={"name": "local_steps"})
    values, want = (evaluate_model(a, scored_model(a, b), "val", KEY) for a, b in ((it, state), (plain, other)))
    assert {name: values[name] for name in want} == want  # the server's model is as it was
    assert any(name.startswith("val/personal") for name in values)


def test_reconstruction_is_scored_by_folding_in():
    it, state = trained(work={"name": "reconstruct"})
    values = evaluate_model(it, scored_model(it, state), "val", KEY)
    assert 0 < values["val/full/hr@10"] <= 1
    assert not jax.tree.leaves(scored_model(it, state)[1])


def test_folding_in_descends_the_expected_loss():
    """The private part that the history asks for: no other one near it is better."""
    it, state = trained(3, model={"name": "mf", "dim": 4, "init_scale": 1.0})
    params, items = state.shared.params, CONTENT.population.train.of(2)
    ids = jnp.array([*items, 30, 30])
    mine = it.model.fold_in(params, History(ids, ids, 30))
    label = np.isin(np.arange(30), items)
    weight = np.where(label, 1, 4 * label.sum() / (30 - label.sum()))

    def loss(vector):
        logit = np.asarray(it.model.score(params, {"private": {"user": vector[None]}, "private_tables": {}}, 0))
        return (weight * (np.logaddexp(0, logit) - label * logit)).sum() / weight.sum()

    found, other = np.asarray(mine["private"]["user"][0]), np.random.default_rng(0)
    for _ in range(20):
        assert loss(found) < loss(found + 0.3 * other.normal(size=4)) + 1e-4


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="must not be negative"):
        ditto(loss_model(bce, user), SGD, strength=-1.0)
    with pytest.raises(ValueError, match="lies between"):
        apfl(loss_model(bce, user), SGD, mixture=1.5)
    for name in ("gradient", "scaffold", "ditto"):
        with pytest.raises(ValueError, match="keep_copy: this work ends"):
            trained(work={"name": name, "keep_copy": True})
    with pytest.raises(ValueError, match="takes a work that keeps it|take a work"):
        trained(work={"name": "reconstruct"}, model={"name": "mf", "dim": 4, "loss": "bpr"})
