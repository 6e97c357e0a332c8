"""A device alone: it trains on its own history from an export, with no network, and writes the message that it would
send. Node and server are those of a deployment, in one process; the server holds the export's model."""

import json
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfed.config.schema import make_config
from jaxfed.core.types import Broadcast
from jaxfed.deployment.coordinator import ask_missing_rows, make_requests
from jaxfed.deployment.envelope import EnvelopeKind, pack_envelopes, read_envelopes, read_refusal
from jaxfed.deployment.node import make_reply
from jaxfed.deployment.node_data import PublicFacts, write_user_data
from jaxfed.deployment.node_states import read_client
from jaxfed.deployment.opened_node import Keys, Node, open_node
from jaxfed.deployment.opened_server import FederationServer, open_server
from jaxfed.export.functions import name_leaves
from jaxfed.export.loader import Export
from jaxfed.training.run_dir import PRIVATE, write_file

TRAINED = "trained.json"


class DeviceMessage(NamedTuple):
    """What a device would send, and of which model that is.

    Args:
        data: The envelope, for a file.
        client: The number of the device.
        round: After which the model was that it trained on.
    """

    data: bytes
    client: int
    round: int


def read_public_facts(export: Export) -> PublicFacts:
    """What everybody knows of the federation that an export comes from."""
    if "federation" not in export.manifest:
        raise ValueError("device: this export is of an older jaxfed: export the run again")
    known = export.manifest["federation"]
    names = "num_clients", "users_per_client", "label", "protocol"
    return PublicFacts(**{name: known[name] for name in names}, kinds=(), items=tuple(export.items))


def read_device_number(folder: Path, facts: PublicFacts, given: int | None = None) -> int:
    """The number of a device among the clients: the one that it is given, or draws for itself, the first time. It keeps
    it, since its private part and the randomness that a server shares with it go by it.

    Raises ValueError where there is no such client, or the device has another number already.
    """
    if given is not None and not 0 <= given < facts.num_clients:
        raise ValueError(f"--client is {given}: this federation has clients 0 to {facts.num_clients - 1}")
    path = folder / "client"
    if not path.exists():
        write_file(path, str(secrets.randbelow(facts.num_clients) if given is None else given))
    try:
        number = int(path.read_text())
    except ValueError:
        number = -1
    if not 0 <= number < facts.num_clients:
        raise ValueError(f"{path} is damaged: remove the folder {folder} to begin anew")
    if given is not None and given != number:
        raise ValueError(
            f"device: the folder {folder} is that of client {number}: pass --client {number}, or another --state"
        )
    return number


def train_on_device(
    export: Export, folder: Path, history: Sequence[int], client: int | None = None, keys: Keys = "own"
) -> DeviceMessage:
    """Trains the export's model on a history, as a client of its federation does in a round.

    A second call for the same export gives the same message: it is not trained twice.

    Args:
        export: The export.
        folder: Of the device: its number, its secret and its private part lie there.
        history: The numbers of the items that the user met, earliest first.
        client: The device's number among the clients. None: the one that it has; the first time it draws one.
        keys: See `open_node`.

    Returns:
        The message.

    Raises:
        ValueError: the export's configuration cannot be deployed, the history is empty, or the device has another
            number.
    """
    config, facts = make_config(export.manifest["configuration"]), read_public_facts(export)
    if facts.label != "implicit":
        raise ValueError("device: rows of this federation have labels, and a history has none")
    if not history:
        raise ValueError("device: the history is empty: there is nothing to train on")
    folder.mkdir(PRIVATE, parents=True, exist_ok=True)
    client = read_device_number(folder, facts, client)
    check_trained(folder, export, history)
    write_user_data(folder / "data.npz", client, history)
    node = open_node(folder, config, facts, keys)
    note_trained(folder, export, history)
    return ask_device(node, open_device_server(export, facts), client)


def describe_training(export: Export, history: Sequence[int]) -> dict[str, Any]:
    """What a device trains on, as it is noted in its folder."""
    model = export.manifest["files"]["weights.safetensors"]["sha256"]
    return {"model": model, "history": list(history)}


def check_trained(folder: Path, export: Export, history: Sequence[int]) -> None:
    """Raises ValueError where a device has trained the same model on another history: two updates of one model would
    tell what has come since."""
    path, now = folder / TRAINED, describe_training(export, history)
    try:
        before = json.loads(path.read_text()) if path.exists() else now
        model = before["model"]
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{path} is damaged: remove the folder {folder} to begin anew") from None
    if model == now["model"] and before != now:
        raise ValueError(
            "device: this model was trained on another history already: a new history waits for the next export"
        )


def note_trained(folder: Path, export: Export, history: Sequence[int]) -> None:
    """Notes what a device trains on, before it does: see `check_trained`."""
    write_file(folder / TRAINED, json.dumps(describe_training(export, history)))


def open_device_server(export: Export, facts: PublicFacts) -> FederationServer:
    """A server for this device alone, which holds an export's model after the round that the export is of."""
    refusals: list[str] = []
    server = open_server(make_config(export.manifest["configuration"]), facts, 0, refusals.append)
    server.seed = make_config(export.manifest["configuration"]).seed
    return hold_model(server, export.weights, export.manifest["federation"]["round"])


def hold_model(server: FederationServer, weights: dict[str, Any], round: int) -> FederationServer:
    """The server, which now holds a model as it was after a round.

    weights: {path: array}. Raises ValueError where clients are sent more than a model.
    """
    party = server.party
    if jax.tree.leaves((party.shared.extra, party.links)):
        raise ValueError(
            "device: the server of this run sends more than the model (its method or a link does), and an export has "
            "only that"
        )
    params = name_leaves(party.shared.params).rebuild(weights)
    server.state = server.state._replace(shared=Broadcast(params), round=jnp.int32(round))
    server.rounds = 0  # no round comes after it, whose rows would be asked for
    return server


def ask_device(node: Node, server: FederationServer, client: int) -> DeviceMessage:
    """The round of the only client of a node. Raises ValueError where the node refuses it."""
    number, ids = int(server.state.round), np.array([client], np.int32)
    saved = read_client(node.folder, client, node.like)
    if saved and saved.answered >= 0:  # what it computed holds for it, whether a server has counted it or not
        server.counted[client] = saved.answered if saved.answered != number else saved.counted

    def exchange(requests: dict[int, bytes]) -> dict[int, bytes]:
        return {at: make_reply(node, data) for at, data in requests.items()}

    members, cohort = {0: ids}, np.full(server.party.sampler.slots, server.party.plan.num_clients)
    cohort[0] = client
    if not server.party.whole:
        ask_missing_rows(server, number, members, members, exchange)
    requests, _ = make_requests(server, number, cohort, members, members)
    for each in read_envelopes(make_reply(node, requests[0])):
        if each.kind == EnvelopeKind.REFUSED:
            raise ValueError(f"device: {read_refusal(each)}")
        if each.kind == EnvelopeKind.MESSAGE:
            return DeviceMessage(pack_envelopes([each]), client, number)
    raise ValueError("device: the round gave no message")
