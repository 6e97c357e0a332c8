"""The apps that Flower starts: a ServerApp for the server, a ClientApp for a node. Both are thin.

Nodes that connect by `jaxfed connect` need no ClientApp (`supernode`). Flower's own SuperNode starts a process of it
for each message. What a node keeps lies on its disk, and so do its compiled programs. So that such a process starts
quickly where another one keeps the node open (`node_process`), what imports JAX is imported by the server alone.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from jaxfed.deployment.node_process import ask_node, keep_compiled_programs
from jaxfed.deployment.polling import SHORTEST_WAIT, wait_between_looks

if TYPE_CHECKING:  # these import JAX
    from jaxfed.deployment.arrivals import RequestQueue
    from jaxfed.deployment.opened_server import Exchange

RECORD, BYTES, TYPE = "jaxfed", "bytes", "query"
LONGEST_WAIT = 0.5  # seconds between two looks for replies
SLACK = 600.0  # seconds in which the server takes a reply that came by the deadline
DEADLINE = 300.0  # seconds in which a node answers, where nobody says how many

client_app = ClientApp()
server_app = ServerApp()


def wrap_bytes(data: bytes) -> RecordDict:
    """Bytes as the content of a message of Flower."""
    return RecordDict({RECORD: ConfigRecord({BYTES: data})})


def unwrap_bytes(content: RecordDict) -> bytes:
    """The bytes of a message's content; those of a stranger are no bytes of jaxfed's."""
    record = content.get(RECORD)
    data = record.get(BYTES) if isinstance(record, ConfigRecord) else None
    return data if isinstance(data, bytes) else b"?"


@client_app.query()
def run_answer(message: Message, context: Context) -> Message:
    """A node's reply to one request. Its configuration names the folder of the node, and whose keys it takes."""
    folder = Path(str(context.node_config["folder"]))
    reply = ask_node(folder, str(context.node_config.get("keys", "own")), unwrap_bytes(message.content))
    return Message(wrap_bytes(reply), reply_to=message)


def make_flower_exchange(grid: Grid, deadline: float) -> "Exchange":
    """How the server reaches nodes through Flower. deadline: seconds in which a node answers, or is left out."""

    def exchange(requests: dict[int, bytes]) -> dict[int, bytes]:
        messages = [
            Message(wrap_bytes(data), dst_node_id=node, message_type=TYPE, ttl=deadline)
            for node, data in requests.items()
        ]
        waiting = {name for name in grid.push_messages(messages) if name}
        replies: dict[int, bytes] = {}
        begin = time.monotonic()
        end = begin + deadline
        while waiting and time.monotonic() < end:
            for reply in grid.pull_messages(waiting):
                waiting.discard(reply.metadata.reply_to_message_id)
                if reply.has_content():  # else Flower says that the node failed or is gone: it drops out
                    replies[reply.metadata.src_node_id] = unwrap_bytes(reply.content)
            if waiting:
                wait_between_looks(time.monotonic() - begin, LONGEST_WAIT)
        return replies

    return exchange


def make_flower_queue(grid: Grid, deadline: float) -> "RequestQueue":
    """How single requests reach nodes through Flower. deadline: seconds in which a node answers, or is left out."""
    from jaxfed.deployment.arrivals import RequestQueue

    ends: dict[str, float] = {}  # of each request without a reply
    last_found = time.monotonic()

    def send(node: int, data: bytes) -> str | None:
        # Flower forgets the replies of messages that have expired, and the server looks when it has moved the model
        message = Message(wrap_bytes(data), dst_node_id=node, message_type=TYPE, ttl=deadline + SLACK)
        ticket = next(iter(grid.push_messages([message])), None)
        if ticket:
            ends[ticket] = time.monotonic() + deadline
        return ticket or None

    def receive() -> list[tuple[Any, bytes | None]]:
        nonlocal last_found
        found: dict[Any, bytes | None] = {}
        for reply in grid.pull_messages([*ends]):
            found[reply.metadata.reply_to_message_id] = unwrap_bytes(reply.content) if reply.has_content() else None
        found |= {ticket: None for ticket, end in ends.items() if time.monotonic() > end and ticket not in found}
        for ticket in found:
            ends.pop(ticket, None)
        if found:
            last_found = time.monotonic()
        else:
            wait_between_looks(time.monotonic() - last_found, LONGEST_WAIT)
        return [*found.items()]

    return RequestQueue(send, receive)


def make_log(path: Path) -> Callable[[str], None]:
    """Lines go to a file, and to the terminal of whoever started the server."""

    def say(text):
        with open(path, "a") as file:
            file.write(f"{text}\n")
        print(text, file=sys.stderr, flush=True)

    return say


def look_sooner_for_parts() -> None:
    """Flower waits a second where it finds a message whose parts are still on the way; from now on, less."""
    from flwr.supercore.inflatable.inflatable_utils import pull_objects

    defaults: Any = pull_objects.__kwdefaults__
    defaults["initial_backoff"] = SHORTEST_WAIT


@server_app.main()
def run_server(grid: Grid, context: Context) -> None:
    """The server's run. Its configuration names the folder, the least number of nodes, and the deadline."""
    from jaxfed.config.config_files import read_config
    from jaxfed.config.schema import make_config
    from jaxfed.deployment.node_data import read_facts
    from jaxfed.deployment.server_run import Network, serve_rounds
    from jaxfed.training.run_dir import write_file

    settings: dict[str, Any] = dict(context.run_config)
    folder = Path(str(settings["folder"]))
    say = make_log(folder / "server.log")
    keep_compiled_programs(folder)
    look_sooner_for_parts()
    try:
        config, facts = make_config(read_config(folder / "config.toml")), read_facts(folder / "facts.json")
        exchange = make_flower_exchange(grid, float(settings.get("deadline", DEADLINE)))
        queue = make_flower_queue(grid, float(settings.get("deadline", DEADLINE)))
        network = Network(exchange, lambda: [*grid.get_node_ids()], queue=queue)
        keys: Any = str(settings.get("keys", "own"))
        serve_rounds(folder, config, facts, network, int(settings.get("nodes", 1)), say, keys=keys)
    except Exception as error:  # whoever waits for the run must be told of any end
        text = " ".join(str(error).split())
        text = text if isinstance(error, ValueError) else f"the server failed: {type(error).__name__}: {text}"
        say(text)
        write_file(folder / "error.txt", text)
        raise
