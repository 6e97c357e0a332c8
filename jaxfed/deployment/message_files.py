"""Messages that devices wrote to files, folded into a run: an asynchronous round by each age (FedBuff: Nguyen et al.
2022), which weighs (1 + age)^-exponent."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfed.channels.staleness import staleness_discount
from jaxfed.config.build import RunParts
from jaxfed.config.settings import Config
from jaxfed.core.federate import make_programs
from jaxfed.core.link import Channel
from jaxfed.core.state import State
from jaxfed.core.tree import scale_tree
from jaxfed.core.types import Tree
from jaxfed.core.wire import ID
from jaxfed.deployment.coordinator import digest_model
from jaxfed.deployment.envelope import Envelope, EnvelopeKind, read_distinct, read_envelopes, refuse_envelope
from jaxfed.deployment.hearing import read_reply_envelope, sum_and_move
from jaxfed.deployment.node_data import find_facts
from jaxfed.deployment.opened_server import FederationServer, HeardMessages, RoundRequest, open_server

LARGEST = 1 << 28  # bytes of a message file
MODELS = "models.json"  # in a run's folder: {digest: round} of the models that messages may be of


class FoldedMessages(NamedTuple):
    """What became of message files.

    Args:
        state: Of the run, after them.
        counted: {file: age of the model that it is of}.
        refused: {file: why, in one line}.
        models: {digest: round} of the models that the run knows now.
        clients: {digest: clients whose messages of that model are counted}.
        epsilon: Of a client of every round that has sent one of these messages, too; None: no link is private.
    """

    state: State
    counted: dict[str, int]
    refused: dict[str, str]
    models: dict[str, int]
    clients: dict[str, list[int]]
    epsilon: float | None = None


class KnownModels(NamedTuple):
    """What a run knows of earlier models: see `FoldedMessages`."""

    models: dict[str, int] = {}
    clients: dict[str, list[int]] = {}


def check_foldable(parts: RunParts) -> None:
    """Raises ValueError for a run into which files cannot be folded."""
    if parts.channel.claims.reveals != "message":
        raise ValueError(
            f"aggregate: this run hides messages in a sum ({parts.wire.sees}), and a message in a file is bare"
        )
    if parts.sampler.history_length:
        raise ValueError(
            "aggregate: clients of this run are sent models of several ages (cohort.buffered): take another"
        )
    if [each for each in parts.account.mechanisms if each.kind != "local"]:
        raise ValueError(
            "aggregate: epsilon of this run counts the cohorts of its sampler, and its server's noise is that of their "
            "rounds: messages that devices choose to send have no place in it. Take local_gaussian"
        )


def scale_decoded(channel: Channel, weight: float) -> Channel:
    """The channel with a server that multiplies what it has decoded by a weight."""

    def decode(total, state, round):
        update, state, figures = channel.decode(total, state, round) if channel.decode else (total, state, {})
        return scale_tree(jnp.float32(weight), update), state, figures

    return channel._replace(decode=decode)


def read_models(folder: Path) -> KnownModels:
    """What a run's folder lists of earlier models, if it has a list. Raises ValueError for a damaged one."""
    path = folder / MODELS
    if not path.exists():
        return KnownModels()
    try:
        found = json.loads(path.read_text())
        models = {str(digest): int(each["round"]) for digest, each in found.items()}
        return KnownModels(
            models, {str(digest): [int(one) for one in each["clients"]] for digest, each in found.items()}
        )
    except (ValueError, AttributeError, TypeError, KeyError):
        raise ValueError(f"{path} is damaged: restore it, or remove it (older messages are then refused)") from None


def pack_models(folded: FoldedMessages) -> str:
    """The text of such a list."""
    found = {
        digest: {"round": round, "clients": folded.clients.get(digest, [])} for digest, round in folded.models.items()
    }
    return json.dumps(found)


def read_message(path: Path) -> Envelope:
    """The message in a file. Raises ValueError where there is none."""
    if not path.is_file():
        raise ValueError("there is no such file")
    with path.open("rb") as file:
        data = file.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise ValueError(f"it has more than {LARGEST >> 20} MB")
    envelopes = read_envelopes(data)
    if len(envelopes) != 1 or envelopes[0].kind != EnvelopeKind.MESSAGE:
        raise ValueError("it is no message of one client")
    return envelopes[0]


