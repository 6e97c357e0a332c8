"""The run of a server: rounds with whoever is there, a checkpoint after each, and rows of figures."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxfed.config.settings import Config
from jaxfed.core.processes import Processes
from jaxfed.core.tree import tree_digest
from jaxfed.deployment.arrivals import RequestQueue, open_arrivals, run_buffered_round
from jaxfed.deployment.coordinator import match_nodes, run_server_round
from jaxfed.deployment.node_data import PublicFacts
from jaxfed.deployment.node_states import Keys, read_secret
from jaxfed.deployment.opened_server import Exchange, FederationServer, open_server
from jaxfed.training.checkpoint import open_checkpoints, restore_newest, save_checkpoint
from jaxfed.training.log import to_json
from jaxfed.training.rounds import Progress
from jaxfed.training.run_dir import lock_folder, write_file
from jaxfed.training.session import round_seed
from jaxfed.training.summary import bytes_per_client

KEPT = 2  # checkpoints
FIELDS = {each.name for each in dataclasses.fields(Progress)}


class Network(NamedTuple):
    """How a server reaches nodes: Flower, or functions in tests.

    Args:
        exchange: Sends requests, and gives back the replies that came by the deadline.
        list_nodes: Who is there now.
        wait: Sleeps for half a second while the server waits for nodes.
        queue: How single requests reach nodes, for rounds that are buffered.
    """

    exchange: Exchange
    list_nodes: Callable[[], Iterable[int]]
    wait: Callable[[], None] = lambda: time.sleep(0.5)
    queue: RequestQueue | None = None


def serve_rounds(
    folder: Path,
    config: Config,
    facts: PublicFacts,
    network: Network,
    least_nodes: int,
    say: Callable[[str], None],
    patience: float = 120.0,
    keys: Keys = "own",
) -> dict[str, Any]:
    """Runs the rounds that are left, and returns what the server knows of the run at its end.

    Args:
        folder: The server's; its checkpoints lie there, from which a run goes on that was ended.
        config: What to run.
        facts: What everybody knows.
        network: How nodes are reached.
        least_nodes: Number of nodes that must be there before the first round.
        say: Is told what happens, a line each.
        patience: Seconds to wait for so many nodes. Where all go later, the server waits until one comes.
        keys: own: the noise that the server adds comes from a secret that it makes and keeps. reproducible: from the
            seed, so that every node can compute it.

    Raises:
        ValueError: too few nodes came, the checkpoint is of another run, or the configuration cannot be deployed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    secret = read_secret(folder) if keys == "own" else None
    server = open_server(config, facts, round_seed(config, Processes()), say, secret)
    with ExitStack() as held:
        held.enter_context(lock_folder(folder))
        checkpoints = held.enter_context(open_checkpoints(folder / "checkpoints", KEPT))
        progress = restore_server(server, checkpoints, config, say)
        rows = held.enter_context(open(folder / "metrics.jsonl", "r+b" if progress.round else "wb"))
        rows.truncate(progress.position)
        rows.seek(progress.position)
        members = gather_nodes(server, network, least_nodes, patience)
        run_round = choose_rounds(server, network, members)
        while progress.round < server.rounds:
            begin, before = time.perf_counter(), (server.bytes_out, server.bytes_in)
            info = run_round()
            jax.block_until_ready(server.state)
            progress.seconds += time.perf_counter() - begin
            row = count_round(server, progress, info, before)
            rows.write(to_json(row).encode() + b"\n")
            rows.flush()
            progress.position = rows.tell()
            save_server(server, checkpoints, progress)
            say(describe_round(row, time.perf_counter() - begin))
    summary = {
        "rounds": progress.round,
        "seconds": round(progress.seconds, 3),
        "shared_sha256": tree_digest(jax.tree.map(np.asarray, server.state.shared)),
        "server_sees": server.party.sees,
        **bytes_per_client(progress),
        **progress.totals(),
    }
    write_file(folder / "summary.json", to_json(summary, 1) + "\n")
    return summary


def choose_rounds(
    server: FederationServer, network: Network, members: dict[int, np.ndarray]
) -> Callable[[], dict[str, Any]]:
    """run_round() -> figures: a cohort that is asked at once, or whoever comes in first. members: nodes that are there,
    and their clients."""
    if server.party.buffered:
        assert network.queue
        arrivals = open_arrivals(server, network.queue, network.list_nodes, network.wait, members)
        return lambda: run_buffered_round(server, arrivals)

    def run_round():
        nonlocal members
        members = gather_members(server, network, members) or gather_nodes(server, network, 1, math.inf)
        return run_server_round(server, members, network.exchange)

    return run_round


