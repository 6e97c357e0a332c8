"""The server of a federation: what it asks of nodes in a round, and what it makes of their replies. It holds the model,
and no interactions. How bytes travel is not its matter: `exchange` is Flower, or a function call in tests."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfed.config.settings import Config
from jaxfed.core.client import ClientInput, PublicRound, client_view, flatten_messages, open_message
from jaxfed.core.federate import Programs, make_programs, message_capacity
from jaxfed.core.link import broadcast_state
from jaxfed.core.state import State, initial_state
from jaxfed.core.tables import map_tables, num_rows, take_rows
from jaxfed.core.tree import zeros_like
from jaxfed.core.types import Block, Messages, Tree
from jaxfed.core.wire import ID, open_shapes, pack_message, unpack_message
from jaxfed.data.packing import pad_rows
from jaxfed.deployment.envelope import (
    NODE,
    Envelope,
    Kind,
    RoundPlan,
    pack_envelopes,
    pack_plan,
    read_envelopes,
    read_numbers,
    read_refusal,
    refuse_envelope,
)
from jaxfed.deployment.node_data import PublicFacts, empty_population, wrap_population
from jaxfed.deployment.node_states import take_rows_or_zeros
from jaxfed.deployment.party import Party, make_party, split_tables
from jaxfed.sampling.cohort import sample_cohort
from jaxfed.training.rounds import make_run_keys

TOGETHER = 32  # clients whose messages are opened side by side
LEAST_ROWS = 256  # to which the rows of a block of messages are padded, or to a power of two of them
EMPTY = np.iinfo(np.int32).max

Exchange = Callable[[dict[int, bytes]], dict[int, bytes]]  # {node: request} -> {node: reply} of those who answered


@dataclass
class Server:
    """A server between two rounds. `open_server` makes it."""

    party: Party
    programs: Programs
    opened: Any  # what opens a block of messages
    state: State  # without what clients keep
    counted: np.ndarray  # int32 [clients]: the last round in which the message of each was counted; -1: none was
    seed: int  # of cohorts and public randomness
    rounds: int
    say: Callable[[str], None]
    wanted: dict[int, dict[int, np.ndarray]] = field(default_factory=dict)  # round -> client -> the rows it asks for
    bytes_out: int = 0  # of all requests, envelopes included
    bytes_in: int = 0


class RoundRequest(NamedTuple):
    """A round as the server asks for it."""

    number: int
    ids: np.ndarray  # int [M]: the cohort
    asked: dict[int, np.ndarray]  # node -> the clients of it that are asked
    digest: bytes  # of the model
    downloaded: dict[int, int]  # client -> bytes of the model that are sent for it


class Heard(NamedTuple):
    """What came back."""

    messages: dict[int, tuple[Tree, np.ndarray]]  # client -> its message, its rows
    answered: set[int]  # clients of which something came, sound or not


def open_server(config: Config, facts: PublicFacts, seed: int, say: Callable[[str], None]) -> Server:
    """A server before its first round.

    Args:
        config: What to run.
        facts: What everybody knows; the server has nothing else.
        seed: Of cohorts and of public randomness: the configuration's, or a secret one.
        say: Is told what is wrong with messages, a line each.

    Raises:
        ValueError: the configuration cannot be deployed.
    """
    party = make_party(config, facts, wrap_population(empty_population(facts), facts))
    streams = make_run_keys(config.seed)
    nobody = party.plan._replace(num_clients=0)
    state = initial_state(nobody, party.model.init(streams.model), streams.memory)._replace(client_states=())
    counted = np.full(facts.num_clients, -1, np.int32)
    opened = jax.jit(partial(open_block, party), static_argnums=5)
    return Server(party, make_programs(party.plan), opened, state, counted, seed, config.rounds, say)


def run_server_round(server: Server, members: dict[int, np.ndarray], exchange: Exchange) -> dict[str, Any]:
    """One round: asks the nodes, hears what comes back in time, and moves the model.

    Args:
        server: It is changed.
        members: Node -> the clients that it holds.
        exchange: Sends requests to nodes and gives back the replies that came by the deadline.

    Returns:
        Figures of the round, as in the simulator.
    """
    number = int(server.state.round)
    ids = sample_cohort(server.party.sampler, server.seed, number)[0]
    asked = {node: np.intersect1d(ids, clients).astype(np.int32) for node, clients in members.items()}
    if not server.party.whole:
        asked = ask_missing_rows(server, number, asked, members, exchange)
    asked = {node: clients for node, clients in asked.items() if len(clients)}
    requests, request = make_requests(server, number, ids, asked, members)
    heard = hear_replies(server, request, members, send_counted(server, requests, exchange))
    state, info = move_model(server, request, heard)
    server.state = state
    present = np.asarray(info["clients/present"])
    server.counted[ids[present]] = number
    server.wanted = {round: rows for round, rows in server.wanted.items() if round > number}
    return info | {"clients/ids": ids, "bytes/model": sum(request.downloaded.values())}


def send_counted(server: Server, requests: dict[int, bytes], exchange: Exchange) -> dict[int, bytes]:
    """Sends requests; counts the bytes both ways."""
    server.bytes_out += sum(map(len, requests.values()))
    replies = exchange(requests) if requests else {}
    server.bytes_in += sum(map(len, replies.values()))
    return replies


def greet_nodes(
    party: Party, nodes: list[int], known: dict[int, np.ndarray], exchange: Exchange, say: Callable[[str], None]
) -> dict[int, np.ndarray]:
    """The clients of each node that has the same configuration, those that are `known` among them. A client that two
    nodes claim belongs to the first."""
    hello = pack_envelopes([Envelope(Kind.HELLO, 0, NODE, party.digest)])
    members = dict(known)
    taken = np.zeros(party.plan.num_clients, bool)
    for clients in known.values():
        taken[clients] = True
    for node, reply in sorted(exchange(dict.fromkeys(nodes, hello)).items()):
        try:
            found = read_envelopes(reply)
            if len(found) == 1 and found[0].kind == Kind.REFUSED:
                raise ValueError(read_refusal(found[0]))
            refuse_envelope(len(found) != 1 or found[0].kind != Kind.HELLO, "this is no answer to a hello")
            refuse_envelope(found[0].digest != party.digest, "another configuration")
            clients = read_numbers(found[0].payload, party.plan.num_clients)
            if taken[clients].any():
                raise ValueError(f"it claims client {clients[taken[clients]][0]}, whom another node holds")
        except ValueError as error:
            say(f"node {node} is left out: {error}")
            continue
        taken[clients] = True
        members[node] = clients
    return members


def find_coming(server: Server, number: int, clients: np.ndarray) -> np.ndarray:
    """Which of a node's clients are asked in the next round, and whose rows are needed then."""
    if server.party.whole or number + 1 >= server.rounds:
        return np.zeros(0, np.int32)
    return np.intersect1d(sample_cohort(server.party.sampler, server.seed, number + 1)[0], clients).astype(np.int32)


