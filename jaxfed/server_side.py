"""The server's side of a round: hear one block after the other, then undo the links and move the model."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxfed import rows, tree
from jaxfed.channel import STORE, accumulate, collect, empty, vacant
from jaxfed.state import Plan, State
from jaxfed.types import Key, Mean, Part, Round, Shared, Tree


class Tally(NamedTuple):
    """What the server has heard so far in a round."""

    total: Tree  # the running sum of messages, tables whole; a `Part` of them all for a link's own reduction
    memory: Tree  # the client store, new memories written
    present: jax.Array  # bool [M]
    metrics: dict[str, Mean]
    rows: jax.Array  # int [M]: table rows that each has sent
    sent: jax.Array  # bool [rows of the total]: whether anybody did


def silence(plan: Plan, part: Part, asked: jax.Array, size: int, long: int) -> Tally:
    """The tally before anybody is heard, but for the memory; placed as `absorb` gives it back, or that compiles
    twice."""
    heard = tree.zeros(empty(part.messages, size)) if plan.streams else vacant(part, asked.size, long)
    shapes = part.metrics, asked, jnp.zeros(len(asked), jnp.int32)
    heard, (metrics, present, count) = plan.place.together((heard, tree.zeros(shapes)))
    return Tally(heard, (), present, metrics, count, plan.place.together(jnp.zeros(size, bool)))


def absorb(plan: Plan, tally: Tally, part: Part, at: jax.Array) -> Tally:
    """Adds one block's part to what the server has heard; at: how many rows lie before it (`collect`)."""
    return Tally(
        accumulate(tally.total, part) if plan.streams else collect(tally.total, part, at),
        rows.scatter(tally.memory, part.ids, part.owner, part.held, part.memory),
        tally.present.at[part.slots].set(part.present, mode="drop"),
        jax.tree.map(jnp.add, tally.metrics, part.metrics),
        tally.rows.at[part.slots].set(part.sizes, mode="drop"),
        tally.sent.at[part.rows].set(True, mode="drop"),
    )


def finish(
    plan: Plan, state: State, heard: Tally, ids: jax.Array, asked: jax.Array, touched: jax.Array | None, key: Key
) -> tuple[State, dict[str, jax.Array]]:
    """Undoes the links and moves the model, of its tables only the rows touched."""
    shared, opt, links, memory, number, past = state
    seen = (shared, opt, links) if touched is None else rows.take((shared, opt, links), touched)
    seen = tree.wide(seen[0]), *seen[1:]
    round = Round(jax.random.fold_in(key, number), ids, heard.present)
    summed = heard.total if plan.streams else plan.reduce(heard.total, heard.sent.size)
    update, links_now, info = plan.channel.decode(summed, seen[2], round)
    delta, opt_now = plan.server.update(update.params, seen[1], seen[0].params)
    extra = plan.work.moves(seen[0].extra, update.extra)
    # what only absent clients hold rests, as if they had not been asked
    at = None if touched is None else jnp.where(heard.sent, touched, rows.catalogue(shared))
    if tree.narrow(shared):
        after = Shared(optax.apply_updates(seen[0].params, delta), extra)
        shared = rows.put(shared, at, tree.stored(after, shared, jax.random.fold_in(round.key, STORE)))
    else:  # an optimiser that does not ask for the model never has its rows read
        shared = Shared(rows.add(shared.params, at, delta), rows.put(shared.extra, at, extra))
    opt, links = rows.put((opt, links), at, (opt_now, links_now))
    shared, opt, links = plan.place.server((shared, opt, links))
    number += 1
    if plan.versions:
        past = jax.tree.map(lambda x, new: x.at[number % plan.versions].set(new), past, shared)
    return State(shared, opt, links, memory, number, past), figures(plan, heard, ids, asked) | info


def figures(plan: Plan, heard: Tally, ids: jax.Array, asked: jax.Array) -> dict[str, jax.Array]:
    """What the clients reported, and how many did."""
    counts = {"clients/reported": heard.present.sum(), "clients/refused": (asked & ~heard.present).sum()}
    counts |= {"clients/dropped": ((ids < plan.num_clients) & ~asked).sum()}
    counts |= {"clients/present": heard.present, "rows/sent": heard.rows}  # [M], as are no other figures
    return {name: mean.value for name, mean in heard.metrics.items()} | counts
