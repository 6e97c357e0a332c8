"""Models of item-item weights that follow from sums over users, and what models without a private part share."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from jaxfed.core.model import ClosedForm, Model
from jaxfed.core.pairs import PairSums, add_to_dense, to_dense
from jaxfed.core.tables import Table, num_rows, unwrap
from jaxfed.core.types import History, Key, Mean, Tree
from jaxfed.models.large_inverse import LARGEST_OF_LAPACK, invert_large

SHORT = 8  # a catalogue has so many times the items of a history from which only the rows of the history are read
TILE = 1024  # rows and columns of a matrix that are mirrored at a time


def no_private_part(key: Key) -> Tree:
    """The private part of a model that has none."""
    return ()


def refuse_loss(shared: Tree, private: Tree, batch: Tree) -> Mean:
    """Raises ValueError: these models are not descended."""
    raise ValueError(
        'a model in closed form has no loss to descend: set work.name = "statistics", server.name = "solve"'
    )


def scatter_to_catalogue(history: History, values: jax.Array) -> jax.Array:
    """[size]: values [L] of a history at its rows of the catalogue."""
    return jnp.zeros(history.size).at[jnp.where(history.live, history.ids, history.size)].add(values, mode="drop")


def weigh_history(history: History, weights: jax.Array) -> Tree:
    """A history whose places weigh `weights` [L], for `score_history`: over the whole catalogue [N], or place by place
    where a history is much shorter than the catalogue."""
    if SHORT * history.ids.shape[0] > history.size:
        return {"catalogue": scatter_to_catalogue(history, weights)}
    return {"ids": history.ids, "weights": jnp.where(history.live, weights, 0)}


def score_history(weighed: Tree, table: Any) -> jax.Array:
    """[N]: the sum of the rows of an item-item table that a weighed history names.

    table: [N, N], or of few neighbours: {"items": int [N, R], "weights": [N, R]}, see `sparse_items`.
    """
    weighed, table = jax.tree.map(jnp.asarray, (weighed, table))
    sparse = isinstance(table, dict)
    if "catalogue" in weighed:
        if not sparse:
            return weighed["catalogue"] @ table
        values = weighed["catalogue"][:, None] * table["weights"]
        return jnp.zeros(len(values)).at[table["items"]].add(values, mode="drop")
    size, ids = num_rows(Table(table)), weighed["ids"]

    def add(place, total):
        id, weight = ids[place], weighed["weights"][place]
        if sparse:
            return total.at[table["items"][id]].add(weight * table["weights"][id], mode="drop")
        return total + weight * table[id]

    return jax.lax.fori_loop(0, (ids < size).sum(), add, jnp.zeros(size))  # as many rows are read as there are items


def item_item_model(
    empty: dict[str, Any],
    columns: int,
    statistics: Callable[[History], jax.Array],
    solve: Callable[..., dict[str, Any]],
    fold_in: Callable[[History], Tree],
    score: Callable[[Tree, Tree], jax.Array],
    **closed: Any,
) -> Model:
    """A model of item-item tables that are solved from sums over pairs of items.

    Args:
        empty: {name: shapes of a table, before the first round}, see `dense_shape`, `sparse_items.sparse_shape`.
        columns: numbers that a client sends for each pair of its items.
        statistics: statistics(history) -> [P, columns]: a user's part of the sums, of the pairs of the history's places
            in the order of `np.triu_indices`.
        solve: solve(sums, candidate) -> {name: table}; see `ClosedForm.solve`. Arrays of NumPy.
        fold_in: fold_in(history) -> what `score` takes of a user.
        score: score(tables, folded) -> [N].
        closed: further fields of `ClosedForm`.

    Returns:
        The model.
    """

    def init(key):
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), empty)
        return {"params": {}, "tables": {name: Table(table) for name, table in zeros.items()}}

    def sums(shared, history):
        return {"params": {}, "tables": {"pairs": Table(statistics(history))}}, {}

    def found(sums, shared, candidate=None):
        tables = solve(sums["tables"]["pairs"], candidate)
        return {"params": {}, "tables": {name: Table(table) for name, table in tables.items()}}

    def logits(shared, private, user):
        return score(unwrap(shared)["tables"], private)

    def folded(shared, history):
        return fold_in(history)

    form = ClosedForm(sums, found, pair_columns=columns, **closed)
    return Model(init, no_private_part, refuse_loss, logits, fold_in=folded, closed=form)


def dense_shape(num_items: int) -> jax.ShapeDtypeStruct:
    """The shape of a table with a weight for every two items."""
    return jax.ShapeDtypeStruct((num_items, num_items), jnp.float32)


def make_gram_pairs(history: History) -> jax.Array:
    """[P, 1]: a user's part of X'X, 1 for each pair of items: whole numbers, of which sums are exact up to 2^24."""
    first, second = np.triu_indices(history.ids.shape[0])
    return 1.0 * (history.live[first] & history.live[second])[:, None]


def make_successor_pairs(history: History, window: int, decay: float) -> jax.Array:
    """[P, 2]: what a user adds for (an item, then another at most `window` later), which weighs decay^(gap - 1): in the
    first column where the earlier item has the lower number, in the second where it has the higher."""
    first, second = np.triu_indices(history.ids.shape[0])
    gap = second - first
    weights = np.where((gap > 0) & (gap <= window), float(decay) ** np.maximum(gap - 1, 0), 0).astype(np.float32)
    rising = history.ids[first] < history.ids[second]
    both = history.live[first] & history.live[second]
    return jnp.stack([jnp.where(both & rising, weights, 0), jnp.where(both & ~rising, weights, 0)], 1)


def mirror_lower(matrix: np.ndarray) -> np.ndarray:
    """Makes a matrix [N, N] symmetric in place, from its lower triangle."""
    for low in range(0, len(matrix), TILE):
        block = matrix[low : low + TILE]
        block[:, low + TILE :] = matrix[low + TILE :, low : low + TILE].T
        square = block[:, low : low + TILE]
        square[:] = np.tril(square) + np.tril(square, -1).T
    return matrix


def ridge_weights(sums: PairSums, l2: float) -> np.ndarray:
    """float32 [N, N]: the weights that predict each item from all others with an l2 penalty (Steck 2019, equation 8).

    X'X + l2 I is inverted in place by Cholesky's factors: nothing beside the result takes memory. Where noise on the
    sums has made it indefinite, it is inverted by elimination.

    Raises ValueError where it is indefinite and too large for elimination.
    """
    matrix = to_dense(sums)
    np.einsum("ii->i", matrix)[:] += l2
    if len(matrix) > LARGEST_OF_LAPACK:
        return divide_by_diagonal(mirror_lower(invert_large(matrix)))
    upper = matrix.T  # as Fortran has it: LAPACK then works in place
    _, failed = scipy.linalg.lapack.spotrf(upper, lower=0, clean=0, overwrite_a=1)
    if failed:
        matrix = mirror_lower(to_dense(sums))
        np.einsum("ii->i", matrix)[:] += l2
        matrix = scipy.linalg.inv(matrix, overwrite_a=True, check_finite=False)
    else:
        scipy.linalg.lapack.spotri(upper, lower=0, overwrite_c=1)
        mirror_lower(matrix)
    return divide_by_diagonal(matrix)


def divide_by_diagonal(matrix: np.ndarray) -> np.ndarray:
    """The weights of an inverse [N, N], or of minus an inverse, in its place."""
    matrix /= -np.diag(matrix).copy()
    np.fill_diagonal(matrix, 0)
    return matrix


def count_successors(sums: PairSums) -> np.ndarray:
    """float32 [N, N]: the sums of `make_successor_pairs`, which are columns 1 and 2: row i, then column j."""
    return add_to_dense(to_dense(sums, 2), sums, 1, upper=True)  # column 2: the earlier item has the higher number


def normalize_successors(counts: np.ndarray) -> np.ndarray:
    """Counts of pairs [N, N], divided in place by the root of both items' sums."""
    first, then = np.maximum(counts.sum(1), 1), np.maximum(counts.sum(0), 1)
    counts /= np.sqrt(first)[:, None]
    counts /= np.sqrt(then)
    return counts


def standardize_scores(x: jax.Array) -> jax.Array:
    """[N]: scores with mean 0 and standard deviation 1."""
    return (x - x.mean()) / jnp.maximum(x.std(), 1e-9)
