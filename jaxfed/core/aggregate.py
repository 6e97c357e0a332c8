"""How a server makes one of all the messages of a cohort: a sum as they come, or a rule on all of them together."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxfed.core.tables import Table, add_rows, is_same_rows, is_table, map_tables, repeat_rows
from jaxfed.core.tree import zeros_like
from jaxfed.core.types import Messages, Tree

TILE = 256  # rows of a table that are added to at a time
DENSE = 32  # a client holds many rows where this times their number is at least the whole


class Capacity(NamedTuple):
    """How much an aggregate must hold."""

    rows: int  # of the tables of the aggregate
    slots: int  # clients of the cohort
    message_rows: int  # table rows that all clients send together


class Aggregator(NamedTuple):
    """Makes one of all messages of a cohort, block by block: a monoid.

    Args:
        init: init(messages, capacity) -> total, of no message yet; `messages` of any block show the shapes.
        add: add(total, messages) -> total, with those of one more block.
        result: result(total, rows) -> the aggregate, whose tables have so many rows.
        streams: Whether the total is as large as one message, however many clients there are. Then it can be added
            chunk by chunk.
        combine: combine(totals) -> total, of totals [D, ...] of the messages of each of D devices. None: the messages
            of all devices go to one total.

    Example:
        >>> import jaxfed as jf
        >>> jf.SUM.streams, jf.gather_then(lambda messages, rows: messages).streams
        (True, False)
    """

    init: Callable[[Messages, Capacity], Tree]
    add: Callable[[Tree, Messages], Tree]
    result: Callable[[Tree, int], Tree]
    streams: bool
    combine: Callable[[Tree], Tree] | None = None


def accumulate_messages(total: Tree, messages: Messages) -> Tree:
    """Adds messages to a total: the only scatter of messages in a round. Integers wrap: a ring sum."""

    def add(part, sent):
        if is_same_rows(sent):
            return Table(add_same_rows(part.rows, messages.rows, sent.values))
        summed = map_tables(lambda x: x, lambda x: jnp.sum(x, 0, dtype=x.dtype), sent)
        return add_rows(part, messages.rows, summed)

    return jax.tree.map(add, total, messages.messages, is_leaf=lambda node: is_table(node) or is_same_rows(node))


def add_same_rows(table: jax.Array, rows: jax.Array, values: jax.Array) -> jax.Array:
    """Adds row c of `values` [W, ...] to each of the rows of client c, which lie end to end in `rows` [R].

    As a product with who holds what, where a client holds many of the rows: a scatter reads and writes the table once
    for each row that is held. Neither makes an array of the size of the table, or of all rows that are held.
    """
    clients = values.shape[0]
    held, flat = rows.size // clients, values.reshape(clients, -1)
    if held * DENSE < table.shape[0]:
        by_client = rows.reshape(clients, held)
        return jax.lax.fori_loop(0, clients, lambda c, table: table.at[by_client[c]].add(values[c], mode="drop"), table)
    who = jnp.repeat(jnp.arange(clients), held)
    holds = jnp.zeros((clients, table.shape[0]), values.dtype).at[who, rows].add(1, mode="drop")

    def add(low, height, table):
        part = jax.lax.dynamic_slice_in_dim(holds, low, height, 1)
        added = jnp.matmul(part.T, flat, precision=jax.lax.Precision.HIGHEST)  # accelerators would round to bfloat16
        added = jax.lax.dynamic_slice_in_dim(table, low, height) + added.reshape(height, *table.shape[1:])
        return jax.lax.dynamic_update_slice_in_dim(table, added, low, 0)

    # some rows at a time, which is in place: a second table for each block of clients would cost more than the product
    height = min(TILE, table.shape[0])
    whole, rest = divmod(table.shape[0], height)
    table = jax.lax.fori_loop(0, whole, lambda i, table: add(i * height, height, table), table)
    return add(whole * height, rest, table) if rest else table


def total_shapes(messages: Messages, rows: int) -> Tree:
    """Shapes of the sum of messages (tables [R, ...], others [W, ...]), whose tables have so many rows."""
    shape = jax.ShapeDtypeStruct
    sent = jax.eval_shape(lambda x: repeat_rows(x, messages.present.size), messages.messages)
    return map_tables(lambda x: shape((rows, *x.shape[1:]), x.dtype), lambda x: shape(x.shape[1:], x.dtype), sent)


def sum_parts(parts: Tree) -> Tree:
    """The sum over the leading axis of all arrays, in their own dtypes; of bool, whether any is true."""
    return jax.tree.map(lambda x: jnp.sum(x, 0, dtype=x.dtype), parts)


SUM = Aggregator(
    init=lambda messages, capacity: zeros_like(total_shapes(messages, capacity.rows)),
    add=accumulate_messages,
    result=lambda total, rows: total,
    streams=True,
    combine=sum_parts,
)


def sum_messages(messages: Messages, rows: int) -> Tree:
    """The sum of all messages of a round at once, whose tables have so many rows."""
    return SUM.add(SUM.init(messages, Capacity(rows, 0, 0)), messages)


class GatheredMessages(NamedTuple):
    """Messages of several blocks beside each other."""

    messages: Messages
    used: jax.Array  # int []: table rows that are taken


def empty_messages(messages: Messages, slots: int, message_rows: int) -> Messages:
    """Places for what a cohort sends, messages like those given: all are empty, and every id lies past all ends."""
    past = jnp.iinfo(jnp.int32).max

    def full(size, x, value=0):
        return jnp.full((size, *x.shape[1:]), value, x.dtype)

    return Messages(
        messages=map_tables(lambda x: full(message_rows, x), lambda x: full(slots, x), messages.messages),
        client_states=(),
        present=full(slots, messages.present, False),
        slots=full(slots, messages.slots, past),
        ids=full(slots, messages.ids, past),
        rows=full(message_rows, messages.rows, past),
        held=full(message_rows, messages.held, past),
        owner=full(message_rows, messages.owner, past),
        metrics={},
        sizes=full(slots, messages.sizes),
    )


def append_messages(gathered: GatheredMessages, messages: Messages) -> GatheredMessages:
    """Puts the messages of a block beside those that are there: clients at their slots, rows end to end."""
    places, used = gathered

    def by_slot(x, new):
        return x.at[messages.slots].set(new, mode="drop")

    def by_row(x, new):
        return jax.lax.dynamic_update_slice_in_dim(x, new, used, 0)

    beside = places._replace(
        messages=map_tables(by_row, by_slot, places.messages, messages.messages),
        present=by_slot(places.present, messages.present),
        slots=by_slot(places.slots, messages.slots),
        ids=by_slot(places.ids, messages.ids),
        rows=by_row(places.rows, messages.rows),
        held=by_row(places.held, messages.held),
        owner=by_row(places.owner, messages.owner),
    )
    return GatheredMessages(beside, used + messages.rows.size)


def gather_then(rule: Callable[[Messages, int], Tree]) -> Aggregator:
    """An aggregator that keeps all messages of a cohort, and applies a rule to all of them at the end.

    Args:
        rule: rule(messages, rows) -> the aggregate, whose tables have so many rows; see `jaxfed.channels.median` for
            one. `messages` has leaves of tables [R, ...] with `rows` [R] and `owner` [R], and other leaves [W, ...]
            with `present` [W], of R table rows and W clients.

    Returns:
        The aggregator.

    Example:
        >>> import jaxfed as jf, jax.numpy as jnp
        >>> largest = jf.gather_then(lambda messages, rows: jnp.max(messages.messages, 0))
        >>> jf.link(aggregator=largest, name="largest").aggregator.streams
        False
    """
    return Aggregator(
        init=lambda messages, capacity: GatheredMessages(
            empty_messages(messages, capacity.slots, capacity.message_rows), jnp.int32(0)
        ),
        add=append_messages,
        result=lambda gathered, rows: rule(gathered.messages, rows),
        streams=False,
    )
