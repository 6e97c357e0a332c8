"""A process that keeps a node open answers as a node that is opened for each request."""

import errno
import json
import os
import queue
import signal
import socket
import subprocess
import sys
from threading import Thread, Timer

import numpy as np
import pytest
from filelock import FileLock

from jaxfed.config.build import build_from_config, load_data
from jaxfed.config.schema import make_config
from jaxfed.core.processes import Processes
from jaxfed.deployment import node
from jaxfed.deployment.collected_run import lay_out_federation
from jaxfed.deployment.coordinator import make_requests
from jaxfed.deployment.envelope import NODE, Envelope, EnvelopeKind, pack_envelopes, read_envelopes, read_refusal
from jaxfed.deployment.node_process import (
    LOCK,
    LOCK_WAIT,
    REQUEST_LOG,
    SOCKET,
    answer_requests,
    ask_node,
    open_listener,
    open_node_folder,
)
from jaxfed.deployment.opened_server import open_server
from jaxfed.sampling.cohort import sample_cohort
from jaxfed.training.session import round_seed
from tests.deployment.federation import MF, RING
from tests.small import start_program

BARE = {"channel": [{"name": "weighted_mean"}], "server": {"name": "sgd", "lazy": False}}


def lay_out(folder, table=MF | BARE):
    """(the folder of the first of two nodes, the server)."""
    config = make_config(table)
    facts = lay_out_federation(folder, config, build_from_config(config, load_data(config.data)), 2)
    return folder / "nodes" / "0", open_server(config, facts, round_seed(config, Processes()), print)


def make_round_request(server, opened):
    """A request of the first round for the clients of a node, which has all rows of the model."""
    ids = sample_cohort(server.party.sampler, server.seed, 0)[0]
    asked = {0: np.intersect1d(ids, opened.ids).astype(np.int32)}
    for client in asked[0].tolist():
        server.wanted.setdefault(0, {})[client] = np.arange(server.party.size, dtype=np.int32)
    return make_requests(server, 0, ids, asked, {0: opened.ids})[0][0]


def start_process(folder):
    words = [sys.executable, "-m", "jaxfed", "node", str(folder), "--keys", "reproducible"]
    return start_program(words, stderr=subprocess.PIPE)


@pytest.mark.long
def test_a_process_answers_for_a_node_and_a_killed_one_is_not_missed(tmp_path):
    """The same bytes as without it, which are the same for a request that comes again. It alone has the node; when it
    is killed, whoever asks opens the node."""
    folder, server = lay_out(tmp_path / "a")
    hello = pack_envelopes([Envelope(EnvelopeKind.HELLO, 0, NODE, server.party.digest)])
    request = make_round_request(server, open_node_folder(folder, "reproducible"))
    with start_process(folder) as process:
        said = []
        assert any("is open: 20 clients" in line or said.append(line) for line in process.stderr), said
        first = [ask_node(folder, "reproducible", each) for each in (hello, request)]
        assert read_envelopes(first[1])[0].kind == EnvelopeKind.MESSAGE
        (refused,) = read_envelopes(ask_node(folder, "own", hello))
        assert read_refusal(refused) == "this node was opened with keys reproducible, not own"
        (other,) = read_envelopes(ask_node(folder, "reproducible", b"no envelope"))
        assert "refused: " in read_refusal(other)
        with start_process(folder) as second:
            assert "another `jaxfed node` keeps this node open" in second.communicate(timeout=100)[1]
        assert second.returncode == 2
        with socket.socket(socket.AF_UNIX) as rude:  # it asks for nothing, and goes
            rude.connect(str(folder / SOCKET))
        assert ask_node(folder, "reproducible", hello) == first[0]
        assert (folder / SOCKET).stat().st_mode & 0o077 == 0
        process.send_signal(signal.SIGKILL)
    opened = [json.loads(line)["open"] for line in (folder / REQUEST_LOG).read_text().splitlines()]
    assert opened == [0.0] * len(opened)
    assert [ask_node(folder, "reproducible", each) for each in (hello, request)] == first
    assert json.loads((folder / REQUEST_LOG).read_text().splitlines()[-1])["open"] > 0
    apart, _ = lay_out(tmp_path / "b")
    assert [ask_node(apart, "reproducible", each) for each in (hello, request)] == first


def test_a_node_that_cannot_be_opened_says_so_in_its_reply(tmp_path):
    folder, server = lay_out(tmp_path / "a", MF | RING)
    (folder / "secure" / "identity").write_bytes(b"other")
    hello = pack_envelopes([Envelope(EnvelopeKind.HELLO, 0, NODE, server.party.digest)])
    (refused,) = read_envelopes(ask_node(folder, "reproducible", hello))
    assert "missing or damaged" in read_refusal(refused)


def test_a_process_waits_for_one_that_answers_just_now(tmp_path):
    """An app of a round may train for minutes, and a process that is started anew must not give up."""
    answering = FileLock(tmp_path / LOCK, thread_local=False)
    answering.acquire()
    Timer(3 * LOCK_WAIT, answering.release).start()
    with open_listener(tmp_path):
        assert not answering.is_locked


@pytest.mark.parametrize("kept", [True, False])
def test_a_node_whose_disk_is_full_says_so(tmp_path, monkeypatch, kept):
    """It must not be asked again and again; nor is a reply lost where only its times cannot be written."""
    folder, server = lay_out(tmp_path)
    hello = pack_envelopes([Envelope(EnvelopeKind.HELLO, 0, NODE, server.party.digest)])
    request = make_round_request(server, open_node_folder(folder, "reproducible"))
    (folder / REQUEST_LOG).mkdir()

    def fail(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(node, "write_client", fail)
    said = queue.Queue()
    if kept:
        Thread(target=answer_requests, args=(folder, "reproducible", said.put), daemon=True).start()
        assert "is open" in said.get(timeout=60)
    replies = [read_envelopes(ask_node(folder, "reproducible", each)) for each in (hello, request)]
    assert replies[0][0].kind == EnvelopeKind.HELLO
    assert "No space left on device" in read_refusal(replies[1][0])


def test_a_node_has_one_process(tmp_path):
    with (
        open_listener(tmp_path),
        pytest.raises(ValueError, match="another `jaxfed node` keeps this node open"),
        open_listener(tmp_path),
    ):
        pass
    deep = tmp_path / ("x" * 100)
    with pytest.raises(ValueError, match="too long for a socket"), open_listener(deep):
        pass
    (tmp_path / SOCKET).write_text("")  # of a process that was killed
    with open_listener(tmp_path):
        assert os.path.exists(tmp_path / SOCKET)
    assert not os.path.exists(tmp_path / SOCKET)