def make_plan(server: Server, number: int, clients: np.ndarray, next: int, coming: np.ndarray) -> Envelope:
    """What a node is told of a round."""
    key = jax.random.fold_in(make_run_keys(server.seed).rounds, number)
    slots = server.party.sampler.slots
    plan = RoundPlan(np.asarray(jax.random.key_data(key)), slots, next, clients, server.counted[clients], coming)
    return Envelope(Kind.PLAN, number, NODE, server.party.digest, 0, pack_plan(plan))


def ask_missing_rows(
    server: Server, number: int, asked: dict[int, np.ndarray], members: dict[int, np.ndarray], exchange: Exchange
) -> dict[int, np.ndarray]:
    """Asks which rows clients hold where that did not come with the round before; returns the clients of whom it is
    known."""
    known = server.wanted.setdefault(number, {})
    missing = {node: np.array([c for c in ids if c not in known], np.int32) for node, ids in asked.items()}
    nobody = np.zeros(0, np.int32)
    requests = {
        node: pack_envelopes([make_plan(server, number, nobody, number, ids)])
        for node, ids in missing.items()
        if len(ids)
    }
    request = RoundRequest(number, nobody, {}, b"", {})
    hear_replies(server, request, members, send_counted(server, requests, exchange))
    return {node: np.array([c for c in ids if c in known], np.int32) for node, ids in asked.items()}


