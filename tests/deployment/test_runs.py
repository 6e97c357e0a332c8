"""Runs of a server: checkpoints, going on after an end at any time, nodes that come and go; and Flower itself."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import psutil
import pytest

from jaxfed.cli import deploy, started_programs
from jaxfed.config.build import build_from_config, load_data
from jaxfed.config.config_files import config_to_toml
from jaxfed.config.schema import make_config
from jaxfed.core.tree import tree_digest
from jaxfed.deployment.collected_run import collect_run, lay_out_federation
from jaxfed.deployment.envelope import EnvelopeKind, read_envelopes
from jaxfed.deployment.opened_node import open_node
from jaxfed.deployment.server_run import Network, serve_rounds
from jaxfed.training.best_model import open_best_model
from jaxfed.training.loop import train_run
from jaxfed.training.rounds import scored_model
from jaxfed.training.run_dir import write_file
from tests.deployment.federation import DATA, MF, RING, SILOS, direct_exchange, simulate
from tests.small import child_environment, start_program

ROOT = Path(__file__).parents[2]


class EndedError(Exception):
    """The server's process is gone."""


def run_apart(out, table, network=direct_exchange, number=3, keys="reproducible"):
    """A federation in the folder `out`: (summary of the server, the configuration, the simulator's parts, facts)."""
    config = make_config(table | {"run": {"out": str(out)}})
    parts = build_from_config(config, load_data(config.data))
    facts = lay_out_federation(out, config, parts, number)
    nodes = {node: open_node(out / "nodes" / str(node), config, facts, "reproducible") for node in range(number)}
    lines = []
    serve_rounds(
        out / "server", config, facts, Network(network(nodes), lambda: [*nodes]), number, lines.append, keys=keys
    )
    return collect_run(out, config, parts, facts, number), lines


KEYS = "own", "reproducible"
TABLE = MF | RING | {"cohort": {"name": "uniform", "size": 12}, "rounds": 4}


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    return train_run(make_config(TABLE | {"run": {"out": str(tmp_path_factory.mktemp("runs") / "simulated")}}))


def test_a_whole_run_has_the_digest_of_the_simulator(simulated, tmp_path):
    """Its folder is read like any other run's, and it counts the same bytes."""
    summary, _ = run_apart(tmp_path / "a", TABLE)
    for key in ("params_sha256", "data_sha256", "bytes_up_per_client", "rounds", "server_sees"):
        assert summary[key] == simulated[key]
    assert json.loads((tmp_path / "a" / "summary.json").read_text())["params_sha256"] == summary["params_sha256"]
    rows = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rows] == [1, 2, 3, 4, 4]
    assert all(row["network/bytes_up"] > 0 for row in rows[:4])
    parts, _, (shared, _) = open_best_model(str(tmp_path / "a"))
    assert parts.data.digest == summary["data_sha256"]
    assert np.isfinite(np.asarray(shared["tables"]["item"].rows)).all()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("round", [0, 2])
def test_a_server_that_ended_goes_on(when, round, simulated, tmp_path):
    """It ends while it asks: before nodes have answered, or when they have and it has heard nothing."""
    ended = []

    def dying(nodes):
        exchange = direct_exchange(nodes)

        def through(requests):
            head = read_envelopes(next(iter(requests.values())))[0]
            dies = head.kind == EnvelopeKind.PLAN and head.round == round and not ended
            if dies and when == "before":
                ended.append(round)
                raise EndedError
            replies = exchange(requests)
            if dies:
                ended.append(round)
                raise EndedError
            return replies

        return through

    with pytest.raises(EndedError):
        run_apart(tmp_path / "a", TABLE, dying)
    summary, lines = run_apart(tmp_path / "a", TABLE)
    assert ended == [round]
    assert any("going on after round 2" in line for line in lines) == (round == 2)
    assert summary["params_sha256"] == simulated["params_sha256"]


