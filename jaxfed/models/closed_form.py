"""Recommenders that are solved from sums over users: one round of (secure) sums is the central model, bit by bit in its
sums. What a client needs to be scored it folds in from its history; nothing private is kept."""

from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxfed.core.model import Model
from jaxfed.core.pairs import PairSums, to_dense
from jaxfed.core.recipe import named
from jaxfed.models.item_item import (
    count_successors,
    dense_shape,
    item_item_model,
    make_gram_pairs,
    make_successor_pairs,
    mirror_lower,
    normalize_successors,
    ridge_weights,
    score_history,
    standardize_scores,
    weigh_history,
)
from jaxfed.models.model import check_positive
from jaxfed.models.sparse_items import (
    sparse_cosine_table,
    sparse_ridge_table,
    sparse_shape,
    sparse_successor_table,
)

MOST_DENSE = 20_000  # items up to which item_knn keeps the whole matrix
SHRINK = 10.0  # added to the norms of the cosines by which neighbours are chosen


def check_candidates(l2: float, l2_grid: tuple[float, ...]) -> None:
    """Raises ValueError for penalties that are not positive."""
    for name, value in (("l2", l2), *(("l2_grid", each) for each in l2_grid)):
        if not value > 0:
            raise ValueError(f"model.{name}: {value:g} is no penalty: it must be above 0")


def describe_solve(num_items: int, tables: int, neighbours: int) -> dict[str, Any]:
    """The fields `solve_bytes` and `advice` of a `ClosedForm` that solves for some tables [N, N], or of neighbours."""
    if neighbours:
        return {"solve_bytes": 0}
    advice = "set model.neighbours = 200: each item is then solved from its nearest 200, an approximation"
    return {"solve_bytes": 4 * num_items**2 * (2 * tables + 1), "advice": advice}


def item_shapes(num_items: int, neighbours: int) -> Any:
    """The shapes of an item-item table, whole (no neighbours) or of the nearest items."""
    return sparse_shape(num_items, neighbours) if neighbours else dense_shape(num_items)


@named("model")
def ease(
    num_items: int, num_users: int = 1, l2: float = 400.0, l2_grid: tuple[float, ...] = (), neighbours: int = 0
) -> Model:
    """EASE (Steck 2019, "Embarrassingly shallow autoencoders"): linear weights from item to item, by one inversion of
    X'X.

    A client sends one number for each pair of its items. Beyond some 20,000 items the inversion takes too long:
    `neighbours` solves for each item from its nearest items alone (Steck 2019, "Markov random fields for collaborative
    filtering"), which takes memory and time as the pairs that occur.

    Args:
        num_items: Number of items.
        num_users: Not used: nothing is kept for a user but the history.
        l2: Penalty on squared weights.
        l2_grid: Penalties to choose from by validation, in place of `l2`: one sum serves all. (): `l2` alone.
        neighbours: Items that an item is predicted from, the nearest by cosine. 0: all others, the exact solution.

    Returns:
        The model.

    Raises:
        ValueError: a penalty is not positive.

    Example:
        >>> import jaxfed as jf, numpy as np
        >>> from jaxfed.core.pairs import PairSums
        >>> both = PairSums(ids=np.array([0, 1, 2]), values=np.ones((3, 1), np.float32), size=2)  # of one user
        >>> model = jf.models.ease(num_items=2, l2=1.0)
        >>> model.closed.solve({"tables": {"pairs": both}}, None)["tables"]["item"].rows.round(3).tolist()
        [[0.0, 0.5], [0.5, 0.0]]
    """
    check_candidates(l2, l2_grid)

    def solve(sums, candidate):
        penalty = candidate or l2
        if neighbours:
            return {"item": sparse_ridge_table(sums, penalty, neighbours, SHRINK)}
        return {"item": ridge_weights(sums, penalty)}

    return item_item_model(
        {"item": item_shapes(num_items, neighbours)},
        1,
        make_gram_pairs,
        solve,
        lambda history: weigh_history(history, 1.0 * history.live),
        lambda tables, history: score_history(history, tables["item"]),
        candidates=l2_grid,
        **describe_solve(num_items, 1, neighbours),
    )


def cosine_table(sums: PairSums, neighbours: int, shrink: float) -> np.ndarray:
    """float32 [N, N]: the shrunken cosine of each item with its `neighbours` nearest, in its column; 0 for the others.
    Equals of the last neighbour stay."""
    matrix = mirror_lower(to_dense(sums))
    counts = np.diag(matrix).copy()
    matrix /= np.sqrt(np.outer(counts, counts)) + np.float32(shrink + 1e-9)
    np.fill_diagonal(matrix, 0)
    most = min(neighbours, len(matrix))
    least = -np.partition(-matrix, most - 1, axis=1)[:, most - 1 : most]
    return np.where(matrix >= least, matrix, 0).T


