"""From a Flax module to a `Model`, and what models share: losses, and variables that may come cut to some rows."""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jaxfed.core.model import Model
from jaxfed.core.tables import num_rows, unwrap, wrap
from jaxfed.core.types import History, Key, Mean, Tree

FOLD_STEPS, FOLD_RATE, FOLD_NEGATIVES = 100, 0.1, 4  # of what makes a private part of a history; see `from_module`

TableDtype = Literal["float32", "bfloat16"]  # what tables are stored in and downloaded as; see `tree.stochastic_cast`
LossName = Literal["bce", "bpr", "squared"]


class Loss(NamedTuple):
    """Per example: pointwise value(logit, label), pairwise value(logit of positive - logit of negative).

    A label between 0 and 1 stands for examples of one item merged: value(z, y) = y value(z, 1) + (1 - y) value(z, 0).
    """

    value: Callable[..., jax.Array]
    pairwise: bool = False


LOSSES = {
    # binary cross-entropy on clicks; with one exponential and one logarithm, where optax has two of each
    "bce": Loss(lambda logit, label: jax.nn.softplus(logit) - label * logit),
    # Bayesian personalised ranking (Rendle et al. 2009)
    "bpr": Loss(lambda gap: -jax.nn.log_sigmoid(gap), pairwise=True),
    # squared error on clicks: the mean over examples of which a share `label` are clicks
    "squared": Loss(lambda logit, label: jnp.square(logit - label) + label * (1 - label)),
    # the same on ratings, which are never merged; what "squared" is where rows are labelled so, see `experiment`
    "rating": Loss(lambda logit, label: jnp.square(logit - label)),
}


def find_loss(name: str) -> Loss:
    """One of `LOSSES`. Raises ValueError with the names there are."""
    if name not in LOSSES:
        raise ValueError(f"no loss {name!r}: choose one of {', '.join(LOSSES)}")
    return LOSSES[name]


def check_positive(name: str, *sizes: int) -> None:
    """Raises ValueError when a size is below 1."""
    if min(sizes) < 1:
        raise ValueError(f"{name} is {', '.join(map(str, sizes))}: sizes must be at least 1")


def take_vectors(table: jax.Array, index: jax.Array | None) -> jax.Array:
    """Rows `index` of a table; None: every row once."""
    return table if index is None else table[index]


def normal_variable(
    module: nn.Module, collection: str, name: str, shape: tuple[int, ...], scale: float, dtype: str = "float32"
):
    """A module's variable that starts with normal numbers of standard deviation `scale`."""

    def make():
        return nn.initializers.normal(scale)(module.make_rng("params"), shape).astype(dtype)

    return module.variable(collection, name, make).value


def score_rows(rows: jax.Array, user: jax.Array) -> jax.Array:
    """Inner products of rows [n, d] with one user's vector [d], as a matrix product, or with one for each [n, d]."""
    return rows @ user if user.ndim == 1 else jnp.sum(rows * user, -1)


