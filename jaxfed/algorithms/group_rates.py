"""Learning rates of their own for the rows of tables and for the private part."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxfed.core.leaf_paths import list_leaves, map_with_paths, match_paths
from jaxfed.core.recipe import named
from jaxfed.core.tables import is_table, map_tables
from jaxfed.core.tree import scale_tree
from jaxfed.core.types import Tree


class Rates(NamedTuple):
    """Learning rate and weight decay of one group of parameters.

    Args:
        learning_rate: None: that of the optimiser.
        weight_decay: None: that of the optimiser.
        per_example: Whether the weight decay is that of the sum of the losses of a batch's examples; the steps of
            tables are then larger by the number of examples. None: no, it is that of their mean.

    Example:
        >>> Rates(learning_rate=60.0)
        Rates(learning_rate=60.0, weight_decay=None, per_example=None)
    """

    learning_rate: float | None = None
    weight_decay: float | None = None
    per_example: bool | None = None


SAME = Rates()


class Layers(NamedTuple):
    """Layers whose rates fall from the top down (Howard and Ruder 2018, "Universal language model fine-tuning").

    Args:
        patterns: Regular expressions, searched in the paths of shared parameters, the top layer first.
        decay: Steps of parameters whose path has the k-th pattern, counted from 0, are multiplied by decay^k. Where
            several patterns are in a path, the first counts. Other parameters have the rate of their group.

    Example:
        >>> Layers(("block_1/", "block_0/", "tables/"), decay=0.5).decay
        0.5
    """

    patterns: tuple[str, ...] = ()
    decay: float = 1.0

    def factors(self, paths: Iterable[str]) -> dict[str, float]:
        """{path: factor} of the paths that have a pattern. Raises ValueError for a pattern that is in no path, or a
        decay that is not positive."""
        if not self.decay > 0:
            raise ValueError(f"work.optimizer.layer_decay is {self.decay}: it must be above 0")
        found = match_paths(self.patterns, paths, "work.optimizer.layers")
        return {path: self.decay**depth for path, depth in found.items()}


ALIKE = Layers()


def scale_part(steps: Tree, params: Tree, rest: Rates, of_tables: Rates, layers: Layers = ALIKE) -> Tree:
    """Steps at rate 1 of one part of the parameters, with the rates of tables and of the rest, and of their layers."""
    factors = layers.factors(list_leaves(params)) if layers.patterns else {}

    def scale(path, step, value):
        rate, decay, _ = of_tables if is_table(step) else rest
        moved = jax.tree.map(lambda x, y: rate * (x - decay * y), step, value)
        return scale_tree(factors[path], moved) if path in factors else moved

    return map_with_paths(scale, steps, params)


def sum_over_examples() -> optax.GradientTransformationExtraArgs:
    """The gradient of a batch's mean loss, times the examples of the batch where it is of tables. Whoever calls it says
    how many these are (`examples`)."""

    def update(gradient, state, params=None, *, examples, **more):
        return map_tables(lambda x: x * examples, lambda x: x, gradient), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


@named("optimizer")
def group_rates(
    optimizer: Callable[..., optax.GradientTransformation],
    learning_rate: float,
    weight_decay: float = 0.0,
    item: Rates = SAME,
    user: Rates = SAME,
    layers: Layers = ALIKE,
    **options: Any,
) -> optax.GradientTransformation:
    """A client's optimiser with a learning rate and weight decay for each group of parameters.

    A step is rate x (optimiser's step at rate 1 - decay x parameter). The client's loss is a mean over a batch, in
    which an item occurs once or twice and the user in every example. So good rates of items are larger, by about the
    batch size; or `item.per_example` takes the sum over the batch for tables, and their rate means the same whatever
    the length of a batch.

    Args:
        optimizer: A function of Optax whose step is proportional to its learning rate: `optax.sgd`, `optax.adam`, ...
        learning_rate: Learning rate of all parameters, unless their group has its own.
        weight_decay: Weight decay of all parameters, unless their group has its own.
        item: Rates of the rows of all tables, shared or private.
        user: Rates of the rest of the private part.
        layers: Layers of the shared part whose rates differ.
        options: Further arguments of `optimizer`.

    Returns:
        A transform of the pair (shared, private).

    Example:
        >>> import jaxfed as jf, jax.numpy as jnp, optax
        >>> optimizer = jf.algorithms.group_rates(optax.sgd, 0.5, item=jf.algorithms.Rates(60.0))
        >>> params = {"item": jf.Table(jnp.ones(1)), "bias": jnp.ones(())}, ()
        >>> steps, _ = optimizer.update(params, optimizer.init(params), params)
        >>> float(steps[0]["item"].rows[0]), float(steps[0]["bias"])
        (-60.0, -0.5)
    """

    def fill(group):
        rate, decay, per_example = group
        own = learning_rate if rate is None else rate, weight_decay if decay is None else decay
        return Rates(*own, per_example)

    def scale_both(steps, params, examples=1.0):
        rate, decay, per_example = fill(user)
        own = Rates(rate, decay / examples if per_example else decay)
        shared = scale_part(steps[0], params[0], fill(SAME), fill(item), layers)
        return shared, scale_part(steps[1], params[1], own, fill(item))

    def scale_by_examples(steps, state, params=None, *, examples, **more):
        return scale_both(steps, params, jnp.maximum(examples, 1)), state

    decays = isinstance(weight_decay, jax.Array) or weight_decay  # what is traced may be 0 or not
    if not decays and all(each is None for each in (*item, *user)) and not layers.patterns:
        return optimizer(learning_rate=learning_rate, **options)
    steps = optimizer(learning_rate=1.0, **options)
    if not item.per_example and not user.per_example:
        return optax.chain(steps, optax.stateless(scale_both))
    summed = [sum_over_examples()] if item.per_example else []
    return optax.chain(*summed, steps, optax.GradientTransformationExtraArgs(optax.init_empty_state, scale_by_examples))