def gather_nodes(server: FederationServer, network: Network, least: int, patience: float) -> dict[int, np.ndarray]:
    """Waits until as many nodes take part. Those that do not answer are asked again, those that answer wrongly are not.
    Raises ValueError where too few come."""
    members: dict[int, np.ndarray] = {}
    end, answered = time.monotonic() + patience, set[int]()

    def exchange(requests):
        replies = network.exchange(requests)
        answered.update(replies)
        return replies

    while len(members) < least:
        there = {*network.list_nodes()}
        answered &= there
        if fresh := sorted(there - members.keys() - answered):
            members = match_nodes(server.party, fresh, members, exchange, server.say)
        if len(members) < least and time.monotonic() > end:
            raise ValueError(
                f"deploy: {len(members)} of {least} nodes took part within {patience:g} seconds: "
                "start the others first, or lower nodes"
            )
        if len(members) < least:
            network.wait()
    return members


def gather_members(server: FederationServer, network: Network, members: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
    """The nodes of a round: those that are there still, and those that have come (back)."""
    there = {*network.list_nodes()}
    known = {node: clients for node, clients in members.items() if node in there}
    fresh = sorted(there - known.keys())
    return match_nodes(server.party, fresh, known, network.exchange, server.say) if fresh else known


def count_round(
    server: FederationServer, progress: Progress, info: dict[str, Any], before: tuple[int, int]
) -> dict[str, Any]:
    """Counts a round; returns its row. Bytes by the names of the simulator are those that it would charge; `network/`
    has those of requests and replies as they were, envelopes included."""
    ids, nobody = np.asarray(info["clients/ids"]), server.party.plan.num_clients
    progress.round += 1
    progress.asked += int((ids < nobody).sum())
    progress.bytes_down += int(info["bytes/model"])
    progress.record_round(server.party.wire, info)
    counts = {name: int(info[name]) for name in ("clients/reported", "clients/refused", "clients/dropped")}
    figures = {name: float(np.sum(x)) for name, x in info.items() if np.ndim(x) == 0 and name not in counts}
    figures.pop("bytes/model", None)
    network = {"network/bytes_down": server.bytes_out - before[0], "network/bytes_up": server.bytes_in - before[1]}
    known = {"server_sees": server.party.sees, "seconds": round(progress.seconds, 3)}
    return {"round": progress.round, **counts, **figures, **progress.totals(), **network, **known}


def describe_round(row: dict[str, Any], seconds: float) -> str:
    """A round in a line."""
    return (
        f"round {row['round']}: {row['clients/reported']} clients reported, {row['clients/dropped']} dropped out, "
        f"{row['clients/refused']} refused; {row['network/bytes_up']:,} bytes up, {row['network/bytes_down']:,} down; "
        f"{seconds:.1f} s"
    )


def save_server(server: FederationServer, checkpoints: Any, progress: Progress) -> None:
    """Writes where the server stands, before nodes are asked for anything more: their states follow it."""
    arrays = {"state": jax.tree.map(np.asarray, server.state), "counted": server.counted}
    record = {"standing": dataclasses.asdict(progress), "digest": server.party.digest.hex()}
    save_checkpoint(checkpoints, progress.round, arrays, record)
    checkpoints.wait_until_finished()


def restore_server(server: FederationServer, checkpoints: Any, config: Config, say: Callable[[str], None]) -> Progress:
    """Where the server goes on from; it is changed. Raises ValueError where the checkpoints are of another run."""

    def problem(record):
        if record.get("digest") != server.party.digest.hex():
            raise ValueError("deploy: the server's folder holds another run, or one of other facts: pass another --out")
        return "" if record.get("standing", {}).keys() == FIELDS else "written by another version of jaxfed"

    template = {"state": server.state, "counted": server.counted}
    found = restore_newest(checkpoints, template, say, problem)
    if found is None:
        return Progress()
    if config.privacy.seed == "secret":
        raise ValueError("deploy: the secret seed is not stored, so this run cannot go on: pass another --out")
    arrays, record, damaged = found
    for step in damaged:
        checkpoints.delete(step)
    server.state, server.counted = arrays["state"], np.array(arrays["counted"])
    say(f"going on after round {record['step']}")
    return Progress(**record["standing"])
