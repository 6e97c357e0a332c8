"""Recommenders that are solved from sums over users: one round of (secure) sums is the central model, bit by bit in its
sums. What a client needs to be scored it folds in from its history; nothing private is kept."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jaxfed.core.model import ClosedForm, Model
from jaxfed.core.recipe import named
from jaxfed.core.tables import Table, num_rows, unwrap, wrap
from jaxfed.core.types import History, Key, Mean, Tree
from jaxfed.models.model import check_positive


def no_private_part(key: Key) -> Tree:
    """The private part of a model that has none."""
    return ()


def refuse_loss(shared: Tree, private: Tree, batch: Tree) -> Mean:
    """Raises ValueError: these models are not descended."""
    raise ValueError(
        'a model in closed form has no loss to descend: set work.name = "statistics", server.name = "solve"'
    )


def scatter_to_rows(history: History, values: jax.Array, rows: int) -> jax.Array:
    """[rows]: values [L] of a history at its rows of the tables given."""
    return jnp.zeros(rows).at[jnp.where(history.live, history.rows, rows)].add(values, mode="drop")


def scatter_to_catalogue(history: History, values: jax.Array) -> jax.Array:
    """[size]: values [L] of a history at its rows of the catalogue."""
    return jnp.zeros(history.size).at[jnp.where(history.live, history.ids, history.size)].add(values, mode="drop")


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


def item_item_model(
    num_items: int, names: Sequence[str], statistics: Callable, solve: Callable, fold_in: Callable, score: Callable
) -> Model:
    """A model of item-item tables [N, N], zero at first.

    statistics(history, rows) -> {name: [rows, N]}; solve({name: [N, N]}) -> {name: [N, N]}, the first of them so that
    (history as 0 and 1) @ table scores items.
    """

    def init(key):
        return {"params": {}, "tables": wrap({name: jnp.zeros((num_items, num_items)) for name in names})}

    def sums(shared, history):
        rows, tables = num_rows(shared), unwrap(shared)["tables"]
        scores = scatter_to_rows(history, 1.0 * history.live, rows) @ tables[names[0]]
        gap = (1 - scores.at[history.ids].get(mode="fill", fill_value=0)) ** 2 * history.live
        statistics_of_user = {"params": {}, "tables": wrap(statistics(history, rows))}
        return statistics_of_user, Mean(gap.sum(), history.live.sum(dtype=jnp.float32))

    def found(sums, shared):
        return {"params": {}, "tables": wrap(solve(unwrap(sums)["tables"]))}

    def logits(shared, private, user):
        return score(unwrap(shared)["tables"], private)

    def folded(shared, history):
        return fold_in(history)

    return Model(init, no_private_part, refuse_loss, logits, fold_in=folded, closed=ClosedForm(sums, found))


def gram_rows(history: History, rows: int) -> jax.Array:
    """[rows, N]: a user's part of X'X, whole numbers: sums of them are exact up to 2^24."""
    return jnp.outer(
        scatter_to_rows(history, 1.0 * history.live, rows), scatter_to_catalogue(history, 1.0 * history.live)
    )


def ridge_weights(gram: jax.Array, l2: float) -> jax.Array:
    """[N, N]: the weights that predict each item from all others with an l2 penalty (Steck 2019, equation 8)."""
    inverse = jnp.linalg.inv(gram + l2 * jnp.eye(len(gram)))
    return jnp.fill_diagonal(-inverse / jnp.diag(inverse), 0.0, inplace=False)


@named("model")
def ease(num_items: int, num_users: int = 1, l2: float = 400.0) -> Model:
    """EASE (Steck 2019, "Embarrassingly shallow autoencoders"): X'X, and one inversion.

    Args:
        l2: The penalty on squared weights.
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
    """Item nearest neighbours (Sarwar et al. 2001) by cosine, shrunk where few users tell; from the X'X of EASE.

    Args:
        neighbours: Of an item, how many are kept.
        shrink: Added to the norms of a cosine, so that pairs few users tell of count less.
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


def count_successors(history: History, rows: int, window: int, decay: float) -> jax.Array:
    """[rows, N]: a user's pairs (i, then j, at most `window` later), which weigh decay^(gap - 1)."""
    places = jnp.arange(history.ids.shape[0])
    then = places[:, None] + jnp.arange(1, window + 1)
    ids = history.ids.at[then].get(mode="fill", fill_value=history.size)
    first = jnp.where(history.live, history.rows, rows)[:, None]
    weights = jnp.broadcast_to(decay ** jnp.arange(window), then.shape)
    return jnp.zeros((rows, history.size)).at[first, ids].add(weights, mode="drop")


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
    """EASE on a history whose weights halve every `half_life` interactions, plus what came after what.

    Counts of item pairs (i, then j, at most `window` later) weigh decay^(gap - 1) and are divided by the root of both
    items' sums, as a cosine; a history enters with weights last^age. Both scores are standardised over the catalogue
    and added, the second times `blend`.

    Args:
        l2: The penalty on squared weights of EASE.
        half_life: Interactions after which an item's weight in a history has halved.
        window: How many interactions later an item may come to count as a successor.
        decay: A pair's weight is decay^(gap - 1), with gap the number of positions from the first item to the second.
        last: An item's weight when predicting successors is last^age, with age the number of later interactions.
        blend: The weight of successors beside EASE.
    """
    check_positive("model.window", window)

    def solve(sums):
        counts = sums["next"]
        norms = jnp.sqrt(jnp.outer(jnp.maximum(counts.sum(1), 1), jnp.maximum(counts.sum(0), 1)))
        return {"item": ridge_weights(sums["item"], l2), "next": counts / norms}

    def fold_in(history):
        age = jnp.maximum(history.age, 0)
        return {
            "liked": scatter_to_catalogue(history, jnp.where(history.live, 0.5 ** (age / half_life), 0)),
            "last": scatter_to_catalogue(history, jnp.where(history.live, last**age, 0)),
        }

    def score(tables, private):
        def standard(x):
            return (x - x.mean()) / jnp.maximum(x.std(), 1e-9)

        return standard(private["liked"] @ tables["item"]) + blend * standard(private["last"] @ tables["next"])

    return item_item_model(
        num_items,
        ["item", "next"],
        lambda history, rows: {
            "item": gram_rows(history, rows),
            "next": count_successors(history, rows, window, decay),
        },
        solve,
        fold_in,
        score,
    )


