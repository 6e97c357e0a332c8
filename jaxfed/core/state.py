"""What a run is between rounds, what its rounds are made of, and how it begins."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxfed.core import client_store as stores
from jaxfed.core import tables, tree
from jaxfed.core.aggregate import SUM, Aggregator
from jaxfed.core.link import Channel
from jaxfed.core.method import Method
from jaxfed.core.pairs import count_pairs, pair_table
from jaxfed.core.parametrization import (
    Parametrization,
    apply_parametrization,
    check_forward,
    describe_difference,
    forward_shapes,
)
from jaxfed.core.placement import Placement
from jaxfed.core.types import Broadcast, ClientState, ClientView, Key, Tree


class State(NamedTuple):
    """All that a run is between rounds, beside its seed. `Algorithm.init` makes it.

    Tables are marked (`Table`); `server_model` takes the marks off.

    Args:
        shared: What the server broadcasts. Its params are theta, where the method has a `Parametrization`.
        opt: State of the server optimiser.
        channel: State of the links, at the server.
        client_states: `ClientState` of all clients [n, ...], tables [n, N, ...]; () while the host holds it.
        round: int []: number of rounds that are done.
        model_history: What was shared before round t, at t % length: [length, ...], tables [length, N, ...].
    """

    shared: Broadcast
    opt: Tree
    channel: Tree
    client_states: Any
    round: jax.Array
    model_history: Tree = ()


class Plan(NamedTuple):
    """What rounds are made of: the arguments of `federate`, which explains them."""

    method: Method
    channel: Channel  # the method's links, and the user's
    num_clients: int
    place: Placement
    padded_shape: tuple[int, int] | None
    client_memory_budget: float
    chunk: int
    store_on_host: bool
    download: Callable[[Broadcast, ClientView], Broadcast] | None
    capacity: int
    history_length: int
    frozen_rows: int  # of the tables of the frozen part (0: there are none)

    @property
    def aggregator(self) -> Aggregator:
        """How all messages become one."""
        return self.channel.aggregator or SUM

    @property
    def num_parts(self) -> int:
        """In how many parts the messages of a round are added, one for each device, before these become one. Of several
        parts arrays have a leading axis."""
        return self.place.client_devices if self.aggregator.combine else 1

    def place_parts(self, parts: Tree) -> Tree:
        """Each part on its device; one part is copied to all devices."""
        return self.place.constrain(parts, "divided" if self.num_parts > 1 else "copied")


def server_model(state: State, parametrization: Parametrization | None = None) -> Tree:
    """The server's parameters, without marks. parametrization: that of the method."""
    return tables.unwrap(apply_parametrization(parametrization, state.shared.params))


def has_pair_sums(method: Method) -> bool:
    """Whether clients send sums over pairs of their rows, for which they read nothing of the model."""
    return method.closed is not None and method.closed.pair_columns > 0


def sent_model(method: Method, shared: Broadcast) -> Broadcast:
    """What clients are sent of what the server holds (arrays or shapes): all of it, or, where they send sums over pairs
    of rows, a table with a row for each pair and no numbers."""
    if not has_pair_sums(method):
        return shared
    return Broadcast({"tables": {"pairs": pair_table(tables.num_rows(shared))}})


def broadcast_shapes(plan: Plan, shared: Broadcast) -> Broadcast:
    """What is broadcast, all rows of it: shapes, or what the server holds where that is it."""
    if has_pair_sums(plan.method):
        return sent_model(plan.method, shared)
    parametrization = plan.method.parametrization
    return shared._replace(params=forward_shapes(parametrization, shared.params)) if parametrization else shared


def table_rows_of(plan: Plan, state: State) -> int:
    """Rows of the tables that are shared or kept by clients (0: there are none); their pairs, where sums are over
    these."""
    if has_pair_sums(plan.method):
        return count_pairs(tables.num_rows(state.shared))
    shared = tables.num_rows(broadcast_shapes(plan, state.shared))
    return max(shared, plan.frozen_rows, tables.num_rows(state.client_states, axis=1))


