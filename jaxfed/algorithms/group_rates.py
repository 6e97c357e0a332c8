"""Learning rates of their own for the rows of tables and for the private part."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from jaxfed.core.recipe import named
from jaxfed.core.tables import is_table


class Rates(NamedTuple):
    """Learning rate and weight decay of one group of parameters; None: those of the optimiser."""

    learning_rate: float | None = None
    weight_decay: float | None = None


SAME = Rates()


@named("optimizer")
def group_rates(
    optimizer: Callable[..., optax.GradientTransformation],
    learning_rate: float,
    weight_decay: float = 0.0,
    item: Rates = SAME,
    user: Rates = SAME,
    **options: Any,
) -> optax.GradientTransformation:
    """A client's optimiser with a learning rate and weight decay for each group of parameters.

    A step is rate x (optimiser's step at rate 1 - decay x parameter). The client's loss is a mean over a batch, in
    which an item occurs once or twice and the user in every example: items take rates that are larger by about the
    batch size.

    Args:
        optimizer: a function of optax whose step is proportional to its learning rate: `optax.sgd`, `optax.adam`, ...
        learning_rate: of all that belongs to no group.
        weight_decay: of all that belongs to no group.
        item: of the rows of all tables, shared or private.
        user: of the rest of the private part.
        options: further arguments of `optimizer`.

    Returns:
        A transform of the pair (shared, private).

    Example:
        >>> import optax
        >>> optimizer = group_rates(optax.sgd, 0.5, item=Rates(60.0), user=Rates(2.0, weight_decay=1e-2))
    """

    def rate_and_decay(group):
        rate, decay = group
        return learning_rate if rate is None else rate, weight_decay if decay is None else decay

    def scaled_step(rate, decay):
        return lambda step, value: rate * (step - decay * value)

    def scale_steps(steps, params):
        def scale_part(rest):
            def scale_node(step, value):
                return jax.tree.map(scaled_step(*(rate_and_decay(item) if is_table(step) else rest)), step, value)

            return scale_node

        rests = (learning_rate, weight_decay), rate_and_decay(user)
        parts = zip(rests, steps, params, strict=True)
        return tuple(jax.tree.map(scale_part(rest), *pair, is_leaf=is_table) for rest, *pair in parts)

    if not weight_decay and item == user == SAME:
        return optimizer(learning_rate=learning_rate, **options)
    return optax.chain(optimizer(learning_rate=1.0, **options), optax.stateless(scale_steps))
