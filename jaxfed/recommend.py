"""What the best model of a run recommends to one user."""

from typing import NamedTuple

import jax
import numpy as np

from jaxfed.config import near
from jaxfed.data.clients import Population
from jaxfed.evaluate import about, elsewhere, predicted
from jaxfed.experiment import Experiment
from jaxfed.types import Tree


class Seat(NamedTuple):
    """Where a user is: among whom, with which number, and at which client."""

    population: Population
    user: int
    client: int
    home: int | None  # the client that holds the private part; None: nobody, as this client never took part


def seat_of(population: Population, name: str, client: str | None) -> Seat:
    """Finds a user, also one who never took part. client: for a user who is at several. Raises ValueError."""
    groups = [population.asked, *filter(None, [population.cold])]
    found = [(group, int(user)) for group in groups for user in np.flatnonzero(group.user_names == name)]
    if not found:
        known = [each for group in groups for each in group.user_names.tolist()[:10000]]
        raise ValueError(f'no user "{name}" in the data{near(name, known)}')
    at = [int(group.client_of[user]) for group, user in found]
    clients = [str(group.names[where]) for (group, _), where in zip(found, at, strict=True)]
    if len(found) > 1 and client not in clients:
        raise ValueError(f"user {name} is at several clients: pass --client with one of {', '.join(clients)}")
    which = clients.index(client) if client is not None and len(found) > 1 else 0
    group, user = found[which]
    return Seat(group, user, at[which], None if group is population.cold else int(population.homes[at[which]]))


def scores(experiment: Experiment, best: tuple[Tree, Tree], seat: Seat) -> np.ndarray:
    """float [N]: the score of every item as evaluations compute it, -inf for what the user had.

    A private part that nobody keeps is made of all that he did, as is that of a user who never took part.
    """
    (shared, private), (population, user, client, home) = best, seat
    model, mine, history = experiment.model, (), np.zeros(0, np.int32)
    parts = population.train, population.valid, population.test
    if home is None or experiment.exams["test"].history.values.size:
        history = np.concatenate([part.of(user) for part in parts]).astype(np.int32)
    if home is not None:
        mine = jax.tree.map(lambda x: x[home], private)
        shared, mine = experiment.work.views[""](shared, mine)
    local = np.asarray(user - population.first[client], np.int32)
    own = about(population, model.features, np.array(user))
    found = np.array(predicted(model, shared, mine, local, history, own))
    # he may be at several clients, and is offered nothing that he had at any
    everywhere = np.flatnonzero(population.user_names == population.user_names[user])
    had = [part.of(each) for part in parts for each in everywhere.tolist()]
    had += [elsewhere(population, np.array([user])).of(0)] if population.domains else []
    found[np.concatenate(had)] = -np.inf
    return found
