"""Recommenders that are solved from sums over users: one round of (secure) sums is the central model, bit by bit in its
sums. What a client needs to be scored it folds in from its history; nothing private is kept."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxfed.core.model import ClosedForm, Model
from jaxfed.core.pairs import PairSums, to_dense
from jaxfed.core.recipe import named
from jaxfed.core.tables import num_rows, same_rows, unwrap, wrap
from jaxfed.core.types import History, Mean, Tree
from jaxfed.models.item_item import (
    count_successors,
    dense_shape,
    gram_pairs,
    item_item_model,
    mirror_lower,
    no_private_part,
    normalize_successors,
    refuse_loss,
    ridge_weights,
    score_history,
    standardize_scores,
    successor_pairs,
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
AT_ONCE = 64  # places of a history that iALS reads at a time
SHRINK = 10.0  # added to the norms of the cosines by which neighbours are chosen


def solve_positive(matrix: jax.Array, right: jax.Array) -> jax.Array:
    """x [d] of matrix x = right, for a symmetric positive definite matrix [d, d]: elimination, which needs no pivots.

    Not jnp.linalg.solve: a batch of those is LAPACK calls in XLA's pool of threads, for which their program waits in a
    thread of that pool. Two programs side by side, as a round's are, can wait for each other for ever (jaxlib 0.10.2).
    """

    def eliminate(i, both):
        row = both[i] / both[i, i]
        return (both - jnp.outer(both[:, i], row)).at[i].set(row)

    both = jnp.concatenate([matrix, right[:, None]], 1)
    return jax.lax.fori_loop(0, len(right), eliminate, both)[:, -1]


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
        >>> both = jf.PairSums(ids=np.array([0, 1, 2]), values=np.ones((3, 1), np.float32), size=2)  # one user had both
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
        num_items,
        {"item": item_shapes(num_items, neighbours)},
        1,
        gram_pairs,
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
    EASE.

    Beyond 20,000 items only the neighbours are kept, of equals those with the first numbers.

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
        >>> model = jf.models.item_knn(num_items=2, shrink=0.0)
        >>> sums = jf.PairSums(ids=np.array([0, 1, 2]), values=np.array([[4], [2], [4]], np.float32), size=2)
        >>> model.closed.solve({"tables": {"pairs": sums}}, None)["tables"]["item"].rows.round(3).tolist()
        [[0.0, 0.5], [0.5, 0.0]]
    """
    check_positive("model.neighbours", neighbours)
    kept = neighbours if num_items > MOST_DENSE else 0

    def solve(sums, candidate):
        return {"item": (sparse_cosine_table if kept else cosine_table)(sums, neighbours, shrink)}

    return item_item_model(
        num_items,
        {"item": item_shapes(num_items, kept)},
        1,
        gram_pairs,
        solve,
        lambda history: weigh_history(history, 1.0 * history.live),
        lambda tables, history: score_history(history, tables["item"]),
        **describe_solve(num_items, 1, kept),
    )


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
        >>> model = jf.models.transitions(num_items=100)
        >>> sorted(jax.eval_shape(model.init, jax.random.key(0))["tables"])
        ['item', 'next']
    """
    check_positive("model.window", window)
    check_candidates(l2, l2_grid)

    def solve(sums, candidate):
        penalty = candidate or l2
        if neighbours:
            weights = sparse_ridge_table(sums, penalty, neighbours, SHRINK)
            return {"item": weights, "next": sparse_successor_table(sums, neighbours)}
        return {"item": ridge_weights(sums, penalty), "next": normalize_successors(count_successors(sums))}

    def fold_in(history):
        age = jnp.maximum(history.age, 0)
        return {"liked": weigh_history(history, 0.5 ** (age / half_life)), "last": weigh_history(history, last**age)}

    def score(tables, folded):
        liked, followed = score_history(folded["liked"], tables["item"]), score_history(folded["last"], tables["next"])
        return standardize_scores(liked) + blend * standardize_scores(followed)

    def statistics(history):
        return jnp.concatenate([gram_pairs(history), successor_pairs(history, window, decay)], 1)

    empty = {name: item_shapes(num_items, neighbours) for name in ("item", "next")}
    closed = {"candidates": l2_grid, **describe_solve(num_items, 2, neighbours)}
    return item_item_model(num_items, empty, 3, statistics, solve, fold_in, score, **closed)


def expand_symmetric(packed: jax.Array, dim: int) -> jax.Array:
    """Symmetric matrices [..., d, d] from their upper halves [..., d (d + 1) / 2]."""
    half = jnp.zeros((*packed.shape[:-1], dim, dim)).at[..., *jnp.triu_indices(dim)].set(packed)
    return half + jnp.swapaxes(half, -1, -2) - half * jnp.eye(dim)


def solve_user(shared: Tree, history: History, l2: float, unobserved: float, real: int) -> jax.Array:
    """[dim]: the vector of a user of iALS, by the history and the item table, of which `real` rows are items."""
    table, count = unwrap(shared)["tables"]["item"], history.live.sum()
    length, dim = history.rows.shape[0], table.shape[1]
    places = min(AT_ONCE, length)

    def add(step, sums):
        """The part of the next places, as many as there are; of the last ones some may come twice."""
        low = jnp.minimum(step * places, length - places)
        at = low + jnp.arange(places)
        fresh = (at >= step * places) & (at < count)
        items = table.at[jax.lax.dynamic_slice_in_dim(history.rows, low, places)].get(mode="fill", fill_value=0)
        items = jnp.where(fresh[:, None], items, 0)
        return sums[0] + items.T @ items, sums[1] + items.sum(0)

    zero = jnp.zeros((dim, dim)), jnp.zeros(dim)
    own, right = jax.lax.fori_loop(0, -(-count // places), add, zero)  # as many places are read as there are items
    ridge = l2 * (count + unobserved * real)
    left = own + unobserved * shared["params"]["gram"] + ridge * jnp.eye(dim)
    return solve_positive(left, right)


def sum_user(shared: Tree, history: History, user: jax.Array) -> tuple[Tree, dict[str, Mean]]:
    """What a user of iALS adds to the sums, and how badly the item table fits the user."""
    own = jnp.outer(user, user)[jnp.triu_indices(len(user))]
    item_rows = same_rows(jnp.concatenate([own, user, jnp.ones(1)]), num_rows(shared))
    items = unwrap(shared)["tables"]["item"].at[history.rows].get(mode="fill", fill_value=0)
    gap = (1 - items @ user) ** 2 * history.live
    fit = Mean(gap.sum(), history.live.sum(dtype=jnp.float32))
    sums = {"params": {"gram": own, "users": jnp.ones(())}, "tables": {"item": item_rows}}
    return sums, {"train/loss": fit}


def solve_items(sums: Tree, dim: int, l2: float, unobserved: float) -> Tree:
    """The shared part of iALS, from the sums over users."""
    item_sums, users = unwrap(sums)["tables"]["item"], sums["params"]["users"]
    own, right, count = item_sums[:, : -dim - 1], item_sums[:, -dim - 1 : -1], item_sums[:, -1]
    ridge = l2 * (count + unobserved * users)
    gram = expand_symmetric(sums["params"]["gram"], dim)
    left = expand_symmetric(own, dim) + unobserved * gram + ridge[:, None, None] * jnp.eye(dim)
    items = jax.lax.map(lambda each: solve_positive(*each), (left, right), batch_size=AT_ONCE)  # that fit into a cache
    return {"params": {"gram": items.T @ items}, "tables": wrap({"item": items})}


@named("model")
def ials(
    num_items: int,
    num_users: int = 1,
    dim: int = 64,
    l2: float = 0.01,
    unobserved: float = 0.0,
    unobserved_ratio: float = 4.85,
    density: float = 0.0625,
    init_scale: float = 0.1,
    real_items: int | None = None,
) -> Model:
    """Implicit alternating least squares (iALS: Hu et al. 2008; Rendle et al. 2022), with a private solution on each
    client (FCF, Ammad-ud-din et al. 2019). An epoch is a round of everyone.

    The loss of a user x is sum over interactions (1 - x.y)^2 + unobserved * sum over all items (x.y)^2 + l2 *
    (interactions + unobserved * N) |x|^2, and that of an item y likewise. A client solves for x from its items' rows
    and Y'Y. It sends x x' (halved by symmetry) and x, alike for all of its items, and x x' once.

    Args:
        num_items: Number of items.
        num_users: Not used: nothing is kept for a user but the history.
        dim: Numbers in the vector of a user and of an item.
        l2: Penalty on squared vectors, for each interaction.
        unobserved: Weight of every pair of a user and an item, beside those that are interactions. 0: by
            `unobserved_ratio`.
        unobserved_ratio: Weight of all pairs together, over that of all interactions. A weight that suits a small
            catalogue makes all predictions 0 on a large and sparse one; this ratio suits both.
        density: Share of all pairs that are interactions. Configurations take it from the data.
        init_scale: Standard deviation of the normal numbers that vectors start with.
        real_items: Rows of the table that are items. None: all.

    Returns:
        The model.

    Raises:
        ValueError: `dim` is below 1, or a weight is negative.

    Example:
        >>> import jax, jaxfed as jf
        >>> model = jf.models.ials(num_items=100, dim=8)
        >>> jax.eval_shape(model.init, jax.random.key(0))["tables"]["item"].rows.shape
        (100, 8)
    """
    check_positive("model.dim", dim)
    if min(unobserved, unobserved_ratio, density) < 0:
        raise ValueError("model.unobserved, unobserved_ratio and density must not be negative")
    real, weight = num_items if real_items is None else real_items, unobserved or unobserved_ratio * density

    def init(key):
        items = init_scale * jax.random.normal(key, (num_items, dim)).at[real:].set(0)
        return {"params": {"gram": items.T @ items}, "tables": wrap({"item": items})}

    def fold_in(shared, history):
        return solve_user(shared, history, l2, weight, real)

    def statistics(shared, history):
        return sum_user(shared, history, fold_in(shared, history))

    solve_sums = jax.jit(partial(solve_items, dim=dim, l2=l2, unobserved=weight))

    def solve(sums, shared, candidate=None):
        return solve_sums(sums)

    def score(shared, private, user):
        return unwrap(shared)["tables"]["item"] @ private

    return Model(init, no_private_part, refuse_loss, score, fold_in=fold_in, closed=ClosedForm(statistics, solve))
