"""A node's side of Flower: messages are fetched, answered and sent back, whatever fails on the way."""

import errno
import inspect
import json
import runpy
import signal
import subprocess
import sys
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from threading import Thread

import pytest

pytest.importorskip("flwr")

from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.constant import ErrorCode
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectUnavailableError,
    inflate_object_from_contents,
    pull_objects,
)
from flwr.supercore.retry import http_retry
from flwr.supercore.run import RunNotRunningException
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode import fleet_http_connection
from flwr.supernode.fleet_http_connection import http_request_response

from jaxfed.cli import node
from jaxfed.cli.node import FLOWER_GIVES_UP, exit_on_signal
from jaxfed.deployment import polling, supernode
from jaxfed.deployment.envelope import NODE as NODE_ENVELOPE
from jaxfed.deployment.envelope import Envelope, EnvelopeKind, make_refusal, pack_envelopes, peek_round
from jaxfed.deployment.flower import look_sooner_for_parts, unwrap_bytes, wrap_bytes
from jaxfed.deployment.node_process import write_reply_times
from jaxfed.deployment.supernode import ServerContact, answer_server, open_connection, read_key_pair
from tests.small import child_environment

ROOT = Path(__file__).parents[2]
RUN, NODE = 5, 77


class EndedError(BaseException):
    """There is nothing more to answer."""


class PretendedServer:
    """Flower's connection to a server that has some messages, of which parts come late, or do not come."""

    def __init__(self, requests, late=0, missing=(), ended=()):
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = RUN, 1, 2
        self.waiting, self.parts, self.trees, self.confirmed = [], {}, {}, []
        self.late, self.missing, self.ended = late, missing, ended
        self.replies, self.pushed = [], {}
        for data in requests:
            message = Message(wrap_bytes(data), dst_node_id=NODE, message_type="query")
            message.metadata.__dict__["_message_id"] = message.object_id
            self.parts |= {name: part.deflate() for name, part in get_all_nested_objects(message).items()}
            self.trees[data] = get_object_tree(message)
            self.waiting.append((data, remove_content_from_message(message)))
        TaskIdentity._run_id = TaskIdentity._node_id = TaskIdentity._task_id = None  # nodes have none

    def receive(self):
        if not self.waiting:
            raise EndedError
        data, head = self.waiting.pop(0)
        if isinstance(data, Exception):
            raise data
        if data is None:
            return None
        self.answering = data
        return head, self.trees[data]

    def pull(self, run, part):
        assert run == RUN
        if self.answering in self.missing:
            raise ObjectPullError(part, "gone")
        if self.late:
            self.late -= 1
            raise ObjectUnavailableError(part)
        return self.parts[part]

    def send(self, reply, tree, seconds):
        assert seconds >= 0
        if self.answering in self.ended:
            raise RunNotRunningException
        self.replies.append(reply)
        return set(get_all_nested_objects(reply)), "session"

    def push(self, run, session, part, content):
        assert (run, session) == (RUN, "session")
        self.pushed[part] = content

    @contextmanager
    def connect(self, *words):
        inspect.signature(http_request_response).bind(*words)
        self.asked = words
        try:
            yield NODE, self.receive, self.send, None, None, self.pull, self.push, self.confirm
        finally:
            self.is_left = True

    def confirm(self, run, name):
        self.confirmed.append((run, name))

    def contents(self):
        """Of each reply, from the parts that were sent."""
        found = []
        for reply in self.replies:
            if not reply.has_content():
                found.append(reply.error)
                continue
            sent = inflate_object_from_contents(reply.metadata.message_id, dict(self.pushed))
            found.append(unwrap_bytes(sent.content))
        return found


@pytest.fixture
def join(monkeypatch):
    """join(server): that is what a node connects to; it does not wait."""

    def prepare(server):
        monkeypatch.setattr(fleet_http_connection, "http_request_response", server.connect)
        monkeypatch.setattr(supernode, "SHORTEST_WAIT", 0.001)
        monkeypatch.setattr(polling, "SHORTEST_WAIT", 0.001)

    return prepare


def answer_all(server, answer=lambda data: data[::-1]):
    """What the node said until the server had nothing more."""
    said = []
    with pytest.raises(EndedError):
        answer_server(ServerContact("here:1", insecure=True), answer, said.append)
    assert server.is_left  # so Flower tells the server that the node goes
    assert not [line for line in said if "\n" in line]
    assert said[:2] == ["connecting to here:1", "connected: Flower calls this node 77 (Ctrl-C ends)"]
    return said[2:]


