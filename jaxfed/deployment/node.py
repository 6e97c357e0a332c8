"""What a node answers to the server's requests, bytes for bytes."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxfed.core.client import ClientInput
from jaxfed.core.tables import map_tables, num_rows
from jaxfed.core.types import Cohort, Tree
from jaxfed.core.wire import ID, open_shapes, pack_message, unpack_message
from jaxfed.deployment.envelope import (
    NODE,
    OTHER_CONFIG,
    Envelope,
    EnvelopeKind,
    RoundPlan,
    digest_model_bytes,
    make_refusal,
    pack_envelopes,
    read_envelopes,
    read_plan,
)
from jaxfed.deployment.node_states import (
    SavedClient,
    read_client,
    take_rows_or_zeros,
    write_client,
)
from jaxfed.deployment.opened_node import Node, make_client_keys, pack_clients
from jaxfed.deployment.party import DeployedPieces, divide_tables
from jaxfed.deployment.secure_node import answer_step, check_session_start, count_message_numbers, open_session

LARGEST_NUMBER = 1e6  # of a model in a secure sum


def make_reply(node: Node, request: bytes) -> bytes:
    """A node's reply to a request of the server. What is wrong with a request is said in the reply, in one line."""
    try:
        return pack_envelopes(make_reply_envelopes(node, read_envelopes(request)))
    except ValueError as error:
        return pack_envelopes([make_refusal(str(error))])


def make_reply_envelopes(node: Node, asked: list[Envelope]) -> list[Envelope]:
    """The envelopes of a reply. Raises ValueError for a request that is not to be answered."""
    if not asked or asked[0].kind not in (EnvelopeKind.HELLO, EnvelopeKind.PLAN, EnvelopeKind.SECURE):
        raise ValueError("a request begins with a hello, a plan or a step of a secure sum")
    head = asked[0]
    if head.kind == EnvelopeKind.SECURE:
        return [answer_step(node, head)]
    if head.digest != node.party.digest:
        raise ValueError(f"this node has {OTHER_CONFIG}")
    if head.kind == EnvelopeKind.HELLO:
        payload = node.ids.astype("<i4").tobytes()
        return [Envelope(EnvelopeKind.HELLO, 0, NODE, node.party.digest, int(node.secret is not None), payload)]
    plan = read_plan(head.payload)
    if strangers := {*plan.asked.tolist(), *plan.coming.tolist()} - {*node.ids.tolist()}:
        raise ValueError(f"client {min(strangers)} is not at this node")
    if plan.slots != node.party.sampler.slots:
        raise ValueError(f"a plan of {plan.slots} slots, the configuration has {node.party.sampler.slots}")
    if node.party.roster:  # no message leaves by itself
        start = check_session_start(node, plan, asked)
        answers = list_answers(node, head.round, plan, asked[1:-1]) if len(plan.asked) else []
        return open_session(node, asked[-1], len(start.cohort), answers)
    replies = list_answers(node, head.round, plan, asked[1:]) if len(plan.asked) else []
    return replies + list_wanted_rows(node, plan)


def list_wanted_rows(node: Node, plan: RoundPlan) -> list[Envelope]:
    """Which rows the clients of the coming round hold then, one envelope each."""
    found: dict[int, np.ndarray] = {}
    if len(plan.coming):
        cohort = pack_clients(node, plan.coming, plan.next)
        for client, rows in zip(*list_lanes(cohort), strict=True):
            found[client] = rows[rows < node.party.size]
    return [
        Envelope(EnvelopeKind.WANTED, plan.next, client, bytes(32), len(rows), rows.astype("<i4").tobytes())
        for client, rows in sorted(found.items())
    ]


def list_lanes(cohort: Cohort) -> tuple[list[int], list[np.ndarray]]:
    """(the clients of all blocks, the rows of each), without empty places."""
    clients, rows = [], []
    for block in cohort.blocks:
        for place, slot in enumerate(block.slots):
            if slot < len(cohort.ids):
                clients.append(int(cohort.ids[slot]))
                rows.append(np.asarray(block.rows[place]))
    return clients, rows


