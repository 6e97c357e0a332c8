"""Item-item tables that keep few weights of each item: for catalogues whose whole matrix does not fit, or is not worth
its time."""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
import scipy.sparse

from jaxfed.core.pairs import PairSums, split_pairs

WIDE = 2  # a row keeps so many times the neighbours of a column: items differ in how often they are a neighbour


def sparse_shape(num_items: int, neighbours: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a table {"items": int [N, R], "weights": [N, R]}: what row i adds to the scores of its `items`."""
    shape = (num_items, min(WIDE * neighbours, num_items))
    return {"items": jax.ShapeDtypeStruct(shape, jnp.int32), "weights": jax.ShapeDtypeStruct(shape, jnp.float32)}


def to_sparse(sums: PairSums, column: int = 0) -> scipy.sparse.csr_array:
    """The symmetric matrix [N, N] whose entries are a column of the sums, zeros left out."""
    high, low = split_pairs(sums.ids)
    values = sums.values[:, column]
    used = values != 0
    high, low, values = high[used], low[used], values[used]
    beside = high != low
    rows, columns = np.concatenate([high, low[beside]]), np.concatenate([low, high[beside]])
    entries = np.concatenate([values, values[beside]])
    return scipy.sparse.csr_array((entries, (rows, columns)), shape=(sums.size, sums.size))


def compute_cosines(gram: scipy.sparse.csr_array, shrink: float) -> scipy.sparse.csr_array:
    """The cosines of all pairs of items with users in common, by X'X; `shrink` is added to the norms."""
    counts, cosines = gram.diagonal(), gram.tocoo()
    near = cosines.data / (np.sqrt(counts[cosines.row] * counts[cosines.col]) + shrink + 1e-9)
    off = cosines.row != cosines.col
    return scipy.sparse.csr_array((near[off], (cosines.row[off], cosines.col[off])), shape=gram.shape)


def keep_largest(matrix: scipy.sparse.csr_array, most: int) -> scipy.sparse.csr_array:
    """The `most` entries of each row that are largest by size; of equal ones those of the first columns."""
    matrix.sort_indices()
    size, kept = np.abs(matrix.data), np.ones(len(matrix.data), bool)
    for row in np.flatnonzero(np.diff(matrix.indptr) > most):
        own = slice(matrix.indptr[row], matrix.indptr[row + 1])
        least = np.partition(size[own], -most)[-most]
        kept[own] = size[own] > least
        kept[own.start + np.flatnonzero(size[own] == least)[: most - kept[own].sum()]] = True
    rows = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))[kept]
    return scipy.sparse.csr_array((matrix.data[kept], (rows, matrix.indices[kept])), shape=matrix.shape)


def solve_neighbours(gram: scipy.sparse.csr_array, near: scipy.sparse.csr_array, l2: float) -> scipy.sparse.csr_array:
    """The weights that predict each item from its neighbours alone with an l2 penalty, a column for each item: EASE
    where the inverse is restricted to a pattern (Steck 2019, "Markov random fields for collaborative filtering").

    near: row j has the neighbours of item j. With all other items as neighbours this is EASE.
    """
    weights, place = near.copy(), np.full(gram.shape[0], -1, np.int32)
    for item in np.flatnonzero(np.diff(near.indptr)):
        own = slice(near.indptr[item], near.indptr[item + 1])
        chosen = near.indices[own]
        place[chosen] = np.arange(len(chosen))
        rows = gram[chosen]
        columns = place[rows.indices]
        inside = np.flatnonzero(columns >= 0)
        matrix = l2 * np.eye(len(chosen), dtype=np.float32)
        matrix[np.searchsorted(rows.indptr, inside, "right") - 1, columns[inside]] += rows.data[inside]
        rest = slice(gram.indptr[item], gram.indptr[item + 1])
        columns = place[gram.indices[rest]]
        right = np.zeros(len(chosen), np.float32)
        right[columns[columns >= 0]] = gram.data[rest][columns >= 0]
        weights.data[own] = scipy.linalg.lapack.sposv(matrix, right)[1]
        place[chosen] = -1
    return weights.T.tocsr()


def lay_out_rows(matrix: scipy.sparse.csr_array, width: int) -> dict[str, np.ndarray]:
    """A table of `sparse_shape` from a sparse matrix: of a row with more than `width` entries the largest by size."""
    kept = keep_largest(matrix, width)
    size = matrix.shape[0]
    row = np.repeat(np.arange(size), np.diff(kept.indptr))
    at = row, np.arange(len(row)) - kept.indptr[row]
    items, weights = np.full((size, width), size, np.int32), np.zeros((size, width), np.float32)
    items[at], weights[at] = kept.indices, kept.data
    return {"items": items, "weights": weights}


def sparse_ridge_table(sums: PairSums, l2: float, neighbours: int, shrink: float) -> dict[str, np.ndarray]:
    """The table of `solve_neighbours`, of the `neighbours` nearest items of each by their shrunken cosines."""
    gram = to_sparse(sums)
    near = keep_largest(compute_cosines(gram, shrink), neighbours)
    return lay_out_rows(solve_neighbours(gram, near, l2), min(WIDE * neighbours, sums.size))


def sparse_cosine_table(sums: PairSums, neighbours: int, shrink: float) -> dict[str, np.ndarray]:
    """The table of the `neighbours` nearest items of each item, the neighbours of an item in its column."""
    near = keep_largest(compute_cosines(to_sparse(sums), shrink), neighbours)
    return lay_out_rows(near.T.tocsr(), min(WIDE * neighbours, sums.size))


def sparse_successor_table(sums: PairSums, neighbours: int) -> dict[str, np.ndarray]:
    """The table of the items that followed each item most, normalised as `item_item.normalize_successors` does."""
    high, low = split_pairs(sums.ids)
    parts = [(low, high, sums.values[:, 1]), (high, low, sums.values[:, 2])]
    first, then, counts = (np.concatenate(each) for each in zip(*parts, strict=True))
    used = counts > 0
    first, then, counts = first[used], then[used], counts[used]
    before = np.maximum(np.bincount(first, counts, sums.size), 1)
    after = np.maximum(np.bincount(then, counts, sums.size), 1)
    values = (counts / np.sqrt(before[first] * after[then])).astype(np.float32)
    matrix = scipy.sparse.csr_array((values, (first, then)), shape=(sums.size, sums.size))
    return lay_out_rows(matrix, min(WIDE * neighbours, sums.size))
