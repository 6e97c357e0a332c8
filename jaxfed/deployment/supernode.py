"""Connects a node to a server: what Flower's SuperNode does, without a process for each message.

`flower-supernode` looks for messages every three seconds, and starts a process of the app for each. Here the
connection is Flower's, with its registration, signatures, TLS and heartbeats. But a message is handed to the process
that keeps the node open (`node_process`), and the next one is looked for the sooner, the shorter ago the last one was.
No code that the server sent is loaded. The modules of Flower that this needs are not public, so `pyproject.toml` bounds
its version.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import Message
from flwr.app.error import Error
from flwr.common.constant import ErrorCode
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents, pull_objects, push_objects
from flwr.supercore.run import RunNotRunningException
from flwr.supernode.fleet_http_connection import http_request_response

from jaxfed.deployment.flower import unwrap_bytes, wrap_bytes
from jaxfed.deployment.polling import SHORTEST_WAIT, wait_between_looks

LONGEST_WAIT = 3.0  # seconds between two looks for messages, as in Flower's SuperNode


class ServerContact(NamedTuple):
    """Where a server is, and how it and the node trust each other.

    Args:
        address: HOST:PORT of the SuperLink.
        insecure: Whether to connect without TLS.
        root_certificates: A file of certificates that the server's is signed by; None: those of the system.
        private_key: A file with the node's key (elliptic curve, OpenSSH); None: a new one, where the server takes any.
    """

    address: str
    insecure: bool = False
    root_certificates: Path | None = None
    private_key: Path | None = None


def answer_server(contact: ServerContact, answer: Callable[[bytes], bytes], say: Callable[[str], None]) -> None:
    """Answers a server's messages, one after the other, until the process is ended. Where the server is away, it is
    tried again.

    Args:
        contact: Where the server is.
        answer: The node's reply to the bytes of a request.
        say: Is told what happens, a line each.

    Raises:
        ValueError: the key cannot be read.
    """
    certificates = contact.root_certificates.read_bytes() if contact.root_certificates else None
    keys = read_key_pair(contact.private_key) if contact.private_key else None
    with http_request_response(contact.address, contact.insecure, certificates, keys) as connection:
        node, receive, send, _, _, pull, push, confirm = connection
        say(f"connected to {contact.address}; Flower calls this node {node} (Ctrl-C ends)")
        last_message = time.monotonic()
        while True:
            try:
                if found := receive():
                    message, begin = fetch_message(*found, pull, confirm), time.monotonic()
                    reply = make_flower_reply(message, answer, say)
                    send_reply(reply, time.monotonic() - begin, send, push)
                    last_message = time.monotonic()
                    continue
            except RunNotRunningException:
                say("the run has ended: its message is not answered")
            except Exception as error:  # a part of the message is missing, or the reply was not taken: the next one
                say(f"a message was lost: {type(error).__name__}: {error}")
            wait_between_looks(time.monotonic() - last_message, LONGEST_WAIT)


def read_key_pair(path: Path) -> tuple[Any, Any]:
    """(private key, public key) of a file in OpenSSH's format. Raises ValueError where it holds none."""
    try:
        private = load_ssh_private_key(path.read_bytes(), None)
    except (ValueError, TypeError, UnsupportedAlgorithm):  # TypeError: it has a password
        private = None
    if not isinstance(private, EllipticCurvePrivateKey):
        raise ValueError(f'{path} is no private key that Flower takes: ssh-keygen -t ecdsa -b 384 -N "" makes one')
    return private, private.public_key()


def fetch_message(head: Message, tree: Any, pull: Callable[..., bytes], confirm: Callable[..., None]) -> Message:
    """A message with its content. head: the message without. tree: names of its parts."""
    run, name = head.metadata.run_id, head.metadata.message_id
    parts = [each.object_id for each in iterate_object_tree(tree)]
    contents = pull_objects(parts, partial(pull, run), initial_backoff=SHORTEST_WAIT)
    confirm(run, name)
    message: Any = inflate_object_from_contents(name, contents)
    message.metadata.__dict__["_message_id"] = name
    return message


def make_flower_reply(message: Message, answer: Callable[[bytes], bytes], say: Callable[[str], None]) -> Message:
    """The reply to a message; where the node fails, an error in Flower's form, so that the server need not wait."""
    try:
        return Message(wrap_bytes(answer(unwrap_bytes(message.content))), reply_to=message)
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
        say(f"a message was not answered: {told}")
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, told), reply_to=message)


def send_reply(reply: Message, seconds: float, send: Callable[..., Any], push: Callable[..., None]) -> None:
    """Sends a reply. seconds: how long it took to make."""
    reply.metadata.__dict__["_message_id"] = reply.object_id
    missing, session = send(reply, get_object_tree(reply), seconds)
    push_objects(
        get_all_nested_objects(reply), partial(push, reply.metadata.run_id, session), object_ids_to_push=missing
    )
