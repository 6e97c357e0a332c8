"""Local steps that are steered against client drift: what SCAFFOLD, FedDyn and Mime have in common.

On tables they act on the rows that a client holds: the dense methods would also move rows of which the client knows
nothing. By row what acts in every step acts in those that hold a row, so much more strongly that it comes to the same
(`scale_to_all_steps`)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxfed.algorithms.local_training import loss_of_pair
from jaxfed.core.client_work import Batches, local_sgd
from jaxfed.core.tables import map_tables, num_rows
from jaxfed.core.tree import zeros_like
from jaxfed.core.types import Mean, Tree


class ControlState(NamedTuple):
    """What a client keeps: the model's private part, and its control variate, like the shared part."""

    private: Tree
    variate: Tree
    held: Tree = ()  # float table: 1 for the rows that it has trained before; see `scaffold`


def private_part(client_state: ControlState) -> Tree:
    """Of a client's state, or of a store of them, what the model's score reads."""
    return client_state.private


def scale_to_all_steps(tree: Tree, steps: Batches) -> Tree:
    """What acts in each of S steps on every row, for steps that see their own rows alone: times S / those that hold the
    row, so that over a round it adds up to as much."""
    times = jnp.zeros(num_rows(tree)).at[steps.rows].add(1.0 * steps.live[:, None], mode="drop")
    factor = steps.live.sum() / jnp.maximum(times, 1)
    return map_tables(lambda x: x * factor.reshape(factor.shape + (1,) * (x.ndim - 1)), lambda x: x, tree)


def steered_optimizer(optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`optimizer` of (shared, private) whose shared gradient is g + shift + pull (value - anchor); its state also sums
    the gradients g. shift, pull and anchor, trees like the shared part, come through `local_sgd`."""

    inner = optax.with_extra_args_support(optimizer)

    def init(params):
        return zeros_like(params[0]), optimizer.init(params)

    def update(steps, state, params, shift, pull, anchor, **more):
        moved = jax.tree.map(lambda g, s, p, x, a: g + s + p * (x - a), steps[0], shift, pull, params[0], anchor)
        steps_now, after = inner.update((moved, steps[1]), state[1], params, **more)
        return steps_now, (jax.tree.map(jnp.add, state[0], steps[0]), after)

    return optax.GradientTransformationExtraArgs(init, update)


def steered_steps(loss, optimizer, both, steps, by_row, shift, strength=0.0) -> tuple[Tree, Tree, Mean]:
    """(parameters, the sum of the gradients, the losses met) of steps with a shift, and a pull of `strength` to where
    they began."""
    start = both[0]
    pull = jax.tree.map(lambda x: jnp.full_like(x, strength), start)
    shift, pull = scale_to_all_steps((shift, pull), steps) if by_row else (shift, pull)
    ends, state, seen = local_sgd(
        loss_of_pair(loss), steered_optimizer(optimizer), both, steps, by_row, shift=shift, pull=pull, anchor=start
    )
    return ends, state[0], seen
