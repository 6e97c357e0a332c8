"""The way of an update from a client to the server: links, each with an end on either side, and `chain`.

A link owns what it does on the client (`encode`) and what undoes it on the server (`decode`). `chain(a, b, c)`
encodes left to right, reduces once, decodes right to left. Read it as model -> wire.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxfed.core.tables import add_rows, clear_padding, is_table, map_tables, num_rows, take_rows
from jaxfed.core.tree import zeros_like
from jaxfed.core.types import Broadcast, ClientView, Mean, Mechanism, Messages, RoundView, Tree


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
    encode: Callable[[Tree, Tree, ClientView], tuple[Tree, Tree]]
    decode: Callable[[Tree, Tree, RoundView], tuple[Tree, Tree, dict]]
    send: Callable[[Tree], Tree] = lambda state: ()
    open: Callable[[Tree, Tree, ClientView], Tree] | None = None
    watch: Callable[[Tree, Tree, ClientView], dict[str, Mean]] | None = None
    reduce: Callable[[Messages, int], Tree] | None = None
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


def accumulate_messages(running: Tree, part: Messages) -> Tree:
    """Adds one part to a running total: the only scatter of messages in a round. Integers wrap: a ring sum."""
    summed = map_tables(lambda x: x, lambda x: jnp.sum(x, 0, dtype=x.dtype), part.messages)
    return add_rows(running, part.rows, summed)


def total_shapes(messages: Tree, size: int) -> Tree:
    """Shapes of the total of `messages` (tables [R, ...], others [W, ...]) over a catalogue of `size` rows."""
    shape = jax.ShapeDtypeStruct
    return map_tables(lambda x: shape((size, *x.shape[1:]), x.dtype), lambda x: shape(x.shape[1:], x.dtype), messages)


def sum_messages(part: Messages, size: int) -> Tree:
    """Sum over the cohort, the reduction of nearly every link."""
    return accumulate_messages(
        jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), total_shapes(part.messages, size)), part
    )


def empty_messages(part: Messages, slots: int, long: int) -> Messages:
    """Room for what a cohort of `slots` clients and `long` rows sends, messages like those of `part`: nobody is there
    yet, and every id lies past all ends."""
    past = jnp.iinfo(jnp.int32).max

    def full(size, x, value=0):
        return jnp.full((size, *x.shape[1:]), value, x.dtype)

    return Messages(
        messages=map_tables(lambda x: full(long, x), lambda x: full(slots, x), part.messages),
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


def append_messages(room: Messages, part: Messages, at: jax.Array) -> Messages:
    """Puts a part beside those that are in the room: clients at their slots, rows end to end, these from `at` on."""

    def by_slot(x, new):
        return x.at[part.slots].set(new, mode="drop")

    def by_row(x, new):
        return jax.lax.dynamic_update_slice_in_dim(x, new, at, 0)

    return room._replace(
        messages=map_tables(by_row, by_slot, room.messages, part.messages),
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


def check_order(links: tuple[Channel, ...]) -> tuple[Channel, ...]:
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
        if each.reduce is sum_messages and (means := [x.name for x in after if x.weighs]):
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
    links = check_order(unplaced)

    def init(example):
        states, memories, size, seen = [], [], num_rows(example), [example]
        for each in links:
            state, memory = each.init(seen[-1])
            sent = message_shapes(each, seen[-1], state, memory, size)
            check_encoded(each, seen[-1], sent)
            states.append(state)
            memories.append(memory)
            seen.append(sent)
        check_decoded(links, seen[:-1], states, jax.eval_shape(partial(opened, size), seen, states))
        return tuple(states), tuple(memories)

    def opened(size, seen, states):
        """What the server makes of one message before it adds it; of shapes."""
        drift = seen[0].params if isinstance(seen[0], Broadcast) else ()
        client = shape_client(None, num_rows(seen[0]), size)._replace(key=None, drift=drift)
        return open_message(seen[-1], send(states), client)

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

    def open_message(update, sent, client):
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
        open=open_message if some("open") else None,
        watch=watch if some("watch") else None,
        reduce=next(iter(wanted), None),
        hides=some("hides"),
        union=some("union"),
        norm=(lambda x: gain_through(links, x)) if all(each.norm for each in links) else None,
        private=sum((each.private for each in links), ()),
        whole=some("whole"),
        counts=some("counts"),
        weighs=some("weighs"),
        encodes=some("encodes"),
        decodes=some("decodes"),
        name=", ".join(each.name for each in links),
        links=unplaced,
    )


def gain_through(links: tuple[Channel, ...], norm: float) -> float:
    """The norm of what leaves the last of some links that all say."""
    for each in links:
        assert each.norm
        norm = each.norm(norm)
    return norm


def shape_client(memory: Tree, rows: int, size: int, slots: int = 2) -> ClientView:
    """A stand-in client that holds `rows` rows, for shape evaluation only."""
    key = jax.random.key(0)
    one, ids = jnp.float32(1), jnp.zeros(rows, jnp.int32)
    return ClientView(memory, key, key, jnp.int32(0), one, one, ids, size, jnp.arange(slots))


def message_shapes(channel: Channel, example: Tree, state: Tree, memory: Tree, size: int) -> Tree:
    """Shapes of one message for an update like `example`, whose tables have as many rows as the client holds.

    Raises ValueError for an `encode` that does not give back (message, memory).
    """

    def encode(update, state, memory):
        rows = num_rows(update)
        sent = take_rows(channel.send(state), jnp.zeros(rows, jnp.int32))
        encoded = channel.encode(update, sent, shape_client(memory, rows, size))
        if type(encoded) is not tuple or len(encoded) != 2:
            raise ValueError(
                f"{channel.name}: encode gave back {type(encoded).__name__}, not the pair (message, memory): end it "
                "with `return message, client.memory`"
            )
        return encoded

    sent, kept = jax.eval_shape(encode, example, state, memory)
    if shapes_of(kept) != shapes_of(memory):
        raise ValueError(
            f"{channel.name}: encode gave back a memory of another shape than init: {describe_shapes(kept)}"
        )
    return sent


def shapes_of(tree: Tree) -> Tree:
    """Shape and dtype of every leaf, for comparisons."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), tree)