def fold_messages(
    config: Config,
    parts: RunParts,
    state: State,
    best: tuple[Tree, int],
    files: Sequence[Path],
    known: KnownModels,
    exponent: float = 0.5,
) -> FoldedMessages:
    """Folds messages into the newest model of a run, those of the oldest models first, a server step for each age.

    Args:
        config: Of the run.
        parts: What it is made of.
        state: Where it stands.
        best: (the shared parameters of its best round, that round): what is exported.
        files: Message files, from anybody.
        known: See `read_models`.
        exponent: A message of a model that is `age` rounds old weighs (1 + age)^-exponent.

    Returns:
        The new state, and what became of each file. What is malformed, of another model or configuration, or the
        second of one client is refused, and the rest goes on.

    Raises:
        ValueError: nothing can be folded into this run.
    """
    check_foldable(parts)
    if not 0 <= exponent < math.inf:
        raise ValueError(f"--exponent is {exponent:g}: it must be a number, and not negative")
    facts = find_facts(parts.data.population, (), parts.data.source.items)
    server = open_server(config, facts, config.seed, lambda line: None)
    models = known.models | {digest_model(server.party, best[0], (), best[1])[0].hex(): best[1]}
    counted: dict[str, int] = {}
    refused: dict[str, str] = {}
    clients = {digest: list(known.clients.get(digest, [])) for digest in models}
    groups: dict[int, dict[int, Any]] = {}
    # the number decides how a message is decoded, and epsilon counts one message of each client
    taken: dict[int, Path] = {}
    for path in sorted({*files}):
        try:
            envelope = read_message(path)
            digest = envelope.digest.hex()
            check_countable(envelope, KnownModels(models, clients), taken)
            groups.setdefault(envelope.round, {})[envelope.client] = take_message(server, envelope)
            clients[digest].append(envelope.client)
            taken[envelope.client] = path
            counted[str(path)] = int(state.round) - envelope.round
        except (ValueError, OSError) as error:
            refused[str(path)] = " ".join(str(error).split())
    begin, client_states = int(state.round), state.client_states
    now = jax.tree.map(jnp.copy, state._replace(client_states=()))  # a step consumes its state
    for round in sorted(groups):
        now = apply_one_age(server, now, round, begin - round, groups[round], exponent)
    now = now._replace(client_states=client_states)
    if counted:
        newest, _ = digest_model(server.party, now.shared.params, (), int(now.round))
        models |= {newest.hex(): int(now.round)}
    epsilon = parts.epsilon(begin + 1) if parts.account.mechanisms and counted else None
    return FoldedMessages(now, counted, refused, models, clients, epsilon)


def check_countable(envelope: Envelope, known: KnownModels, taken: dict[int, Path]) -> None:
    """Raises ValueError for a message of an unknown model, and for the second one of a client.

    taken: {client: file} of the messages that are folded in now.
    """
    digest, client = envelope.digest.hex(), envelope.client
    if known.models.get(digest) != envelope.round:
        raise ValueError("it is of a model that this run does not know")
    if client in taken or client in known.clients[digest]:
        where = f"as {taken[client]}" if client in taken else "when this run was made"
        raise ValueError(
            f"client {client} was counted already, {where}: one message of a client is taken. If these are two "
            "devices, give each a number of its own (jaxfed device --client)"
        )


def take_message(server: FederationServer, envelope: Envelope) -> tuple[Tree, np.ndarray]:
    """(a message, its rows). Raises ValueError where it is malformed."""
    clients = np.arange(server.party.plan.num_clients)
    refuse_envelope(envelope.client >= len(clients), "of a client that there is not")
    size = ID * envelope.rows
    refuse_envelope(size > len(envelope.payload) or envelope.rows > server.party.size, "more rows than it has bytes")
    if not server.party.whole:  # whole tables come without ids
        rows = read_distinct(envelope.payload[:size], server.party.size)
        server.wanted[envelope.round] = {envelope.client: rows}  # in a file nobody has asked for rows before
    ids = np.array([envelope.client], np.int32)
    request, heard = RoundRequest(envelope.round, ids, {0: ids}, envelope.digest, {}), HeardMessages({}, set())
    read_reply_envelope(server, request, clients, 0, envelope, heard)
    return heard.messages[envelope.client]


def apply_one_age(
    server: FederationServer, state: State, round: int, age: int, messages: dict[int, Any], exponent: float
) -> State:
    """A server step from messages that are all of the model after one round, a cohort's worth at a time."""
    party, weight = server.party, float(staleness_discount(jnp.float32(age), exponent))
    server.programs = make_programs(party.plan._replace(channel=scale_decoded(party.channel, weight)))
    after, slots, clients = int(state.round), party.sampler.slots, sorted(messages)
    for low in range(0, len(clients), slots):
        some = clients[low : low + slots]
        ids = np.full(slots, party.plan.num_clients)
        ids[: len(some)] = some
        server.wanted[round] = {client: messages[client][1] for client in some}
        request = RoundRequest(round, ids, {0: np.array(some, np.int32)}, b"", {})
        server.state = state._replace(round=jnp.int32(round))  # whose public randomness the clients had
        heard = HeardMessages({client: messages[client] for client in some}, {*some})
        state, _ = sum_and_move(server, request, heard)
        after += 1
        state = jax.block_until_ready(state)._replace(round=jnp.int32(after))
    return state
