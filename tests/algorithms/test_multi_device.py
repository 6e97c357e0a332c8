"""One user on several devices: who has what, the merge by hand, and one device a user is no device at all."""

import numpy as np
import optax
import pytest

from jaxfed.algorithms.local_training import local_steps
from jaxfed.algorithms.multi_device import with_merged_devices
from jaxfed.channels.average import weighted_mean
from jaxfed.config.build import build_from_config, load_data
from jaxfed.config.schema import make_config
from jaxfed.core.federate import federate
from jaxfed.core.method import Method
from jaxfed.data.preparation import prepare_population
from jaxfed.data.sources.synthetic import synthetic_data
from jaxfed.training.rounds import evaluate_model, initial_arrays, make_run_keys, prepare_round, scored_model
from tests.data.test_data import made, owned
from tests.small import DATA, KEY, MARKED, PLAIN, USERS, WHO, bce, close, loss_model, row_cohort, run, same, user

TABLE = {"name": "synthetic", "users": 50, "items": 40, "mean_length": 9.0}
MF = {"model": {"name": "mf", "dim": 4, "init_scale": 0.5}, "channel": [{"name": "per_row_mean"}]}
LINE = np.array([0, 0, 1, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10])  # of the clients of `small`; 0, 1 and 2, 3, 4 are one user


def trained(table, rounds=3, **more):
    """(experiment, state) after some rounds of everyone."""
    config = make_config({"data": table, "cohort": {"name": "everyone"}} | MF | more)
    it = build_from_config(config, load_data(config.data))
    state = initial_arrays(it, 0)["state"]
    for t in range(rounds):
        state, _ = it.algorithm.step(state, prepare_round(it, 0, t).cohort, make_run_keys(0).rounds)
    return it, state


# --- who has what ----------------------------------------


def test_a_users_train_rows_are_dealt_and_nothing_is_lost():
    source = synthetic_data(50, 40, mean_length=9.0)
    whole = prepare_population(source)[1]
    data, population = prepare_population(source, clients="device", devices=3)
    people = population.people
    assert owned(people) == owned(whole)
    assert f"{population.num_clients} devices of 50 users" in data.notes
    assert population.users_per_client == 1
    for u in range(50):
        mine = np.flatnonzero(population.owner == u)
        assert 1 <= len(mine) <= 3
        assert population.homes[u] == mine[0]
        assert (population.user_names[mine] == people.user_names[u]).all()
        parts = [population.train.of(d).tolist() for d in mine]
        history = people.train.of(u).tolist()
        assert sorted(np.concatenate(parts, dtype=int).tolist()) == sorted(history)
        for part, device in zip(parts, mine, strict=True):
            assert part == [item for item in history if item in part]  # earliest first, as before
            assert population.excluded.of(device).tolist() == sorted(part)  # what it has not seen may be its negative
            assert not len(population.test.of(device))
    assert population.num_train.sum() == whole.num_train.sum()
    other = prepare_population(source, clients="device", devices=3, deal=1)[1]
    assert (
        other.names.tolist() != population.names.tolist()
        or other.train.values.tolist() != population.train.values.tolist()
    )


def test_devices_of_a_column():
    """Without merge who appears at two shops is two users; with it the user has a device in each."""
    device = np.array(["phone", "tv", "phone", "tv", "phone", "phone", "tv", "tv"])
    data = made([0] * 5 + [1] * 3, [0, 1, 2, 3, 4, 0, 1, 2], columns={"device": device})
    _, population = prepare_population(data, clients="device", merge="devices")
    assert owned(population.people) == {("0", "0"): ((0, 1, 2), (3,), (4,)), ("1", "1"): ((0,), (1,), (2,))}
    trained_on = {population.names[c]: population.train.of(c).tolist() for c in range(population.num_clients)}
    assert trained_on == {"0/phone": [0, 2], "0/tv": [1], "1/phone": [0]}  # the last two of each are held out
    assert population.owner.tolist() == [0, 0, 1]


def test_cold_users_leave_with_all_of_their_devices():
    source = synthetic_data(50, 40, mean_length=9.0)
    _, population = prepare_population(source, clients="device", devices=2, cold=0.2)
    cold = set(population.cold.user_names.tolist())
    assert len(cold) == 10
    assert not cold & set(population.user_names.tolist())
    assert population.people.num_clients == 40
    assert (population.people.user_names[population.owner] == population.user_names).all()
    assert owned(population.people) | owned(population.cold) == owned(prepare_population(source)[1])


# --- the merge ----------------------------------------


def plain():
    return federate(Method(local_steps(loss_model(bce, user), optax.sgd(0.1))), weighted_mean(), USERS)