def test_no_node_can_compute_the_noise_of_the_server(tmp_path):
    """Nodes are told the public randomness of a round. By a secret of the server other noise is drawn, the same again
    when it goes on; links that draw from one key at both ends do not go with it."""
    links = [{"name": "mean", "count": 12}, {"name": "clip", "bound": 0.5}, {"name": "gaussian"}]
    table = MF | {"channel": links, "rounds": 2}
    digests = {keys: run_apart(tmp_path / keys, table, keys=keys)[0]["params_sha256"] for keys in KEYS}
    again, _ = run_apart(tmp_path / "own", table, keys="own")
    assert digests["own"] != digests["reproducible"]
    assert again["params_sha256"] == digests["own"]
    turned = table | {"channel": [links[0], {"name": "rotate"}, *links[1:]]}
    with pytest.raises(ValueError, match="beside noise rotate would tell nodes"):
        run_apart(tmp_path / "c", turned, keys="own")


def test_another_run_in_the_folder_is_refused(tmp_path):
    run_apart(tmp_path / "a", TABLE | {"rounds": 1})
    with pytest.raises(ValueError, match="holds another run"):
        run_apart(tmp_path / "a", TABLE | {"rounds": 1, "seed": 9})


@pytest.mark.parametrize("keys", KEYS)
def test_what_nodes_keep_is_for_their_owner_alone(keys, tmp_path):
    """Whatever the process masks: folders that hold others, and each file of a client, a key or data."""
    mask = os.umask(0o022)
    try:
        run_apart(tmp_path / "deep" / "a", TABLE | {"rounds": 1}, number=2, keys=keys)
    finally:
        os.umask(mask)
    nodes = tmp_path / "deep" / "a" / "nodes"
    folders = [nodes, *nodes.glob("*"), *nodes.glob("*/*/")]
    files = [*nodes.rglob("*.npz"), *nodes.rglob("secret"), *nodes.rglob("identity"), *nodes.rglob("masked.json")]
    assert len(files) >= 2 * 4
    assert {path.stat().st_mode & 0o777 for path in folders if path.is_dir()} == {0o700}
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}


def test_where_all_nodes_have_gone_the_server_waits_for_one(tmp_path):
    """They are there for the first round, and again after a while: no round is counted in which nobody can answer."""
    config = make_config(TABLE | {"rounds": 2})
    parts = build_from_config(config, load_data(config.data))
    facts = lay_out_federation(tmp_path, config, parts, 2)
    nodes = {node: open_node(tmp_path / "nodes" / str(node), config, facts, "reproducible") for node in range(2)}
    looks = iter([[0, 1], [0, 1], [], [], []])
    network = Network(direct_exchange(nodes), lambda: next(looks, [0, 1]), lambda: time.sleep(0.01))
    serve_rounds(tmp_path / "server", config, facts, network, 2, print)
    rows = [json.loads(line) for line in (tmp_path / "server" / "metrics.jsonl").read_text().splitlines()]
    assert [row["clients/reported"] > 0 for row in rows] == [True, True]
    assert next(looks, None) is None  # the empty ones were seen


def test_too_few_nodes(tmp_path):
    config = make_config(TABLE)
    parts = build_from_config(config, load_data(config.data))
    facts = lay_out_federation(tmp_path, config, parts, 2)
    network = Network(lambda requests: {}, lambda: [1, 2], lambda: time.sleep(0.01))
    with pytest.raises(ValueError, match=r"0 of 2 nodes took part within 0\.1 seconds"):
        serve_rounds(tmp_path / "server", config, facts, network, 2, print, patience=0.1)
    with pytest.raises(ValueError, match="there are 40 clients, each at one node"):
        lay_out_federation(tmp_path, config, parts, 41)


def write_table(path, table):
    import tomli_w

    path.write_text(tomli_w.dumps(table))
    return path


