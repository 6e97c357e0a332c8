"""What `chain` checks: that links stand in a sound order, and that each gives back what it says it does."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxfed.core.aggregate import SUM
from jaxfed.core.link import Channel, broadcast_state, encode_message
from jaxfed.core.tables import is_table, num_rows, take_rows
from jaxfed.core.types import Broadcast, ClientView, RoundView, Tree


def check_order(links: Sequence[Channel]) -> list[float]:
    """The largest norm that a message can have where it comes to each link.

    Raises:
        ValueError: an order that is not sound.
    """
    check_readers(links)
    bound, noise_bound, noised = math.inf, math.inf, ""
    bounds = []
    for claims in (each.claims for each in links):
        bounds.append(bound)
        if claims.check:
            claims.check(bound)
        if claims.mechanisms:
            claims.mechanisms(bound)  # raises where nothing bounds what comes in
        bound = claims.l2_gain(bound) if claims.l2_gain else math.inf
        if noised and not bound <= noise_bound * (1 + 1e-6):
            raise ValueError(
                f"{claims.name} after {noised} lets one client add more than the noise of {noised} covers: "
                f"put {claims.name} before the clipping, or bound what it does"
            )
        if claims.mechanisms:
            noised, noise_bound = claims.name, bound
    for i, each in enumerate(links):
        check_neighbours(each, links[i + 1 :], bool(noised))
    return bounds


def check_readers(links: Sequence[Channel]) -> None:
    """Raises ValueError for a link that must read each message, beside a link that changes or hides messages."""
    for each in (each for each in links if each.claims.needs_messages):
        others = [x for x in links if x is not each]
        changed = [x for x in others if x.encode and not x.decode_message]
        hidden = [x for x in others if x.claims.reveals != "message" or x.claims.mechanisms]
        for other in (*hidden, *changed, *(x for x in others if x.aggregator not in (None, SUM))):
            raise ValueError(
                f"{each.claims.name} needs each client's message as it was sent, and {other.claims.name} hides or "
                f"changes it: take {each.claims.needs_messages}, or leave {other.claims.name} out"
            )


def check_neighbours(each: Channel, after: Sequence[Channel], private: bool) -> None:
    """Raises ValueError for a link that cannot stand before those `after` it."""
    name = each.claims.name
    means = [x.claims.name for x in after if x.claims.is_average]
    if each.decode_message and (hiding := [x.claims.name for x in after if x.claims.reveals != "message"]):
        raise ValueError(
            f"{name} must be opened one message at a time, and {hiding[0]} hides all but the sum: "
            "use codes that add up, or give up one of them"
        )
    if each.decode_message and (others := [x.claims.name for x in after if x.encode and not x.decode_message]):
        raise ValueError(f"{others[0]} cannot work on the codes of {name}: put {name} last")
    if each.claims.is_average and means:
        raise ValueError(f"{name} and {means[0]} both make a mean of the sum: keep one of them")
    if each.aggregator is SUM and means:
        raise ValueError(f"{name} reads the sum, and {means[0]} makes a mean of it: put {means[0]} before")
    if each.claims.reads_cohort_size and private:
        raise ValueError(f"{name} divides by how many reported, which is private: set its count to the expected cohort")


def shape_client(link_state: Tree, rows: int, size: int, bound: float = math.inf, slots: int = 2) -> ClientView:
    """A stand-in client that holds `rows` rows, for shape evaluation only."""
    key = jax.random.key(0)
    one, ids = jnp.float32(1), jnp.zeros(rows, jnp.int32)
    return ClientView(link_state, key, key, jnp.int32(0), one, one, ids, size, jnp.arange(slots), bound=bound)


def message_shapes(
    channel: Channel, example: Tree, state: Tree, link_state: Tree, size: int, bound: float = math.inf
) -> Tree:
    """Shapes of one message for an update like `example`, whose tables have as many rows as the client holds.

    Raises:
        ValueError: an `encode` that does not give back (message, link_state).
    """

    def encode(update, state, link_state):
        rows = num_rows(update)
        sent = take_rows(broadcast_state(channel, state), jnp.zeros(rows, jnp.int32))
        encoded = encode_message(channel, update, sent, shape_client(link_state, rows, size, bound))
        if type(encoded) is not tuple or len(encoded) != 2:
            raise ValueError(
                f"{channel.claims.name}: encode gave back {type(encoded).__name__}, not the pair (message, "
                "link_state): end it with `return message, client.link_state`"
            )
        return encoded

    sent, kept = jax.eval_shape(encode, example, state, link_state)
    if shapes_of(kept) != shapes_of(link_state):
        raise ValueError(
            f"{channel.claims.name}: encode gave back a link state of another shape than init: {describe_shapes(kept)}"
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
    holds, or another shape that neither `decode` nor `decode_message` takes back.

    Args:
        example, sent: shapes of what the link is given and of what it makes of it.
    """
    rows, name = num_rows(example), channel.claims.name
    for node in jax.tree.leaves(sent, is_leaf=is_table):
        if is_table(node) and any(x.shape[:1] != (rows,) for x in jax.tree.leaves(node)):
            raise ValueError(
                f"{name}: encode made a table of {describe_shapes(node)} out of {rows} rows: a table keeps a row for "
                "each that the client holds"
            )
    if not (channel.decode or channel.decode_message) and shapes_of(sent) != shapes_of(example):
        raise ValueError(
            f"{name}: encode changes the shape of a message ({describe_shapes(sent)}) and nothing undoes it: give the "
            "link a decode, or a decode_message"
        )


