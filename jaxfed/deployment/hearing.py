"""What the server makes of the replies of a round: it checks and reads them, adds them up, and moves the model."""

from typing import Any

import jax
import numpy as np

from jaxfed.core.federate import message_capacity
from jaxfed.core.link import broadcast_state
from jaxfed.core.state import State
from jaxfed.core.tables import map_tables, num_rows
from jaxfed.core.types import Tree
from jaxfed.core.wire import open_shapes, unpack_message
from jaxfed.data.packing import pad_rows
from jaxfed.deployment.envelope import (
    NODE,
    Envelope,
    EnvelopeKind,
    read_distinct,
    read_envelopes,
    read_refusal,
    refuse_envelope,
)
from jaxfed.deployment.node_states import take_rows_or_zeros
from jaxfed.deployment.opened_server import EMPTY_ROWS, FederationServer, HeardMessages, RoundRequest
from jaxfed.deployment.party import DeployedPieces
from jaxfed.training.rounds import make_run_keys

TOGETHER = 32  # clients whose messages are opened side by side

LEAST_ROWS = 256  # to which the rows of a block of messages are padded, or to a power of two of them

EMPTY = np.iinfo(np.int32).max


def read_replies(
    server: FederationServer, request: RoundRequest, members: dict[int, np.ndarray], replies: dict[int, bytes]
) -> HeardMessages:
    """Reads what came back. What is wrong is refused with a line, and the rest goes on."""
    heard = HeardMessages({}, set())
    for node, data in sorted(replies.items()):
        heard.answered.update(request.asked.get(node, EMPTY_ROWS).tolist())
        try:
            envelopes = read_envelopes(data)
        except ValueError as error:
            server.say(f"round {request.number + 1}: node {node}: {error}")
            continue
        for each in envelopes:
            try:
                read_reply_envelope(server, request, members.get(node, EMPTY_ROWS), node, each, heard)
            except ValueError as error:
                who = "" if each.client == NODE else f", client {each.client}"
                server.say(f"round {request.number + 1}: node {node}{who}: {error}")
    return heard


def read_reply_envelope(
    server: FederationServer,
    request: RoundRequest,
    clients: np.ndarray,
    node: int,
    each: Envelope,
    heard: HeardMessages,
) -> None:
    """Takes one envelope of a reply. Raises ValueError for one that is refused."""
    party = server.party
    if each.kind == EnvelopeKind.REFUSED:
        raise ValueError(read_refusal(each))
    refuse_envelope(each.client not in clients, "of a client that is not at this node")
    if each.kind == EnvelopeKind.WANTED:
        now = request.number + bool(request.asked)  # what clients of this round hold must not change any more
        refuse_envelope(bool(party.buffered and request.asked), "rows that nobody asked for")
        refuse_envelope(each.round != now, f"rows of round {each.round + 1}")
        server.wanted.setdefault(each.round, {})[each.client] = read_distinct(each.payload, party.size)
        return
    refuse_envelope(each.kind != EnvelopeKind.MESSAGE, f"kind {each.kind.name} is none of a reply")
    refuse_envelope(each.client not in request.asked.get(node, EMPTY_ROWS), "of a client that was not asked")
    refuse_envelope(each.client in heard.messages, "a second message of one client")
    refuse_envelope(each.round != request.number, f"of round {each.round + 1}")
    refuse_envelope(each.digest != request.digest, "of another model")
    like, every = party.message, np.arange(party.size, dtype=np.int32)
    if party.whole and num_rows(open_shapes(like)):
        message, rows = unpack_message(every.tobytes() + each.payload, like, party.size, party.size)
    else:
        message, rows = unpack_message(each.payload, like, each.rows, party.size)
        known = server.wanted.get(request.number, {}).get(each.client, EMPTY_ROWS)
        refuse_envelope(not party.whole and not np.array_equal(rows, known), "of other rows than were asked for")
    heard.messages[each.client] = message, rows


