"""Models of sequences where clients are organisations of very different sizes: what they send, by other ways."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxfed as jf
from jaxfed.config.build import build_from_config
from jaxfed.config.schema import make_config
from jaxfed.core.tables import unwrap
from jaxfed.data.packing import pack_cohort
from jaxfed.training.loop import train_run
from jaxfed.training.rounds import initial_arrays, make_run_keys
from tests.data.test_sequences_of_organisations import DATA, ITEMS, POPULATION, REGION, unpacked
from tests.small import close

BY_REGION = jf.data.partition(DATA._replace(columns={"region": REGION}), by="region")
BY_USER = jf.data.partition(DATA, by="user")
ABSENT = 3  # the organisation of 17 users
TABLE = {
    "model": {"name": "sasrec", "dim": 8, "length": 16, "dropout": 0.0, "loss": "softmax"},
    "work": {"name": "gradient", "batch_size": 4, "negatives": 9, "optimizer": {"name": "sgd"}},
    "channel": [{"name": "weighted_mean"}],
    "server": {"name": "sgd", "learning_rate": 1.0, "lazy": False},
    "cohort": {"name": "everyone"},
}


def take_round(clients, absent, **more):
    """(what a round takes from the model, the model, its parameters before, the cohort); absent: numbers of clients."""
    it = build_from_config(make_config(TABLE | more), clients)
    ids, _ = it.sampler.draw(0, 0)
    present = ~np.isin(ids, absent)
    cohort = pack_cohort(clients.population, it.batching, it.shapes, ids, present, 0, 0)
    state = initial_arrays(it, 0)["state"]
    before = jax.device_get(unwrap(state.shared.params))
    state, _ = it.algorithm.step(state, cohort, make_run_keys(0).rounds)
    moved = jax.tree.map(np.subtract, before, jax.device_get(unwrap(state.shared.params)))
    assert max(np.abs(x).max() for x in jax.tree.leaves(moved)) > 1e-3
    return moved, it.model, before, cohort


def work(**more):
    return {"work": TABLE["work"] | more}


def users_of(client):
    """The numbers of an organisation's users where users are clients."""
    first, end = POPULATION.client_offsets[client : client + 2]
    return np.flatnonzero(np.isin(BY_USER.population.user_names, POPULATION.user_names[first:end]))


@pytest.mark.parametrize("model", ["sasrec", "hstu"])
def test_organisations_send_the_gradients_of_their_users(model):
    """Weighted by targets: what the users would send as clients, whatever the size of a batch; one is absent."""
    chosen = {"model": TABLE["model"] | {"name": model}}
    want, *_ = take_round(BY_USER, users_of(ABSENT), **chosen)
    for size in (1, 64):
        got, *_ = take_round(BY_REGION, [ABSENT], **chosen, **work(batch_size=size))
        close(got, want, atol=2e-5)  # gradients of size one
    everyone, *_ = take_round(BY_REGION, [], **chosen)
    assert max(np.abs(x - y).max() for x, y in zip(*map(jax.tree.leaves, (everyone, want)), strict=True)) > 1e-3


@pytest.mark.parametrize(
    ("name", "size", "absent"),
    [
        pytest.param("sasrec", 1, 4, marks=pytest.mark.full),
        pytest.param("sasrec", 4, ABSENT, marks=pytest.mark.full),
        ("bert4rec", 4, ABSENT),  # masks, too
    ],
)
def test_local_steps_by_hand(name, size, absent):
    """Two epochs with dropout: each step is on the mean loss over the targets of its histories, on whole tables.

    To a three-hundredth of the largest number: rounding grows from step to step, of which there are up to 34.
    """
    more = {"model": {"name": name, "dim": 8, "length": 16, "dropout": 0.3, "loss": "sampled_softmax"}}
    steps = work(name="local_steps", epochs=2, batch_size=size, optimizer={"name": "sgd", "learning_rate": 0.05})
    got, model, start, cohort = take_round(BY_REGION, [absent], **more, **steps)

    @jax.jit
    def slope(params, sequences, drawn, keys):
        def mean_loss(params):
            batch = {"negative": drawn, "catalogue": jnp.float32(ITEMS)}
            each = [
                model.loss(params, (), batch | {"sequence": s, "dropout": k})
                for s, k in zip(sequences, keys, strict=True)
            ]
            return sum(seen.total for seen in each) / sum(seen.weight for seen in each)

        return jax.grad(mean_loss)(params)

    total, weights = jax.tree.map(np.zeros_like, start), 0
    for client, trained in unpacked(cohort).items():
        if client == absent:
            continue
        params = start
        for reads, negatives, keys in trained:
            drawn = np.zeros(ITEMS, np.float32)
            drawn[list(negatives)] = list(negatives.values())
            padded = np.full((len(reads), 17), ITEMS)
            for row, each in zip(padded, reads, strict=True):
                row[: len(each)] = each
            moved = slope(params, list(padded), drawn, [np.array(key, np.uint32) for key in keys])
            params = jax.tree.map(lambda x, g: x - 0.05 * g, params, moved)
        weight = sum(len(each) - 1 for reads, _, _ in trained for each in reads)
        total = jax.tree.map(lambda t, x, y, w=weight: t + w * (x - y), total, start, params)
        weights += weight
    for leaf, want in zip(*map(jax.tree.leaves, (got, total)), strict=True):
        np.testing.assert_allclose(leaf, want / weights, atol=3e-3 * np.abs(leaf).max())


def test_users_are_tested_one_by_one():
    """By their own histories: figures of organisations are those of their users."""
    figures = []
    for clients in (BY_REGION, BY_USER):
        it = build_from_config(make_config(TABLE | {"evaluation": {"history": "all"}}), clients)
        shared = it.model.init(jax.random.key(1))
        found = it.evaluator(shared, (), it.eval_splits["test"], jax.random.key(0))
        figures.append({name: found[name].total.sum() for name in ("full/ndcg@10", "full/hr@10", "full/mrr")})
    assert figures[0]["full/ndcg@10"] > 0
    close(*figures)


@pytest.mark.parametrize("name", ["gradient", "local_steps"])
def test_a_run_goes_on_as_if_it_had_not_stopped(name, tmp_path):
    def train(out, rounds):
        data = {"name": "synthetic", "users": 30, "items": 40, "clients": "silo", "silos": 4}
        more = {"cohort": {"size": 3, "dropout": 0.2}, "evaluation": {"every": 1}, "rounds": rounds}
        return train_run(
            make_config(TABLE | work(name=name) | more | {"data": data, "run": {"out": str(tmp_path / out)}}),
            resume=True,
        )

    whole = train("whole", 4)
    train("parts", 2)
    assert train("parts", 4)["params_sha256"] == whole["params_sha256"]
    run = jf.load_run(str(tmp_path / "whole"))
    assert len(run.recommend(user="3", k=3)) == 3
