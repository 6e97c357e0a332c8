"""What an export computes, as pure functions of named arrays: scores, the best items, and a client's training.

Their arguments are dictionaries of arrays, since a process that runs an export knows no type of jaxfed. `-1` marks an
unused place of a list of items.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfed.core.leaf_paths import join_path
from jaxfed.core.model import Model
from jaxfed.core.tables import num_rows, unwrap
from jaxfed.core.types import Tree
from jaxfed.evaluation.evaluator import predict_scores

PAST_END = np.iinfo(np.int32).max  # of every table
CHUNK = 1024  # scores whose largest is found before the best chunks are sorted
Named = dict[str, Any]  # {path: array}


class NamedTree(NamedTuple):
    """A tree as {path: array}, and how to make the tree of it again."""

    leaves: Named
    rebuild: Callable[[Named], Tree]


def name_leaves(tree: Tree) -> NamedTree:
    """The leaves of a tree by their paths, such as "tables/item"."""
    paths = [join_path(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(unwrap(tree))]
    values, structure = jax.tree.flatten(tree)
    assert len(set(paths)) == len(values), "two leaves of one path"

    def rebuild(leaves: Named) -> Tree:
        return jax.tree.unflatten(structure, [leaves[path] for path in paths])

    return NamedTree(dict(zip(paths, values, strict=True)), rebuild)


def mark_unused(items: jax.Array, num_items: int) -> jax.Array:
    """Items as tables read them: what is no item lies past the end."""
    return jnp.where((items < 0) | (items >= num_items), PAST_END, items)


def score_histories(
    model: Model, rebuild: Callable[[Named], Tree], num_items: int, weights: Named, asked: Named
) -> jax.Array:
    """float32 [b, num_items]: the scores of all items for users of whom only a history is known.

    Args:
        model: the model.
        rebuild: makes the shared parameters of `weights`.
        num_items: number of items.
        weights: {path: array}.
        asked: `history` int32 [b, L], earliest first, -1 where unused; `times` int32 [b, L + 1] and `features` int32
            [b, F], where the model reads them.
    """
    shared, reads_times = rebuild(weights), model.sequence is not None and model.sequence.times != "none"

    def score(one):
        history = mark_unused(one["history"], num_items)
        times = one["times"] if reads_times else jnp.zeros(0, jnp.int32)
        features = one["features"] if "user" in model.features else jnp.zeros(0, jnp.int32)
        return predict_scores(model, shared, (), jnp.int32(0), history, features, times)

    return jax.vmap(score)(asked)


def score_private_parts(
    model: Model,
    rebuild: Callable[[Named], Tree],
    rebuild_private: Callable[[Named], Tree],
    weights: Named,
    private: Named,
    asked: Named,
) -> jax.Array:
    """float32 [b, num_items]: the scores of all items for users by what their clients keep.

    Args:
        model: the model.
        rebuild: makes the shared parameters of `weights`.
        rebuild_private: makes one client's private part of `private`.
        weights: {path: array}.
        private: {path: array [b, ...]}: of the client of each user.
        asked: `user` int32 [b]: which of the client's users; `features` int32 [b, F], where the model reads them.
    """
    shared, none = rebuild(weights), jnp.zeros(0, jnp.int32)

    def score(own, one):
        features = one["features"] if "user" in model.features else none
        return predict_scores(model, shared, rebuild_private(own), one["user"], none, features, none)

    return jax.vmap(score)(private, asked)


def find_top_items(most: int, scores: jax.Array, excluded: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The items with the highest scores, ties by the lower number: exactly, also where it looks at few chunks of them.

    The `most` best items lie in the `most` chunks with the highest best score: a chunk that is not among these is
    behind an item of each of them.

    Args:
        most: number of items, at most as many as there are.
        scores: float [b, N].
        excluded: int32 [b, S]: items that are left out; past the end or negative: unused.

    Returns:
        (int32 [b, most]: the items, -1 where there are no more; float32 [b, most]: their scores, -inf there).
    """
    size = scores.shape[-1]
    rows = jnp.arange(scores.shape[0])[:, None]
    scores = scores.at[rows, mark_unused(excluded, size)].set(-jnp.inf, mode="drop")
    if size <= 16 * CHUNK or size <= 2 * most * CHUNK:
        values, items = jax.lax.top_k(scores, most)
    else:
        padded = jnp.pad(scores, ((0, 0), (0, -size % CHUNK)), constant_values=-jnp.inf)
        chunks = padded.reshape(scores.shape[0], -1, CHUNK)
        best = jnp.sort(jax.lax.top_k(chunks.max(-1), most)[1], -1)  # in order, so that ties stay those of all scores
        near = jnp.take_along_axis(chunks, best[..., None], 1)
        values, places = jax.lax.top_k(near.reshape(scores.shape[0], most * CHUNK), most)
        items = jnp.take_along_axis(best, places // CHUNK, 1) * CHUNK + places % CHUNK
    return jnp.where(values > -jnp.inf, items, -1).astype(jnp.int32), values


class ClientExample(NamedTuple):
    """What a client of the longest kind has in a round, as shapes: what `update_client` is compiled for."""

    broadcast: NamedTree
    state: NamedTree
    batches: NamedTree


def update_client(
    update: Callable[..., Any], example: ClientExample, broadcast: Named, state: Named, batches: Named, key: jax.Array
) -> dict[str, Any]:
    """A client's training in a round, before anything is clipped, coded or noised.

    Args:
        update: `ClientWork.update`.
        example: how to make its arguments of named arrays.
        broadcast: {path: array}: the model, tables cut to the client's rows [K, ...].
        state: {path: array}: what the client keeps.
        batches: {path: array}: see `Batches`.
        key: uint32 [2]: randomness of this client and round.

    Returns:
        {"update": {path: array}, which points uphill, "state": what the client keeps now, "weight": its examples,
        "loss": the mean loss of the model that it was sent}.
    """
    wrapped = jax.random.wrap_key_data(key, impl="threefry2x32")
    output = update(
        example.broadcast.rebuild(broadcast), example.state.rebuild(state), example.batches.rebuild(batches), wrapped
    )
    update_leaves, kept = name_leaves(output.update).leaves, name_leaves(output.client_state).leaves
    return {"update": update_leaves, "state": kept, "weight": output.weight, "loss": jnp.asarray(output.loss)}


def make_functions(
    model: Model, shared: NamedTree, private: NamedTree, num_items: int, most: int
) -> dict[str, Callable[..., Any]]:
    """{name: function of named arrays} of all that a model can compute of a user.

    private: of one client. most: number of items of a list of recommendations.
    """
    found: dict[str, Callable[..., Any]] = {"top_items": partial(find_top_items, most)}
    if model.fold_in and num_rows(shared.rebuild(shared.leaves)):  # else a history tells nothing
        found["score_histories"] = partial(score_histories, model, shared.rebuild, num_items)
    if private.leaves:
        found["score_private"] = partial(score_private_parts, model, shared.rebuild, private.rebuild)
    return found