def list_answers(node: Node, round: int, plan: RoundPlan, sent: list[Envelope]) -> list[Envelope]:
    """A message, or why there is none, of each client that is asked."""
    digest, others, tables = read_download(node, round, plan, sent)
    saved, refused = {}, {}
    for client, counted in zip(plan.asked.tolist(), plan.counted.tolist(), strict=True):
        try:
            saved[client] = recall_client(node, client, counted, round, digest)
        except ValueError as error:
            refused[client] = make_refusal(str(error), round, client)
    todo = [client for client, known in saved.items() if known.answered != round]
    if todo:
        for block in (cohort := pack_clients(node, np.array(todo, np.int64), round)).blocks:
            saved |= run_node_block(node, round, plan, cohort, block, digest, others, tables, saved)
    replies = []
    for client in plan.asked.tolist():
        if client in refused:
            replies.append(refused[client])
        elif (known := saved[client]).message is None:
            replies.append(make_refusal("the update held NaN or infinity", round, client))
        else:
            replies.append(Envelope(EnvelopeKind.MESSAGE, round, client, digest, known.rows, known.message))
    return replies


def recall_client(node: Node, client: int, counted: int, round: int, digest: bytes) -> SavedClient:
    """What is kept of a client as the server has counted it. Raises ValueError where it must not answer."""
    saved = read_client(node.folder, client, node.like)
    if saved is None:
        first = node.first_states(jnp.array([client], jnp.int32))
        return SavedClient(jax.tree.map(lambda x: np.asarray(x[0]), first))
    saved = saved.settle(counted)
    if max(saved.counted, saved.answered) > round or saved.counted == round:
        raise ValueError(
            f"round {round + 1} is over for this client: a second answer could undo the noise of the first"
        )
    if saved.answered == round and saved.digest != digest:
        raise ValueError(
            f"round {round + 1} was answered for another model: a second answer could undo the noise of one"
        )
    if saved.answered == round:
        return saved
    return SavedClient(saved.state, saved.counted)


def read_download(node: Node, round: int, plan: RoundPlan, sent: list[Envelope]) -> tuple[bytes, list, dict]:
    """(the model's digest, what all clients are sent alike, {client: its tables}); tables of `NODE`: for all of them.

    Raises ValueError where the server would not send this.
    """
    party = node.party
    if not sent or sent[0].kind != EnvelopeKind.COMMON or any(each.kind != EnvelopeKind.ROWS for each in sent[1:]):
        raise ValueError("a plan that asks clients comes with a model")
    if any(each.round != round or each.digest != sent[0].digest for each in sent):
        raise ValueError("parts of several models or rounds")
    like_tables, like_others = divide_tables((party.shared, party.links))
    if party.whole:
        if digest_model_bytes(round, sent[0].payload) != sent[0].digest:
            raise ValueError("a model with the digest of another")
        every = np.arange(party.size, dtype=np.int32)
        whole, _ = unpack_message(
            pack_ids(like_tables, every) + sent[0].payload, [*like_tables, *like_others], party.size, party.size
        )
        check_size_of_numbers(party, whole)
        return sent[0].digest, whole[len(like_tables) :], {NODE: (every, whole[: len(like_tables)])}
    others, _ = unpack_message(sent[0].payload, like_others, 0, party.size)
    tables = {}
    for each in sent[1:]:
        found, rows = unpack_message(each.payload, like_tables, each.rows, party.size)
        tables[each.client] = rows, found
    if missing := {*plan.asked.tolist()} - tables.keys():
        raise ValueError(f"the rows of client {min(missing)} are missing")
    return sent[0].digest, others, tables


def check_size_of_numbers(party: DeployedPieces, model: list) -> None:
    """Raises ValueError for a model of a secure sum by which the updates of some clients might not be finite: these
    clients would bring zeros, and the sum would hide the others less."""
    floats = [np.asarray(x) for x in jax.tree.leaves(model) if jnp.issubdtype(x.dtype, jnp.floating)]
    if party.roster and not all((np.abs(x) <= LARGEST_NUMBER).all() for x in floats):
        raise ValueError(
            f"a model with a number that is not finite, or beyond {LARGEST_NUMBER:,.0f}: go back to an older checkpoint"
        )