def test_one_device_a_user_changes_no_bit():
    weight = np.random.default_rng(0).integers(1, 99, USERS)  # which do not divide evenly
    got, info = run(with_merged_devices(plain(), np.arange(USERS), weight), row_cohort())
    want, _ = run(plain(), row_cohort())
    same(got, want)
    assert int(info["clients/merged"]) == 0


def test_two_devices_by_hand():
    """One full batch each: gradients on PLAIN of NumPy, private parts averaged by examples over those who reported."""
    there = [client != 4 for client in WHO]  # of the devices 2, 3 and 4 of a user, 4 drops out
    weight = np.array([len(DATA[c][0]) for c in range(USERS)], float)
    algorithm = with_merged_devices(plain(), LINE, weight)
    state, info = run(algorithm, in_one_step(row_cohort(present=there)), rounds=1)
    start = algorithm.init(MARKED, KEY).client_states[0]["user"]
    same(start[2], start[4])  # a user begins with one part
    item, bias = (np.asarray(PLAIN[name], np.float64) for name in ("item", "bias"))
    after = {}
    for c in WHO:
        items, labels = DATA[c]
        slope = 1 / (1 + np.exp(-(item[items] @ np.asarray(start[c], np.float64) + bias[items]))) - labels
        after[c] = np.asarray(start[c]) - 0.1 * (slope @ item[items]) / len(items)
    both = (weight[2] * after[2] + weight[3] * after[3]) / (weight[2] + weight[3])
    got = np.asarray(state.client_states[0]["user"])
    for device in (2, 3, 4):
        close(got[device], both.astype(np.float32), rtol=1e-5)
    close(got[0], after[1].astype(np.float32))  # who was not asked has what the user's other device learned
    close(got[7], after[7].astype(np.float32))
    same(got[12], np.asarray(start[12]))
    assert int(info["clients/merged"]) == 1


def in_one_step(cohort):
    """Steps [m, S, B] as one of S x B examples."""

    def one(block):
        steps = block.data
        m = len(block.slots)
        y, w = (x.reshape(m, 1, -1) for x in steps.batch)
        data = steps._replace(rows=steps.rows.reshape(m, 1, -1), live=steps.live[:, :1], batch=(y, w))
        return block._replace(data=data)

    return cohort._replace(blocks=tuple(map(one, cohort.blocks)))


# --- the whole ----------------------------------------


def test_one_device_a_user_is_the_run_without_devices():
    one, want = trained(TABLE | {"clients": "device", "devices": 1}), trained(TABLE)
    same(one[1], want[1])
    values = [evaluate_model(it, scored_model(it, state), "test", KEY) for it, state in (one, want)]
    assert values[0] == values[1]


def test_users_are_asked_once_with_what_all_their_devices_have_seen():
    """Ranked by hand from the first device's part, which is that of all of them."""
    it, state = trained(TABLE | {"clients": "device", "devices": 3})
    population, vectors = it.data.population, np.asarray(state.client_states[0]["private"]["user"][:, 0])
    tables = {name: np.asarray(x.rows) for name, x in state.shared.params["tables"].items()}
    hits = []
    for u in range(50):
        mine = np.flatnonzero(population.owner == u)
        assert (vectors[mine] == vectors[mine[0]]).all()
        scores, people = tables["item"] @ vectors[mine[0]] + tables["bias"], population.people
        had, (target,) = np.concatenate([people.train.of(u), people.valid.of(u)]), people.test.of(u)
        others = np.setdiff1d(np.arange(40), [*had, target])
        hits.append((scores[others] >= scores[target]).sum() < 10)
    asked = evaluate_model(it, scored_model(it, state), "test", KEY)
    assert asked["test/full/hr@10"] == pytest.approx(np.mean(hits), abs=1e-6)  # a user more or less is 0.02


def test_devices_that_a_run_cannot_have():
    table = TABLE | {"clients": "device"}
    for more in ({"work": {"name": "scaffold"}}, {"work": {"name": "ditto"}}, {"work": {"keep_copy": True}}):
        with pytest.raises(ValueError, match="keeps more on a client than the private part"):
            trained(table, 0, **more)
    with pytest.raises(ValueError, match="merged where rounds run"):
        trained(table, 0, run={"client_store": "host"})
    closed = {"model": {"name": "ease"}, "work": {"name": "statistics"}, "server": {"name": "solve"}, "channel": []}
    with pytest.raises(ValueError, match="all of a user's history"):
        trained(table, 0, **closed)
    it, _ = trained(table, 1, work={"name": "reconstruct"})  # nothing kept, nothing merged
    assert it.data.population.people
