"""The inverse of matrices with more rows than LAPACK counts, on small ones."""

import numpy as np
import pytest

from jaxfed.models import item_item, large_inverse
from jaxfed.models.item_item import ridge_weights
from jaxfed.models.large_inverse import invert_large
from tests.models.test_sparse_items import SUMS


@pytest.mark.parametrize(("rows", "tile"), [(1, 8), (64, 64), (65, 64), (129, 50), (60, 200)])
def test_it_is_minus_the_inverse_and_reads_the_lower_triangle(rows, tile, monkeypatch):
    """Against float64, to the rounding of float32 times the condition number, 20."""
    monkeypatch.setattr(large_inverse, "TILE", tile)
    rng = np.random.default_rng(rows)
    orthogonal = np.linalg.qr(rng.normal(size=(rows, rows)))[0]
    matrix = orthogonal * rng.uniform(0.5, 10, rows) @ orthogonal.T
    given = np.where(np.tri(rows, dtype=bool), matrix, 777).astype(np.float32)
    found = invert_large(given)
    assert found is given, "in place"
    np.testing.assert_allclose(np.tril(found), -np.tril(np.linalg.inv(matrix)), atol=20 * 2e-6)


def test_weights_are_those_of_lapack(monkeypatch):
    want = ridge_weights(SUMS, 3.0)
    monkeypatch.setattr(item_item, "LARGEST_OF_LAPACK", 2)
    monkeypatch.setattr(large_inverse, "TILE", 3)
    found = ridge_weights(SUMS, 3.0)
    assert not np.diag(found).any()
    np.testing.assert_allclose(found, want, atol=1e-5)  # float32 solves in another order


def test_an_indefinite_matrix_is_refused_in_a_line():
    with pytest.raises(ValueError, match=r"indefinite.*raise model.l2, or set model.neighbours") as error:
        invert_large(np.diag([1.0, -1.0]).astype(np.float32))
    assert "\n" not in str(error.value)
