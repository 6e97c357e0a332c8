"""Rows: what is marked is cut, what lies past the end is nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxfed.core.tables import (
    Table,
    add_rows,
    flatten_tables,
    gather_client,
    num_rows,
    pad_tables,
    put_rows,
    scatter_client_leaves,
    scatter_client_tables,
    take_rows,
    unwrap,
    wrap,
)

TREE = {"t": Table(jnp.arange(12.0).reshape(6, 2)), "d": jnp.ones(3)}


def test_marks_come_off():
    tree = {"a": jnp.ones(3), "b": {"c": jnp.zeros(2)}}
    assert jax.tree.structure(unwrap(wrap(tree))) == jax.tree.structure(tree)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=8))
def test_take_and_add_against_numpy(ids):
    table, at = np.arange(12.0).reshape(6, 2), np.array(ids)
    got = take_rows(TREE, at)["t"].rows
    want = np.where((at < 6)[:, None], table[np.minimum(at, 5)], 0)
    np.testing.assert_array_equal(got, want)
    delta = np.random.default_rng(len(ids)).integers(-5, 5, (len(ids), 2)).astype(np.float32)
    total = table.copy()
    np.add.at(total, at[at < 6], delta[at < 6])
    got = add_rows(TREE, at, {"t": Table(delta), "d": np.ones(3)})
    np.testing.assert_array_equal(got["t"].rows, total)
    np.testing.assert_array_equal(got["d"], 2 * np.ones(3))


def test_put_replaces_and_drops_past_the_end():
    got = put_rows(TREE, np.array([1, 6]), {"t": Table(-jnp.ones((2, 2))), "d": jnp.zeros(3)})
    want = np.arange(12.0).reshape(6, 2)
    want[1] = -1
    np.testing.assert_array_equal(got["t"].rows, want)
    np.testing.assert_array_equal(got["d"], np.zeros(3))


def test_gather_then_scatter_is_where_it_was():
    store = {"t": Table(jnp.arange(24.0).reshape(4, 6)), "d": jnp.arange(4.0)}
    who, rows = np.array([2, 0, 4]), np.array([[1, 5, 6], [0, 6, 6], [3, 4, 5]])
    got = jax.vmap(gather_client, (None, 0, 0))(store, who, rows)
    np.testing.assert_array_equal(got["t"].rows, [[13, 17, 0], [0, 0, 0], [0, 0, 0]])
    np.testing.assert_array_equal(got["d"], [2, 0, 0])
    owner = np.repeat(who, 3)
    new = flatten_tables(jax.tree.map(lambda x: x + 100, got))
    back = scatter_client_leaves(scatter_client_tables(store, owner, rows.ravel(), new), who, new)
    want = np.arange(24.0).reshape(4, 6)
    want[2, [1, 5]] += 100
    want[0, 0] += 100
    np.testing.assert_array_equal(back["t"].rows, want)
    np.testing.assert_array_equal(back["d"], [100, 1, 102, 3])


def test_pad_lengthens_tables_and_leaves_each_to_their_size():
    got = pad_tables({"t": Table(jnp.ones((2, 3))), "d": jnp.ones(2)}, 4, 5)
    assert got["t"].rows.shape == (5, 3)
    assert got["d"].tolist() == [1, 1, 0, 0]


def test_tables_of_different_lengths_are_refused():
    assert num_rows(TREE) == 6
    assert num_rows({"d": jnp.ones(2)}) == 0
    with pytest.raises(ValueError, match=r"different lengths: \[2, 6\]"):
        num_rows([TREE, Table(jnp.ones(2))])