@named("model")
def item_knn(num_items: int, num_users: int = 1, neighbours: int = 200, shrink: float = 10.0) -> Model:
    """Item nearest neighbours (Sarwar et al. 2001) by cosine, which is shrunk for pairs with few users. From X'X, as
    EASE. Beyond 20,000 items only the neighbours are kept.

    Args:
        num_items: Number of items.
        num_users: Not used: nothing is kept for a user but the history.
        neighbours: Number of neighbours of an item that are kept.
        shrink: Added to the norms of a cosine, so that pairs with few users count less.

    Returns:
        The model.

    Raises:
        ValueError: there are no neighbours.

    Example:
        >>> import jaxfed as jf, numpy as np
        >>> from jaxfed.core.pairs import PairSums
        >>> model = jf.models.item_knn(num_items=2, shrink=0.0)
        >>> sums = PairSums(ids=np.array([0, 1, 2]), values=np.array([[4], [2], [4]], np.float32), size=2)
        >>> model.closed.solve({"tables": {"pairs": sums}}, None)["tables"]["item"].rows.round(3).tolist()
        [[0.0, 0.5], [0.5, 0.0]]
    """
    check_positive("model.neighbours", neighbours)
    kept = neighbours if num_items > MOST_DENSE else 0

    def solve(sums, candidate):
        return {"item": (sparse_cosine_table if kept else cosine_table)(sums, neighbours, shrink)}

    return item_item_model(
        {"item": item_shapes(num_items, kept)},
        1,
        make_gram_pairs,
        solve,
        lambda history: weigh_history(history, 1.0 * history.live),
        lambda tables, history: score_history(history, tables["item"]),
        **describe_solve(num_items, 1, kept),
    )


def solve_transitions(sums: PairSums, candidate: float | None, l2: float, neighbours: int) -> dict[str, Any]:
    """The tables of `transitions`."""
    if neighbours:
        weights = sparse_ridge_table(sums, candidate or l2, neighbours, SHRINK)
        return {"item": weights, "next": sparse_successor_table(sums, neighbours)}
    return {"item": ridge_weights(sums, candidate or l2), "next": normalize_successors(count_successors(sums))}


@named("model")
def transitions(
    num_items: int,
    num_users: int = 1,
    l2: float = 400.0,
    half_life: float = 10.0,
    window: int = 20,
    decay: float = 0.9,
    last: float = 0.7,
    blend: float = 1.0,
    l2_grid: tuple[float, ...] = (),
    neighbours: int = 0,
) -> Model:
    """EASE (Steck 2019) on a history whose weights halve every `half_life` interactions, plus which item followed
    which.

    Pairs of items (i, then j, at most `window` later) count decay^(gap - 1). The counts are divided by the root of both
    items' sums, as a cosine, and a history enters with weights last^age. Both scores are standardised over the
    catalogue and added, the second times `blend`.

    Args:
        num_items: Number of items.
        num_users: Not used: nothing is kept for a user but the history.
        l2: Penalty on squared weights of EASE.
        half_life: Interactions after which an item's weight in a history has halved.
        window: How many interactions later an item may come to count as a successor.
        decay: A pair's weight is decay^(gap - 1), with gap the number of positions from the first item to the second.
        last: An item's weight when predicting successors is last^age, with age the number of later interactions.
        blend: Weight of the score of successors beside that of EASE.
        l2_grid: Penalties to choose from by validation, in place of `l2`: one sum serves all. (): `l2` alone.
        neighbours: Items that an item is predicted from, see `ease`. 0: all others, the exact solution.

    Returns:
        The model.

    Raises:
        ValueError: the window is below 1, or a penalty is not positive.

    Example:
        >>> import jax, jaxfed as jf
        >>> sorted(jax.eval_shape(jf.models.transitions(num_items=9).init, jax.random.key(0))["tables"])
        ['item', 'next']
    """
    check_positive("model.window", window)
    check_candidates(l2, l2_grid)
    solve = partial(solve_transitions, l2=l2, neighbours=neighbours)

    def fold_in(history):
        age = jnp.maximum(history.age, 0)
        return {"liked": weigh_history(history, 0.5 ** (age / half_life)), "last": weigh_history(history, last**age)}

    def score(tables, folded):
        liked, followed = score_history(folded["liked"], tables["item"]), score_history(folded["last"], tables["next"])
        return standardize_scores(liked) + blend * standardize_scores(followed)

    def statistics(history):
        return jnp.concatenate([make_gram_pairs(history), make_successor_pairs(history, window, decay)], 1)

    empty = dict.fromkeys(("item", "next"), item_shapes(num_items, neighbours))
    closed = {"candidates": l2_grid, **describe_solve(num_items, 2, neighbours)}
    return item_item_model(empty, 3, statistics, solve, fold_in, score, **closed)
