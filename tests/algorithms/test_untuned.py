"""The rates of a configuration that says nothing of training: a round by hand, and what they are left out of."""

import jax
import numpy as np
import optax
import pytest

import jaxfed as jf
from jaxfed.algorithms.group_rates import Rates, group_rates
from jaxfed.config.build import build_from_config, load_data
from jaxfed.config.overrides import override_config
from jaxfed.config.registry import REGISTRY
from jaxfed.config.schema import config_to_table, make_config
from jaxfed.core.tables import Table
from jaxfed.data.batching import Batching, draw_examples
from jaxfed.training.rounds import initial_arrays, make_run_keys, prepare_round

LENGTHS = (3, 4, 7, 12, 30)  # items of five users, of which validation and test take one each
BATCHES = {"batch_size": 10, "negatives": 2}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    random, lines = np.random.default_rng(0), ["user,item,time"]
    for user, length in enumerate(LENGTHS):
        lines += [f"{user},{item},{when}" for when, item in enumerate(random.choice(40, length, replace=False))]
    path = tmp_path_factory.mktemp("rows") / "rows.csv"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def train_by_hand(vectors, bias, user, drawn, rule):
    """(start - end of the rows, of the biases, rows touched, the user's vector) of one client, step by step."""
    item, own = dict(rule.item.__dict__), dict(rule.user.__dict__)
    start, vectors, bias, touched = (vectors, bias), vectors.copy(), bias.copy(), np.zeros(len(bias), bool)
    for low in range(0, len(drawn.item), BATCHES["batch_size"]):
        at = slice(low, low + BATCHES["batch_size"])
        ids, label = drawn.item[at, 0], drawn.label[at].astype(float)
        error = 1 / (1 + np.exp(-(vectors[ids] @ user + bias[ids]))) - label
        each = np.unique(ids)
        slopes, shifts = np.zeros_like(vectors), np.zeros_like(bias)
        np.add.at(slopes, ids, error[:, None] * user)
        np.add.at(shifts, ids, error)
        of_user = (error @ vectors[ids] + own["weight_decay"] * user) / len(ids)
        for table, slope in ((vectors, slopes), (bias, shifts)):
            table[each] -= item["learning_rate"] * (slope[each] + item["weight_decay"] * table[each])
        user = user - own["learning_rate"] * of_user
        touched[each] = True
    return start[0] - vectors, start[1] - bias, touched, user


def test_a_round_by_the_rule_is_that_by_hand(rows):
    """Clients of one to nine steps, the last of them short, some of whom drop out; rows with fewer holders than the
    floor, and with more."""
    table = {"data": {"path": rows}, "model": {"dim": 4}, "work": BATCHES, "cohort": {"dropout": 0.35}}
    config = make_config(table | {"channel": [{"name": "per_row_mean", "floor": 2.0}]})
    parts = build_from_config(config, load_data(config.data))
    state, key = initial_arrays(parts, 0)["state"], make_run_keys(0).rounds
    ready = prepare_round(parts, 0, 0)
    present = np.asarray(ready.cohort.ids)[np.asarray(ready.cohort.present)]
    assert 3 <= len(present) < len(LENGTHS)
    size = parts.data.population.num_items
    vectors, bias = (np.asarray(state.shared.params["tables"][name].rows, float)[:size] for name in ("item", "bias"))
    users = np.asarray(jax.tree.leaves(parts.method.private_part(state.client_states.work))[0], float)
    total, shift, holders = np.zeros_like(vectors), np.zeros_like(bias), np.zeros(size)
    for client in present:
        drawn = draw_examples(parts.data.population, Batching(**BATCHES), np.array([client]), 0, 0)
        own = users[client].reshape(-1)
        moved, moved_bias, touched, _ = train_by_hand(vectors, bias, own, drawn, config.work.optimizer)
        total, shift, holders = total + moved, shift + moved_bias, holders + touched
    floor = config.channel[0].floor
    assert floor == 2
    assert set(holders) >= {0, 1, 2, 3}
    after, _ = parts.algorithm.step(state, ready.cohort, key)
    for name, start, sums in (("item", vectors, total), ("bias", bias, shift)):
        by = np.maximum(holders, floor).reshape((-1,) + (1,) * (sums.ndim - 1))
        got = np.asarray(after.shared.params["tables"][name].rows)[:size]
        np.testing.assert_allclose(got, start - sums / by, rtol=1e-5, atol=1e-6)  # float32 against float64