def test_messages_are_answered_in_turn_and_parts_may_come_late(join):
    server = PretendedServer([b"abc", b"12" * 100_000], late=4)
    join(server)
    server.waiting.insert(1, (None, None))  # there is nothing for a while
    names = [head.metadata.message_id for _, head in server.waiting if head]
    assert answer_all(server) == []
    assert server.contents() == [b"cba", b"21" * 100_000]
    assert [reply.metadata.reply_to_message_id for reply in server.replies] == names
    assert server.confirmed == [(RUN, name) for name in names]
    assert server.asked == ("here:1", True, None, None)


def test_what_fails_is_said_here_and_the_next_message_is_answered(join):
    """The server is told at once, but not what the error said, which may be of the node's data."""

    def answer(data):
        if data == b"bad":
            raise OSError("disk\nfull")
        return data.upper()

    server = PretendedServer([b"bad", b"gone", b"over", b"good"], missing=[b"gone"], ended=[b"over"])
    join(server)
    said = answer_all(server, answer)
    *errors, reply = server.contents()
    assert reply == b"GOOD"
    assert [(each.code, each.reason) for each in errors] == [
        (ErrorCode.CLIENT_APP_RAISED_EXCEPTION, kind) for kind in ("OSError", "ObjectPullError")
    ]
    assert said[0] == "a message was not answered: OSError: disk full"
    assert said[1].startswith("a message was not answered: ObjectPullError: ")
    assert said[2].startswith("a reply was not sent: RunNotRunningException")


def test_a_server_that_does_not_answer_is_said_once(join):
    server = PretendedServer([b"abc"])
    join(server)
    server.waiting = [(RuntimeError("500 of\x1b[31m\nthe server"), None)] * 3 + server.waiting
    said = answer_all(server)
    assert len(said) == 1
    assert said[0].startswith("the server does not answer: RuntimeError: 500 of")
    assert "\x1b" not in said[0]
    assert server.contents() == [b"cba"]


def test_what_the_node_refuses_is_said_here(join):
    server = PretendedServer([b"abc"])
    join(server)
    reply = pack_envelopes([make_refusal("the node cannot be opened: no data.npz")])
    assert answer_all(server, lambda data: reply) == ["refused: the node cannot be opened: no data.npz"]
    assert server.contents() == [reply]


def test_a_log_that_cannot_be_written_ends_nothing(join):
    server = PretendedServer([b"abc"])
    join(server)

    def say(line):
        raise OSError(errno.ENOSPC, "no space")

    with pytest.raises(EndedError):
        answer_server(ServerContact("here:1", insecure=True), lambda data: data, say)
    assert server.contents() == [b"abc"]


def test_a_connection_that_ends_by_itself_is_an_error(monkeypatch):
    """Flower logs what is raised, and goes on behind its `with`."""

    @contextmanager
    def swallow(*words):
        with suppress(EndedError):
            yield (NODE, PretendedServer([]).receive, *[None] * 6)

    monkeypatch.setattr(fleet_http_connection, "http_request_response", swallow)
    with pytest.raises(ValueError, match="the connection to here:1 has ended"):
        answer_server(ServerContact("here:1", insecure=True), lambda data: data, print)


@pytest.mark.parametrize("address", ["nonsense", "http://127.0.0.1:80", "here:99999", "here:port", ":80", "", "a/b:80"])
def test_addresses_are_checked(address):
    with pytest.raises(ValueError, match="is no HOST:PORT of a server"):
        open_connection(ServerContact(address, insecure=True))


def test_what_trust_needs_is_checked(tmp_path):
    (tmp_path / "ca.crt").write_text("no certificate")
    with pytest.raises(ValueError, match=r"ca\.crt holds no certificates that can be read"):
        open_connection(ServerContact("here:1", root_certificates=tmp_path / "ca.crt"))
    with pytest.raises(ValueError, match="of no use without TLS"):
        open_connection(ServerContact("here:1", insecure=True, private_key=tmp_path / "ca.crt"))
    with pytest.raises(ValueError, match="of no use without TLS"):
        open_connection(ServerContact("here:1", insecure=True, root_certificates=tmp_path / "ca.crt"))


def test_where_the_server_does_not_take_the_node_there_is_one_line(tmp_path):
    """A server that is no SuperLink: Flower would end the program with lines of its own."""

    class Refuse(BaseHTTPRequestHandler):
        def do_POST(self):
            self.send_error(418)

        def log_message(self, *words):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Refuse) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{server.server_address[1]}"
        with pytest.raises(ValueError, match=f"{address} does not take this node: .*418") as told:
            answer_server(ServerContact(address, insecure=True), lambda data: data, print)
        server.shutdown()
    assert "\n" not in str(told.value)


