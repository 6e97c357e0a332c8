"""Recommenders that are solved from sums over users: one round of (secure) sums is the central model, bit by bit in its
sums. What a client needs to be scored it folds in from its history; nothing private is kept."""

import jax
import jax.numpy as jnp

from jaxfed.core.model import ClosedForm, Model
from jaxfed.core.recipe import named
from jaxfed.core.tables import Table, num_rows, unwrap, wrap
from jaxfed.core.types import History, Mean, Tree
from jaxfed.models.item_item import (
    count_successors,
    gram_rows,
    item_item_model,
    no_private_part,
    normalize_successors,
    refuse_loss,
    ridge_weights,
    scatter_to_catalogue,
    scatter_to_rows,
    standardize_scores,
)
from jaxfed.models.model import check_positive


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


@named("model")
def ease(num_items: int, num_users: int = 1, l2: float = 400.0) -> Model:
    """EASE (Steck 2019, "Embarrassingly shallow autoencoders"): linear weights from item to item, by one inversion of
    X'X.

    Args:
        num_items: Number of items.
        num_users: Not used: nothing is kept for a user but the history.
        l2: Penalty on squared weights.

    Returns:
        The model.

    Example:
        >>> import jaxfed as jf, jax.numpy as jnp
        >>> sums = {"params": {}, "tables": {"item": jf.Table(jnp.ones((2, 2)))}}  # one user had both items
        >>> jf.models.ease(num_items=2, l2=1.0).closed.solve(sums, None)["tables"]["item"].rows.round(3).tolist()
        [[0.0, 0.5], [0.5, 0.0]]
    """
    return item_item_model(
        num_items,
        ["item"],
        lambda history, rows: {"item": gram_rows(history, rows)},
        lambda sums: {"item": ridge_weights(sums["item"], l2)},
        lambda history: scatter_to_catalogue(history, 1.0 * history.live),
        lambda tables, history: history @ tables["item"],
    )


