"""Smaller models: what adds nothing may go, sizes shrink, the strongest stay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxfed as jf
from jaxfed.core.tables import unwrap
from jaxfed.core.tree import count_bytes
from jaxfed.models.structured_pruning import measure_heads, measure_units, merge_rows, shrink_blocks
from tests.models.test_sequence import make_history, shared_of
from tests.small import close

N, DIM, LENGTH, ITEMS = 30, 8, 12, [4, 1, 7, 2, 2]


def make_sasrec(**more):
    return jf.models.sasrec(N, dim=DIM, length=LENGTH, **{"heads": 4, "expansion": 2, "block": "pre_norm"} | more)


def scores(model, shared):
    return model.score(shared, model.fold_in(shared, make_history(ITEMS)), 0)


def silence(block, heads, units):
    """A block of which these heads and units give zero, one by its values, the others by their outputs."""
    attention, feed = block["attention"], block["feed_forward"]
    output = attention["output"]["kernel"].at[np.array(heads[1:])].set(0)
    value = {
        "kernel": attention["value"]["kernel"].at[:, heads[0]].set(0),
        "bias": attention["value"]["bias"].at[heads[0]].set(0),
    }
    attention = attention | {"value": value, "output": attention["output"] | {"kernel": output}}
    silent = feed["output"]["kernel"].at[np.array(units)].set(0)
    return block | {"attention": attention, "feed_forward": feed | {"output": feed["output"] | {"kernel": silent}}}


@pytest.mark.parametrize("block", ["pre_norm", "ligr"])
def test_what_adds_nothing_may_go(block):
    """Other heads and units in each block. What is left is a smaller model of the registry."""
    large = make_sasrec(block=block)
    shared = shared_of(large)
    encoder = shared["params"]["encoder"]
    silent = {
        "block_0": silence(encoder["block_0"], [1, 3], [0, 5, 6, 7]),
        "block_1": silence(encoder["block_1"], [0, 2], [1, 2, 14, 15]),
    }
    shared = shared | {"params": {"encoder": encoder | silent}}
    small = make_sasrec(block=block, heads=2, head_width=DIM // 4, hidden_width=12)
    kept = shrink_blocks(shared, heads=2, hidden=12)
    close(scores(small, kept), scores(large, shared), atol=1e-5)
    got, want = (jax.tree.map(jnp.shape, x) for x in (kept, unwrap(small.init(jax.random.key(0)))))
    assert got == want
    assert count_bytes(kept["params"]) < 0.75 * count_bytes(shared["params"])
    assert (
        float(jnp.abs(scores(small, shrink_blocks(shared_of(large), 2, 12)) - scores(large, shared_of(large))).max())
        > 1e-2
    )


def test_the_strongest_stay():
    """By the norms, in NumPy."""
    attention = shared_of(make_sasrec())["params"]["encoder"]["block_0"]["attention"]
    strength = []
    for head in range(4):
        value = np.append(np.ravel(attention["value"]["kernel"][:, head]), attention["value"]["bias"][head])
        strength.append(np.linalg.norm(value) * np.linalg.norm(np.ravel(attention["output"]["kernel"][head])))
    np.testing.assert_allclose(measure_heads(attention), strength, rtol=1e-5)
    feed = {"inner": {"kernel": jnp.array([[1.0, 3.0]]), "bias": jnp.array([0.0, 4.0])}}
    feed |= {"output": {"kernel": jnp.array([[2.0], [1.0]])}}
    assert measure_units(feed).tolist() == [2.0, 5.0]


def test_rows_that_are_dropped_share_one():
    rows = jnp.arange(12.0).reshape(4, 3)
    merged = merge_rows(rows, np.array([True, False, True, False]))
    assert merged.tolist() == [[0, 1, 2], [6, 7, 8], [6, 7, 8], [6, 7, 8]]
    close(merge_rows(rows, np.ones(4, bool)), rows, atol=0)


def test_what_cannot_be_is_one_line():
    shared = shared_of(make_sasrec())
    with pytest.raises(ValueError, match="heads is 5: a block has 4, set it from 1 to that"):
        shrink_blocks(shared, heads=5)
    with pytest.raises(ValueError, match="the model has no blocks"):
        shrink_blocks(jf.models.mf(10).init(jax.random.key(0)))
    with pytest.raises(ValueError, match="model.head_width is -1: it must be at least 0"):
        make_sasrec(head_width=-1)