def test_signals_leave_the_connection_and_flowers_own_is_told_apart(capsys):
    def _should_giveup():  # as in Flower
        exit_on_signal(signal.SIGINT, sys._getframe())

    for stop, code, said in (
        (lambda: exit_on_signal(signal.SIGTERM, sys._getframe()), 128 + signal.SIGTERM, "the node leaves"),
        (_should_giveup, 2, "the server no longer knows this node"),
    ):
        with pytest.raises(SystemExit) as ended:
            stop()
        assert ended.value.code == code
        assert said in capsys.readouterr().err
    assert FLOWER_GIVES_UP in inspect.getsource(http_retry)


def test_parts_are_looked_for_sooner():
    """The default is Flower's, and is of no public function."""
    assert pull_objects.__kwdefaults__["initial_backoff"] >= polling.SHORTEST_WAIT
    look_sooner_for_parts()
    assert pull_objects.__kwdefaults__["initial_backoff"] == polling.SHORTEST_WAIT


def test_rounds_are_put_beside_their_slowest_node(tmp_path):
    overhead = runpy.run_path(str(ROOT / "scripts" / "deployed_overhead.py"))
    plan = Envelope(EnvelopeKind.PLAN, 1, NODE_ENVELOPE, bytes(32))
    hello = Envelope(EnvelopeKind.HELLO, 0, NODE_ENVELOPE, bytes(32))
    assert [peek_round(pack_envelopes([each])) for each in (hello, plan)] == [None, 1]
    assert peek_round(b"short") is None
    for number, seconds in enumerate((0.5, 2.0)):
        folder = tmp_path / "nodes" / str(number)
        folder.mkdir(parents=True)
        write_reply_times(folder, pack_envelopes([hello]), 9.0, 9.0, b"")
        for part in (0.25, 0.75):
            write_reply_times(folder, pack_envelopes([plan]), 0.0, part * seconds, b"reply")
    (tmp_path / "server").mkdir()
    rows = [{"round": 1, "seconds": 1.0}, {"round": 2, "seconds": 4.5}]
    (tmp_path / "server" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert overhead["list_rounds"](tmp_path) == [
        {"round": 1, "seconds": 1.0, "node": 0, "rest": 1.0, "allowed": 0.15},
        {"round": 2, "seconds": 3.5, "node": 2.0, "rest": 1.5, "allowed": pytest.approx(6.15)},
    ]


def test_keys_that_flower_does_not_take_are_refused(tmp_path):
    subprocess.run(["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", tmp_path / "good"], check=True)
    private, public = read_key_pair(tmp_path / "good")
    assert private.public_key() == public
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "other"], check=True)
    subprocess.run(["ssh-keygen", "-q", "-t", "ecdsa", "-N", "secret", "-f", tmp_path / "locked"], check=True)
    (tmp_path / "none").write_text("no key")
    for name in ("other", "locked", "none"):
        with pytest.raises(ValueError, match=f"{name} is no private key that Flower takes: ssh-keygen"):
            read_key_pair(tmp_path / name)


@pytest.mark.parametrize(("waited", "slept"), [(0, 0.1), (1, 0.1), (4, 0.2), (1000, 3.0)])
def test_looks_come_less_often_the_longer_nothing_comes(monkeypatch, waited, slept):
    times = []
    monkeypatch.setattr(polling.time, "sleep", times.append)
    polling.wait_between_looks(waited, 3.0)
    assert times == [slept]


def test_the_process_that_connects_needs_no_jax():
    code = "import sys, jaxfed.cli.main, jaxfed.deployment.supernode; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=child_environment())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere", "--superlink", "127.0.0.1:1"], "is no folder: name the one that holds"),
        ([".", "--superlink", "127.0.0.1:1", "--private-key", "nothing"], "nothing is no file"),
        ([".", "--superlink", "127.0.0.1:1"], "config.toml is no file"),
        (["."], "--superlink"),
    ],
)
def test_wrong_words_are_refused(words, said):
    found = subprocess.run(
        [sys.executable, "-m", "jaxfed", "connect", *words],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=child_environment(),
    )
    assert found.returncode == 2
    assert said in found.stderr.splitlines()[-1]


@pytest.mark.parametrize("found", [lambda name: None, lambda name: find_spec("nothing.of.this")])
def test_another_flower_or_none_is_said_in_one_line(monkeypatch, found):
    monkeypatch.setattr(node, "find_spec", found)
    with pytest.raises(ValueError, match=r"connect needs Flower 1\.42: pip install"):
        node.require_flower("connect")
