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
    asked = {"valid": population.train, "test": population.train, "times": None}
    return Clients(data, population._replace(**asked), "", leaky=False)


def save_live_model(before: LiveModel) -> SavedModel:
    """The model as what another one begins with."""
    shared, private = jax.device_get((before.shared, before.private))
    source, names = before.parts.data.source, before.parts.data.population.names
    return SavedModel("the window before", shared, None, source.items, item_texts(source), private, names)


def score_window(live: LiveModel, data: Dataset, users: np.ndarray) -> np.ndarray:
    """Scores of all items of a data set for some of its users, by what a model knows.

    Args:
        live: the model.
        data: the whole data set.
        users: int [u], ascending: numbers of users. One whom the model does not know has the private part of a new
            client, and no history.

    Returns:
        float32 [u, items of the data set]: -inf for items that the model does not know.
    """
    place = np.searchsorted(live.users, users)
    known = (place < len(live.users)) & (live.users[np.minimum(place, len(live.users) - 1)] == users)
    place = np.where(known, place, -1)
    longest = int(live.parts.data.population.train.counts.max()) if live.past else 0
    shared, fresh = with_frozen(live.shared, live.parts.model.frozen), new_client_part(live)
    score = jax.jit(jax.vmap(make_score(live), (None, None, 0, 0, 0)))
    at_once = max(min(AT_ONCE // (len(live.items) + longest), len(users)), 1)
    found = np.full((len(users), len(data.items)), -np.inf, np.float32)
    for low in range(0, len(users), at_once):
        high = min(low + at_once, len(users))
        some = np.resize(np.arange(low, high), at_once)  # of one shape
        private = jax.tree.map(lambda x, at=place[some]: x[np.maximum(at, 0)], live.private)
        scores = score(shared, fresh, private, known[some], pad_histories(live, place[some], longest))
        found[low:high, live.items] = np.asarray(scores)[: high - low, : len(live.items)]
    return found


def make_score(live: LiveModel) -> Callable[..., jax.Array]:
    """score(shared, private part of a new client, private part, whether that is known, history [H]) -> float [rows]."""
    view, nothing = live.parts.method.work.views[""], jnp.zeros(0, jnp.int32)

    def score(shared, fresh, private, is_known, history):
        own = jax.tree.map(lambda kept, new: jnp.where(is_known, kept, new), private, fresh)
        shared, own = view(shared, own)
        return predict_scores(live.parts.model, shared, own, jnp.int32(0), history, nothing, nothing)

    return score


def new_client_part(live: LiveModel) -> Tree:
    """The private part of a client that is asked before it took part."""
    method, key = live.parts.method, make_run_keys(0).memory
    return method.private_part(method.work.init(live.shared, key)[1])


def pad_histories(live: LiveModel, place: np.ndarray, longest: int) -> np.ndarray:
    """int32 [u, longest]: the items of users, earliest first, past the end of the catalogue where unused.

    place: int [u], numbers of clients; -1: none, and no history.
    """
    population = live.parts.data.population
    made = np.full((len(place), longest), population.num_items, np.int32)
    if longest:
        for line, who in enumerate(place):
            if who >= 0:
                own = population.train.of(who)[-longest:]
                made[line, : len(own)] = own
    return made