@named("model")
def item_knn(num_items: int, num_users: int = 1, neighbours: int = 200, shrink: float = 10.0) -> Model:
    """Item nearest neighbours (Sarwar et al. 2001) by cosine, which is shrunk for pairs with few users. From X'X, as
    EASE.

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
        >>> import jaxfed as jf, jax.numpy as jnp
        >>> model = jf.models.item_knn(num_items=2, shrink=0.0)
        >>> sums = {"params": {}, "tables": {"item": jf.Table(jnp.array([[4.0, 2.0], [2.0, 4.0]]))}}
        >>> model.closed.solve(sums, None)["tables"]["item"].rows.round(3).tolist()
        [[0.0, 0.5], [0.5, 0.0]]
    """
    check_positive("model.neighbours", neighbours)

    def solve(sums):
        counts = jnp.diag(sums["item"])
        near = sums["item"] / (jnp.sqrt(jnp.outer(counts, counts)) + shrink + 1e-9)
        near = jnp.fill_diagonal(near, 0.0, inplace=False)
        least = jax.lax.top_k(near, min(neighbours, num_items))[0][:, -1:]
        return {"item": jnp.where(near >= least, near, 0).T}  # the neighbours of an item in its column

    return item_item_model(
        num_items,
        ["item"],
        lambda history, rows: {"item": gram_rows(history, rows)},
        solve,
        lambda history: scatter_to_catalogue(history, 1.0 * history.live),
        lambda tables, history: history @ tables["item"],
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

    Returns:
        The model.

    Raises:
        ValueError: the window is below 1.

    Example:
        >>> import jax, jaxfed as jf
        >>> model = jf.models.transitions(num_items=100)
        >>> sorted(jax.eval_shape(model.init, jax.random.key(0))["tables"])
        ['item', 'next']
    """
    check_positive("model.window", window)

    def solve(sums):
        return {"item": ridge_weights(sums["item"], l2), "next": normalize_successors(sums["next"])}

    def fold_in(history):
        age = jnp.maximum(history.age, 0)
        return {
            "liked": scatter_to_catalogue(history, jnp.where(history.live, 0.5 ** (age / half_life), 0)),
            "last": scatter_to_catalogue(history, jnp.where(history.live, last**age, 0)),
        }

    def score(tables, private):
        liked, followed = private["liked"] @ tables["item"], private["last"] @ tables["next"]
        return standardize_scores(liked) + blend * standardize_scores(followed)

    def statistics(history, rows):
        return {"item": gram_rows(history, rows), "next": count_successors(history, rows, window, decay)}

    return item_item_model(num_items, ["item", "next"], statistics, solve, fold_in, score)


def expand_symmetric(packed: jax.Array, dim: int) -> jax.Array:
    """Symmetric matrices [..., d, d] from their upper halves [..., d (d + 1) / 2]."""
    half = jnp.zeros((*packed.shape[:-1], dim, dim)).at[..., *jnp.triu_indices(dim)].set(packed)
    return half + jnp.swapaxes(half, -1, -2) - half * jnp.eye(dim)


def solve_user(shared: Tree, history: History, l2: float, unobserved: float, real: int) -> jax.Array:
    """[dim]: the vector of a user of iALS, by the history and the item table, of which `real` rows are items."""
    items = unwrap(shared)["tables"]["item"].at[history.rows].get(mode="fill", fill_value=0)
    weights = 1.0 * history.live
    own = jnp.einsum("l,li,lj->ij", weights, items, items)
    ridge = l2 * (weights.sum() + unobserved * real)
    left = own + unobserved * shared["params"]["gram"] + ridge * jnp.eye(items.shape[1])
    return solve_positive(left, weights @ items)


def sum_user(shared: Tree, history: History, user: jax.Array) -> tuple[Tree, Mean]:
    """What a user of iALS adds to the sums, and how badly the item table fits the user."""
    own, rows = jnp.outer(user, user)[jnp.triu_indices(len(user))], num_rows(shared)
    held = scatter_to_rows(history, 1.0 * history.live, rows)
    item_rows = jnp.outer(held, jnp.concatenate([own, user, jnp.ones(1)]))
    items = unwrap(shared)["tables"]["item"].at[history.rows].get(mode="fill", fill_value=0)
    gap = (1 - items @ user) ** 2 * history.live
    fit = Mean(gap.sum(), history.live.sum(dtype=jnp.float32))
    return {"params": {"gram": own, "users": jnp.ones(())}, "tables": {"item": Table(item_rows)}}, fit


def solve_items(sums: Tree, dim: int, l2: float, unobserved: float) -> Tree:
    """The shared part of iALS, from the sums over users."""
    item_sums, users = unwrap(sums)["tables"]["item"], sums["params"]["users"]
    own, right, count = item_sums[:, : -dim - 1], item_sums[:, -dim - 1 : -1], item_sums[:, -1]
    ridge = l2 * (count + unobserved * users)
    gram = expand_symmetric(sums["params"]["gram"], dim)
    left = expand_symmetric(own, dim) + unobserved * gram + ridge[:, None, None] * jnp.eye(dim)
    items = jax.vmap(solve_positive)(left, right)
    return {"params": {"gram": items.T @ items}, "tables": wrap({"item": items})}


@named("model")
def ials(
    num_items: int,
    num_users: int = 1,
    dim: int = 64,
    l2: float = 0.01,
    unobserved: float = 0.3,
    init_scale: float = 0.1,
    real_items: int | None = None,
) -> Model:
    """Implicit alternating least squares (iALS: Hu et al. 2008; Rendle et al. 2022), with a private solution on each
    client (FCF, Ammad-ud-din et al. 2019). An epoch is a round of everyone.

    The loss of a user x is sum over interactions (1 - x.y)^2 + unobserved * sum over all items (x.y)^2 + l2 *
    (interactions + unobserved * N) |x|^2, and that of an item y likewise. A client solves for x from its items' rows
    and Y'Y. It sends x x' (halved by symmetry) and x for each of its items, and x x' once.

    Args:
        num_items: Number of items.
        num_users: Not used: nothing is kept for a user but the history.
        dim: Numbers in the vector of a user and of an item.
        l2: Penalty on squared vectors, for each interaction.
        unobserved: Weight of every pair of a user and an item, beside those that are interactions.
        init_scale: Standard deviation of the normal numbers that vectors start with.
        real_items: Rows of the table that are items. None: all.

    Returns:
        The model.

    Raises:
        ValueError: `dim` is below 1.

    Example:
        >>> import jax, jaxfed as jf
        >>> model = jf.models.ials(num_items=100, dim=8)
        >>> jax.eval_shape(model.init, jax.random.key(0))["tables"]["item"].rows.shape
        (100, 8)
    """
    check_positive("model.dim", dim)
    real = num_items if real_items is None else real_items

    def init(key):
        items = init_scale * jax.random.normal(key, (num_items, dim)).at[real:].set(0)
        return {"params": {"gram": items.T @ items}, "tables": wrap({"item": items})}

    def fold_in(shared, history):
        return solve_user(shared, history, l2, unobserved, real)

    def statistics(shared, history):
        return sum_user(shared, history, fold_in(shared, history))

    def solve(sums, shared):
        return solve_items(sums, dim, l2, unobserved)

    def score(shared, private, user):
        return unwrap(shared)["tables"]["item"] @ private

    return Model(init, no_private_part, refuse_loss, score, fold_in=fold_in, closed=ClosedForm(statistics, solve))