def sent_shapes(plan: Plan, shared: Broadcast) -> Broadcast:
    """Shapes of an update with all rows, of what the server holds (arrays or shapes)."""

    def shapes(shared):
        return plan.method.work.update_shapes(tree.to_compute_dtype(sent_model(plan.method, shared)))

    return jax.eval_shape(shapes, shared)


def initial_client_states(plan: Plan, params: Tree, ids: jax.Array, key: Key) -> Tree:
    """What clients `ids` [m] keep before their first round: (of the work, of the links), leaves [m, ...]."""
    full, shared = tree.to_compute_dtype(params), jax.eval_shape(plan.method.work.init, params, key)[0]
    work_states = jax.vmap(
        lambda i: plan.method.init_client_state(plan.method.work.init(full, jax.random.fold_in(key, i))[1], i)
    )(ids)
    link_states = plan.channel.init(sent_shapes(plan, shared))[1]
    return ClientState(work_states, jax.tree.map(lambda x: jnp.broadcast_to(x, (len(ids), *x.shape)), link_states))


def check_client_memory(plan: Plan, params: Tree, key: Key) -> None:
    """Raises ValueError where past models, or what clients keep, take more than the budget."""
    shared, _ = jax.eval_shape(plan.method.work.init, params, key)
    everyone = jax.ShapeDtypeStruct((plan.num_clients,), jnp.int32)
    held = tree.count_bytes(jax.eval_shape(partial(initial_client_states, plan), params, everyone, key))
    budget = f"the budget is {plan.client_memory_budget / 1e9:.1f}"
    if (history := plan.history_length * tree.count_bytes(shared)) > plan.client_memory_budget:
        raise ValueError(
            f"{plan.history_length} versions of the model take {history / 1e9:.1f} GB, {budget}: set cohort.max_age "
            "lower, or raise the budget (run.client_memory_gb)"
        )
    if held > plan.client_memory_budget:
        raise ValueError(
            f"client states take {held / 1e9:.1f} GB, {budget}: keep less on a client (what is kept by table row costs "
            "clients x catalogue) or raise the budget (run.client_memory_gb)"
        )


def check_theta(plan: Plan, theta: Tree, key: Key) -> None:
    """Raises ValueError where theta does not become what the method's clients are sent."""
    if plan.method.parametrization is None:
        return
    params = check_forward(plan.method.parametrization, theta)
    sent = jax.eval_shape(plan.method.work.init, params, key)[0].params
    if describe_difference(sent, params):
        raise ValueError("Method.parametrization: this method has several models at the server: leave it out")


def initial_state(plan: Plan, held: Tree, key: Key) -> State:
    """The state before the first round, laid out as the placement says. held: the parameters, or theta."""
    check_theta(plan, held, key)
    params = apply_parametrization(plan.method.parametrization, held)
    check_client_memory(plan, params, key)

    def fresh(params, held, key) -> tuple:
        params = jax.tree.map(jnp.copy, params)  # a step donates its state: never the caller's arrays
        shared, _ = plan.method.work.init(params, key)
        full = tree.to_compute_dtype(shared)
        store = () if plan.store_on_host else initial_client_states(plan, params, jnp.arange(plan.num_clients), key)
        links = plan.channel.init(sent_shapes(plan, shared))[0]
        stack = partial(jax.tree.map, lambda x: jnp.broadcast_to(x, (plan.history_length, *x.shape)))
        history = stack(shared) if plan.history_length else ()
        if held is not None:
            shared, full = shared._replace(params=jax.tree.map(jnp.copy, held)), tree.to_compute_dtype(Broadcast(held))
        opt = plan.method.server.init(full.params)
        # the rounds of a closed form consume no model, which may be large: it is not copied
        return () if plan.method.closed else shared, opt, links, store, jnp.int32(0), history

    theta = held if plan.method.parametrization else None
    shared, opt, links, *rest = jax.jit(fresh)(params, theta, key)
    if plan.method.closed:
        shared = Broadcast(params)
    state = State(*plan.place.constrain((shared, opt, links), "server"), *plan.place.constrain(rest, "copied"))
    if plan.store_on_host:
        some = jax.jit(lambda ids: initial_client_states(plan, params, ids, key))
        state = state._replace(client_states=stores.make_host_store(some, plan.num_clients))
    return state