def score_one_by_one(score: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """The same scores, of one user after the other where a CPU is to score many.

    The layers of a network over the catalogue then stay in its cache. Those of many users at once are written to memory
    and read again, layer by layer.
    """
    in_turn = jax.custom_batching.sequential_vmap(score)

    def score_in_turn(*args):
        return (in_turn if jax.default_backend() == "cpu" else score)(*args)

    return score_in_turn


def fit_private(
    loss: Loss,
    private: Callable[[Key], Tree],
    score: Callable[..., jax.Array],
    shared: Tree,
    history: History,
    *known: jax.Array,
) -> Tree:
    """The private part of a user with this history: descends the expected loss over it and FOLD_NEGATIVES negatives to
    each of it, from one start."""
    start, rows = private(jax.random.key(0)), num_rows(shared)
    label = jnp.zeros(rows).at[jnp.where(history.live, history.rows, rows)].set(1, mode="drop")
    weight = jnp.where(label > 0, 1, FOLD_NEGATIVES * label.sum() / jnp.maximum(rows - label.sum(), 1))

    def objective(candidate):
        each = loss.value(score(shared, candidate, jnp.int32(0), *known), label)
        return jnp.sum(each * weight) / jnp.maximum(weight.sum(), 1e-9)

    pace = optax.adam(FOLD_RATE)

    def step(_, carry):
        update, state = pace.update(jax.grad(objective)(carry[0]), carry[1])
        return optax.apply_updates(carry[0], update), state

    return jax.lax.fori_loop(0, FOLD_STEPS, step, (start, pace.init(start)))[0]


def make_frozen(module: nn.Module) -> Tree:
    """The collections `frozen` and `frozen_tables` of a module, the same for every seed; (): it has neither."""

    def make(key):
        made = module.init(key, jnp.int32(0), jnp.zeros(1, jnp.int32))
        return {"frozen": made.get("frozen", {}), "frozen_tables": wrap(made.get("frozen_tables", {}))}

    key = jax.random.key(0)
    return jax.jit(make)(key) if jax.tree.leaves(jax.eval_shape(make, key)) else ()


def score_batch(logits: Callable[..., jax.Array], batch: dict[str, jax.Array], known: tuple) -> list[jax.Array]:
    """The logits of a batch's items and of those that they are compared with, as far as it has them; else of all rows.

    logits(user, item, *known): item None is every row once.
    """
    names = [name for name in ("item", "other") if name in batch]
    if "user" in batch:
        return [logits(batch["user"], batch[name], *known) for name in names]
    every = logits(jnp.int32(0), None, *known)  # one user: a row's logit is computed once, then picked
    return [every[batch[name]] for name in names] or [every]


def from_module(
    module: nn.Module,
    loss: Loss | LossName = "bce",
    penalty: Callable[[Tree, Tree], jax.Array] | None = None,
    features: tuple[str, ...] = (),
) -> Model:
    """Makes a model of a Flax module.

    The module has __call__(user, item=None) -> logits. item: positions in the tables given, None: every row once. user:
    positions among the client's users, or one of them. Tables may come cut to a client's rows. The collection says
    where a variable lives: `params`, `tables`, `private`, `private_tables`; `frozen`, `frozen_tables` (never trained).

    Args:
        module: The module.
        loss: See `Loss`; or its name: bce, bpr, squared.
        penalty: penalty(shared, private) -> [rows]: added to the loss of each example, for the row of its (first) item.
        features: The sides, of `user` and `item`, whose features the module reads. Then it has __call__(user,
            item=None, of_user=None, of_item=None): numbers of features, of_user [..., F] like `user`. None: unknown.

    Returns:
        The model.

    Raises:
        ValueError: there is no loss of that name.

    Example:
        >>> class Bias(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, user, item=None):
        ...         return take_vectors(self.variable("tables", "bias", jnp.zeros, 100).value, item)
        >>> model = from_module(Bias(), "bce")
    """
    loss = find_loss(loss) if isinstance(loss, str) else loss

    def init(key):
        made = module.init(key, jnp.int32(0), jnp.zeros(1, jnp.int32))
        return {"params": made.get("params", {}), "tables": wrap(made.get("tables", {}))}

    def private(key):
        made = module.init(key, jnp.int32(0), jnp.zeros(1, jnp.int32))
        return {"private": made.get("private", {}), "private_tables": wrap(made.get("private_tables", {}))}

    def logits(shared, private, user, item, *known):
        return module.apply({**unwrap(shared), **unwrap(private)}, user, item, *known)

    def score(shared, private, user, *known):
        return logits(shared, private, user, None, *known)

    def value(shared, private, batch):
        known = (batch.get("user_features"), batch.get("item_features")) if features else ()
        at = score_batch(partial(logits, shared, private), batch, known)
        each = loss.value(at[0] - at[1]) if loss.pairwise else loss.value(at[0], batch["label"])
        if penalty:
            more = penalty(unwrap(shared), unwrap(private))
            each += more[batch["item"]] if "item" in batch else more
        return Mean(jnp.sum(each * batch["weight"]), jnp.sum(batch["weight"]))

    frozen = make_frozen(module)
    folds = None if loss.pairwise else partial(fit_private, loss, private, score)
    return Model(init, private, value, score, loss.pairwise, folds, features=features, frozen=frozen)
