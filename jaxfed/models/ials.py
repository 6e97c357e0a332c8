"""Implicit alternating least squares: each client solves for its own vector, the server for the items' from sums."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxfed.core.model import ClosedForm, Model
from jaxfed.core.recipe import named
from jaxfed.core.tables import num_rows, same_rows, unwrap, wrap
from jaxfed.core.types import History, Mean, Tree
from jaxfed.models.item_item import no_private_part, refuse_loss
from jaxfed.models.model import check_positive

COLUMNS = 16  # columns of a matrix that are eliminated at a time: fewer are faster, and take longer to compile
AT_ONCE = 64  # places of a history that are read at a time, and items that are solved for
multiply = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)  # accelerators would round to bfloat16


def eliminate_rows(rows: jax.Array) -> jax.Array:
    """[w, n - w]: rows [w, n] combined so that their first w columns become those of the identity, without these."""
    height = rows.shape[0]

    def eliminate(i, rows):
        column, row = (jax.lax.dynamic_index_in_dim(rows, i, axis, False) for axis in (1, 0))
        row = row / row[i]
        return jnp.where((jnp.arange(height) == i)[:, None], row, rows - column[:, None] * row)

    return jax.lax.fori_loop(0, height, eliminate, rows)[:, height:]


def solve_positive(matrix: jax.Array, right: jax.Array) -> jax.Array:
    """x [d] of matrix x = right, for a symmetric positive definite matrix [d, d]: elimination, which needs no pivots,
    some columns at a time. What is left of the matrix becomes smaller each time.

    Not jnp.linalg.solve: a batch of those is LAPACK calls in XLA's pool of threads, for which their program waits in a
    thread of that pool. Two programs side by side, as a round's are, can wait for each other for ever (jaxlib 0.10.2).
    """
    left, solved = jnp.concatenate([matrix, right[:, None]], 1), []
    for low in range(0, len(right), COLUMNS):
        width = min(COLUMNS, len(right) - low)
        rows = eliminate_rows(left[:width])
        solved.append(rows)
        left = left[width:, width:] - multiply(left[width:, :width], rows)
    x = jnp.zeros(0)
    for rows in reversed(solved):
        x = jnp.concatenate([rows[:, -1] - multiply(rows[:, :-1], x), x])
    return x


def expand_symmetric(packed: jax.Array, dim: int) -> jax.Array:
    """Symmetric matrices [..., d, d] from their upper halves [..., d (d + 1) / 2]."""
    place = np.zeros((dim, dim), np.int32)
    place[np.triu_indices(dim)] = np.arange(packed.shape[-1])
    return packed[..., np.maximum(place, place.T)]


def with_gram(items: jax.Array) -> Tree:
    """The shared part of iALS, from the item table [N, dim]."""
    return {"params": {"gram": multiply(items.T, items)}, "tables": wrap({"item": items})}


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
        return sums[0] + multiply(items.T, items), sums[1] + items.sum(0)

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
    of_all_pairs = unobserved * expand_symmetric(sums["params"]["gram"], dim)
    ridge = l2 * (count + unobserved * users)

    def solve_item(each):
        own, right, ridge = each
        return solve_positive(expand_symmetric(own, dim) + of_all_pairs + ridge * jnp.eye(dim), right)

    items = jax.lax.map(solve_item, (own, right, ridge), batch_size=AT_ONCE)  # whose matrices fit into a cache
    return with_gram(items)


def check_weights(*weights: float) -> None:
    """Raises ValueError for a weight of pairs that is negative."""
    if min(weights) < 0:
        raise ValueError("model.unobserved, unobserved_ratio and density must not be negative")


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
        unobserved: Weight of every pair beside those that are interactions. 0: by `unobserved_ratio`.
        unobserved_ratio: Weight of all pairs together, over that of all interactions. A weight that suits a small
            catalogue makes all predictions 0 on a large and sparse one; this ratio suits both.
        density: Share of all pairs that are interactions. In a configuration 0, the default, takes it from the data.
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
    check_weights(unobserved, unobserved_ratio, density)
    real, weight = num_items if real_items is None else real_items, unobserved or unobserved_ratio * density

    def init(key):
        return with_gram(init_scale * jax.random.normal(key, (num_items, dim)).at[real:].set(0))

    def statistics(shared, history):
        return sum_user(shared, history, fold_in(shared, history))

    def score(shared, private, user):
        return unwrap(shared)["tables"]["item"] @ private

    fold_in = partial(solve_user, l2=l2, unobserved=weight, real=real)
    solve_sums = jax.jit(partial(solve_items, dim=dim, l2=l2, unobserved=weight))
    closed = ClosedForm(statistics, lambda sums, shared, candidate=None: solve_sums(sums))
    return Model(init, no_private_part, refuse_loss, score, fold_in=fold_in, closed=closed)
