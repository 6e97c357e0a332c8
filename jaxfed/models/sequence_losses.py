"""Losses of the next item: its logit against those of negatives, which are rows of the same step."""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

SequenceLossName = Literal["softmax", "sampled_softmax", "bce", "gbce", "bpr"]
BELOW_ALL = -1e30  # the logit of what is no negative: finite, so that no gradient is NaN


class Comparison(NamedTuple):
    """One target and what it is compared with.

    Args:
        positive: float []: the target's logit.
        logits: float [k]: those of all rows of the step.
        drawn: float [k]: how often each row is a negative; 0 for the target itself.
        catalogue: float []: number of items that may be negatives.
    """

    positive: jax.Array
    logits: jax.Array
    drawn: jax.Array
    catalogue: jax.Array


def softmax_loss(one: Comparison) -> jax.Array:
    """Cross-entropy of the target among all items; from drawn ones, a sampled estimate of it.

    The sum over the other N - 1 items is that over the n drawn ones times (N - 1) / n, which is the logQ correction of
    uniform negatives (Bengio and Senecal 2008). The target is there with certainty and is not corrected.
    """
    total = one.drawn.sum()
    scale = jnp.log(one.catalogue - 1) - jnp.log(jnp.maximum(total, 1))
    is_negative = one.drawn > 0
    others = jnp.where(is_negative, one.logits + jnp.log(jnp.where(is_negative, one.drawn, 1)) + scale, BELOW_ALL)
    return jax.nn.logsumexp(jnp.append(others, one.positive)) - one.positive


def bce_loss(one: Comparison, calibration: float = 0.0) -> jax.Array:
    """Binary cross-entropy of the target and n negatives, over n + 1 (Kang and McAuley 2018, equation 6); with a
    calibration of t, gBCE (Petrov and Macdonald 2023, equations 9 and 10): the target's part times
    beta = 1 - t (1 - n / (N - 1))."""
    total = one.drawn.sum()
    beta = 1 - calibration * (1 - jnp.minimum(total / (one.catalogue - 1), 1))
    return (beta * jax.nn.softplus(-one.positive) + jnp.sum(one.drawn * jax.nn.softplus(one.logits))) / (total + 1)


def bpr_loss(one: Comparison) -> jax.Array:
    """The mean over negatives of -log sigmoid(target - negative) (Rendle et al. 2009)."""
    each = jax.nn.softplus(one.logits - one.positive)
    return jnp.sum(one.drawn * each) / jnp.maximum(one.drawn.sum(), 1)


class SequenceLoss(NamedTuple):
    """A loss of one target."""

    value: Callable[[Comparison], jax.Array]
    whole_catalogue: bool = False  # it is compared with all items of the catalogue
    uniform_negatives: bool = False  # it is an estimate that holds for uniform negatives alone


def find_sequence_loss(name: str, calibration: float = 0.75) -> SequenceLoss:
    """One of the losses by its name. calibration: t of gbce. Raises ValueError."""
    losses = {
        "softmax": SequenceLoss(softmax_loss, whole_catalogue=True),
        "sampled_softmax": SequenceLoss(softmax_loss, uniform_negatives=True),
        "bce": SequenceLoss(bce_loss),
        "gbce": SequenceLoss(lambda one: bce_loss(one, calibration), uniform_negatives=True),
        "bpr": SequenceLoss(bpr_loss),
    }
    if name not in losses:
        raise ValueError(f"model.loss: no loss {name!r} of sequences: choose one of {', '.join(losses)}")
    if not 0 <= calibration <= 1 or math.isnan(calibration):
        raise ValueError(f"model.calibration is {calibration:g}: it must be from 0 to 1")
    return losses[name]
