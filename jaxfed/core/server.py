"""The server's side of a round: hear one block after the other, then undo the links and move the model."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxfed.core import tables, tree
from jaxfed.core.channel import accumulate_messages, append_messages, empty_messages, total_shapes
from jaxfed.core.state import Plan, State
from jaxfed.core.streams import STORE
from jaxfed.core.types import Broadcast, Key, Mean, Messages, RoundView, Tree


class Accumulator(NamedTuple):
    """What the server has heard so far in a round."""

    total: Tree  # the running sum of messages, tables whole; a `Part` of them all for a link's own reduction
    memory: Tree  # the client store, new memories written
    present: jax.Array  # bool [M]
    metrics: dict[str, Mean]
    rows: jax.Array  # int [M]: table rows that each has sent
    sent: jax.Array  # bool [rows of the total]: whether anybody did


def init_accumulator(plan: Plan, part: Messages, asked: jax.Array, size: int, long: int) -> Accumulator:
    """The tally before anybody is heard, but for the memory; placed as `accumulate` gives it back, or that compiles
    twice."""
    heard = (
        tree.zeros_like(total_shapes(part.messages, size)) if plan.streams else empty_messages(part, asked.size, long)
    )
    shapes = part.metrics, asked, jnp.zeros(len(asked), jnp.int32)
    heard, (metrics, present, count) = plan.place.together((heard, tree.zeros_like(shapes)))
    return Accumulator(heard, (), present, metrics, count, plan.place.together(jnp.zeros(size, bool)))


def accumulate(plan: Plan, tally: Accumulator, part: Messages, at: jax.Array) -> Accumulator:
    """Adds one block's part to what the server has heard; at: how many rows lie before it (`collect`)."""
    return Accumulator(
        accumulate_messages(tally.total, part) if plan.streams else append_messages(tally.total, part, at),
        tables.scatter_clients(tally.memory, part.ids, part.owner, part.held, part.memory),
        tally.present.at[part.slots].set(part.present, mode="drop"),
        jax.tree.map(jnp.add, tally.metrics, part.metrics),
        tally.rows.at[part.slots].set(part.sizes, mode="drop"),
        tally.sent.at[part.rows].set(True, mode="drop"),
    )


def server_update(
    plan: Plan, state: State, heard: Accumulator, ids: jax.Array, asked: jax.Array, touched: jax.Array | None, key: Key
) -> tuple[State, dict[str, jax.Array]]:
    """Undoes the links and moves the model, of its tables only the rows touched."""
    shared, opt, links, memory, number, past = state
    seen = (shared, opt, links) if touched is None else tables.take_rows((shared, opt, links), touched)
    seen = tree.to_compute_dtype(seen[0]), *seen[1:]
    round = RoundView(jax.random.fold_in(key, number), ids, heard.present)
    summed = heard.total if plan.streams else plan.reduce(heard.total, heard.sent.size)
    update, links_now, info = plan.channel.decode(summed, seen[2], round)
    delta, opt_now = plan.server.update(update.params, seen[1], seen[0].params)
    extra = plan.work.moves(seen[0].extra, update.extra)
    # what only absent clients hold rests, as if they had not been asked
    at = None if touched is None else jnp.where(heard.sent, touched, tables.num_rows(shared))
    if tree.has_storage_dtype(shared):
        after = Broadcast(optax.apply_updates(seen[0].params, delta), extra)
        shared = tables.put_rows(shared, at, tree.stochastic_cast(after, shared, jax.random.fold_in(round.key, STORE)))
    else:  # an optimiser that does not ask for the model never has its rows read
        shared = Broadcast(tables.add_rows(shared.params, at, delta), tables.put_rows(shared.extra, at, extra))
    opt, links = tables.put_rows((opt, links), at, (opt_now, links_now))
    shared, opt, links = plan.place.server((shared, opt, links))
    number += 1
    if plan.versions:
        past = jax.tree.map(lambda x, new: x.at[number % plan.versions].set(new), past, shared)
    return State(shared, opt, links, memory, number, past), round_figures(plan, heard, ids, asked) | info


def round_figures(plan: Plan, heard: Accumulator, ids: jax.Array, asked: jax.Array) -> dict[str, jax.Array]:
    """What the clients reported, and how many did."""
    counts = {"clients/reported": heard.present.sum(), "clients/refused": (asked & ~heard.present).sum()}
    counts |= {"clients/dropped": ((ids < plan.num_clients) & ~asked).sum()}
    counts |= {"clients/present": heard.present, "rows/sent": heard.rows}  # [M], as are no other figures
    return {name: mean.value for name, mean in heard.metrics.items()} | counts
