"""What a recommender is to jaxfed: a Flax module whose variable collections say where each variable lives.

| collection       | lives                  | leading axis         |
|------------------|------------------------|----------------------|
| `params`         | shared, sent whole     |                      |
| `tables`         | shared, sent by row    | the catalogue [N]    |
| `private`        | never leaves a client  |                      |
| `private_tables` | never leaves a client  | the catalogue [N]    |
| `frozen`         | read, never trained    |                      |
| `frozen_tables`  | read by row            | the catalogue [N]    |
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax

from jaxfed.core.pruning import FrozenAndMasks, clear_pruned
from jaxfed.core.recipe import Recipe
from jaxfed.core.types import History, Key, Mean, Tree

TimesRead = Literal["none", "known", "request"]  # see `SequenceFormat.times`


class ClosedForm(NamedTuple):
    """How a model's shared part follows from sums over users.

    Args:
        statistics: statistics(shared, history) -> (what one user adds to the sums, {name: `Mean`} of figures). Its
            tables are rows of the user's items, or, with `pair_columns`, one `Table` "pairs" with a row for each pair
            of the history's places (see `jaxfed.core.pairs`); nothing of the shared part is then read.
        solve: solve(sums, shared, candidate=None) -> shared: the model, from the sums over all. It runs on the host,
            outside of compiled programs. With `pair_columns` the table "pairs" of the sums is a `PairSums`.
        pair_columns: Numbers sent for each pair of a user's items. 0: sums are of rows.
        candidates: Values of a hyper-parameter of `solve`: one sum serves all, and validation chooses. (): none.
        solve_bytes: Memory that `solve` takes beside the sums.
        advice: What to do where that does not fit.
    """

    statistics: Callable[[Tree, History], tuple[Tree, dict[str, Mean]]]
    solve: Callable[..., Tree]
    pair_columns: int = 0
    candidates: tuple[float, ...] = ()
    solve_bytes: int = 0
    advice: str = ""


class SequenceFormat(NamedTuple):
    """Batches of histories in their order, in place of batches of examples: each step of a client reads one.

    A batch then has `sequence` int [T], positions of the latest items in the rows of the step, earliest first and past
    the end where unused; `negative` float [k], how often each row of the step was drawn as a negative; `catalogue`
    float [], the number of items that may be negatives; and `dropout` uint32 [2], the data of a key of JAX. Where
    clients have several users, a step may read several histories, of different users: `sequence` is then [H, T] and
    `dropout` [H, 2], and a history without items is none. See `jaxfed.models.sequence.sum_over_histories`.

    A model that reads times also has `time` int32 of the shape of `sequence`: when each of the items was met, in
    seconds by a clock that is the same for all clients. See `History.times`.

    Args:
        length: The most items of a history in a step, the latest ones. For next-item targets the last one is only a
            target.
        whole_catalogue: Whether every step has the rows of all items, each of them a negative once.
        compares: Whether the loss compares with negatives. False: none are drawn, whatever `work.negatives` says.
        times: Which times the model reads. none: no batch has any. known: those of the items that it reads. request:
            also that of the interaction that is to be predicted, which leaks: results are marked LEAKY.
        uniform_negatives: Whether the loss is right for uniform negatives alone.

    Example:
        >>> SequenceFormat(length=51).whole_catalogue
        False
    """

    length: int
    whole_catalogue: bool = False
    compares: bool = True
    times: TimesRead = "none"
    uniform_negatives: bool = False


class Model(NamedTuple):
    """A model as pure functions; `jaxfed.from_module` makes one of a Flax module.

    Args:
        init: init(key) -> shared parameters, their tables marked as `Table`.
        private: private(key) -> one client's own part.
        loss: loss(shared, private, batch) -> `Mean` over examples.
        score: score(shared, private, user) -> [rows]: a logit for every row of the tables given, for one of the
            client's users.
        pairwise: Whether batches are pairs of a positive and a negative.
        fold_in: fold_in(shared, history) -> the private part of a client with this one user. None: a history does not
            give it.
        closed: How the shared part follows from sums over users. None: it has no such form.
        features: The sides, of `user` and `item`, whose features it reads. Batches then have `user_features` and
            `item_features`, and score(..., of_user, of_item) and fold_in(..., of_user, of_item) take them: numbers [F]
            of the user, [rows, F] of the items, past the end of the vocabulary where unused. They are never trained.
        frozen: What the model reads and nobody trains, its tables marked: a dict, or () for nothing. Each client that
            takes part downloads it once. It is in no message, no optimiser and no checkpoint. loss, score and fold_in
            are given it beside the entries of `shared`, tables cut like these (`with_frozen`).
        sequence: What batches of histories it learns from. It then keeps no private part: `fold_in` gives what scores
            a user from the history. None: it learns from examples.
        recipe: The call that made the model, see `Recipe`.

    Example:
        >>> import jaxfed as jf, jax, jax.numpy as jnp
        >>> model = jf.Model(
        ...     init=lambda key: {"params": {}, "tables": {"bias": jf.Table(jnp.zeros(100))}},
        ...     private=lambda key: (),
        ...     loss=lambda shared, private, batch: jf.Mean(jnp.square(shared["tables"]["bias"]).sum(), 1.0),
        ...     score=lambda shared, private, user: shared["tables"]["bias"].rows,
        ... )
        >>> model.score(model.init(jax.random.key(0)), (), 0).shape
        (100,)
    """

    init: Callable[[Key], Tree]
    private: Callable[[Key], Tree]
    loss: Callable[[Tree, Tree, Tree], Mean]
    score: Callable[..., jax.Array]
    pairwise: bool = False
    fold_in: Callable[..., Tree] | None = None
    closed: ClosedForm | None = None
    features: tuple[str, ...] = ()
    frozen: Tree = ()
    sequence: SequenceFormat | None = None
    recipe: Recipe | None = None


def with_frozen(shared: Tree, frozen: Tree = ()) -> Tree:
    """The shared parameters with what is frozen beside them, as a model's functions read them. See `Model.frozen`.

    Where `frozen` is `FrozenAndMasks`, pruned weights are set to zero."""
    if isinstance(frozen, FrozenAndMasks):
        shared, frozen = clear_pruned(shared, frozen.masks), frozen.frozen
    return {**shared, **frozen} if jax.tree.leaves(frozen) else shared