def make_requests(
    server: Server, number: int, ids: np.ndarray, asked: dict[int, np.ndarray], members: dict[int, np.ndarray]
) -> tuple[dict[int, bytes], RoundRequest]:
    """What each node is sent: the plan, the model's parts for all, and the rows of each of its clients."""
    party = server.party
    sent = jax.device_get((server.state.shared, broadcast_state(party.channel, server.state.channel)))
    tables, others = split_tables(sent)
    whole = pack_all_rows([*tables, *others], party.size)
    digest = hashlib.sha256(number.to_bytes(8, "little") + whole).digest()
    common = Envelope(Kind.COMMON, number, NODE, digest, 0, whole if party.whole else pack_message(others, EMPTY_ROWS))
    requests, downloaded = {}, {}
    for node, clients in asked.items():
        pieces = [make_plan(server, number, clients, number + 1, find_coming(server, number, members[node])), common]
        for client in clients.tolist():
            if not party.whole:
                rows = server.wanted[number][client]
                payload = pack_message(jax.tree.map(lambda x, rows=rows: x[rows], tables), rows)
                pieces.append(Envelope(Kind.ROWS, number, client, digest, len(rows), payload))
            downloaded[client] = len(common.payload) + (0 if party.whole else len(pieces[-1].payload))
        requests[node] = pack_envelopes(pieces)
    return requests, RoundRequest(number, ids, asked, digest, downloaded)


EMPTY_ROWS = np.zeros(0, np.int32)


def pack_all_rows(tree: Tree, size: int) -> bytes:
    """A tree with all rows of its tables, whose ids need not be told."""
    packed = pack_message(tree, np.arange(size, dtype=np.int32))
    return packed[ID * size :] if num_rows(open_shapes(tree)) else packed


def hear_replies(
    server: Server, request: RoundRequest, members: dict[int, np.ndarray], replies: dict[int, bytes]
) -> Heard:
    """Reads what came back. What is wrong is refused with a line, and the rest goes on."""
    heard = Heard({}, set())
    for node, data in sorted(replies.items()):
        heard.answered.update(request.asked.get(node, EMPTY_ROWS).tolist())
        try:
            envelopes = read_envelopes(data)
        except ValueError as error:
            server.say(f"round {request.number}: node {node}: {error}")
            continue
        for each in envelopes:
            try:
                hear_envelope(server, request, members.get(node, EMPTY_ROWS), node, each, heard)
            except ValueError as error:
                who = "" if each.client == NODE else f", client {each.client}"
                server.say(f"round {request.number}: node {node}{who}: {error}")
    return heard


def hear_envelope(
    server: Server, request: RoundRequest, clients: np.ndarray, node: int, each: Envelope, heard: Heard
) -> None:
    """Takes one envelope of a reply. Raises ValueError for one that is refused."""
    party = server.party
    if each.kind == Kind.REFUSED:
        raise ValueError(read_refusal(each))
    refuse_envelope(each.client not in clients, "of a client that is not at this node")
    if each.kind == Kind.WANTED:
        refuse_envelope(each.round not in (request.number, request.number + 1), f"rows of round {each.round}")
        server.wanted.setdefault(each.round, {})[each.client] = read_numbers(each.payload, party.size)
        return
    refuse_envelope(each.kind != Kind.MESSAGE, f"kind {each.kind.name} is none of a reply")
    refuse_envelope(each.client not in request.asked.get(node, EMPTY_ROWS), "of a client that was not asked")
    refuse_envelope(each.client in heard.messages, "a second message of one client")
    refuse_envelope(each.round != request.number, f"of round {each.round}")
    refuse_envelope(each.digest != request.digest, "of another model")
    like, every = party.message, np.arange(party.size, dtype=np.int32)
    if party.whole and num_rows(open_shapes(like)):
        message, rows = unpack_message(every.tobytes() + each.payload, like, party.size, party.size)
    else:
        message, rows = unpack_message(each.payload, like, each.rows, party.size)
        known = server.wanted.get(request.number, {}).get(each.client)
        refuse_envelope(not party.whole and not np.array_equal(rows, known), "of other rows than were asked for")
    heard.messages[each.client] = message, rows


