"""Distillation at the server: a student learns the scores of a teacher, on histories that are drawn at random."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxfed.core.client_work import identity
from jaxfed.core.model import Model, with_frozen
from jaxfed.core.tables import num_rows
from jaxfed.core.tree import to_compute_dtype
from jaxfed.core.types import History, Key, Tree

HISTORIES, LENGTH, BATCH = 2048, 20, 64  # histories that are drawn, items of each, and histories of a step
RATE = 1e-3  # learning rate of Adam
PAST_END = np.iinfo(np.int32).max  # an unused place of a history, whatever the catalogue


def draw_histories(teach: Callable[[jax.Array], jax.Array], key: Key) -> jax.Array:
    """int [HISTORIES, LENGTH]: items drawn one after the other, without repeats: with probability 1/2 from the softmax
    of the teacher's scores after the items before, else uniformly over the items that it knows. With the teacher's
    choices alone, its best items would be in every history, and the student would not learn their scores.

    teach: see `distil_scores`.
    """

    def draw(key):
        def add(history, now):
            place, own = now
            choice, chance = jax.random.split(own)
            scores = mask_history(teach(history), history)
            scores = jnp.where(jax.random.bernoulli(chance) & (scores > -jnp.inf), 0.0, scores)
            drawn = jax.random.categorical(choice, scores)
            return history.at[place].set(drawn.astype(jnp.int32)), None

        empty = jnp.full(LENGTH, PAST_END, jnp.int32)
        return jax.lax.scan(add, empty, (jnp.arange(LENGTH), jax.random.split(key, LENGTH)))[0]

    return jax.lax.map(draw, jax.random.split(key, HISTORIES), batch_size=BATCH)


def mask_history(scores: jax.Array, history: jax.Array) -> jax.Array:
    """Scores [N], -inf for the items of a history."""
    return scores.at[history].set(-jnp.inf, mode="drop")


def score_divergence(teacher: jax.Array, student: jax.Array) -> jax.Array:
    """float []: the Kullback-Leibler divergence KL(softmax(teacher) || softmax(student)) of scores [N].

    Items that the teacher scores with -inf are left out of both.
    """
    known = teacher > -jnp.inf
    want = jax.nn.log_softmax(teacher)
    got = jax.nn.log_softmax(jnp.where(known, student, -jnp.inf))
    return jnp.sum(jnp.where(known, jnp.exp(want) * (jnp.where(known, want, 0) - jnp.where(known, got, 0)), 0))


def score_by_history(model: Model, shared: Tree, history: jax.Array) -> jax.Array:
    """float [N]: a model's scores for a user with a history int [L], with numbers past the end where unused."""
    whole = with_frozen(shared, model.frozen)
    assert model.fold_in
    private = model.fold_in(whole, History(history, history, num_rows(whole)))
    return model.score(whole, private, jnp.int32(0))


def shorten_histories(pool: jax.Array, key: Key) -> jax.Array:
    """int [BATCH, LENGTH]: the first items of some histories of a pool, cut at random lengths."""
    who, length = jax.random.split(key)
    kept = jnp.arange(LENGTH) < jax.random.randint(length, (BATCH, 1), 1, LENGTH + 1)
    return jnp.where(kept, pool[jax.random.randint(who, (BATCH,), 0, len(pool))], PAST_END)


def mean_divergence(
    model: Model,
    teach: Callable[[jax.Array], jax.Array],
    forward: Callable[[Tree], Tree],
    params: Tree,
    histories: jax.Array,
) -> jax.Array:
    """float []: the mean over histories of the divergence of a model's scores from the teacher's, of items that are not
    in the history; see `distil_scores`."""
    shared = forward(params)

    def diverge(history):
        wanted = mask_history(teach(history), history)
        return score_divergence(wanted, score_by_history(model, shared, history)[: len(wanted)])

    return jax.vmap(diverge)(histories).mean()


def check_student(model: Model) -> None:
    """Raises ValueError for a model that does not score users by their histories."""
    if model.sequence is None:
        raise ValueError(
            "start.distil_steps: this model does not score users by their histories: take a model of sequences, such "
            "as sasrec"
        )
    if model.sequence.times != "none":
        raise ValueError('start.distil_steps: histories that are drawn have no times: set model.time_bias to "none"')


def distil_scores(
    model: Model,
    params: Tree,
    teach: Callable[[jax.Array], jax.Array],
    key: Key,
    steps: int,
    forward: Callable[[Tree], Tree] = identity,
) -> tuple[Tree, jax.Array]:
    """(the parameters of a model after it has learnt the scores of another one, float [steps]: the divergences). Hinton
    et al. 2015, "Distilling the knowledge in a neural network".

    Histories are drawn by `draw_histories`, so no data are read, and cut at random. Steps are those of Adam.

    Args:
        model: the student, which scores a user by the history.
        params: its shared parameters, or what the server holds in their place.
        teach: teach(history int [L]) -> float [N]: the teacher's scores, divided by a temperature. A history has
            numbers past the end where unused. -inf: an item that the teacher does not know.
        key: randomness of the histories.
        steps: number of steps.
        forward: forward(params) -> the shared parameters.
    """
    check_student(model)
    drawing, cutting = jax.random.split(key)
    pace, diverge = optax.adam(RATE), partial(mean_divergence, model, teach, forward)

    @jax.jit
    def run(params):
        pool = draw_histories(teach, drawing)

        def step(carry, key):
            params, state = carry
            loss, gradient = jax.value_and_grad(diverge)(params, shorten_histories(pool, key))
            update, state = pace.update(gradient, state, params)
            return (optax.apply_updates(params, update), state), loss

        held = to_compute_dtype(params)
        (held, _), losses = jax.lax.scan(step, (held, pace.init(held)), jax.random.split(cutting, steps))
        return jax.tree.map(lambda new, old: new.astype(old.dtype), held, params), losses

    return run(params)
