"""Beam search for items by their codes, over a trie (prefix tree) of the codes of all items: it finds only items."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfed.core.types import Tree
from jaxfed.models.decoder import Decoder, PastPieces
from jaxfed.models.transformer import MASKED_LOGIT


class TrieLevel(NamedTuple):
    """The prefixes of one length, and which pieces may follow each."""

    children: np.ndarray  # int [prefixes, V]: the number of the prefix with a further piece; -1: no item has it


class FoundCodes(NamedTuple):
    """What a beam search found, the most likely first."""

    pieces: jax.Array  # int [beam, levels]
    likelihood: jax.Array  # [beam]: the sum of their log-likelihoods; `MASKED_LOGIT` where fewer were found


def build_trie(pieces: np.ndarray, vocabulary: int) -> tuple[TrieLevel, ...]:
    """The trie of codes int [N, levels], level by level. Rows with a piece past the vocabulary are no items."""
    used = pieces[(pieces < vocabulary).all(1)]
    prefix, levels = np.zeros(len(used), np.int64), []
    for level in range(used.shape[1]):
        distinct, following = np.unique(np.stack([prefix, used[:, level]], 1), axis=0, return_inverse=True)
        children = np.full((int(prefix.max(initial=0)) + 1, vocabulary), -1, np.int32)
        children[distinct[:, 0], distinct[:, 1]] = np.arange(len(distinct))
        levels.append(TrieLevel(children))
        prefix = following.ravel()
    return tuple(levels)


def search_codes(
    module: Decoder, variables: Tree, past: PastPieces, logits: jax.Array, trie: tuple[TrieLevel, ...], beam: int
) -> FoundCodes:
    """The most likely codes after a history.

    Args:
        module: The decoder.
        variables: Its variables.
        past: What it keeps of the history, of one user.
        logits: float [V]: of the piece after the history.
        trie: The codes of all items, see `build_trie`.
        beam: Number of prefixes that are kept at each level.
    """
    prefix, total = jnp.zeros(1, jnp.int32), jnp.zeros(1)
    pieces, now = jnp.zeros((1, 0), jnp.int32), logits[None]
    for level, (children,) in enumerate(trie):
        if level:
            live = jnp.ones((1, level), bool)
            now = jax.vmap(lambda each, live=live: module.apply(variables, each[None], live, past)[0][0, -1])(pieces)
        vocabulary = children.shape[1]
        following = jnp.where((total > MASKED_LOGIT)[:, None], jnp.asarray(children)[prefix], -1)
        each = total[:, None] + jax.nn.log_softmax(now)[:, :vocabulary]
        each = jnp.where(following < 0, MASKED_LOGIT, each).ravel()
        total, best = jax.lax.top_k(each, min(beam, each.size))
        pieces = jnp.concatenate([pieces[best // vocabulary], (best % vocabulary)[:, None]], 1)
        prefix = jnp.maximum(following.ravel()[best], 0)
    return FoundCodes(pieces, total)


def score_found(found: FoundCodes, pieces: jax.Array) -> jax.Array:
    """[rows]: the mean log-likelihood of the codes of each row int [rows, levels]; `MASKED_LOGIT` where they were not
    found."""
    same = (pieces[:, None] == found.pieces).all(2) & (found.likelihood > MASKED_LOGIT)
    return jnp.where(same, found.likelihood / pieces.shape[1], MASKED_LOGIT).max(1)
