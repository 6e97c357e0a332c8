"""`Channel`: what a link does, and `Claims`: what it says of itself."""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

from jaxfed.core.aggregate import Aggregator
from jaxfed.core.recipe import Recipe
from jaxfed.core.types import ClientView, Mean, Mechanism, RoundView, Tree

Reveals = Literal["message", "sum", "sum and rows"]


class Claims(NamedTuple):
    """What a link says of itself: what `chain` checks, and the accountant and the prices rest on.

    Args:
        name: What it is called in errors and summaries.
        l2_gain: l2_gain(bound) -> the largest L2 norm of what leaves the client, where what comes in has a norm of at
            most `bound`; its decode must not enlarge anything then. None: nobody says.
        mechanisms: mechanisms(bound) -> what it releases under noise, where messages of norm `bound` come in. It raises
            ValueError where that bounds nothing. None: no noise.
        reveals: What the server learns of the messages: each one ("message"), the aggregate alone ("sum"), or also
            which rows the cohort holds together ("sum and rows"); then only these are sent.
        needs_all_rows: Whether it must see every row, also those that no client holds.
        by_entry: Whether what it makes of one number of a message depends on no other one.
        is_average: Whether it makes a mean of the sum.
        reads_cohort_size: Whether its result depends on how many clients reported.
        needs_messages: Not empty where the link must read each client's message as it was sent: what an error says to
            take instead, beside links that hide or change messages. "": it needs no such message.
        check: check(bound): raises ValueError for a bound that it cannot take.
        links: Of a chain, its links as they were given.
        recipe: The call that made the link, see `Recipe`.

    Example:
        >>> import jaxfed as jf
        >>> jf.Claims(name="half", l2_gain=lambda bound: bound / 2).l2_gain(3.0)
        1.5
    """

    name: str = "link"
    l2_gain: Callable[[float], float] | None = None
    mechanisms: Callable[[float], tuple[Mechanism, ...]] | None = None
    reveals: Reveals = "message"
    needs_all_rows: bool = False
    by_entry: bool = False
    is_average: bool = False
    reads_cohort_size: bool = False
    needs_messages: str = ""
    check: Callable[[float], None] | None = None
    links: tuple["Channel", ...] = ()
    recipe: Recipe | None = None


class Channel(NamedTuple):
    """What a link, or a chain of them, does. `jaxfed.link` makes one from some of these functions.

    Left of the aggregator tables are slices [K, ...], right of it they are whole [N, ...]. `client` and `round` know
    the link's own state and keys, and `bound`: the largest norm that a message can have where it comes to the link
    (`Claims.l2_gain` of the links before).

    Args:
        init: init(example) -> (state, link_state), of the server and of each client. `example` is what the link will
            see, as arrays or shapes: a client's message, or, for a link that does nothing on the client, what the
            server reads of it.
        encode: encode(message, sent, client) -> (message, link_state), on the client; `sent` is what it downloaded of
            the state.
        decode: decode(total, state, round) -> (total, state, info), on the server. State changes only here.
        decode_message: decode_message(message, sent, client) -> message, on the server, one message at a time before
            the sum: for codes that mean something alone only. The client has neither link state nor a key of its own
            there.
        aggregator: How messages become one. None: any will do.
        broadcast: broadcast(state) -> the part of the state that every client downloads (of its tables, the client's
            rows).
        metrics: metrics(message, sent, client) -> {name: Mean}: what the link does to one client's message, which a
            simulation may look at.
        claims: What it says of itself.

    Example:
        >>> import jaxfed as jf
        >>> jf.Channel(init=lambda example: ((), ()), claims=jf.Claims(name="nothing")).claims.name
        'nothing'
    """

    init: Callable[[Tree], tuple[Tree, Tree]]
    encode: Callable[[Tree, Tree, ClientView], tuple[Tree, Tree]] | None = None
    decode: Callable[[Tree, Tree, RoundView], tuple[Tree, Tree, dict]] | None = None
    decode_message: Callable[[Tree, Tree, ClientView], Tree] | None = None
    aggregator: Aggregator | None = None
    broadcast: Callable[[Tree], Tree] | None = None
    metrics: Callable[[Tree, Tree, ClientView], dict[str, Mean]] | None = None
    claims: Claims = Claims()


