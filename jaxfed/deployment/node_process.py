"""A process that keeps a node open, and how whoever has a request reaches it: by a socket in the node's folder.

Requests come to `jaxfed connect`, or to processes that Flower's SuperNode starts for each message. Where `jaxfed node`
keeps the node open, these only pass requests on, and need neither JAX nor the node's data. Where it does not run, they
open the node themselves for each request. So this module imports JAX only when it opens a node.
"""

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Client, Listener
from pathlib import Path
from typing import Any, cast

from filelock import FileLock, Timeout

from jaxfed.deployment.envelope import make_refusal, pack_envelopes, peek_round

SOCKET, LOCK, REQUEST_LOG = ".socket", ".lock", "requests.jsonl"
LOCK_WAIT = 0.2  # seconds to wait for the lock before the socket is tried again
LONGEST_PATH = 100  # bytes of a socket's path: systems take 104 or 108
BACKLOG = 16  # requests that may wait


def ask_node(folder: Path, keys: str, request: bytes) -> bytes:
    """A node's reply to a request: of the process that keeps the node open, or else of this one.

    Args:
        folder: The node's.
        keys: See `open_node`.
        request: Envelopes.

    Returns:
        The reply. What is wrong is said in it.
    """
    while True:
        try:
            with Client(str(folder / SOCKET), "AF_UNIX") as connection:
                connection.send_bytes(keys.encode())
                connection.send_bytes(request)
                return connection.recv_bytes()
        except (OSError, EOFError):  # nobody is there, or has ended before it answered
            pass
        try:
            with FileLock(folder / LOCK, timeout=LOCK_WAIT):
                return make_own_reply(folder, keys, request)
        except Timeout:  # another process that opens it, or one that is about to listen
            continue


def make_own_reply(folder: Path, keys: str, request: bytes) -> bytes:
    """The reply of this process, which opens the node for it."""
    begin = opened = time.perf_counter()
    try:
        node = open_node_folder(folder, keys)
        opened = time.perf_counter()
        reply = make_reply_or_refusal(node, request)
    except (ValueError, OSError) as error:
        reply = pack_envelopes([make_refusal(f"the node cannot be opened: {error}")])
    write_reply_times(folder, request, opened - begin, time.perf_counter() - opened, reply)
    return reply


def make_reply_or_refusal(node: Any, request: bytes) -> bytes:
    """A node's reply; a refusal where its disk is full, or a file of it cannot be written."""
    from jaxfed.deployment.node import make_reply

    try:
        return make_reply(node, request)
    except OSError as error:
        return pack_envelopes([make_refusal(f"the node cannot keep what it computed: {error}")])


def write_reply_times(folder: Path, request: bytes, opening: float, answering: float, reply: bytes) -> None:
    """Adds to `REQUEST_LOG` how long a reply took, in seconds, its bytes, and the number of the round, as the server's
    rows count them. Where that fails, the reply counts."""
    number = peek_round(request)
    times = {"open": round(opening, 3), "answer": round(answering, 3), "up": len(reply)}
    times |= {} if number is None else {"round": number + 1}
    with suppress(OSError), open(folder / REQUEST_LOG, "a") as file:
        file.write(json.dumps(times) + "\n")


def open_node_folder(folder: Path, keys: str) -> Any:
    """A node by the configuration and the facts in its folder. Raises ValueError, see `open_node`."""
    from jaxfed.config.config_files import read_config
    from jaxfed.config.schema import make_config
    from jaxfed.deployment.node_data import read_facts
    from jaxfed.deployment.opened_node import open_node

    keep_compiled_programs(folder)
    config, facts = make_config(read_config(folder / "config.toml")), read_facts(folder / "facts.json")
    return open_node(folder, config, facts, cast(Any, keys))


def keep_compiled_programs(folder: Path) -> None:
    """Has JAX keep compiled programs in a folder: the next process finds them."""
    import jax

    jax.config.update("jax_compilation_cache_dir", str(folder / "programs"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@contextmanager
def open_listener(folder: Path) -> Iterator[Listener]:
    """Yields a listener at the node's socket, which only the owner of the folder can reach. It waits for processes that
    answer for the node just now.

    Raises ValueError where another process keeps the node open, or the socket's path is too long.
    """
    path = folder / SOCKET
    if len(os.fsencode(path)) > LONGEST_PATH:
        raise ValueError(f"{path} is too long for a socket: move the node's folder, or do without `jaxfed node`")
    with lock_node(folder):
        path.unlink(missing_ok=True)  # of a process that was killed
        mask = os.umask(0o077)
        try:
            listener = Listener(str(path), "AF_UNIX", BACKLOG)
        finally:
            os.umask(mask)
        with listener:
            yield listener


def lock_node(folder: Path) -> Any:
    """The lock of a node, held, once nobody answers for it. Raises ValueError where another process keeps it open."""
    while True:
        try:
            return FileLock(folder / LOCK).acquire(timeout=LOCK_WAIT)
        except Timeout:
            if is_kept_open(folder):
                raise ValueError(f"{folder}: another `jaxfed node` keeps this node open: end that one first") from None


def is_kept_open(folder: Path) -> bool:
    """Whether a process listens at the node's socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(str(folder / SOCKET)) == 0


def answer_requests(folder: Path, keys: str, say: Callable[[str], None]) -> None:
    """Opens a node and answers requests for it, one after the other, until the process is ended.

    Args:
        folder: The node's.
        keys: See `open_node`.
        say: Called with one line once the node is open.

    Raises:
        ValueError: the node cannot be opened, or another process keeps it open.
    """
    with open_listener(folder) as listener:
        node = open_node_folder(folder, keys)
        say(f"node {folder} is open: {len(node.ids):,} clients (Ctrl-C ends)")
        while True:
            try:
                with listener.accept() as connection:
                    requested_keys = connection.recv_bytes().decode(errors="replace")
                    request, begin = connection.recv_bytes(), time.perf_counter()
                    if requested_keys == keys:
                        reply = make_reply_or_refusal(node, request)
                    else:
                        refusal = f"this node was opened with keys {keys}, not {requested_keys}"
                        reply = pack_envelopes([make_refusal(refusal)])
                    write_reply_times(folder, request, 0.0, time.perf_counter() - begin, reply)
                    connection.send_bytes(reply)
            except (OSError, EOFError):  # whoever asked is gone, and will ask again
                continue
