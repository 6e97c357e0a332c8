"""Freezing: a model with some parameters that are not trained."""

from collections.abc import Sequence

import jax

from jaxfed.core.leaf_paths import list_leaves, match_paths
from jaxfed.core.model import Model
from jaxfed.core.types import Tree

FROZEN_PARAMETERS = "frozen_parameters"  # the entry of `Model.frozen` with what is frozen here


def select_leaves(tree: Tree, chosen: set[str], inside: bool, prefix: str = "") -> Tree:
    """The nested dicts of a tree with the leaves whose paths are chosen (inside), or with the others."""
    if not isinstance(tree, dict):
        return tree
    made = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict):
            if (part := select_leaves(value, chosen, inside, f"{path}/")) or not value:
                made[key] = part
        elif (path in chosen) == inside:
            made[key] = value
    return made


def merge_leaves(first: Tree, second: Tree) -> Tree:
    """Nested dicts with the leaves of both."""
    made = dict(first)
    for key, value in second.items():
        made[key] = merge_leaves(made[key], value) if isinstance(value, dict) and key in made else value
    return made


def join_frozen(shared: Tree) -> Tree:
    """The shared parameters, with frozen ones put back in their places; the inverse of `freeze_leaves`.

    Args:
        shared: The shared parameters of a model, with what is frozen beside them (`with_frozen`).

    Returns:
        The parameters of the model before freezing. Other frozen parts stay beside them.
    """
    if not isinstance(shared, dict) or FROZEN_PARAMETERS not in shared:
        return shared
    rest = {key: value for key, value in shared.items() if key != FROZEN_PARAMETERS}
    return merge_leaves(rest, shared[FROZEN_PARAMETERS])


def freeze_leaves(model: Model, patterns: Sequence[str], values: Tree | None = None) -> Model:
    """Freezes the parameters of a model that patterns choose: they are not trained.

    They become part of `Model.frozen`: clients download them once, and they are in no message, no optimiser and no
    checkpoint.

    Args:
        model: The model.
        patterns: Regular expressions, each found anywhere in the path of a shared parameter, such as `block_0/` or
            `tables/item`.
        values: Parameters of the model, whose values the frozen ones have. Left out: those that the model draws with
            seed 0, whatever the seed of the run.

    Returns:
        The model, whose `init` gives the parameters that are trained.

    Raises:
        ValueError: a pattern is in no path, nothing would be left to train, or the model is a closed form.

    Example:
        >>> import jaxfed as jf
        >>> model = jf.models.freeze_leaves(jf.models.sasrec(num_items=100, dim=8), ["block_0/"])
        >>> "block_0" in model.init(jax.random.key(0))["params"]["encoder"]
        False
    """
    if not patterns:
        return model
    if model.closed:
        raise ValueError("work.freeze: the server solves for this model: leave it out")
    sizes = jax.eval_shape(model.init, jax.random.key(0))
    leaves = list_leaves(sizes)
    chosen = {*match_paths(patterns, leaves, "work.freeze")}
    if chosen == leaves.keys():
        raise ValueError("work.freeze: the patterns are in the paths of all parameters, so nothing would be trained")
    if list_leaves(select_leaves(sizes, chosen, True)).keys() != chosen:
        raise ValueError("work.freeze: the parameters of this model are no nested dicts: leave it out")
    held = jax.jit(model.init)(jax.random.key(0)) if values is None else values
    return take_out_leaves(model, chosen, select_leaves(jax.device_get(held), chosen, True))


def take_out_leaves(model: Model, chosen: set[str], held: Tree) -> Model:
    """The model without the leaves at the chosen paths among its shared parameters; its frozen part has them (held)."""

    def init(key):
        return select_leaves(model.init(key), chosen, False)

    def loss(shared, private, batch):
        return model.loss(join_frozen(shared), private, batch)

    def score(shared, *rest):
        return model.score(join_frozen(shared), *rest)

    def fold_in(shared, *rest):
        assert model.fold_in
        return model.fold_in(join_frozen(shared), *rest)

    frozen, folds = {**(model.frozen or {}), FROZEN_PARAMETERS: held}, fold_in if model.fold_in else None
    return model._replace(init=init, loss=loss, score=score, fold_in=folds, frozen=frozen, recipe=None)
