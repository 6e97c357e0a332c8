"""The way of an update from a client to the server: links, each with an end on either side, and `chain`.

A link owns what it does on the client (`encode`) and what undoes it on the server (`decode`). `chain(a, b, c)`
encodes left to right, aggregates once, decodes right to left. Read it as model -> wire.
"""

import math
from collections.abc import Callable

import jax
import optax

from jaxfed.core.channel_checks import check_decoded, check_encoded, check_order, message_shapes, read_shapes
from jaxfed.core.link import (
    Channel,
    Claims,
    broadcast_state,
    decode_total,
    encode_message,
    link,
    list_links,
    list_mechanisms,
)
from jaxfed.core.tables import clear_padding, num_rows, repeat_rows
from jaxfed.core.tree import zeros_like
from jaxfed.core.types import Mean, Mechanism, Tree


def chain(*links: Channel) -> Channel:
    """Joins links into one. Server state, link state and download are tuples in the order of the links.

    Args:
        links: The links, from the model to the wire; chains among them are taken apart.

    Returns:
        The channel. On clients it encodes from left to right, at the server it decodes from right to left.

    Raises:
        ValueError: two links need different aggregators (secure sums and robust rules exclude each other), codes cannot
            be read where they are, two links make a mean, or a client could add more than the noise of a link covers.

    Example:
        >>> import jaxfed as jf
        >>> channel = jf.chain(jf.channels.mean(count=100), jf.channels.clip(0.5), jf.channels.gaussian(2.0))
        >>> channel.claims.name, channel.claims.is_average
        ('mean, clip, gaussian', True)
    """
    for each in links:
        if not isinstance(each, Channel):
            raise ValueError(
                f"chain: a {type(each).__name__} is no link: pass links one by one, call functions that make them, and "
                "wrap transforms of optax in at_client or at_server"
            )
    links = sum((list_links(each) for each in links), ())
    wanted = {each.aggregator: each.claims.name for each in reversed(links) if each.aggregator}
    if len(wanted) > 1:
        names = ", ".join(reversed(wanted.values()))
        raise ValueError(f"links need different reductions ({names}): keep one of them")
    bounds = check_order(links)

    encode, metrics, decode_message = make_client_side(links, bounds)
    decode, broadcast = make_server_side(links, bounds)
    return Channel(
        make_init(links, bounds),
        encode,
        decode,
        decode_message=decode_message if any(each.decode_message for each in links) else None,
        aggregator=next(iter(wanted), None),
        broadcast=broadcast,
        metrics=metrics if any(each.metrics for each in links) else None,
        claims=join_claims(links),
    )


def make_init(links: tuple[Channel, ...], bounds: list[float]) -> Callable[[Tree], tuple[Tree, Tree]]:
    """The `init` of a chain, which also checks that each link gives back what it says it does."""

    def init(example):
        states, link_states, size = [], [], num_rows(example)
        messages, read = [example], [example]  # as the client sends it so far, and as the server reads that
        for i, each in enumerate(links):
            if not each.claims.by_entry:
                messages[-1], read[-1] = jax.eval_shape(repeat_rows, (messages[-1], read[-1]))
            state, link_state = each.init(messages[-1] if each.encode else read[-1])
            sent = message_shapes(each, messages[-1], state, link_state, size, bounds[i])
            check_encoded(each, messages[-1], sent)
            states.append(state)
            link_states.append(link_state)
            messages.append(sent)
            read.append(read_shapes(links[: i + 1], messages, states))
        check_decoded(links, bounds, read[:-1], states, read[-1])
        return tuple(states), tuple(link_states)

    return init