def command(*words):
    return [sys.executable, "-m", "jaxfed", *map(str, words)]


def flower_processes(folder):
    """The processes that name a folder in their environment: those that a deployment has started."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if f"FLWR_HOME={folder}".encode() in (place / "environ").read_bytes().split(b"\0"):
                found.append(int(place.name))
        except OSError:
            continue
    return found


def test_a_server_whose_process_ends_is_noticed(monkeypatch):
    monkeypatch.setattr(started_programs, "SERVER_LOOKS", 0.0)
    ended = started_programs.watch_server()
    assert not ended()  # it has not begun
    with subprocess.Popen([sys.executable, "-c", "input()", "flwr-serverapp"], stdin=subprocess.PIPE) as process:
        while "flwr-serverapp" not in psutil.Process(process.pid).cmdline():
            time.sleep(0.01)
        assert not ended()
        assert not ended()
        process.kill()
        process.wait()
    assert ended()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rounds": 9}, r"is a federation of 4 rounds, not 9: pass .*config\.toml as CONFIG\.toml"),
        ({"model": MF["model"] | {"dim": 7}}, "was run with another configuration"),
    ],
)
def test_a_federation_goes_on_with_its_configuration_alone(tmp_path, change, said):
    """Else the configuration would be written over before the server refuses it."""
    (tmp_path / "server").mkdir()
    deploy.check_deployed_config(tmp_path, make_config(TABLE))  # of no federation
    write_file(tmp_path / "server" / "config.toml", config_to_toml(make_config(TABLE)))
    deploy.check_deployed_config(tmp_path, make_config(TABLE))
    with pytest.raises(ValueError, match=said):
        deploy.check_deployed_config(tmp_path, make_config(TABLE | change))


@pytest.mark.skipif(not shutil.which("setpriv"), reason="processes are tied by setpriv of util-linux")
def test_programs_end_where_whoever_started_them_is_killed(tmp_path):
    """`kill -9` leaves nobody to end them."""
    (tmp_path / "flower").mkdir()
    code = (
        "import pathlib, sys, time; from jaxfed.cli.started_programs import launch_programs\n"
        "with launch_programs(pathlib.Path(sys.argv[1])) as start:\n"
        "    print(start('sleep', ['sleep', '1000']).pid, flush=True); time.sleep(1000)"
    )
    words = [sys.executable, "-c", code, str(tmp_path)]
    with start_program(words, stdout=subprocess.PIPE) as process:
        started = psutil.Process(int(process.stdout.readline()))
        deadline = time.monotonic() + 60
        while started.name() != "sleep" and time.monotonic() < deadline:  # setpriv becomes the program
            time.sleep(0.05)
        assert started.name() == "sleep"
        process.kill()
    assert not psutil.wait_procs([started], timeout=60)[1]


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")
def test_flower_runs_what_the_simulator_does(tmp_path):
    """A SuperLink and two nodes on loopback, five silos: the same params_sha256. No process is left."""
    pytest.importorskip("flwr")
    table = MF | RING | SILOS | {"rounds": 2, "data": DATA | {"clients": "silo", "silos": 5}}
    path = write_table(tmp_path / "silos.toml", table)
    out, alone = tmp_path / "deployed", tmp_path / "simulated"
    kind = {"cwd": ROOT, "env": child_environment(), "check": True, "capture_output": True, "timeout": 400}
    subprocess.run(command("deploy", path, "--nodes", 2, "--out", out), **kind)
    subprocess.run(command("train", path, "--out", alone), **kind)
    summaries = [json.loads((each / "summary.json").read_text()) for each in (out, alone)]
    assert summaries[0]["params_sha256"] == summaries[1]["params_sha256"]
    assert not flower_processes(out / "flower")


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")
def test_stopped_all_processes_end_and_the_run_goes_on(tmp_path):
    pytest.importorskip("flwr")
    table = MF | RING | SILOS | {"rounds": 3}
    path = write_table(tmp_path / "silos.toml", table)
    out, alone = tmp_path / "deployed", tmp_path / "simulated"
    kind = {"cwd": ROOT, "env": child_environment()}
    words = command("deploy", path, "--rounds", 4, "--nodes", 2, "--out", out)
    with start_program(words, stderr=subprocess.PIPE) as process:
        assert any(line.startswith("round 1:") for line in process.stderr)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGINT
    again = shlex.split(told.splitlines()[-1].partition("go on with: jaxfed ")[2])
    assert not flower_processes(out / "flower")
    other = subprocess.run([*words, "--keys", "own", "--resume"], check=False, capture_output=True, text=True, **kind)
    assert other.returncode == 2
    assert "go on with --nodes 2 --keys reproducible --resume" in other.stderr
    subprocess.run(command(*again), check=True, timeout=400, **kind)  # the words that were printed
    subprocess.run(command("train", path, "--rounds", 4, "--out", alone), check=True, timeout=400, **kind)
    summaries = [json.loads((each / "summary.json").read_text()) for each in (out, alone)]
    assert summaries[0]["params_sha256"] == summaries[1]["params_sha256"]
    assert os.path.getsize(out / "metrics.jsonl")


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")
def test_a_node_that_is_killed_drops_its_clients_out(tmp_path):
    """The connection of the second of four nodes is killed after round 1: the others go on, as in the simulator without
    its silo from then on. Its vector of round 2 may be on the way already. A secure sum of three nodes could not lose
    any."""
    pytest.importorskip("flwr")
    table = MF | RING | SILOS | {"rounds": 3}
    path, out = write_table(tmp_path / "silos.toml", table), tmp_path / "deployed"
    words = command("deploy", path, "--nodes", 4, "--deadline", 60, "--out", out)
    with start_program(words, stderr=subprocess.PIPE) as process:
        assert any(line.startswith("round 1:") for line in process.stderr)
        for pid in flower_processes(out / "flower"):
            line = Path(f"/proc/{pid}/cmdline").read_text()
            if "\0connect\0" in line and f"{out}/nodes/1" in line:
                os.kill(pid, signal.SIGKILL)
        _, told = process.communicate(timeout=400)
    assert process.returncode == 0
    assert "node 1 ended, and its clients drop out" in told
    summary = json.loads((out / "summary.json").read_text())
    dropped = summary["clients/dropped_total"]
    assert dropped in (1, 2)
    config = make_config(table)
    parts = build_from_config(config, load_data(config.data))
    want, _ = simulate(parts, 3, table["seed"], lambda round: [1] if round >= 3 - dropped else [])
    assert summary["params_sha256"] == tree_digest(jax.tree.map(np.asarray, scored_model(parts, want)))


@pytest.mark.full
@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")
def test_flower_runs_buffered_rounds(tmp_path):
    """Who comes in first is for the machine to say: every round has as many as it waits for, and nothing is left."""
    pytest.importorskip("flwr")
    cohort = {"name": "buffered", "size": 4, "concurrency": 8}
    table = MF | {"algorithm": {"name": "fedbuff"}, "cohort": cohort, "clock": {"name": "lognormal"}, "rounds": 3}
    path, out = write_table(tmp_path / "buffered.toml", table), tmp_path / "deployed"
    kind = {"cwd": ROOT, "env": child_environment(), "check": True, "capture_output": True, "timeout": 400}
    subprocess.run(command("deploy", path, "--nodes", 3, "--out", out), **kind)
    rows = [json.loads(line) for line in (out / "server" / "metrics.jsonl").read_text().splitlines()]
    assert [row["clients/reported"] for row in rows] == [4, 4, 4]
    assert not [row for row in rows if row["clients/refused"] or row["clients/dropped"]]
    assert json.loads((out / "summary.json").read_text())["rounds"] == 3
    assert not flower_processes(out / "flower")