def sum_and_move(server: FederationServer, request: RoundRequest, heard: HeardMessages) -> tuple[State, dict[str, Any]]:
    """Adds the messages in the order of the cohort's slots, and lets the server move the model."""
    party, state, programs = server.party, server.state, server.programs
    touched = list_touched_rows(server, request) if party.lazy else None
    public_key = jax.random.fold_in(make_run_keys(server.seed).rounds, request.number)
    slots = [slot for slot, client in enumerate(request.ids.tolist()) if client in heard.messages]
    asked = np.array([client in heard.answered for client in request.ids.tolist()])
    total_rows, blocks = party.size if touched is None else len(touched), []
    links = broadcast_state(party.channel, state.channel)
    width = choose_width(party, heard)
    for low in range(0, max(len(slots), 1), TOGETHER):
        messages, places = stack_messages(party, request, heard, slots[low : low + TOGETHER], width, touched)
        blocks.append(server.opened(state.shared, links, messages, places, public_key, total_rows))
    needed = sum(block.rows.size for block in blocks)
    capacity = message_capacity(party.plan, blocks[0].rows.size, needed)
    heap = programs.init_accumulator(blocks[0], asked, total_rows, capacity)
    for block in blocks:
        heap = programs.accumulate(heap, block)
    return programs.server_update(state, heap, request.ids.astype(np.int32), asked, touched, server.noise_key, ())


def list_touched_rows(server: FederationServer, request: RoundRequest) -> np.ndarray:
    """int32 [R]: the rows that any client asks for, ascending, padded past the end to a power of two."""
    known = server.wanted[request.number]
    rows = [known[client] for clients in request.asked.values() for client in clients.tolist()]
    distinct = np.unique(np.concatenate([EMPTY_ROWS, *rows]))
    return pad_rows(distinct, max(LEAST_ROWS, 1 << (len(distinct) - 1).bit_length()), server.party.size)


def choose_width(party: DeployedPieces, heard: HeardMessages) -> int:
    """Rows to which messages are padded: of a few sizes, so that few programs are compiled."""
    if party.whole:
        return party.size
    longest = max([len(rows) for _, rows in heard.messages.values()], default=0)
    return max(LEAST_ROWS, 1 << (longest - 1).bit_length()) if longest else LEAST_ROWS


def stack_messages(
    party: DeployedPieces,
    request: RoundRequest,
    heard: HeardMessages,
    slots: list[int],
    width: int,
    touched: np.ndarray | None,
) -> tuple[Tree, tuple[np.ndarray, ...]]:
    """(the messages of some slots side by side, where they belong: see `open_block`)."""
    many = min(TOGETHER, party.sampler.slots)
    at = np.full(many, EMPTY, np.int32)
    at[: len(slots)] = slots
    ids = np.full(many, party.plan.num_clients, np.int32)
    ids[: len(slots)] = request.ids[slots]
    ages = np.array([heard.ages.get(client, 0) for client in ids.tolist()], np.int32)
    rows = np.full((many, width), party.size, np.int32)
    parts = []
    for lane, client in enumerate(ids[: len(slots)].tolist()):
        message, held = heard.messages[client]
        rows[lane, : len(held)] = held
        parts.append(pad_message(message, width))
    nothing = pad_message(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), party.message), width)
    parts += [jax.tree.map(np.zeros_like, nothing)] * (many - len(parts))
    positions = rows
    if touched is not None:
        positions = np.searchsorted(touched, rows).astype(np.int32)
        positions[rows >= party.size] = len(touched)
    return jax.tree.map(lambda *x: np.stack(x), *parts), (at, ids, ages, rows, positions)


def pad_message(message: Tree, width: int) -> Tree:
    """A message whose tables have `width` rows, zeros at the end."""
    return map_tables(lambda x: take_rows_or_zeros(np.asarray(x), np.arange(width)), np.asarray, message)
