"""Gradient accumulation: k batches of b examples move a client as one batch of k b does, in the memory of one batch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxfed.algorithms.fedavg import fedavg, fedprox
from jaxfed.algorithms.local_training import local_steps, output_facts
from jaxfed.config.build import build_from_config, load_data
from jaxfed.config.schema import make_config
from jaxfed.core.client_work import Batches, local_sgd
from jaxfed.core.tables import Table
from jaxfed.core.types import Mean
from jaxfed.data.packing import pack_cohort
from jaxfed.training.rounds import initial_arrays
from tests.composed import TABLE, pack_small_run
from tests.small import KEY, close, same

PLAIN = [{"name": "weighted_mean"}]
PER_EXAMPLE = {"item": {"per_example": True}, "user": {"per_example": True}, "weight_decay": 0.02}
OPTIMIZERS = {
    "sgd": {"name": "sgd", "learning_rate": 0.5},
    "momentum and decay": {"name": "sgd", "learning_rate": 0.2, "momentum": 0.9, "weight_decay": 0.1},
    "sums over examples": {"name": "sgd", "learning_rate": 0.1, **PER_EXAMPLE},
    "adam": {"name": "adam", "learning_rate": 0.02},
}
WORK = {"name": "local_steps", "proximal": 0.1}


def run_rounds(rounds=2, **work):
    """The state after some rounds of a matrix factorisation, of clients from one batch to many; one drops out."""
    made, cohort = pack_small_run(work=WORK | work, channel=PLAIN, server={"name": "sgd"})
    counts = [int(x) for block in cohort.blocks for x in block.data.live.sum(1) if x]
    state = initial_arrays(made, 0)["state"]
    for number in range(rounds):
        ids, lengths = cohort.ids, made.data.population.num_train
        present = np.arange(len(ids)) != np.argsort(lengths)[-2 - number]
        cohort = pack_cohort(made.data.population, made.batching, made.shapes, ids, present, 0, number)
        state, _ = made.algorithm.step(state, cohort, KEY)
    return state, counts


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("by_row", [True, False])
def test_batches_together_are_one_batch(name, by_row):
    """Also where the last group lacks batches, and the last batch examples; by row no other rows are touched."""
    own = {"optimizer": OPTIMIZERS[name], "by_row": by_row}
    small, counts = run_rounds(batch_size=8, accumulate=3, **own)
    large, _ = run_rounds(batch_size=24, **own)
    assert {count % 3 for count in counts} == {0, 1, 2}
    assert min(counts) < 3 < 6 < max(counts)
    close(small.shared, large.shared, atol=1e-5)
    close(small.client_states, large.client_states, atol=1e-5)
    alone, _ = run_rounds(batch_size=8, **own)
    gap = jax.tree.map(lambda a, b: np.abs(a - b).max(), alone.shared, large.shared)
    assert max(jax.tree.leaves(gap)) > 1e-3  # otherwise the above could not fail


def test_one_batch_at_a_time_changes_nothing():
    same(run_rounds(accumulate=1)[0], run_rounds()[0])


@pytest.mark.parametrize("name", ["sasrec", "gru4rec"])
def test_histories(name):
    """A step of a model of sequences is one history, with new negatives in each epoch. All epochs together are one step
    along the gradient that the work `gradient` sends."""
    own = {"blocks": 1, "heads": 1} if name == "sasrec" else {}
    model = {"name": name, "dim": 4, "length": 8, "dropout": 0.0} | own
    sgd = {"optimizer": {"name": "sgd", "learning_rate": 1.0}, "epochs": 3}
    shared = []
    for work in ({"name": "local_steps", "accumulate": 4}, {"name": "gradient"}, {"name": "local_steps"}):
        config = make_config(TABLE | {"model": model, "work": work | sgd, "channel": PLAIN, "server": {"name": "sgd"}})
        made = build_from_config(config, load_data(config.data))
        lengths = made.data.population.num_train
        assert lengths.max() > 4 * lengths.min()
        present = np.arange(len(lengths)) != lengths.argmax()
        who = np.arange(len(lengths), dtype=np.int32)
        cohort = pack_cohort(made.data.population, made.batching, made.shapes, who, present, 0, 0)
        shared.append(made.algorithm.step(initial_arrays(made, 0)["state"], cohort, KEY)[0].shared.params)
    close(*shared[:2], atol=1e-5)
    assert max(np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, shared[1:]), strict=True)) > 1e-3


RNG = np.random.default_rng(0)
STEPS, WIDTH, DIM = 7, 4, 3
LIVE = np.array([1, 1, 0, 1, 1, 1, 0], bool)  # groups of three: two batches, three, none
X, Y = RNG.normal(size=(STEPS, WIDTH, DIM)), RNG.normal(size=(STEPS, WIDTH))
W = RNG.integers(1, 5, (STEPS, WIDTH)) * (RNG.random((STEPS, WIDTH)) < 0.7)
BATCH = tuple(jnp.asarray(x, jnp.float32) for x in (X, Y, W))
UNEVEN = Batches(jnp.zeros((STEPS, 1), int), jnp.asarray(LIVE), BATCH, jnp.float32(W.sum()))


def weighted_error(params, batch, *frozen):
    x, y, w = batch
    return Mean(jnp.sum(w * (x @ params - y) ** 2), w.sum())


def step_groups(kind, rate=0.05):
    """Steps of SGD or Adam over the groups of three, in NumPy."""
    value, first, second, moves = np.full(DIM, 0.3), np.zeros(DIM), np.zeros(DIM), 0
    for start in range(0, STEPS, 3):
        chosen = [s for s in range(start, min(start + 3, STEPS)) if LIVE[s]]
        if not chosen:
            continue
        x, y, w = (np.concatenate([each[s] for s in chosen]) for each in (X, Y, W))
        slope = 2 * (w * (x @ value - y)) @ x / w.sum()
        moves += 1
        first, second = 0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * slope**2
        scaled = first / (1 - 0.9**moves) / (np.sqrt(second / (1 - 0.999**moves)) + 1e-8)
        value = value - rate * (slope if kind == "sgd" else scaled)
    return value


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_weights_padding_and_short_groups(kind):
    """A batch counts by its examples. Padding does not, wherever it lies; a group of padding moves nothing, nor does it
    count as a step of Adam."""
    start = jnp.full(DIM, 0.3)
    optimizer = getattr(optax, kind)(0.05)
    end, state, seen = local_sgd(weighted_error, optimizer, start, UNEVEN, accumulate=3)
    np.testing.assert_allclose(end, step_groups(kind), atol=1e-5)
    np.testing.assert_allclose(seen.weight, W[LIVE].sum())
    assert int(optax.tree.get(state, "count", 2)) == 2
    facts = output_facts(lambda params, private, batch: weighted_error(params, batch), (start, ()), UNEVEN, 3)
    assert int(facts["steps"]) == 2


def test_what_padding_holds_is_not_read():
    rotten = UNEVEN._replace(batch=jax.tree.map(lambda x: x.at[~LIVE].set(jnp.nan), BATCH))
    ends = [local_sgd(weighted_error, optax.adam(0.05), jnp.zeros(DIM), it, accumulate=3)[0] for it in (UNEVEN, rotten)]
    same(*ends)


def test_memory_is_that_of_one_batch():
    """Temporary memory of the steps of a client whose examples have wide activations."""
    table = Table(jnp.zeros((64, 8)))

    def loss(table, batch):
        return Mean(jnp.sum(jnp.tanh(table @ batch) ** 2), 1.0)  # 64 x 4,096 for each batch of the table's rows

    def measure(batches, rows, accumulate):
        at = jnp.arange(64).reshape(batches, rows)
        steps = Batches(at, jnp.ones(batches, bool), jnp.ones((batches, 8, 4096)), jnp.float32(64))
        run = jax.jit(lambda steps: local_sgd(loss, optax.sgd(0.1), table, steps, accumulate=accumulate)[0])
        return run.lower(steps).compile().memory_analysis().temp_size_in_bytes

    assert measure(8, 8, 8) < 0.3 * measure(1, 64, 1)


def test_refused_in_one_line():
    for make in (fedavg, fedprox):
        with pytest.raises(ValueError, match=r"^accumulate is 0: it must be at least 1$"):
            make(None, optax.sgd(0.1), accumulate=0)
    with pytest.raises(ValueError, match="accumulate is -2"):
        local_steps(None, optax.sgd(0.1), accumulate=-2)
    config = make_config(TABLE | {"work": {"name": "local_steps", "accumulate": 0}, "channel": PLAIN})
    with pytest.raises(ValueError, match="accumulate is 0"):
        build_from_config(config, load_data(config.data))
    for wrong in (
        {"algorithm": {"name": "scaffold", "accumulate": 2}},
        {"work": {"name": "scaffold", "accumulate": 2}},
    ):
        with pytest.raises(ValueError, match='unknown key "(work|algorithm).accumulate"'):
            make_config(wrong)
