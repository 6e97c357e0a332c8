"""Metrics as monoids: every one is a `Mean`, so they add up over users, devices and chunks alike."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxfed.core.types import Mean

CUTOFFS = (10, 20)


def finalize_metric(name: str, value: Any) -> Any:
    """A metric from the mean that is kept of it: rmse is the root of a mean of squares."""
    return value**0.5 if name.endswith("rmse") else value


def count_not_beaten(score: jax.Array, others: jax.Array, counts: jax.Array) -> jax.Array:
    """int [T]: for each score [T], how many of `others` [n] where `counts` [n] it does not beat.

    Ties count against it, and so does a score that is not a number.
    """
    return jax.lax.map(lambda s: jnp.sum(~(others < s) & counts), score)


def ranking_metrics(
    score: jax.Array, real: jax.Array, others: jax.Array, counts: jax.Array, cutoffs: tuple[int, ...] = CUTOFFS
) -> dict[str, Mean]:
    """Metrics of one user: targets' scores [T] where `real` [T], against `others` [n] where `counts` [n].

    The j-th best target ranks j + (others not beaten). For each cut-off k, hr@k: any target in the first k; recall@k,
    precision@k, f1@k: of all targets; ndcg@k: gains 1 / log2(1 + rank) over their best possible sum. mrr: of the best
    target; auc: share of others beaten. All weigh 1 for a user with targets and 0 for one without.
    """
    score = jnp.where(real, score, jnp.nan)
    score = -jnp.sort(-score)  # best first; those that are not numbers last
    place = jnp.arange(1, score.size + 1)
    targets, not_beaten = real.sum(), count_not_beaten(score, others, counts)
    rank = jnp.where(place <= targets, place + not_beaten, jnp.iinfo(jnp.int32).max)
    gain = jnp.where(place <= targets, 1 / jnp.log2(1.0 + rank), 0)
    best, has = 1 / jnp.log2(1.0 + place), jnp.minimum(targets, 1)
    values = {
        "mrr": 1 / rank[0],
        "auc": jnp.sum(jnp.where(place <= targets, 1 - not_beaten / jnp.maximum(counts.sum(), 1), 0))
        / jnp.maximum(targets, 1),
    }
    for k in cutoffs:
        hits = jnp.sum(rank <= k)
        ideal = jnp.sum(jnp.where(place <= jnp.minimum(targets, k), best, 0))
        values[f"hr@{k}"] = jnp.minimum(hits, 1)
        values[f"ndcg@{k}"] = jnp.sum(jnp.where(rank <= k, gain, 0)) / jnp.maximum(ideal, 1e-9)
        values[f"recall@{k}"] = hits / jnp.maximum(targets, 1)
        values[f"precision@{k}"] = hits / k
        values[f"f1@{k}"] = 2 * hits / (targets + k)
    return {name: Mean(jnp.where(has, value, 0.0), has * 1.0) for name, value in values.items()}


def classification_metrics(score: jax.Array, real: jax.Array, others: jax.Array, counts: jax.Array) -> dict[str, Mean]:
    """Accuracy, precision, recall and F1 over all candidates, a candidate being positive when sigmoid(score) > 0.5; and
    log_loss, -log of the sigmoid that each gives to what it is."""
    hit, wrong = jnp.sum((score > 0) & real), jnp.sum((others > 0) & counts)
    targets, size = real.sum(), real.sum() + counts.sum()
    has = jnp.minimum(targets, 1) * 1.0
    lost = jnp.sum(jnp.where(real, jax.nn.softplus(-score), 0)) + jnp.sum(jnp.where(counts, jax.nn.softplus(others), 0))
    return {
        "log_loss": Mean(has * lost, has * size),
        "accuracy": Mean(has * (hit + counts.sum() - wrong), has * size),
        "precision": Mean(has * hit, has * (hit + wrong)),
        "recall": Mean(has * hit, has * targets),
        "f1": Mean(has * 2 * hit, has * (hit + wrong + targets)),
    }


def exposure_at_k(
    scores: jax.Array,
    unseen: jax.Array,
    targets: jax.Array,
    is_asked: jax.Array,
    cutoffs: tuple[int, ...] = CUTOFFS,
) -> dict[str, Mean]:
    """er@k [T] of one user: whether each target [T] is among the first k of all items [N] where `unseen` [N], by their
    `scores` [N]; it weighs 1 where `is_asked` [T] and else 0. Ties count against a target, as in
    `count_not_beaten`.

    The exposure ratio of a promoted item (FedRecAttack: Rong et al. 2022): the share of the users who have not
    interacted with it to whom it is recommended.
    """
    rank, weight = (
        count_not_beaten(scores[targets], scores, unseen),
        is_asked * 1.0,
    )  # does not beat itself: the first has rank 1
    exposed = dict.fromkeys((5, *cutoffs))
    return {f"er@{k}": Mean(jnp.where(rank <= k, weight, 0.0), weight) for k in exposed}


def rating_errors(score: jax.Array, label: jax.Array, real: jax.Array) -> dict[str, Mean]:
    """Errors of predicted ratings [T] where `real` [T]: rmse (kept as the mean of squares, see `finished`) and mae."""
    gap, count = jnp.where(real, score - label, 0), real.sum() * 1.0
    return {"rmse": Mean(jnp.square(gap).sum(), count), "mae": Mean(jnp.abs(gap).sum(), count)}


def click_metrics(score: jax.Array, label: jax.Array, real: jax.Array) -> dict[str, Mean]:
    """log_loss of logits [T] for labels 0 and 1 where `real` [T], over all rows; auc of one user: the share of its
    pairs of a 1 and a 0 in the right order, ties half. It weighs 1 for a user with both and 0 for others, and is left
    out where nobody has two rows (T = 1)."""
    log_loss = jnp.where(real, jax.nn.softplus(score) - label * score, 0)
    found = {"log_loss": Mean(log_loss.sum(), real.sum() * 1.0)}
    if score.size > 1:
        pair = (real & (label > 0))[:, None] & (real & (label <= 0))
        right = jnp.where(score[:, None] > score, 1.0, jnp.where(score[:, None] == score, 0.5, 0.0))
        has_both = pair.any() * 1.0
        found["auc"] = Mean(has_both * jnp.sum(right * pair) / jnp.maximum(pair.sum(), 1), has_both)
    return found


LABELLED = {"rating": rating_errors, "click": click_metrics}  # metrics of held-out rows that have labels