def describe_shapes(tree: Tree) -> str:
    """The shapes of a tree's leaves, as far as they fit in a message."""
    text = ", ".join(str(tuple(jnp.shape(x))) for x in jax.tree.leaves(tree))
    return text if len(text) < 80 else text[:77] + "..."


def check_encoded(channel: Channel, example: Tree, sent: Tree) -> None:
    """Raises ValueError for a link whose messages the server could not read: tables of other rows than the client
    holds, or another shape that neither `decode` nor `open` takes back. example, sent: shapes of what it is given and
    of what it makes of it."""
    rows = num_rows(example)
    for node in jax.tree.leaves(sent, is_leaf=is_table):
        if is_table(node) and any(x.shape[:1] != (rows,) for x in jax.tree.leaves(node)):
            raise ValueError(
                f"{channel.name}: encode made a table of {describe_shapes(node)} out of {rows} rows: a table keeps "
                "a row for each that the client holds"
            )
    if channel.encodes and not channel.decodes and not channel.open and shapes_of(sent) != shapes_of(example):
        raise ValueError(
            f"{channel.name}: encode changes the shape of a message ({describe_shapes(sent)}) and nothing undoes it: "
            "give the link a decode, or an open"
        )


def check_decoded(links: Sequence[Channel], seen: Sequence[Tree], states: Tree, opened: Tree) -> None:
    """Raises ValueError for a link whose `decode` does not give back what its `encode` was given.

    seen: shapes of what each link is given, a model's update first; opened: of a message as the server adds it.
    """
    round = jax.eval_shape(lambda: RoundView(jax.random.key(0), jnp.zeros(2, jnp.int32), jnp.zeros(2, bool)))
    total = opened
    for each, example, state in reversed(list(zip(links, seen, states, strict=True))):
        decoded = jax.eval_shape(each.decode, total, state, round)
        if type(decoded) is not tuple or len(decoded) != 3:
            raise ValueError(f"{each.name}: decode gave back something else than (total, state, info)")
        total = decoded[0]
        given = [x._replace(extra=()) if isinstance(x, Broadcast) else x for x in (total, example)]
        if each.decodes and shapes_of(given[0]) != shapes_of(given[1]):
            raise ValueError(
                f"{each.name}: decode gave back {describe_shapes(given[0])} for an update of "
                f"{describe_shapes(given[1])}: it must have the shape of what encode was given"
            )
        if shapes_of(decoded[1]) != shapes_of(state):
            raise ValueError(
                f"{each.name}: decode gave back a state of another shape than init: {describe_shapes(decoded[1])}"
            )


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

    return link(decode=decode, init=lambda example: (transform.init(zeros_like(example)), ()))
