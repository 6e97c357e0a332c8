"""Item-item tables of few neighbours: against the whole matrices, and against NumPy item by item."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse

from jaxfed.core.pairs import PairSums, count_pairs
from jaxfed.core.types import History
from jaxfed.models import closed_form
from jaxfed.models.closed_form import ease, item_knn, transitions
from jaxfed.models.item_item import ridge_weights, score_history, weigh_history
from jaxfed.models.sparse_items import compute_cosines, keep_largest, sparse_ridge_table, to_sparse

ITEMS, USERS = 40, 60
random = np.random.default_rng(0)
X = (random.random((USERS, ITEMS)) < 0.15).astype(np.float64)
GRAM = X.T @ X
LOW = np.tril_indices(ITEMS)
SUMS = PairSums(np.arange(count_pairs(ITEMS)), GRAM[LOW].astype(np.float32)[:, None], ITEMS)


def dense(table):
    """[N, N] of a table of few weights."""
    found = np.zeros((ITEMS, ITEMS + 1))
    found[np.arange(ITEMS)[:, None], table["items"]] = table["weights"]
    return found[:, :ITEMS]


def nearest(neighbours, shrink=10.0):
    """The neighbours of each item by NumPy, of equals the first."""
    near = GRAM / (np.sqrt(np.outer(np.diag(GRAM), np.diag(GRAM))) + shrink)
    np.fill_diagonal(near, 0)
    order = np.argsort(-near, axis=1, kind="stable")[:, :neighbours]
    return near, [[j for j in row if near[i, j] > 0] for i, row in enumerate(order)]


def test_with_all_items_as_neighbours_it_is_ease():
    counts = (GRAM > 0).sum(1)
    full = PairSums(SUMS.ids, SUMS.values + 1, ITEMS)  # every pair occurs
    got = dense(sparse_ridge_table(full, 20.0, ITEMS, 0.0))
    np.testing.assert_allclose(got, ridge_weights(full, 20.0), rtol=1e-4, atol=1e-5)  # float32 solves
    assert counts.max() < ITEMS  # the sums themselves do not have all pairs


def test_each_item_is_predicted_from_its_neighbours_alone():
    neighbours, l2 = 6, 3.0
    got, (_, chosen) = dense(sparse_ridge_table(SUMS, l2, neighbours, 10.0)), nearest(neighbours)
    want = np.zeros((ITEMS, ITEMS))
    for item, near in enumerate(chosen):
        want[near, item] = np.linalg.solve(GRAM[np.ix_(near, near)] + l2 * np.eye(len(near)), GRAM[near, item])
    kept = got != 0  # a row keeps 12 weights at most
    np.testing.assert_allclose(got[kept], want[kept], rtol=1e-3, atol=1e-5)
    assert (kept.sum(1) <= 2 * neighbours).all()
    assert np.abs(want[~kept]).max() <= np.abs(want[kept]).max()


def test_the_largest_entries_of_a_row_are_kept_and_of_equals_the_first():
    matrix = scipy.sparse.csr_array(np.array([[1.0, -3, 2, 2, 2], [0, 0, 1, 0, 0]]))
    assert keep_largest(matrix, 3).toarray().tolist() == [[0, -3, 2, 2, 0], [0, 0, 1, 0, 0]]


def test_cosines_are_those_of_numpy():
    want, _ = nearest(1)
    np.testing.assert_allclose(compute_cosines(to_sparse(SUMS), 10.0).toarray(), want, rtol=1e-5)


@pytest.mark.parametrize("length", [3, 30])  # of 40 items: places are read one by one, or the whole catalogue
def test_few_weights_score_as_the_matrix_of_them_does(length):
    table = sparse_ridge_table(SUMS, 3.0, 6, 10.0)
    ids = jnp.array([*random.permutation(ITEMS)[: length - 1], ITEMS, ITEMS])
    history = History(ids, ids, ITEMS)
    weighed = weigh_history(history, 0.5 ** jnp.arange(len(ids)))
    got = jax.jit(score_history)(weighed, table)
    want = 0.5 ** np.arange(length - 1) @ dense(table)[np.asarray(ids[:-2])]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("places", [4, 7])  # an eighth of the catalogue is the limit
def test_a_history_is_scored_alike_place_by_place_and_over_the_catalogue(places):
    weights = ridge_weights(SUMS, 3.0)
    ids = jnp.array([5, 9, 31] + [ITEMS] * (places - 3))
    weighed = weigh_history(History(ids, ids, ITEMS), jnp.arange(1.0, places + 1))
    assert ("catalogue" in weighed) == (places == 7)
    want = np.array([1, 2, 3.0]) @ weights[[5, 9, 31]]
    np.testing.assert_allclose(score_history(weighed, weights), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "model",
    [
        lambda: ease(ITEMS, neighbours=5),
        lambda: transitions(ITEMS, neighbours=5),
        lambda: item_knn(ITEMS, neighbours=5),
    ],
)
def test_a_solution_has_the_shapes_of_the_first_model(model, monkeypatch):
    monkeypatch.setattr(closed_form, "MOST_DENSE", ITEMS - 1)
    built = model()
    values = np.concatenate([SUMS.values, SUMS.values, SUMS.values], 1)[:, : built.closed.pair_columns]
    found = built.closed.solve({"tables": {"pairs": SUMS._replace(values=values)}}, None)
    first = built.init(jax.random.key(0))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), found) == jax.tree.map(lambda x: (x.shape, x.dtype), first)
