"""`Method`: what makes a federated method, both halves of it: what clients compute, and what the server makes of it."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import optax

from jaxfed.core.client_work import ClientWork, identity
from jaxfed.core.link import Channel
from jaxfed.core.model import ClosedForm
from jaxfed.core.parametrization import Parametrization
from jaxfed.core.recipe import Recipe
from jaxfed.core.tree import subtract
from jaxfed.core.types import Broadcast, ClientView, Tree

AVERAGE = optax.sgd(1.0)  # the server optimiser that moves the model by the aggregate as it is


class Submodels(NamedTuple):
    """The groups of clients, and the shapes of the sub-model that each group is sent: bytes depend on them.

    Args:
        groups: int [clients]: the group of each; those of a group have sub-models of one size.
        cut: cut(group, broadcast) -> shapes of the sub-model that a client of the group is sent, of those of the whole.
        number: Number of groups.
    """

    groups: np.ndarray
    cut: Callable[[int, Broadcast], Broadcast]
    number: int


def keep_state(client_state: Tree, client: jax.Array) -> Tree:
    """A client's state as it is."""
    return client_state


class Method(NamedTuple):
    """A federated method: what clients compute, and what the server makes of it.

    Args:
        work: What one client computes.
        links: The method's own links, left of those that a user adds.
        server: Moves the model by what the channel made of all updates.
        parametrization: What the server holds in place of the model's shared parameters. None: these themselves.
        move_extra: move_extra(extra, update) -> extra: what is broadcast beside the model after a round, from what the
            channel made of all `ClientOutput.update.extra`; tables are the rows that the round touched.
        move_params: move_params(broadcast, delta, extra) -> delta: changes the server's step, from what was broadcast,
            the step, and what the channel made of `ClientOutput.update.extra`. None: the step stays as it is.
        summarize_metrics: summarize_metrics(figures) -> figures of a round, from the means over clients of
            `ClientOutput.metrics`, which may be arrays.
        private_part: private_part(client_states) -> the private part of the model, of one client's state or of a store
            of many: what the views of the work read beside the server's model.
        compare_clients: compare_clients(params, client_states) -> (client_states, {name: figure}): what the server
            makes, after each round, of what all clients keep [n, ...], whose updates it knows one by one. None:
            nothing.
        own_download: own_download(broadcast) -> shapes of what a client downloads for itself alone, beside what is
            broadcast; tables are its rows.
        send_to_client: send_to_client(shared, client) -> `Broadcast`: what the server computes for one client, which is
            sent in place of the client's rows of what the server holds; `own_download` has its shapes. None: the rows.
        make_server: make_server(optimizer) -> what moves the server's model, made of `server`: for aggregates that are
            not updates.
        reads_histories: Whether clients read whole histories in their order, not mini-batches with negatives.
        needs_all_rows: Whether what clients send concerns every row of the tables, also those that no client of a round
            holds.
        closed: How the server solves for the model from the sum of all messages, in place of `server`. None: `server`
            moves the model.
        sends_difference: Whether an update is where the shared part began less where it ended, and a client keeps only
            the private part of the model.
        is_central: Whether all data are in one place and nothing is sent; see `algorithms.central`.
        init_client_state: init_client_state(client_state, client) -> client_state: what a client keeps before its first
            round, where that depends on which client it is.
        submodels: Where clients train sub-models of different sizes. None: all are sent the whole model.
        recipe: The call that made the method, see `Recipe`.

    Example:
        >>> import jaxfed as jf, optax
        >>> work = jf.algorithms.fedavg(jf.models.mf(num_items=100), optax.sgd(0.1)).work
        >>> clipped_fedadam = jf.Method(work, links=(jf.channels.clip(0.5),), server=jf.algorithms.fedadam(0.01))
        >>> clipped_fedadam.links[0].claims.name
        'clip'
    """

    work: ClientWork
    links: tuple[Channel, ...] = ()
    server: optax.GradientTransformation = AVERAGE
    parametrization: Parametrization | None = None
    move_extra: Callable[[Tree, Tree], Tree] = subtract
    move_params: Callable[[Broadcast, Tree, Tree], Tree] | None = None
    summarize_metrics: Callable[[dict[str, jax.Array]], dict[str, jax.Array]] = identity
    private_part: Callable[[Tree], Tree] = identity
    compare_clients: Callable[[Tree, Tree], tuple[Tree, dict[str, jax.Array]]] | None = None
    own_download: Callable[[Broadcast], Tree] = lambda broadcast: ()
    send_to_client: Callable[[Broadcast, ClientView], Broadcast] | None = None
    make_server: Callable[[optax.GradientTransformation], optax.GradientTransformation] = identity
    reads_histories: bool = False
    needs_all_rows: bool = False
    closed: ClosedForm | None = None
    sends_difference: bool = False
    is_central: bool = False
    init_client_state: Callable[[Tree, jax.Array], Tree] = keep_state
    submodels: Submodels | None = None
    recipe: Recipe | None = None

    def with_server(self) -> "Method":
        """The method whose server is what `make_server` makes of it."""
        return self._replace(server=self.make_server(self.server))
