"""Scores of items in place of parameters: which of them a client and a server send to each other."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxfed.core.types import Key

LEAST_SHARE, LEAST_RATIO, MOST_RATIO = 0.1, 1.0, 4.0  # the paper's ranges of beta and gamma, see `choose_sent_items`


class Predictions(NamedTuple):
    """Scores of some items: what a client sends, and what it is sent."""

    item: Any  # int [s]: rows of the catalogue; past the end where unused
    score: Any  # float [s]: between 0 and 1


def make_empty_predictions(count: int) -> Predictions:
    """The form of a message of so many items."""
    return Predictions(jnp.zeros(count, jnp.int32), jnp.zeros(count))


def choose_sent_items(
    key: Key, is_positive: jax.Array, is_negative: jax.Array, count: int
) -> tuple[jax.Array, jax.Array]:
    """(int [count]: the items whose scores a client sends, in a random order; bool [count]: which of them it took).

    beta is uniform in [LEAST_SHARE, 1] and gamma in [LEAST_RATIO, MOST_RATIO], anew in each round. Of P items that it
    took it sends beta P, at least one and at most count / (1 + gamma); the other places hold items that it drew as
    negatives. Places for which it has no item are past the end.

    is_positive: bool [N], what it took. is_negative: bool [N], what it drew, without what it took.
    """
    end, taken = is_positive.shape[0], is_positive.sum()
    share_key, ratio_key, chance_key, order_key = jax.random.split(key, 4)
    share = jax.random.uniform(share_key, minval=LEAST_SHARE)
    ratio = jax.random.uniform(ratio_key, minval=LEAST_RATIO, maxval=MOST_RATIO)
    most = jnp.minimum(taken, jnp.maximum(jnp.floor(count / (1 + ratio)), 1))
    num_positives = jnp.clip(jnp.floor(share * taken), jnp.minimum(1, most), most).astype(jnp.int32)
    chance, place = jax.random.uniform(chance_key, (end,)), jnp.arange(count)

    def pick(among, place):
        """Items in a random order, first those of `among`."""
        order = jnp.argsort(jnp.where(among, chance, 2.0))
        return jnp.where((place >= 0) & (place < among.sum()), order.at[place].get(mode="clip"), end)

    item = jnp.where(place < num_positives, pick(is_positive, place), pick(is_negative, place - num_positives))
    item = jax.random.permutation(order_key, item).astype(jnp.int32)
    return item, is_positive.at[item].get(mode="fill", fill_value=False)


def swap_scores(score: jax.Array, positive: jax.Array, live: jax.Array, share: float) -> jax.Array:
    """float [s]: the scores of the t highest positives exchanged with those of the t highest others, in their order.

    t is a share of the positives, at least 1 where the share is not 0, and at most the number of others.
    """
    other = live & ~positive
    wanted = jnp.maximum(jnp.floor(share * positive.sum()), 1.0 if share else 0.0)
    swapped = jnp.arange(score.shape[0]) < jnp.minimum(wanted, jnp.minimum(positive.sum(), other.sum()))
    high, low = (jnp.argsort(jnp.where(among, -score, jnp.inf)) for among in (positive, other))
    out = score.at[high].set(jnp.where(swapped, score[low], score[high]))
    return out.at[low].set(jnp.where(swapped, score[high], out[low]))


def make_client_predictions(
    key: Key, score: jax.Array, is_positive: jax.Array, is_negative: jax.Array, count: int, swap: float, noise: float
) -> Predictions:
    """What a client sends of its scores [N], each between 0 and 1: of `count` items, with some exchanged and noised.

    is_positive, is_negative: see `choose_sent_items`. swap: see `swap_scores`. noise: scale of Laplace noise on each
    score that is sent, which is then cut to [0, 1].
    """
    choosing, noising = jax.random.split(key)
    item, positive = choose_sent_items(choosing, is_positive, is_negative, count)
    live = item < score.shape[0]
    sent = swap_scores(score.at[item].get(mode="fill", fill_value=0), positive, live, swap)
    sent = jnp.clip(sent + noise * jax.random.laplace(noising, sent.shape), 0, 1)
    return Predictions(item, jnp.where(live, sent, 0))


def choose_received_items(
    score: jax.Array, uploads: jax.Array, latest: jax.Array, count: int, confident: float
) -> jax.Array:
    """int [count]: the items whose scores the server sends to a client, none of those that it sent last.

    A share `confident` are the items that came most often from clients, the others those with the highest score. Places
    for which there is no item are past the end, which all are for a client that never sent any.
    """
    end, first = score.shape[0], round(confident * count)
    free = jnp.ones(end, bool).at[latest].set(False, mode="drop")

    def pick(value, free, count):
        best, item = jax.lax.top_k(jnp.where(free, value, -jnp.inf), count)
        return jnp.where(best > -jnp.inf, item, end)

    often = pick(uploads, free, first)
    high = pick(score, free.at[often].set(False, mode="drop"), count - first)
    return jnp.where((latest < end).any(), jnp.concatenate([often, high]), end).astype(jnp.int32)
