"""The way of an update from a client to the server: links, each with an end on either side, and `chain`.

A link owns what it does on the client (`encode`) and what undoes it on the server (`decode`). `chain(a, b, c)`
encodes left to right, reduces once, decodes right to left. Read it as model -> wire.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxfed.rows import add, catalogue, lift, take
from jaxfed.tree import nbytes, wide, zeros
from jaxfed.types import Client, Part, Round, Tree


class Channel(NamedTuple):
    """Left of `reduce` tables are slices [K, ...], right of it they are whole [N, ...].

    init(example) -> (state, memory): from what the link will see, as arrays or shapes.
    encode(message, sent, client) -> (message, memory): on the client; `sent` is what it downloaded of the state.
    decode(total, state, round) -> (total, state, info): on the server. State changes only here.
    send(state) -> the part of the state that every client downloads (its tables: the client's rows).
    reduce(parts, size) -> total: None where any will do; see `total`.
    hides: the server learns nothing but the reduction.
    """

    init: Callable[[Tree], tuple[Tree, Tree]]
    encode: Callable[[Tree, Tree, Client], tuple[Tree, Tree]]
    decode: Callable[[Tree, Tree, Round], tuple[Tree, Tree, dict]]
    send: Callable[[Tree], Tree] = lambda state: ()
    reduce: Callable[[Part, int], Tree] | None = None
    hides: bool = False


def accumulate(running: Tree, part: Part) -> Tree:
    """Adds one part to a running total: the only scatter of messages in a round. Integers wrap: a ring sum."""
    summed = lift(lambda x: x, lambda x: jnp.sum(x, 0, dtype=x.dtype), part.messages)
    return add(running, part.rows, summed)


def empty(messages: Tree, size: int) -> Tree:
    """Shapes of the total of `messages` (tables [R, ...], others [W, ...]) over a catalogue of `size` rows."""
    shape = jax.ShapeDtypeStruct
    return lift(lambda x: shape((size, *x.shape[1:]), x.dtype), lambda x: shape(x.shape[1:], x.dtype), messages)


def total(part: Part, size: int) -> Tree:
    """Sum over the cohort, the reduction of nearly every link."""
    return accumulate(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), empty(part.messages, size)), part)


def link(encode=None, decode=None, init=None, **needs) -> Channel:
    """Lifts plain functions to a Channel; whatever is left out is identity."""
    return Channel(
        init or (lambda example: ((), ())),
        encode or (lambda update, sent, client: (update, client.memory)),
        decode or (lambda total, state, round: (total, state, {})),
        **needs,
    )


def chain(*links: Channel) -> Channel:
    """Joins links into one. State, memory and download are tuples in the order of the links.

    Raises ValueError when two links need different reductions (secure sums and robust rules exclude each other).
    """
    wanted = {each.reduce for each in links} - {None}
    if len(wanted) > 1:
        names = ", ".join(sorted(getattr(f, "__qualname__", repr(f)) for f in wanted))
        raise ValueError(f"links need different reductions ({names}): keep one of them")

    def init(example):
        states, memories, size = [], [], catalogue(example)
        for each in links:
            state, memory = each.init(example)
            example = message(each, example, state, memory, size)
            states.append(state)
            memories.append(memory)
        return tuple(states), tuple(memories)

    def encode(update, sent, client):
        memories = []
        for i, each in enumerate(links):
            key, public = jax.random.fold_in(client.key, i), jax.random.fold_in(client.public, i)
            mine = client._replace(memory=client.memory[i], key=key, public=public)
            update, memory = each.encode(update, sent[i], mine)
            memories.append(memory)
        return update, tuple(memories)

    def decode(total, states, round):
        new: list[Tree] = []
        info: dict[str, jax.Array] = {}
        for i, each in reversed(list(enumerate(links))):
            mine = round._replace(key=jax.random.fold_in(round.key, i))
            total, state, seen = each.decode(total, states[i], mine)
            new.append(state)
            info |= seen
        return total, tuple(reversed(new)), info

    def send(states):
        return tuple(each.send(state) for each, state in zip(links, states, strict=True))

    return Channel(init, encode, decode, send, wanted.pop() if wanted else None, any(each.hides for each in links))


def probe(memory: Tree, rows: int, size: int, slots: int = 2) -> Client:
    """A stand-in client that holds `rows` rows, for shape evaluation only."""
    key = jax.random.key(0)
    one, ids = jnp.float32(1), jnp.zeros(rows, jnp.int32)
    return Client(memory, key, key, jnp.int32(0), one, one, ids, size, jnp.arange(slots))


def message(channel: Channel, example: Tree, state: Tree, memory: Tree, size: int) -> Tree:
    """Shapes of one message for an update like `example`, whose tables have as many rows as the client holds."""

    def encode(update, state, memory):
        rows = catalogue(update)
        sent = take(channel.send(state), jnp.zeros(rows, jnp.int32))
        return channel.encode(update, sent, probe(memory, rows, size))[0]

    return jax.eval_shape(encode, example, state, memory)


class Wire(NamedTuple):
    """What crosses the wire for one client and one round."""

    up: int  # bytes it sends, row ids included
    down: int  # bytes it receives, its request for rows included
    sees: str  # what the server learns of it: update+rows | update | sum


def wire(channel: Channel, shared: Tree, rows: int) -> Wire:
    """Derived from the chain and from shapes, for a client that holds `rows` rows.

    A client that asks for its rows has shown them, whatever hides its upload: one that sends no rows, downloads whole
    tables.
    """
    size = catalogue(shared)
    state, _ = jax.eval_shape(channel.init, jax.eval_shape(wide, shared))
    down = shared, channel.send(state)
    mine = jax.eval_shape(partial(take, ids=jnp.zeros(rows, jnp.int32)), down)
    update = jax.eval_shape(wide, mine[0])  # updates are float32, whatever the model is stored in
    memory = jax.eval_shape(channel.init, update)[1]
    sent = message(channel, update, state, memory, size)
    shows_rows = catalogue(sent) > 0
    ids = jnp.dtype(jnp.int32).itemsize * rows if shows_rows else 0
    received = nbytes(mine) + ids if shows_rows else nbytes(down)
    sees = "sum" if channel.hides else "update+rows" if shows_rows else "update"
    return Wire(nbytes(sent) + ids, received, sees)


def at_client(transform: optax.GradientTransformation) -> Channel:
    """Runs a stateless optax transform on each update before it is sent (clipping, scaling, ...).

    Norms are those of the dense update: the rows a client does not hold are zero in it.
    """
    return link(lambda update, sent, client: (transform.update(update, transform.init(update))[0], client.memory))


def at_server(transform: optax.GradientTransformation) -> Channel:
    """Runs any optax transform on the aggregate; its state is server state."""

    def decode(total, state, round):
        total, state = transform.update(total, state)
        return total, state, {}

    return link(decode=decode, init=lambda example: (transform.init(zeros(example)), ()))