def expand_symmetric(packed: jax.Array, dim: int) -> jax.Array:
    """Symmetric matrices [..., d, d] from their upper halves [..., d (d + 1) / 2]."""
    half = jnp.zeros((*packed.shape[:-1], dim, dim)).at[..., *jnp.triu_indices(dim)].set(packed)
    return half + jnp.swapaxes(half, -1, -2) - half * jnp.eye(dim)


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
    """Implicit alternating least squares (Hu et al. 2008; Rendle et al. 2022) with a private solution on each client
    (FCF, Ammad-ud-din et al. 2019); an epoch is a round of everyone.

    The loss is sum over interactions (1 - x.y)^2 + unobserved sum over all pairs (x.y)^2 + l2 (interactions +
    unobserved * N) |x|^2 for a user, and likewise for an item. A client solves for x from its items' rows and Y'Y, and
    sends x x' and x for each of its items (halved by symmetry), and x x' once.

    Args:
        dim: Numbers in the vector of a user and of an item.
        l2: The penalty on squared vectors, for each interaction.
        unobserved: The weight of all pairs beside those that are interactions.
        init_scale: Standard deviation of the normal numbers that vectors start with.
        real_items: Rows of the table that are items. None: all.
    """
    check_positive("model.dim", dim)
    real = num_items if real_items is None else real_items
    upper = jnp.triu_indices(dim)

    def init(key):
        items = init_scale * jax.random.normal(key, (num_items, dim)).at[real:].set(0)
        return {"params": {"gram": items.T @ items}, "tables": wrap({"item": items})}

    def fold_in(shared, history):
        items = unwrap(shared)["tables"]["item"].at[history.rows].get(mode="fill", fill_value=0)
        weights = 1.0 * history.live
        own = jnp.einsum("l,li,lj->ij", weights, items, items)
        ridge = l2 * (weights.sum() + unobserved * real)
        return solve_positive(own + unobserved * shared["params"]["gram"] + ridge * jnp.eye(dim), weights @ items)

    def statistics(shared, history):
        user, rows = fold_in(shared, history), num_rows(shared)
        own, held = jnp.outer(user, user)[upper], scatter_to_rows(history, 1.0 * history.live, rows)
        item_rows = jnp.outer(held, jnp.concatenate([own, user, jnp.ones(1)]))
        items = unwrap(shared)["tables"]["item"].at[history.rows].get(mode="fill", fill_value=0)
        gap = (1 - items @ user) ** 2 * history.live
        fit = Mean(gap.sum(), history.live.sum(dtype=jnp.float32))
        return {"params": {"gram": own, "users": jnp.ones(())}, "tables": {"item": Table(item_rows)}}, fit

    def solve(sums, shared):
        item_sums, users = unwrap(sums)["tables"]["item"], sums["params"]["users"]
        own, right, count = item_sums[:, : -dim - 1], item_sums[:, -dim - 1 : -1], item_sums[:, -1]
        ridge = l2 * (count + unobserved * users)
        gram = expand_symmetric(sums["params"]["gram"], dim)
        left = expand_symmetric(own, dim) + unobserved * gram + ridge[:, None, None] * jnp.eye(dim)
        items = jax.vmap(solve_positive)(left, right)
        return {"params": {"gram": items.T @ items}, "tables": wrap({"item": items})}

    def score(shared, private, user):
        return unwrap(shared)["tables"]["item"] @ private

    return Model(init, no_private_part, refuse_loss, score, fold_in=fold_in, closed=ClosedForm(statistics, solve))
