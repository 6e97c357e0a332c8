"""The adaptive server optimisers of Reddi et al. 2021, "Adaptive federated optimization", algorithm 2.

Optax's adam, yogi and adagrad differ from them: they correct the bias of the first rounds or add epsilon elsewhere.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxfed.core.recipe import named

Second = Callable[[jax.Array, jax.Array], jax.Array]  # (second moment, update) -> the second moment after it


class AdaptiveMoments(NamedTuple):
    """The state, like the parameters: the running mean of updates, and of their squares (FedAdagrad: their sum)."""

    first: Any
    second: Any


def adaptive_optimizer(
    learning_rate: Any, b1: float, tau: float, initial: float, second: Second
) -> optax.GradientTransformation:
    """x moves by learning_rate * m / (sqrt(v) + tau): m the mean of updates with momentum b1, v as `second` has it.

    Args:
        learning_rate: a number, or a schedule over rounds.
        b1: momentum of the first moment.
        tau: added to sqrt(v) in the denominator; limits the step where v is small.
        initial: value of v before round 1, in units of tau^2. Reddi et al. ask for at least 1.
        second: how v follows the updates.

    Raises:
        ValueError: for a momentum outside of [0, 1), or a negative tau or initial value.
    """
    if not 0 <= b1 < 1 or tau < 0 or initial < 0:
        raise ValueError("server: b1 lies in [0, 1), tau and initial are 0 or more")

    def init(params):
        return AdaptiveMoments(
            jax.tree.map(jnp.zeros_like, params), jax.tree.map(lambda x: jnp.full_like(x, initial * tau**2), params)
        )

    def update(updates, state, params=None):
        m = jax.tree.map(lambda m, x: b1 * m + (1 - b1) * x, state.first, updates)
        v = jax.tree.map(second, state.second, updates)

        def step(m, v):  # 0 / 0 where nothing has ever come and tau is 0
            below = jnp.sqrt(v) + tau
            return jnp.where(below > 0, m / jnp.where(below > 0, below, 1), 0)

        return jax.tree.map(step, m, v), AdaptiveMoments(m, v)

    return optax.chain(optax.GradientTransformation(init, update), optax.scale_by_learning_rate(learning_rate))


@named("server")
def fedadam(
    learning_rate: Any, b1: float = 0.9, b2: float = 0.99, tau: float = 1e-3, initial: float = 1.0
) -> optax.GradientTransformation:
    """FedAdam (Reddi et al. 2021): v = b2 v + (1 - b2) x^2 for an update x, without correction of the bias.

    The model moves by learning_rate m / (sqrt(v) + tau), where m is the mean of updates with momentum b1.

    Args:
        learning_rate: Learning rate: a number, or a schedule of Optax over the rounds.
        b1: Decay of m, the running mean of updates.
        b2: Decay of v, the running mean of squared updates.
        tau: Added to sqrt(v) in the denominator; limits the step where v is small.
        initial: Value of v before round 1, in units of tau^2. Reddi et al. ask for at least 1.

    Returns:
        The optimiser, a transform of Optax.

    Raises:
        ValueError: `b1` is not in [0, 1), or `tau` or `initial` is negative.

    Example:
        >>> import jaxfed as jf, jax.numpy as jnp
        >>> optimizer = jf.algorithms.fedadam(0.1, b1=0.0, tau=1.0, initial=0.0)
        >>> step, _ = optimizer.update(jnp.array(10.0), optimizer.init(jnp.array(0.0)))
        >>> round(float(step), 4)
        -0.5
    """
    return adaptive_optimizer(learning_rate, b1, tau, initial, lambda v, x: b2 * v + (1 - b2) * jnp.square(x))


@named("server")
def fedyogi(
    learning_rate: Any, b1: float = 0.9, b2: float = 0.99, tau: float = 1e-3, initial: float = 1.0
) -> optax.GradientTransformation:
    """FedYogi (Reddi et al. 2021): v = v - (1 - b2) x^2 sign(v - x^2) for an update x.

    The model moves by learning_rate m / (sqrt(v) + tau), where m is the mean of updates with momentum b1.

    Args:
        learning_rate: Learning rate: a number, or a schedule of Optax over the rounds.
        b1: Decay of m, the running mean of updates.
        b2: Decay of v, the running mean of squared updates.
        tau: Added to sqrt(v) in the denominator; limits the step where v is small.
        initial: Value of v before round 1, in units of tau^2. Reddi et al. ask for at least 1.

    Returns:
        The optimiser, a transform of Optax.

    Raises:
        ValueError: `b1` is not in [0, 1), or `tau` or `initial` is negative.

    Example:
        >>> import jaxfed as jf, jax.numpy as jnp
        >>> optimizer = jf.algorithms.fedyogi(0.1, b1=0.0, tau=1.0, initial=0.0)
        >>> step, _ = optimizer.update(jnp.array(10.0), optimizer.init(jnp.array(0.0)))
        >>> round(float(step), 4)
        -0.5
    """

    def second(v, x):
        return v - (1 - b2) * jnp.square(x) * jnp.sign(v - jnp.square(x))

    return adaptive_optimizer(learning_rate, b1, tau, initial, second)


@named("server")
def fedadagrad(
    learning_rate: Any, b1: float = 0.0, tau: float = 1e-3, initial: float = 1.0
) -> optax.GradientTransformation:
    """FedAdagrad (Reddi et al. 2021): v = v + x^2 for an update x.

    The model moves by learning_rate m / (sqrt(v) + tau), where m is the mean of updates with momentum b1.

    Args:
        learning_rate: Learning rate: a number, or a schedule of Optax over the rounds.
        b1: Decay of m, the running mean of updates.
        tau: Added to sqrt(v) in the denominator; limits the step where v is small.
        initial: Value of v before round 1, in units of tau^2. Reddi et al. ask for at least 1.

    Returns:
        The optimiser, a transform of Optax.

    Raises:
        ValueError: `b1` is not in [0, 1), or `tau` or `initial` is negative.

    Example:
        >>> import jaxfed as jf, jax.numpy as jnp
        >>> optimizer = jf.algorithms.fedadagrad(0.1, tau=1.0, initial=0.0)
        >>> step, _ = optimizer.update(jnp.array(3.0), optimizer.init(jnp.array(0.0)))
        >>> round(float(step), 4)
        -0.075
    """
    return adaptive_optimizer(learning_rate, b1, tau, initial, lambda v, x: v + jnp.square(x))
