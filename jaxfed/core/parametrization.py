"""`Parametrization`: the server may hold something else than the parameters that it broadcasts.

The server holds theta. A round broadcasts params = forward(theta, rows), clients train and send updates of params, and
the sum is pulled back to theta by one vector-Jacobian product of forward. For a gradient this is the chain rule: what
the server optimiser is given is the gradient of loss(forward(theta)).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxfed.core.model import Model
from jaxfed.core.pruning import Pruning
from jaxfed.core.recipe import Recipe
from jaxfed.core.tables import clear_padding, num_rows, take_rows
from jaxfed.core.tree import to_compute_dtype
from jaxfed.core.types import Key, Tree


class Parametrization(NamedTuple):
    """What the server holds in place of the model's shared parameters.

    Args:
        init: init(key) -> theta: what the server holds and its optimiser moves. Tables of theta have a row for each row
            of the catalogue, and only the rows that a round touches are moved. All other leaves are moved in every
            round.
        forward: forward(theta, rows) -> params: the model's shared parameters; of tables the rows `rows`, int [U] (past
            the end: unused, whatever is given there), or all rows where that is None. It is differentiable, and gives
            float32 for a theta in float32, whatever it is stored in. Where there is something frozen, it is
            forward(theta, rows, frozen).
        frozen: What forward reads at the server and nobody trains, arrays of NumPy, its tables marked; () for nothing.
            It is an argument of the compiled programs, and in no message, no optimiser and no checkpoint.
        pruning: Which weights are set to zero, and when; theta is then the model's own parameters. None: no pruning.
        recipe: The call that made it, see `Recipe`.

    Example:
        A parametrization that changes nothing:

        >>> import jaxfed as jf, jax, jax.numpy as jnp
        >>> from jaxfed.core.tables import take_rows
        >>> same = jf.Parametrization(
        ...     init=lambda key: {"item": jf.Table(jax.random.normal(key, (100, 8)))},
        ...     forward=lambda theta, rows: theta if rows is None else take_rows(theta, rows),
        ... )
        >>> theta = same.init(jax.random.key(0))
        >>> same.forward(theta, jnp.array([3, 7]))["item"].rows.shape
        (2, 8)
    """

    init: Callable[[Key], Tree]
    forward: Callable[..., Tree]
    frozen: Tree = ()
    pruning: Pruning | None = None
    recipe: Recipe | None = None


def frozen_arguments(frozen: Tree) -> tuple:
    """What forward is given beside theta and rows: what is frozen, where there is any."""
    return (frozen,) if jax.tree.leaves(frozen) else ()


def apply_parametrization(parametrization: Parametrization | None, theta: Tree) -> Tree:
    """The model's shared parameters, all rows of their tables; None: theta itself."""
    if parametrization is None:
        return theta
    return jax.jit(parametrization.forward)(theta, None, *frozen_arguments(parametrization.frozen))


def forward_shapes(parametrization: Parametrization, theta: Tree, rows: Any = None) -> Tree:
    """The shapes of what forward gives for theta and rows, arrays or shapes themselves."""
    return jax.eval_shape(parametrization.forward, theta, rows, *frozen_arguments(parametrization.frozen))


def make_pull_back(
    parametrization: Parametrization | None,
    theta: Tree,
    rows: jax.Array | None,
    sent: jax.Array,
    frozen: Tree = (),
) -> Callable[[Tree], Tree]:
    """From an update of params to that of theta, at theta.

    Args:
        parametrization: None: an update is left as it is.
        theta: what the server holds.
        rows: int [U]: the rows of the catalogue that updates have, None: all. Those of theta's tables likewise.
        sent: bool [U]: which of `rows` some client sent. What an update has in the others is dropped.
        frozen: `Parametrization.frozen`.
    """
    if parametrization is None:
        return lambda update: update
    forward, beside = parametrization.forward, frozen_arguments(frozen)

    def pull_back(update):
        _, pull = jax.vjp(lambda theta: to_compute_dtype(forward(theta, rows, *beside)), to_compute_dtype(theta))
        (change,) = pull(update if rows is None else clear_padding(update, sent))
        return change if rows is None else take_rows(change, rows)

    return pull_back


def describe_difference(got: Tree, want: Tree) -> str:
    """Where two trees of shapes differ first; "": nowhere."""
    pairs = [jax.tree_util.tree_flatten_with_path(tree)[0] for tree in (got, want)]
    given, wanted = ({jax.tree_util.keystr(path): f"{x.dtype}{list(x.shape)}" for path, x in each} for each in pairs)
    for path in wanted | given:
        if given.get(path) != wanted.get(path):
            return f"{path} is {given.get(path, 'missing')} where {wanted.get(path, 'nothing')} is expected"
    return "" if str(jax.tree.structure(got)) == str(jax.tree.structure(want)) else "the nodes of the trees differ"


def check_forward(parametrization: Parametrization, theta: Tree) -> Tree:
    """The shapes of the model's shared parameters.

    Raises:
        ValueError: rows are not cut as tables are marked, or a table of theta is not one of the catalogue's rows.
    """
    whole = forward_shapes(parametrization, theta)
    ids = jax.ShapeDtypeStruct((2,), jnp.int32)
    some = forward_shapes(parametrization, theta, ids)
    if found := describe_difference(some, jax.eval_shape(take_rows, whole, ids)):
        raise ValueError(f"Parametrization.forward of 2 rows: {found}: give the rows asked for, of each marked Table")
    catalogue = num_rows(whole)
    try:
        held = num_rows((theta, parametrization.frozen))
    except ValueError as error:
        raise ValueError(f"Parametrization.init: {error}: mark as Table only what has a row for each item") from None
    if held not in (0, catalogue):
        raise ValueError(
            f"Parametrization.init: its tables have {held} rows, those of the model {catalogue}: mark as Table only "
            "what has a row for each item"
        )
    return whole


def check_parametrization(parametrization: Parametrization, model: Model) -> None:
    """Raises ValueError for a parametrization that does not give the shared parameters of a model."""
    key = jax.random.key(0)
    whole = check_forward(parametrization, jax.eval_shape(parametrization.init, key))
    if found := describe_difference(whole, jax.eval_shape(model.init, key)):
        raise ValueError(f"Parametrization.forward does not give the parameters of the model: {found}")
