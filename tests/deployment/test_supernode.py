"""A node's side of Flower: messages are fetched, answered and sent back, whatever fails on the way."""

import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

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
)
from flwr.supercore.run import RunNotRunningException
from flwr.supercore.task_identity import TaskIdentity

from jaxfed.deployment import polling, supernode
from jaxfed.deployment.flower import unwrap_bytes, wrap_bytes
from jaxfed.deployment.supernode import ServerContact, answer_server, read_key_pair
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
    def connect(self, address, insecure, certificates, keys):
        self.asked = address, insecure, certificates, keys
        confirm = lambda run, name: self.confirmed.append((run, name))
        yield NODE, self.receive, self.send, None, None, self.pull, self.push, confirm

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


def answer_all(server, monkeypatch, answer=lambda data: data[::-1]):
    """What the node said until the server had nothing more."""
    monkeypatch.setattr(supernode, "http_request_response", server.connect)
    monkeypatch.setattr(supernode, "SHORTEST_WAIT", 0.001)
    monkeypatch.setattr(polling, "SHORTEST_WAIT", 0.001)
    said = []
    with pytest.raises(EndedError):
        answer_server(ServerContact("here:1", insecure=True), answer, said.append)
    return said


def test_messages_are_answered_in_turn_and_parts_may_come_late(monkeypatch):
    server = PretendedServer([b"abc", b"12" * 100_000], late=4)
    server.waiting.insert(1, (None, None))  # there is nothing for a while
    names = [head.metadata.message_id for _, head in server.waiting if head]
    said = answer_all(server, monkeypatch)
    assert server.contents() == [b"cba", b"21" * 100_000]
    assert [reply.metadata.reply_to_message_id for reply in server.replies] == names
    assert server.confirmed == [(RUN, name) for name in names]
    assert server.asked == ("here:1", True, None, None)
    assert said == ["connected to here:1; Flower calls this node 77 (Ctrl-C ends)"]


def test_what_fails_is_told_and_the_next_message_is_answered(monkeypatch):
    def answer(data):
        if data == b"bad":
            raise OSError("disk full")
        return data.upper()

    server = PretendedServer([b"bad", b"gone", b"over", b"good"], missing=[b"gone"], ended=[b"over"])
    said = answer_all(server, monkeypatch, answer)
    error, reply = server.contents()
    assert reply == b"GOOD"
    assert (error.code, error.reason) == (ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "OSError: disk full")
    assert said[1] == "a message was not answered: OSError: disk full"
    assert said[2].startswith("a message was lost: ObjectPullError: ")
    assert said[3] == "the run has ended: its message is not answered"


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