def link(
    encode: Callable[[Tree, Tree, ClientView], tuple[Tree, Tree]] | None = None,
    decode: Callable[[Tree, Tree, RoundView], tuple[Tree, Tree, dict]] | None = None,
    init: Callable[[Tree], tuple[Tree, Tree]] | None = None,
    *,
    decode_message: Callable[[Tree, Tree, ClientView], Tree] | None = None,
    aggregator: Aggregator | None = None,
    broadcast: Callable[[Tree], Tree] | None = None,
    metrics: Callable[[Tree, Tree, ClientView], dict[str, Mean]] | None = None,
    is_average: bool | None = None,
    **claims: Any,
) -> Channel:
    """Makes a link of plain functions, see `Channel`; what is left out does nothing.

    Args:
        encode: encode(message, sent, client) -> (message, link_state), on the client.
        decode: decode(total, state, round) -> (total, state, info), on the server.
        init: init(example) -> (state, link_state), of the server and of each client. Left out: there is no state.
        decode_message: decode_message(message, sent, client) -> message, on the server, before the sum.
        aggregator: How messages become one. None: any will do.
        broadcast: broadcast(state) -> the part of the state that every client downloads.
        metrics: metrics(message, sent, client) -> {name: Mean}.
        is_average: Whether `decode` makes a mean of the sum. A link with a `decode` must say: noise to its left would
            be that of a mean.
        claims: Further fields of `Claims`, such as `name` and `l2_gain`.

    Returns:
        The link.

    Raises:
        ValueError: there is a `decode` without `is_average`.

    Example:
        >>> import jaxfed as jf
        >>> half = jf.link(lambda update, sent, client: (update / 2, client.link_state), name="half")
        >>> half.claims.name
        'half'
    """
    if unknown := claims.keys() - set(Claims._fields):
        raise ValueError(f"link: no claim {min(unknown)!r}: there are {', '.join(Claims._fields)}")
    if claims.get("reveals", "message") not in get_args(Reveals):
        raise ValueError(f"link: reveals is {claims['reveals']!r}: choose one of {', '.join(get_args(Reveals))}")
    if decode is not None and is_average is None:
        raise ValueError(
            f"{claims.get('name', 'link')}: a link with a decode must say whether it makes a mean of the sum: pass "
            "is_average=True or is_average=False"
        )
    if encode is None and decode is None and decode_message is None:
        claims = {"l2_gain": lambda bound: bound} | claims
    all_claims = Claims(is_average=bool(is_average), **claims)
    start = init or (lambda example: ((), ()))
    return Channel(start, encode, decode, decode_message, aggregator, broadcast, metrics, all_claims)


def list_links(channel: Channel) -> tuple[Channel, ...]:
    """The links of a chain; a link alone is one."""
    return channel.claims.links or (channel,)


def list_mechanisms(channel: Channel, bound: float = math.inf) -> tuple[Mechanism, ...]:
    """What a link or a chain releases under noise, where messages of norm `bound` come in."""
    return channel.claims.mechanisms(bound) if channel.claims.mechanisms else ()


def broadcast_state(channel: Channel, state: Tree) -> Tree:
    """What clients download of a link's state."""
    return channel.broadcast(state) if channel.broadcast else ()


def encode_message(channel: Channel, message: Tree, sent: Tree, client: ClientView) -> tuple[Tree, Tree]:
    """(what a link or chain makes of a client's message, what it keeps there)."""
    return channel.encode(message, sent, client) if channel.encode else (message, client.link_state)


def decode_total(channel: Channel, total: Tree, state: Tree, round: RoundView) -> tuple[Tree, Tree, dict[str, Any]]:
    """(what a link or chain makes of an aggregate, its state after the round, figures)."""
    return channel.decode(total, state, round) if channel.decode else (total, state, {})
