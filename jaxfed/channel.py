"""The way of an update from a client to the server: links, each with an end on either side, and `chain`.

A link owns what it does on the client (`encode`) and what undoes it on the server (`decode`). `chain(a, b, c)`
encodes left to right, reduces once, decodes right to left. Read it as model -> wire.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxfed.rows import add, catalogue, clear_padding, lift, take
from jaxfed.tree import zeros
from jaxfed.types import Client, Mean, Mechanism, Part, Round, Tree

# streams of a round's key that are no link's: links have the first ones, and what a link makes of its own is public
STORE, DOWN, CLIENTS = ((1 << 31) - n for n in (1, 2, 3))


class Channel(NamedTuple):
    """Left of `reduce` tables are slices [K, ...], right of it they are whole [N, ...].

    init(example) -> (state, memory): from what the link will see, as arrays or shapes.
    encode(message, sent, client) -> (message, memory): on the client; `sent` is what it downloaded of the state.
    decode(total, state, round) -> (total, state, info): on the server. State changes only here.
    send(state) -> the part of the state that every client downloads (its tables: the client's rows).
    open(message, sent, client) -> message: on the server, one message at a time before the sum, for codes that mean
        something alone only; the client has neither memory nor a key of its own there. None: nothing to open.
    watch(message, sent, client) -> {name: Mean}: the simulator's view of what the link does to one client's message.
    reduce(part, size) -> total: None where any will do; see `total`. Compiled into the round: see `collect` for what
    another one than the sum is given.
    hides: the server learns nothing but the reduction.
    union: beside what `hides` says, it is public which rows the cohort holds together, and only they are sent.
    norm(x) -> the largest L2 norm of what leaves the client, where what came in has norm x at most, and a decode that
        enlarges nothing; None: nobody says.
    private: what it releases under noise. A chain gives noise links the norm at their place: see `at`.
    at(norm) -> the link, for what comes in; None: the link itself.
    whole: it must see every row, also those that no client holds.
    counts: its result depends on how many reported.
    weighs: it makes a mean of the sum, and so comes before (in a decode: after) those that read the sum itself.
    encodes, decodes: whether it does anything there.
    """

    init: Callable[[Tree], tuple[Tree, Tree]]
    encode: Callable[[Tree, Tree, Client], tuple[Tree, Tree]]
    decode: Callable[[Tree, Tree, Round], tuple[Tree, Tree, dict]]
    send: Callable[[Tree], Tree] = lambda state: ()
    open: Callable[[Tree, Tree, Client], Tree] | None = None
    watch: Callable[[Tree, Tree, Client], dict[str, Mean]] | None = None
    reduce: Callable[[Part, int], Tree] | None = None
    hides: bool = False
    union: bool = False
    norm: Callable[[float], float] | None = None
    private: tuple[Mechanism, ...] = ()
    at: Callable[[float], "Channel"] | None = None
    whole: bool = False
    counts: bool = False
    weighs: bool = False
    encodes: bool = True
    decodes: bool = True
    name: str = "link"
    links: tuple["Channel", ...] = ()  # of a chain, as they were given


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


def vacant(part: Part, slots: int, long: int) -> Part:
    """Room for what a cohort of `slots` clients and `long` rows sends, messages like those of `part`: nobody is there
    yet, and every id lies past all ends."""
    past = jnp.iinfo(jnp.int32).max

    def full(size, x, value=0):
        return jnp.full((size, *x.shape[1:]), value, x.dtype)

    return Part(
        messages=lift(lambda x: full(long, x), lambda x: full(slots, x), part.messages),
        memory=(),
        present=full(slots, part.present, False),
        slots=full(slots, part.slots, past),
        ids=full(slots, part.ids, past),
        rows=full(long, part.rows, past),
        held=full(long, part.held, past),
        owner=full(long, part.owner, past),
        metrics={},
        sizes=full(slots, part.sizes),
    )


def collect(room: Part, part: Part, at: jax.Array) -> Part:
    """Puts a part beside those that are in the room: clients at their slots, rows end to end, these from `at` on."""

    def by_slot(x, new):
        return x.at[part.slots].set(new, mode="drop")

    def by_row(x, new):
        return jax.lax.dynamic_update_slice_in_dim(x, new, at, 0)

    return room._replace(
        messages=lift(by_row, by_slot, room.messages, part.messages),
        present=by_slot(room.present, part.present),
        slots=by_slot(room.slots, part.slots),
        ids=by_slot(room.ids, part.ids),
        rows=by_row(room.rows, part.rows),
        held=by_row(room.held, part.held),
        owner=by_row(room.owner, part.owner),
    )


def link(encode=None, decode=None, init=None, **needs) -> Channel:
    """Lifts plain functions to a Channel; whatever is left out is identity."""
    plain = encode is None and decode is None
    return Channel(
        init or (lambda example: ((), ())),
        encode or (lambda update, sent, client: (update, client.memory)),
        decode or (lambda total, state, round: (total, state, {})),
        **{"norm": (lambda x: x) if plain else None, "encodes": bool(encode), "decodes": bool(decode)} | needs,
    )


def placed(links: tuple[Channel, ...]) -> tuple[Channel, ...]:
    """Links that know the norm of what comes to them. Raises ValueError for orders that are not sound."""
    norm, bound, noised = math.inf, math.inf, ""
    made: list[Channel] = []
    for each in links:
        each = each.at(norm) if each.at else each
        norm = each.norm(norm) if each.norm else math.inf
        if noised and not norm <= bound * (1 + 1e-6):
            raise ValueError(
                f"{each.name} after {noised} lets one client add more than the noise of {noised} covers: "
                f"put {each.name} before the clipping, or bound what it does"
            )
        if each.private:
            noised, bound = each.name, norm
        made.append(each)
    for i, each in enumerate(made):
        after = made[i + 1 :]
        if each.open and (hiding := [x.name for x in after if x.hides]):
            raise ValueError(
                f"{each.name} must be opened one message at a time, and {hiding[0]} hides all but the sum: "
                "use codes that add up, or give up one of them"
            )
        if each.open and (others := [x.name for x in after if x.encodes and not x.open]):
            raise ValueError(f"{others[0]} cannot work on the codes of {each.name}: put {each.name} last")
        if each.reduce is total and (means := [x.name for x in after if x.weighs]):
            raise ValueError(f"{each.name} reads the sum, and {means[0]} makes a mean of it: put {means[0]} before")
        if each.counts and any(x.private for x in made):
            raise ValueError(
                f"{each.name} divides by how many reported, which is private: set its count to the expected cohort"
            )
    return tuple(made)


def chain(*links: Channel) -> Channel:
    """Joins links into one. State, memory and download are tuples in the order of the links.

    Raises ValueError when two links need different reductions (secure sums and robust rules exclude each other), when
    codes cannot be opened where they are, and when a client could add more than the noise of a link covers.
    """
    unplaced = sum((each.links or (each,) for each in links), ())
    wanted = {each.reduce: each.name for each in reversed(unplaced) if each.reduce}
    if len(wanted) > 1:
        names = ", ".join(reversed(wanted.values()))
        raise ValueError(f"links need different reductions ({names}): keep one of them")
    links = placed(unplaced)

    def init(example):
        states, memories, size = [], [], catalogue(example)
        for each in links:
            state, memory = each.init(example)
            example = message(each, example, state, memory, size)
            states.append(state)
            memories.append(memory)
        return tuple(states), tuple(memories)

    def own(client, i):
        """The client as link i knows it."""
        key = client.key if client.key is None else jax.random.fold_in(client.key, i)
        memory = client.memory if client.memory is None else client.memory[i]
        return client._replace(memory=memory, key=key, public=jax.random.fold_in(client.public, i))

    def encode(update, sent, client):
        memories = []
        for i, each in enumerate(links):
            update, memory = each.encode(clear_padding(update, client.held), sent[i], own(client, i))
            memories.append(memory)
        return update, tuple(memories)

    def watch(update, sent, client):
        seen: dict[str, Mean] = {}
        for i, each in enumerate(links):
            update = clear_padding(update, client.held)
            seen |= each.watch(update, sent[i], own(client, i)) if each.watch else {}
            update, _ = each.encode(update, sent[i], own(client, i))
        return seen

    def open(update, sent, client):
        for i, each in reversed(list(enumerate(links))):
            update = each.open(update, sent[i], own(client, i)) if each.open else update
        return update

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

    def some(name):
        return any(getattr(each, name) for each in links)

    return Channel(
        init,
        encode,
        decode,
        send,
        open=open if some("open") else None,
        watch=watch if some("watch") else None,
        reduce=next(iter(wanted), None),
        hides=some("hides"),
        union=some("union"),
        norm=(lambda x: through(links, x)) if all(each.norm for each in links) else None,
        private=sum((each.private for each in links), ()),
        whole=some("whole"),
        counts=some("counts"),
        weighs=some("weighs"),
        encodes=some("encodes"),
        decodes=some("decodes"),
        name=", ".join(each.name for each in links),
        links=unplaced,
    )


def through(links: tuple[Channel, ...], norm: float) -> float:
    """The norm of what leaves the last of some links that all say."""
    for each in links:
        assert each.norm
        norm = each.norm(norm)
    return norm


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
