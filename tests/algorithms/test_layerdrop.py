"""Blocks that a client draws: all of them is FedAvg, the others add nothing and rest, each is averaged over its own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxfed as jf
from jaxfed.algorithms.layerdrop import keep_blocks, mark_block_coordinates
from jaxfed.config.build import build_from_config, load_data
from jaxfed.config.schema import make_config
from jaxfed.core.state import server_model
from jaxfed.core.tables import Table, take_rows
from jaxfed.core.types import Broadcast, Weights
from jaxfed.training.rounds import initial_arrays, make_run_keys, prepare_round
from tests.models.test_sequence import MODELS, make_history, shared_of
from tests.small import close, same

DATA = {"name": "synthetic", "users": 8, "items": 20, "mean_length": 5.0}
CONTENT = load_data(make_config({"data": DATA}).data)
SASREC = {"name": "sasrec", "dim": 4, "length": 6, "blocks": 3, "dropout": 0.0}


def build(algorithm, channel=(), model=SASREC, **more):
    table = {
        "data": DATA,
        "model": model,
        "algorithm": algorithm,
        "work": {"negatives": 6, "optimizer": {"name": "sgd", "learning_rate": 0.5}},
        "channel": [{"name": each} for each in channel],
        "cohort": {"name": "everyone"},
    }
    return build_from_config(make_config(table | more), CONTENT)


def one_round(it):
    state, ready = initial_arrays(it, 0)["state"], prepare_round(it, 0, 0)
    before = jax.tree.map(np.array, server_model(state))
    return before, server_model(it.algorithm.step(state, ready.cohort, make_run_keys(0).rounds)[0])


@pytest.mark.parametrize("gradient", [False, True])
def test_all_blocks_are_fedavg(gradient):
    plain = {"name": "fedsgd" if gradient else "fedavg"}
    got = one_round(build({"name": "layerdrop", "share": 1.0, "sends_gradient": gradient}))[1]
    same(got, one_round(build(plain, ["per_row_mean"]))[1])


@pytest.mark.parametrize("name", ["sasrec", "sasrec, ligr", "bert4rec", "hstu"])
def test_a_block_that_is_left_out_is_its_residual_path(name):
    """As a model without it: the last block, so that the others have their numbers."""
    small = {"blocks": 1}
    model, short = MODELS[name](), MODELS[name](**small)
    shared = shared_of(model)
    kept = keep_blocks(shared, jnp.array([True, False, True]))
    encoder = {key: x for key, x in shared["params"]["encoder"].items() if key != "block_1"}
    lone = {**shared, "params": {"encoder": encoder}}
    history = make_history([4, 1, 7, 2])
    got, want = model.fold_in(kept, history), short.fold_in(lone, history)
    close(got, want, atol=1e-6)


def test_a_client_moves_the_blocks_that_it_draws():
    """Two of three, other ones by client and round; its gradient is that of the model without the third."""
    it = build({"name": "layerdrop", "sends_gradient": True})
    shared, ready = initial_arrays(it, 0)["state"].shared, prepare_round(it, 0, 0)
    block, drawn = ready.cohort.blocks[-1], set()
    longest = int(np.argmax(block.num_train))  # a history of one item has no target
    sent, steps = take_rows(shared, block.rows[longest]), jax.tree.map(lambda x: x[longest], block.data)
    plain = jf.algorithms.fedsgd(it.model, optax.sgd(0.1)).work
    for number in range(8):
        update = it.method.work.update(sent, it.model.private(jax.random.key(0)), steps, jax.random.key(number)).update
        kept = np.asarray(update.extra).astype(bool)
        assert kept[:3].sum() == 2
        assert kept[3]
        drawn.add(tuple(kept))
        for each in range(3):
            moved = any(
                np.asarray(x).any() for x in jax.tree.leaves(update.params["params"]["encoder"][f"block_{each}"])
            )
            assert moved == kept[each]
    assert len(drawn) == 3
    want = plain.update(Broadcast(keep_blocks(sent.params, jnp.array(kept))), (), steps, jax.random.key(0)).update
    close(update.params, keep_blocks(want.params, jnp.array(kept)))


def test_each_block_is_averaged_over_its_own_clients():
    """Three clients: one has both blocks, one the first, one none; a row is divided by those who hold it."""
    params = {"params": {"block_0": {"w": jnp.zeros(2)}, "block_1": {"w": jnp.zeros(2)}, "norm": jnp.zeros(1)}}
    params |= {"tables": {"item": Table(jnp.zeros((2, 1)))}}
    link = jf.channels.coordinate_mean(mark_block_coordinates, shown=(-1,))
    summed = {
        "params": {"block_0": {"w": jnp.full(2, 6.0)}, "block_1": {"w": jnp.full(2, 5.0)}, "norm": jnp.array([9.0])}
    }
    summed |= {"tables": {"item": Table(jnp.array([[4.0], [0.0]]))}}
    total = Broadcast(summed), Weights(Table(jnp.array([[2.0], [0.0]]))), jnp.array([2.0, 1.0, 3.0])
    made = link.decode(total, jnp.int32(0), None)[0].params
    assert made["params"]["block_0"]["w"].tolist() == [3, 3]
    assert made["params"]["block_1"]["w"].tolist() == [5, 5]
    assert made["params"]["norm"].tolist() == [3]
    assert made["tables"]["item"].rows.tolist() == [[2], [0]]


def test_bytes_are_those_of_the_blocks_that_are_drawn():
    """One block of three less in both directions; up also what the rest, blocks and rows weigh."""
    it, whole = build({"name": "layerdrop"}), build({"name": "layerdrop", "share": 1.0})
    rows, every = np.array([1, 7]), np.zeros(2, int)
    encoder = initial_arrays(it, 0)["state"].shared.params["params"]["encoder"]
    one = 4 * sum(x.size for x in jax.tree.leaves(encoder["block_2"]))
    np.testing.assert_array_equal(it.wire.down(rows, 0, every), whole.wire.down(rows) - one)
    np.testing.assert_array_equal(it.wire.up(rows, 0, every), whole.wire.up(rows) - one + 4 * 3)


@pytest.mark.parametrize(
    ("algorithm", "model", "said"),
    [
        ({"share": 0.0}, SASREC, "algorithm.share is 0: it must be above 0, up to 1"),
        ({}, SASREC | {"block": "authors_code"}, "has no residual path around a block"),
        ({}, {"name": "gru4rec", "dim": 4}, "no blocks of one size"),
    ],
)
def test_what_cannot_be_is_one_line(algorithm, model, said):
    with pytest.raises(ValueError, match=said) as error:
        initial_arrays(build({"name": "layerdrop"} | algorithm, model=model), 0)
    assert "\n" not in str(error.value)
