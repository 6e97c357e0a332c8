"""What the best model of a run recommends to one user."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from jaxfed.config.build import RunParts
from jaxfed.config.schema import suggest
from jaxfed.core.excerpt import shorten, shorten_list
from jaxfed.core.model import with_frozen
from jaxfed.core.types import Tree
from jaxfed.data.interactions import Dataset
from jaxfed.data.population import Population
from jaxfed.data.splits import LEAST, PART, TRAIN
from jaxfed.evaluation.evaluator import predict_scores
from jaxfed.evaluation.split import other_domains_items, user_feature_rows


class UserPlace(NamedTuple):
    """Where a user is: among whom, with which number, and at which client."""

    population: Population
    user: int
    client: int
    home: int | None  # the client that holds the private part; None: nobody, as this client never took part


def find_user(population: Population, name: str) -> list[tuple[Population, int]]:
    """Wherever a user is: among those asked, and among those who never took part."""
    groups = [population.asked, *filter(None, [population.cold])]
    return [(group, int(user)) for group in groups for user in np.flatnonzero(group.user_names == name)]


def locate_user(
    population: Population, name: str, client: str | None, source: Callable[[], Dataset] | None = None
) -> UserPlace:
    """Where a user is, also one who never took part.

    Args:
        population: the clients.
        name: the user's id in the data.
        client: at which client, for a user who is at several.
        source: reads the data once more, to tell users who were left out from those who are not there.

    Raises:
        ValueError: there is no such user, or no such client.
    """
    found = find_user(population, name)
    if not found:
        left_out = why_left_out(source(), name) if source else ""
        known = population.asked.user_names.tolist()[:10000]
        raise ValueError(left_out or f'no user "{shorten(name)}" in the data{suggest(name, known)}')
    at = [int(group.client_of[user]) for group, user in found]
    clients = [str(group.names[where]) for (group, _), where in zip(found, at, strict=True)]
    if client not in clients and (client is not None or len(found) > 1):
        raise ValueError(f"--client: user {shorten(name)} is at {shorten_list(clients)}: pass one of them")
    which = 0 if client is None else clients.index(client)
    group, user = found[which]
    return UserPlace(group, user, at[which], None if group is population.cold else int(population.homes[at[which]]))


def why_left_out(data: Dataset, name: str) -> str:
    """Why a user of the source is no user of a run; "": there is no such user."""
    number = np.flatnonzero(data.users == name)
    if not len(number):
        return ""
    count = len(np.unique(data.interactions.item[data.interactions.user == number[0]]))
    k_core = "the k-core (data.user_core, data.item_core), or no row among those that train (data.protocol)"
    why = f"fewer than {LEAST} interactions" if count < LEAST else k_core
    train = data.columns.get(PART, np.zeros(0)) == TRAIN
    if len(train) and not (data.interactions.user[train] == number[0]).any():
        why = "no train row"
    return f'user "{shorten(name)}" was left out: {why}'


def selected_view(parts: RunParts, select: str) -> str:
    """Whose model a run was chosen by: that of `val/VIEW/...`, see `Work.views`; "": the server's."""
    name = select.split("/")[1]
    return name if name in parts.method.work.views else ""


def collect_user_times(population: Population, user: int) -> np.ndarray:
    """int [L + 1]: when a user did all that the user did, and the last of these times as that of the request."""
    times = np.concatenate([each.of(user) for each in population.time_lists])
    return np.append(times, times[-1:])


def score_items(parts: RunParts, best: tuple[Tree, Tree], seat: UserPlace, view: str = "") -> np.ndarray:
    """float [N]: the score of every item as evaluations compute it, -inf for what the user had.

    view: one of `Work.views`. A private part that nobody keeps is made of all that a user did, as is that of one who
    never took part. A model that reads the time of the request is given that of the latest interaction.
    """
    (shared, private), (population, user, client, home) = best, seat
    model, client_private, history = parts.model, (), np.zeros(0, np.int32)
    histories = population.train, population.valid, population.test
    if home is None or parts.eval_splits["test"].history.values.size:
        history = np.concatenate([part.of(user) for part in histories]).astype(np.int32)
    if home is not None:
        client_private = jax.tree.map(lambda x: x[home], private)
        shared, client_private = parts.method.work.views[view](shared, client_private)
    local = np.asarray(user - population.client_offsets[client], np.int32)
    own = user_feature_rows(population, model.features, np.array(user))
    times = collect_user_times(population, user) if model.sequence and model.sequence.times != "none" else history[:0]
    shared = with_frozen(shared, model.frozen)
    found = np.array(predict_scores(model, shared, client_private, local, history, own, times))
    # a user may be at several clients, and is offered no item that occurs at any of them
    everywhere = find_user(parts.data.population, str(population.user_names[user]))
    had = [part.of(each) for group, each in everywhere for part in (group.train, group.valid, group.test)]
    had += [other_domains_items(population, np.array([user])).of(0)] if population.domains else []
    found[np.concatenate(had)] = -np.inf
    return found
