"""Connects a node to a server: what Flower's SuperNode does, without a process for each message.

`flower-supernode` looks for messages every three seconds, and starts a process of the app for each. Here the
connection is Flower's, with its registration, signatures, TLS and heartbeats. But a message is handed to the process
that keeps the node open (`node_process`), and the next one is looked for the sooner, the shorter ago the last one was.
No code that the server sent is loaded. The modules of Flower that this needs are not public, so `pyproject.toml` bounds
its version.
"""

import re
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from ssl import SSLError, create_default_context
from typing import Any, NamedTuple, NoReturn

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import Message
from flwr.app.error import Error
from flwr.common.constant import ErrorCode
from flwr.supercore.address import parse_address
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents, pull_objects, push_objects
from flwr.supercore.run import RunNotRunningException
from flwr.supernode import fleet_http_connection

from jaxfed.core.excerpt import printable
from jaxfed.deployment.envelope import EnvelopeKind, read_envelopes, read_refusal
from jaxfed.deployment.flower import unwrap_bytes, wrap_bytes
from jaxfed.deployment.polling import SHORTEST_WAIT, wait_between_looks

FAILURES = (Exception, RunNotRunningException)  # the second is Flower's, and no Exception
LONGEST_REFUSAL = 4096  # bytes of a reply that is read for refusals
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
        say: Is told what happens, a line each, and nothing twice in a row.

    Raises:
        ValueError: the server does not take the node, or what the contact names cannot be used.
    """
    last_line, last_message = "", time.monotonic()

    def tell(text):
        nonlocal last_line
        line = printable(" ".join(text.split()))
        if line != last_line:
            last_line = line
            with suppress(OSError):  # of a full disk, or a terminal that is gone
                say(line)

    tell(f"connecting to {contact.address}")
    with open_connection(contact) as (node, receive, send, _, _, pull, push, confirm):
        fetch = partial(fetch_message, pull, confirm)
        tell(f"connected: Flower calls this node {node} (Ctrl-C ends)")
        while True:
            try:
                found = receive()
            except FAILURES as error:
                tell(f"the server does not answer: {type(error).__name__}: {error}")
                found = None
            if found:
                head, tree = found
                reply, seconds = answer_message(head, tree, fetch, answer, tell)
                try:
                    send_reply(reply, seconds, send, push)
                except FAILURES as error:  # the run has ended, or the reply is not taken: the next one
                    tell(f"a reply was not sent: {type(error).__name__}: {error}")
                last_message = time.monotonic()
            else:
                wait_between_looks(time.monotonic() - last_message, LONGEST_WAIT)
    raise ValueError(f"the connection to {contact.address} has ended: start this again")


def open_connection(contact: ServerContact) -> Any:
    """Flower's connection, to be entered. Raises ValueError where the contact cannot be used."""
    if not re.fullmatch(r".+:\d+", contact.address) or "/" in contact.address or parse_address(contact.address) is None:
        raise ValueError(f"{contact.address!r} is no HOST:PORT of a server")
    if contact.insecure and (contact.private_key or contact.root_certificates):
        raise ValueError("a key or certificates are of no use without TLS: leave out --insecure, or these")
    certificates = None if contact.root_certificates is None else str(contact.root_certificates)
    try:
        create_default_context(cafile=certificates)
    except (SSLError, ValueError) as error:
        raise ValueError(f"{certificates} holds no certificates that can be read (PEM): {error}") from error
    keys = read_key_pair(contact.private_key) if contact.private_key else None
    fleet_http_connection.flwr_exit = partial(refuse_start, contact.address)
    return fleet_http_connection.http_request_response(contact.address, contact.insecure, certificates, keys)


def refuse_start(address: str, code: int, message: str = "", **_: Any) -> NoReturn:
    """In place of Flower's end of the program: raises ValueError."""
    what = (
        "is the key registered there? Has the server TLS (else --insecure), and a certificate that --root-certificates "
        "signed? The key of a node that was killed is taken again after a minute"
    )
    raise ValueError(f"{address} does not take this node: {' '.join(message.split())} ({what})")


def answer_message(
    head: Message,
    tree: Any,
    fetch: Callable[[Message, Any], Message],
    answer: Callable[[bytes], bytes],
    say: Callable[[str], None],
) -> tuple[Message, float]:
    """(the reply to a message, seconds that it took). Where its parts are missing, or the node fails, the reply is an
    error in Flower's form, so that the server need not wait; what failed is said here alone.

    head: the message without its content. tree: the names of its parts.
    """
    begin = time.monotonic()
    try:
        message = fetch(head, tree)
        reply = answer(unwrap_bytes(message.content))
        for line in list_refusals(reply):
            say(f"refused: {line}")
        return Message(wrap_bytes(reply), reply_to=message), time.monotonic() - begin
    except FAILURES as error:
        say(f"a message was not answered: {type(error).__name__}: {error}")
        told = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, type(error).__name__)
        return Message(told, reply_to=head), time.monotonic() - begin


def list_refusals(reply: bytes) -> list[str]:
    """Why the node refused a request, a line each; none where it answered."""
    if len(reply) > LONGEST_REFUSAL:
        return []
    try:
        return [read_refusal(each) for each in read_envelopes(reply) if each.kind == EnvelopeKind.REFUSED]
    except ValueError:  # the server says what is wrong with a reply
        return []


def read_key_pair(path: Path) -> tuple[Any, Any]:
    """(private key, public key) of a file in OpenSSH's format. Raises ValueError where it holds none."""
    try:
        private = load_ssh_private_key(path.read_bytes(), None)
    except (ValueError, TypeError, UnsupportedAlgorithm):  # TypeError: it has a password
        private = None
    if not isinstance(private, EllipticCurvePrivateKey):
        raise ValueError(f'{path} is no private key that Flower takes: ssh-keygen -t ecdsa -b 384 -N "" makes one')
    return private, private.public_key()


def fetch_message(pull: Callable[..., bytes], confirm: Callable[..., None], head: Message, tree: Any) -> Message:
    """A message with its content."""
    run, name = head.metadata.run_id, head.metadata.message_id
    parts = [each.object_id for each in iterate_object_tree(tree)]
    contents = pull_objects(parts, partial(pull, run), initial_backoff=SHORTEST_WAIT)
    confirm(run, name)
    message: Any = inflate_object_from_contents(name, contents)
    message.metadata.__dict__["_message_id"] = name
    return message


def send_reply(reply: Message, seconds: float, send: Callable[..., Any], push: Callable[..., None]) -> None:
    """Sends a reply. seconds: how long it took to make."""
    reply.metadata.__dict__["_message_id"] = reply.object_id
    missing, session = send(reply, get_object_tree(reply), seconds)
    push_objects(
        get_all_nested_objects(reply), partial(push, reply.metadata.run_id, session), object_ids_to_push=missing
    )