def read_shapes(links: Sequence[Channel], messages: Sequence[Tree], states: Sequence[Tree]) -> Tree:
    """Shapes of what the server makes of one message before it aggregates: every code is read.

    messages: shapes of what each link is given, and last of what is sent.
    """
    first = messages[0]
    size, drift = num_rows(first), first.params if isinstance(first, Broadcast) else ()

    def read(message, states, drift):
        client = shape_client(None, size, size)._replace(key=None, drift=drift)
        for each, state in reversed(list(zip(links, states, strict=True))):
            if each.decode_message:
                message = each.decode_message(message, broadcast_state(each, state), client)
        return message

    return jax.eval_shape(read, messages[-1], tuple(states), drift)


def check_decoded(
    links: Sequence[Channel], bounds: Sequence[float], given: Sequence[Tree], states: Sequence[Tree], read: Tree
) -> None:
    """Raises ValueError for a link whose `decode` does not give back what its `encode` was given.

    Args:
        given: shapes of what each link is given, as the server reads it: every code to its left is undone.
        read: shapes of a message as the server adds it.
    """
    total = read
    for each, bound, example, state in reversed(list(zip(links, bounds, given, states, strict=True))):
        if not each.decode:
            continue
        name = each.claims.name

        def decode(total, state, decode=each.decode, bound=bound):
            view = RoundView(jax.random.key(0), jnp.zeros(2, jnp.int32), jnp.zeros(2, bool), bound)
            return decode(total, state, view)

        try:
            decoded = jax.eval_shape(decode, total, state)
        except (ValueError, TypeError) as error:
            if f"{name}:" in str(error):
                raise
            first = str(error).strip().split("\n")[0]
            raise ValueError(
                f"{name}: decode cannot read a sum of {describe_shapes(total)} with a state of "
                f"{describe_shapes(state)}: {first}"
            ) from error
        if type(decoded) is not tuple or len(decoded) != 3:
            raise ValueError(f"{name}: decode gave back something else than (total, state, info)")
        total = decoded[0]
        back, wanted = (x._replace(extra=()) if isinstance(x, Broadcast) else x for x in (total, example))
        if shapes_of(back) != shapes_of(wanted):
            raise ValueError(
                f"{name}: decode gave back {describe_shapes(back)} for an update of {describe_shapes(wanted)}: it "
                "must have the shape of what encode was given"
            )
        if shapes_of(decoded[1]) != shapes_of(state):
            raise ValueError(
                f"{name}: decode gave back a state of another shape than init: {describe_shapes(decoded[1])}"
            )