def test_steps_of_a_sum_do_not_depend_on_how_long_a_batch_is():
    """The gradient of a mean over n examples, times n, less the decay: the same for any n."""
    rates = Rates(2.0, 0.1, per_example=True)
    pace = group_rates(REGISTRY["optimizer"]["sgd"], 0.5, 0.0, rates, Rates(3.0, 0.6, per_example=True))
    params = {"t": Table(np.ones(2, np.float32))}, {"w": np.float32(1.0)}
    for examples in (1.0, 8.0):
        mean = jax.tree.map(lambda x: x / np.float32(examples), params)
        got, _ = pace.update(mean, pace.init(params), params, examples=np.float32(examples))
        np.testing.assert_allclose(got[0]["t"].rows, 2.0 * (-1 - 0.1), rtol=1e-6)
        np.testing.assert_allclose(got[1]["w"], -3.0 * (1 + 0.6) / examples, rtol=1e-6)


def test_what_says_how_it_trains_is_left_alone():
    rule = make_config({})
    assert (rule.work.optimizer.item.per_example, rule.model.init_scale, rule.channel[0].floor) == (True, 0.01, 4)
    assert make_config(config_to_table(rule)) == rule
    others = (
        {"work": {"optimizer": {"name": "adam"}}},
        {"work": {"name": "gradient"}},
        {"model": {"name": "neumf"}},
        {"model": {"loss": "bpr"}},
        {"server": {"name": "adam"}},
        {"algorithm": {"name": "ditto"}},
        {"data": {"label": "click"}},
    )
    for table in others:
        config = make_config(table)
        assert config.work.optimizer.item.per_example is None, table
        assert (config.rounds, config.cohort.holders, config.channel[0].floor) == (100, 0, 0), table


def test_beside_noise_nothing_of_the_rule_follows_the_data():
    """Neither how many clients a round has nor when a run ends; what is written down already is refused."""
    private = {"channel": [{"name": "mean", "count": 8}, {"name": "clip"}, {"name": "gaussian"}]}
    config = make_config(private)
    assert (config.cohort.holders, config.evaluation.patience) == (0, 0)
    assert config.work.optimizer.item.per_example
    with pytest.raises(ValueError, match=r"cohort\.holders: the size of a round would tell"):
        make_config(private | {"cohort": {"holders": 160.0}})
    assert make_config(private | {"cohort": {"holders": 160.0, "size": 8}}).cohort.size == 8
    data = jf.data.partition(jf.data.load("synthetic", users=20, items=30, mean_length=8.0))
    model = jf.models.mf(30)
    method = jf.algorithms.fedavg(model, client_optimizer=group_rates(optax.sgd, 0.1))
    channel = jf.chain(jf.channels.mean(8), jf.channels.clip(1.0), jf.channels.gaussian(1.0))
    with pytest.raises(ValueError, match=r"cohort\.holders"):
        jf.Experiment(data, model, method, channel, cohort=jf.sampling.uniform(holders=160.0))


def test_a_key_of_the_rule_is_changed_alone():
    config = override_config({}, ["--work.optimizer.item.learning-rate", "0.5", "--cohort.size", "64"])
    assert config.work.optimizer.item.learning_rate == 0.5
    assert (config.work.optimizer.item.per_example, config.cohort.size, config.model.init_scale) == (True, 64, 0.01)
    assert make_config({"channel": [{"name": "mean"}], "rounds": 7}).work.optimizer.item.per_example