def pack_ids(like: list, rows: np.ndarray) -> bytes:
    """The ids that a message with tables begins with, where the other end knows them."""
    return rows.astype("<i4").tobytes() if num_rows(open_shapes(like)) else b""


def run_node_block(node, round, plan, cohort, block, digest, others, tables, saved) -> dict[int, SavedClient]:
    """Trains the clients of one block, and writes down what each answers and keeps from now on."""
    party = node.party
    lanes = np.asarray(block.slots) < len(cohort.ids)
    who = np.where(lanes, cohort.ids[np.where(lanes, block.slots, 0)], party.plan.num_clients)
    held = np.asarray(block.rows)
    nothing = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), node.like)
    states = [
        take_held(saved[c].state if c in saved else nothing, rows) for c, rows in zip(who.tolist(), held, strict=True)
    ]
    given = [find_tables(tables, client, rows, party) for client, rows in zip(who.tolist(), held, strict=True)]
    own = ClientInput(
        jnp.asarray(who, jnp.int32),
        jax.tree.map(lambda *x: np.stack(x), *states),
        jnp.asarray(held),
        block.num_train,
        block.data,
        np.zeros(len(who), np.int32),
    )
    keys = make_client_keys(node, round, plan, who)
    stacked = jax.tree.map(lambda *x: np.stack(x), *given)
    made = jax.device_get(node.program(others, stacked, own, keys, plan.key, np.zeros(plan.slots, bool)))
    messages, after, finite = made
    out = {}
    for lane in np.flatnonzero(lanes).tolist():
        client, rows = int(who[lane]), held[lane][held[lane] < party.size]
        one = jax.tree.map(lambda x, lane=lane: x[lane], (messages, after))
        kept = put_held(saved[client].state, held[lane], one[1]) if finite[lane] else saved[client].state
        known = pack_client_message(party, one[0], rows) if finite[lane] else pack_missing_message(party)
        out[client] = SavedClient(saved[client].state, saved[client].counted, kept, round, digest, *known)
        write_client(node.folder, client, out[client])
    return out


def pack_client_message(party: DeployedPieces, message: Tree, rows: np.ndarray) -> tuple[int, bytes]:
    """(number of table rows, the bytes) of one client's message."""
    if not num_rows(open_shapes(message)):
        return 0, pack_message(message, np.zeros(0, np.int32))
    if party.whole:  # all rows: no ids are told
        return party.size, pack_message(message, np.arange(party.size, dtype=np.int32))[ID * party.size :]
    return len(rows), pack_message(message, rows)


def pack_missing_message(party: DeployedPieces) -> tuple[int, bytes | None]:
    """(number of table rows, the bytes) in the place of a message that is not finite. In a secure sum they are zeros:
    otherwise a server could send a model whose update is not finite only for holders of a certain item, and learn who
    they are."""
    return (party.size, bytes(4 * count_message_numbers(party.message))) if party.roster else (0, None)


def find_tables(tables: dict, client: int, rows: np.ndarray, party: DeployedPieces) -> list:
    """The rows of the model of one client, in its order; rows past the end are zeros."""
    known, found = tables[NODE] if NODE in tables else tables.get(client, (np.zeros(0, np.int32), None))
    if found is None:
        like = divide_tables((party.shared, party.links))[0]
        return jax.tree.map(lambda x: np.zeros((len(rows), *x.shape[1:]), x.dtype), like)
    place = np.full(party.size + 1, len(known))
    place[known] = np.arange(len(known))
    at = place[np.minimum(rows, party.size)]
    if (at[rows < party.size] == len(known)).any():
        raise ValueError(f"client {client} was sent other rows than it asked for")
    return jax.tree.map(lambda x: take_rows_or_zeros(x, at), found)


def take_held(state: Tree, rows: np.ndarray) -> Tree:
    """What one client keeps, of tables the rows that it holds."""
    return map_tables(lambda x: take_rows_or_zeros(x, rows), lambda x: x, state)


def put_held(state: Tree, rows: np.ndarray, new: Tree) -> Tree:
    """What one client keeps after a round, of tables [N, ...] with new rows."""

    def put(x, y):
        inside, out = rows < len(x), np.array(x)
        out[rows[inside]] = y[inside]
        return out

    return map_tables(put, lambda x, y: np.asarray(y), state, new)