def open_block(
    party: Party,
    shared: Tree,
    links: Tree,
    messages: Tree,
    places: tuple[jax.Array, ...],
    public_key: jax.Array,
    total_rows: int,
) -> Messages:
    """The server's side of a block of messages: opened, and laid flat as the simulator does.

    places: (slots [m], ids [m], rows [m, K], positions of these in the total [m, K]). total_rows: of the total.
    """
    slots, ids, rows, positions = places
    nobody = jnp.full(party.sampler.slots, party.plan.num_clients, jnp.int32)
    public = PublicRound(public_key, nobody, party.size)

    def one(message, id, rows):
        sender = client_view(ClientInput(id, (), rows, jnp.float32(0), ()), public)
        if party.channel.decode_message:  # all of a cohort start from the present model
            sender = sender._replace(drift=zeros_like(take_rows(shared, rows).params))
        return open_message(party.channel, message, take_rows(links, rows), sender)

    opened, is_finite = jax.vmap(one)(messages, ids, rows)
    counts = is_finite & (slots < party.sampler.slots)
    block = Block(slots, positions, jnp.zeros(len(slots)), ())
    ends = total_rows, party.size, party.plan.num_clients
    return flatten_messages(block, counts, ids, rows, opened, (), {}, ends=ends, padded_shape=None)


def move_model(server: Server, request: RoundRequest, heard: Heard) -> tuple[State, dict[str, Any]]:
    """Adds the messages in the order of the cohort's slots, and lets the server move the model."""
    party, state, programs = server.party, server.state, server.programs
    touched = list_touched_rows(server, request) if party.lazy else None
    key = make_run_keys(server.seed).rounds
    public_key = jax.random.fold_in(key, request.number)
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
    return programs.server_update(state, heap, request.ids.astype(np.int32), asked, touched, key, ())


def list_touched_rows(server: Server, request: RoundRequest) -> np.ndarray:
    """int32 [R]: the rows that any client asks for, ascending, padded past the end to a power of two."""
    known = server.wanted[request.number]
    rows = [known[client] for clients in request.asked.values() for client in clients.tolist()]
    distinct = np.unique(np.concatenate([EMPTY_ROWS, *rows]))
    return pad_rows(distinct, max(LEAST_ROWS, 1 << (len(distinct) - 1).bit_length()), server.party.size)


def choose_width(party: Party, heard: Heard) -> int:
    """Rows to which messages are padded: of a few sizes, so that few programs are compiled."""
    if party.whole:
        return party.size
    longest = max([len(rows) for _, rows in heard.messages.values()], default=0)
    return max(LEAST_ROWS, 1 << (longest - 1).bit_length()) if longest else LEAST_ROWS


def stack_messages(
    party: Party, request: RoundRequest, heard: Heard, slots: list[int], width: int, touched: np.ndarray | None
) -> tuple[Tree, tuple[np.ndarray, ...]]:
    """(the messages of some slots side by side, where they belong: see `open_block`)."""
    many = min(TOGETHER, party.sampler.slots)
    at = np.full(many, EMPTY, np.int32)
    at[: len(slots)] = slots
    ids = np.full(many, party.plan.num_clients, np.int32)
    ids[: len(slots)] = request.ids[slots]
    rows = np.full((many, width), party.size, np.int32)
    parts = []
    for lane, client in enumerate(ids[: len(slots)].tolist()):
        message, held = heard.messages[client]
        rows[lane, : len(held)] = np.arange(party.size) if party.whole else held
        parts.append(pad_message(message, width))
    nothing = pad_message(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), party.message), width)
    parts += [jax.tree.map(np.zeros_like, nothing)] * (many - len(parts))
    positions = rows
    if touched is not None:
        positions = np.searchsorted(touched, rows).astype(np.int32)
        positions[rows >= party.size] = len(touched)
    return jax.tree.map(lambda *x: np.stack(x), *parts), (at, ids, rows, positions)


def pad_message(message: Tree, width: int) -> Tree:
    """A message whose tables have `width` rows, zeros at the end."""
    return map_tables(lambda x: take_rows_or_zeros(np.asarray(x), np.arange(width)), np.asarray, message)
