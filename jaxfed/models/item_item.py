"""Tables of item-item weights that follow from sums over users, and what models without a private part share."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jaxfed.core.model import ClosedForm, Model
from jaxfed.core.tables import num_rows, unwrap, wrap
from jaxfed.core.types import History, Key, Mean, Tree


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


def count_successors(history: History, rows: int, window: int, decay: float) -> jax.Array:
    """[rows, N]: a user's pairs (i, then j, at most `window` later), which weigh decay^(gap - 1)."""
    places = jnp.arange(history.ids.shape[0])
    then = places[:, None] + jnp.arange(1, window + 1)
    ids = history.ids.at[then].get(mode="fill", fill_value=history.size)
    first = jnp.where(history.live, history.rows, rows)[:, None]
    weights = jnp.broadcast_to(decay ** jnp.arange(window), then.shape)
    return jnp.zeros((rows, history.size)).at[first, ids].add(weights, mode="drop")


def normalize_successors(counts: jax.Array) -> jax.Array:
    """[N, N]: counts of pairs, divided by the root of both items' sums."""
    return counts / jnp.sqrt(jnp.outer(jnp.maximum(counts.sum(1), 1), jnp.maximum(counts.sum(0), 1)))


def standardize_scores(x: jax.Array) -> jax.Array:
    """[N]: scores with mean 0 and standard deviation 1."""
    return (x - x.mean()) / jnp.maximum(x.std(), 1e-9)