def make_client_side(links: tuple[Channel, ...], bounds: list[float]) -> tuple[Callable, Callable, Callable]:
    """What a chain does with one message: (`encode`, `metrics`, `decode_message`)."""

    def at_link(client, i):
        """The client as link i knows it."""
        key = client.key if client.key is None else jax.random.fold_in(client.key, i)
        link_state = client.link_state if client.link_state is None else client.link_state[i]
        public = jax.random.fold_in(client.public, i)
        return client._replace(link_state=link_state, key=key, public=public, bound=bounds[i])

    def prepare_message(i, update, client):
        """What link i is given of a message."""
        whole = links[i].encode and not links[i].claims.by_entry
        return clear_padding(repeat_rows(update) if whole else update, client.held)

    def encode_at(i, update, sent, client):
        return encode_message(links[i], prepare_message(i, update, client), sent[i], at_link(client, i))

    def encode(update, sent, client):
        link_states = []
        for i in range(len(links)):
            update, link_state = encode_at(i, update, sent, client)
            link_states.append(link_state)
        return update, tuple(link_states)

    def metrics(update, sent, client):
        seen: dict[str, Mean] = {}
        for i, each in enumerate(links):
            if each.metrics:
                seen |= each.metrics(prepare_message(i, update, client), sent[i], at_link(client, i))
            update, _ = encode_at(i, update, sent, client)
        return seen

    def decode_message(message, sent, client):
        for i, each in reversed(list(enumerate(links))):
            if each.decode_message:
                message = each.decode_message(message, sent[i], at_link(client, i))
        return message

    return encode, metrics, decode_message


def make_server_side(links: tuple[Channel, ...], bounds: list[float]) -> tuple[Callable, Callable]:
    """What a chain does at the server: (`decode`, `broadcast`)."""

    def decode(total, states, round):
        new, info = list(states), dict[str, jax.Array]()
        for i, each in reversed(list(enumerate(links))):
            here = round._replace(key=jax.random.fold_in(round.key, i), bound=bounds[i])
            total, new[i], seen = decode_total(each, total, states[i], here)
            info |= seen
        return total, tuple(new), info

    def broadcast(states):
        return tuple(broadcast_state(each, state) for each, state in zip(links, states, strict=True))

    return decode, broadcast


def join_claims(links: tuple[Channel, ...]) -> Claims:
    """What a chain of links says of itself."""

    def l2_gain(bound):
        for each in links:
            assert each.claims.l2_gain
            bound = each.claims.l2_gain(bound)
        return bound

    def mechanisms(bound):
        found: tuple[Mechanism, ...] = ()
        for each in links:
            found += list_mechanisms(each, bound)
            bound = each.claims.l2_gain(bound) if each.claims.l2_gain else math.inf
        return found

    def some(name):
        return any(getattr(each.claims, name) for each in links)

    hidden = [each.claims.reveals for each in links if each.claims.reveals != "message"]
    return Claims(
        name=", ".join(each.claims.name for each in links),
        l2_gain=l2_gain if all(each.claims.l2_gain for each in links) else None,
        mechanisms=mechanisms if some("mechanisms") else None,
        reveals="sum and rows" if "sum and rows" in hidden else hidden[0] if hidden else "message",
        needs_all_rows=some("needs_all_rows"),
        by_entry=all(each.claims.by_entry for each in links),
        is_average=some("is_average"),
        reads_cohort_size=some("reads_cohort_size"),
        links=links,
    )


def at_client(transform: optax.GradientTransformation) -> Channel:
    """Runs a stateless transform of Optax on each update before it is sent (clipping, scaling, ...).

    Norms are those of the dense update: the rows that a client does not hold are zero in it.

    Args:
        transform: The transform. It starts anew for every update.

    Returns:
        The link.

    Example:
        >>> import jaxfed as jf, jax.numpy as jnp, optax
        >>> from types import SimpleNamespace
        >>> half, client = jf.at_client(optax.scale(0.5)), SimpleNamespace(link_state=())
        >>> float(half.encode(jnp.array(3.0), (), client)[0])
        1.5
    """
    return link(
        lambda update, sent, client: (transform.update(update, transform.init(update))[0], client.link_state),
        name="at_client",
    )


def at_server(transform: optax.GradientTransformation) -> Channel:
    """Runs any transform of Optax on the aggregate. Its state is server state.

    Args:
        transform: The transform.

    Returns:
        The link.

    Example:
        >>> import jaxfed as jf, jax.numpy as jnp, optax
        >>> momentum = jf.at_server(optax.trace(0.5))
        >>> state, _ = momentum.init(jnp.array(0.0))
        >>> _, state, _ = momentum.decode(jnp.array(3.0), state, None)
        >>> float(momentum.decode(jnp.array(0.0), state, None)[0])
        1.5
    """

    def decode(total, state, round):
        total, state = transform.update(total, state)
        return total, state, {}

    def init(example):
        return transform.init(zeros_like(example)), ()

    return link(decode=decode, init=init, is_average=False, name="at_server")
