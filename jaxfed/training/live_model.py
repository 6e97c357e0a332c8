"""A model that trains on the rows that have arrived, and goes on from where it was when more arrive."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfed.config.build import RunParts, build_from_config
from jaxfed.config.evaluation_stages import choose_history
from jaxfed.config.settings import Config, Start
from jaxfed.config.start import SavedModel
from jaxfed.core.model import with_frozen
from jaxfed.core.types import Tree
from jaxfed.data.clients import Clients
from jaxfed.data.interactions import Dataset, select_rows
from jaxfed.data.item_descriptions import item_texts
from jaxfed.data.preparation import assign_clients, make_population, split_shared_users
from jaxfed.data.sorting import sort_histories
from jaxfed.data.splits import TRAIN, Split
from jaxfed.evaluation.evaluator import predict_scores
from jaxfed.evaluation.prequential import TimeLine, rank_rows
from jaxfed.training.rounds import initial_arrays, make_run_keys, run_rounds, scored_model

AT_ONCE = 1 << 22  # scores that are computed at a time


class LiveModel(NamedTuple):
    """A model, and what it knows."""

    parts: RunParts
    shared: Tree
    private: Tree  # of all clients
    users: np.ndarray  # int [clients]: their numbers in the whole data set, ascending
    items: np.ndarray  # int [items]: likewise
    rounds: int  # that were done
    past: str  # "": private parts are kept; else they are made of histories


def train_live_model(
    config: Config, data: Dataset, rows: int, rounds: int, before: LiveModel | None = None
) -> LiveModel:
    """A model that has trained on the first rows of a data set.

    Args:
        config: what is trained.
        data: rows in time order.
        rows: how many of them there are so far.
        rounds: how many rounds are trained.
        before: the model to go on from: rows of items, what clients keep and other parameters. Items and users that it
            does not know begin as all did. The states of optimisers and links begin anew. None: a new model. A closed
            form is solved anew in any case.

    Raises:
        ValueError: the configuration cannot be replayed.
    """
    known = np.arange(len(data.interactions.user)) < rows
    users, items = (np.unique(column[:rows]) for column in (data.interactions.user, data.interactions.item))
    clients = make_training_clients(select_rows(data, known))
    saved = None
    if before and not before.parts.method.closed:
        saved = save_live_model(before)
        keeps = bool(jax.tree.leaves(before.parts.model.private(jax.random.key(0)))) and not before.past
        config = dataclasses.replace(config, start=Start(run="the window before", private=keeps))
    parts = build_live_parts(config, clients, saved)
    first = before.rounds if saved and before else 0
    state = initial_arrays(parts, config.seed)["state"]
    state = state._replace(round=state.round + first)  # random numbers are those of its own rounds
    for done in run_rounds(parts, state, config.seed, first, first + rounds):
        state = done.state
    shared, private = jax.tree.map(lambda x: x.copy(), scored_model(parts, state))
    past = choose_history(config.evaluation, parts.model, parts.method, "implicit")
    return LiveModel(parts, shared, private, users, items, first + rounds, past)


def build_live_parts(config: Config, clients: Clients, saved: SavedModel | None) -> RunParts:
    """What a model is made of. Raises ValueError for methods, models and channels that are not replayed."""
    try:
        parts = build_from_config(config, clients, saved=saved)
    except ValueError as error:
        if not saved:
            raise
        raise ValueError(f"replay: this model cannot go on from window to window: {error}") from None
    if parts.account.mechanisms:
        raise ValueError("replay: what noise spends over many windows is not accounted for: leave it out")
    if parts.model.features:
        raise ValueError("replay: models of features are not replayed, whose words come from all of the data")
    if parts.method.parametrization or parts.method.is_central:
        raise ValueError("replay: parametrizations and central training are not replayed")
    return parts


def make_training_clients(data: Dataset) -> Clients:
    """A data set as clients, each user one, all of whose rows train. What an evaluation would ask is nothing new."""
    group, names = assign_clients(data, "user", 0, 0)
    data = split_shared_users(data, group)
    rows = data.interactions
    order = sort_histories(rows.user, rows.time, len(data.users), ties_in_order=True)  # which are in time order
    split = Split(np.full(len(order), TRAIN, np.int8), order, leaky=False)
    population = make_population(data, split, names)
    population = population._replace(valid=population.train, test=population.train, times=None)
    return Clients(data, population, "", leaky=False)


def save_live_model(before: LiveModel) -> SavedModel:
    """The model as what another one begins with."""
    shared, private = jax.device_get((before.shared, before.private))
    source, names = before.parts.data.source, before.parts.data.population.names
    return SavedModel("the window before", shared, None, source.items, item_texts(source), private, names)


def rank_by_model(live: LiveModel, data: Dataset, line: TimeLine, first: int, last: int) -> np.ndarray:
    """The ranks of rows by what a model knows, see `rank_rows`.

    Where private parts are made of histories, that of each row is what its user did before it, as a client knows it.
    Else a user whom the model does not know has the private part of a new client.

    Args:
        live: the model.
        data: the whole data set, in time order.
        line: its rows.
        first, last: the rows from `first` to before `last` are predicted.

    Returns:
        float [last - first].
    """
    longest = int(line.count_before(first, last).max()) if live.past else 0
    if live.parts.model.sequence:
        longest = min(longest, live.parts.model.sequence.length)
    width = 1 << max(longest - 1, 0).bit_length() if live.past else 0  # few shapes
    score, at_once = make_score(live), max(AT_ONCE // (len(live.items) + width), 1)
    local = np.full(len(data.items), len(live.items), np.int32)
    local[live.items] = np.arange(len(live.items))
    ranks = []
    for low in range(first, last, at_once):
        high = min(low + at_once, last)
        user = line.user[low:high]
        users, question = (user, np.arange(len(user))) if live.past else np.unique(user, return_inverse=True)
        history = np.full((len(users), width), len(live.items), np.int32)
        for number in range(len(users) if width else 0):
            known = local[line.before(low + number)]
            own = known[known < len(live.items)][-width:]
            history[number, : len(own)] = own
        scores = np.full((len(users), len(data.items)), -np.inf, np.float32)
        scores[:, live.items] = score_users(live, score, users, history)
        ranks.append(rank_rows(line, scores, question, low))
    return np.concatenate(ranks)


def score_users(live: LiveModel, score: Callable[..., jax.Array], users: np.ndarray, history: np.ndarray) -> np.ndarray:
    """float32 [u, items that the model knows].

    Args:
        live: the model.
        score: see `make_score`.
        users: int [u]: numbers in the whole data set.
        history: int32 [u, H]: items by the model's own numbers, past their end where unused.
    """
    place = np.minimum(np.searchsorted(live.users, users), len(live.users) - 1)
    known = live.users[place] == users
    size = 1 << (len(users) - 1).bit_length()  # few shapes
    some = np.resize(np.arange(len(users)), size)
    private = jax.tree.map(lambda x: x[np.where(known, place, 0)[some]], live.private)
    shared, fresh = with_frozen(live.shared, live.parts.model.frozen), new_client_part(live)
    found = score(shared, fresh, private, known[some], history[some])
    return np.asarray(found)[: len(users), : len(live.items)]


def make_score(live: LiveModel) -> Callable[..., jax.Array]:
    """score(shared, private part of a new client, private parts [u], whether they are known [u], histories [u, H]) ->
    float [u, rows]."""
    view, nothing = live.parts.method.work.views[""], jnp.zeros(0, jnp.int32)

    def score(shared, fresh, private, is_known, history):
        own = jax.tree.map(lambda kept, new: jnp.where(is_known, kept, new), private, fresh)
        shared, own = view(shared, own)
        return predict_scores(live.parts.model, shared, own, jnp.int32(0), history, nothing, nothing)

    return jax.jit(jax.vmap(score, (None, None, 0, 0, 0)))


def new_client_part(live: LiveModel) -> Tree:
    """The private part of a client that is asked before it took part."""
    method, key = live.parts.method, make_run_keys(0).memory
    return method.private_part(method.work.init(live.shared, key)[1])
