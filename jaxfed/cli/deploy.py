"""jaxfed deploy: a server and several nodes in processes of their own on this machine, connected by Flower."""

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

from jaxfed.cli.launch import find_free_port
from jaxfed.cli.node import require_flower
from jaxfed.cli.started_programs import launch_programs, watch_server
from jaxfed.cli.summary import describe_best, print_summary

EPILOG = "Any key of a configuration can be given as --section.key value, e.g. --rounds 5"
APP = """[project]
name = "jaxfed-federation"
version = "1.0.0"
description = "Rounds of jaxfed"
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "jaxfed"
[tool.flwr.app.components]
serverapp = "jaxfed.deployment.flower:server_app"
clientapp = "jaxfed.deployment.flower:client_app"
[tool.flwr.app.config]
folder = ""
nodes = 1
deadline = 300.0
keys = "own"
"""
CONNECTION = """[superlink]
default = "here"
[superlink.here]
address = "127.0.0.1:{port}"
{trust}
"""
LAUNCH = "launch.json"  # the options by which a federation was started


def add_deploy_options(command: Callable[..., argparse.ArgumentParser]) -> None:
    """The options of `deploy`."""
    deploy = command(
        "deploy", "Run a configuration with real processes: a server and several nodes here, by Flower.", EPILOG
    )
    deploy.add_argument(
        "config", metavar="CONFIG.toml", help="a file, a run's folder, or the name of one that comes with jaxfed"
    )
    deploy.add_argument("--nodes", type=int, default=5, help="number of nodes; clients are dealt to them (5)")
    deploy.add_argument("--out", metavar="RUN", help="where the run lives (runs/NAME_deployed)")
    deploy.add_argument("--resume", action="store_true", help="go on with the federation that is there")
    deploy.add_argument(
        "--keys",
        choices=("reproducible", "own"),
        default="reproducible",
        help="where clients' noise and batches come from: the seed, as in jaxfed train; or secrets of the nodes, which "
        "then add the noise of skellam in shares",
    )
    deploy.add_argument(
        "--deadline",
        type=float,
        default=300.0,
        help="seconds after which a node that has not answered is left out (300)",
    )

    deploy.add_argument(
        "--tls", action="store_true", help="connect by TLS, and have nodes prove who they are, with keys made for it"
    )


def deploy_command(args: argparse.Namespace, overrides: list[str]) -> None:
    """jaxfed deploy"""
    require_flower("deploy")
    from jaxfed.config.build import build_from_config, load_data
    from jaxfed.config.config_files import locate_config, read_config, set_draw_place
    from jaxfed.config.overrides import override_config
    from jaxfed.config.schema import expect_table
    from jaxfed.deployment.collected_run import collect_run, lay_out_federation
    from jaxfed.training.log import log
    from jaxfed.training.run_dir import check_folder, lock_folder, write_file

    if args.deadline <= 0:
        raise ValueError("--deadline must be above 0 seconds")
    table, name = read_config(args.config), locate_config(args.config).stem
    table["run"] = expect_table(table.get("run", {}), "run") | {"out": args.out or f"runs/{name}_deployed"}
    own = ("--out", "--resume", "--nodes", "--keys", "--deadline", "--tls")
    config = set_draw_place(override_config(table, overrides, own), "host")
    out = Path(config.run.out).absolute()
    if (out / "server").exists() and not args.resume:
        raise ValueError(f"{out} already holds a federation: pass --resume to go on with it, or another --out")
    if not (out / "server").exists():
        check_folder(out, config, args.resume)
    check_launch(out, args)
    check_deployed_config(out, config)
    data = load_data(config.data)
    parts = build_from_config(config, data)
    out.mkdir(0o700, parents=True, exist_ok=True)
    with lock_folder(out):
        facts = lay_out_federation(out, config, parts, args.nodes, args.keys)
        write_file(out / LAUNCH, json.dumps(list_launch_options(args)))
        if args.keys == "reproducible" and parts.account.mechanisms:
            log("privacy: keys are reproducible, so server and nodes can compute each other's noise: see --keys own")
        log(f"{args.nodes} nodes hold {facts.num_clients:,} clients; {out}/server/server.log has every line")
        run_processes(out, args)
        summary = collect_run(out, config, parts, facts, args.nodes)
    print_summary(summary, f"{config.run.out}: {describe_best(summary, config.evaluation.every)}")


def list_launch_options(args: argparse.Namespace) -> dict[str, Any]:
    """What must stay the same where a federation goes on."""
    return {"nodes": args.nodes, "keys": args.keys, "tls": args.tls}


def check_launch(out: Path, args: argparse.Namespace) -> None:
    """Raises ValueError where a federation was started with other nodes or keys than it would go on with."""
    if not (out / LAUNCH).exists():
        return
    try:
        known = json.loads((out / LAUNCH).read_text())
    except ValueError:
        raise ValueError(f"{out / LAUNCH} is damaged: pass another --out") from None
    if known != list_launch_options(args):
        raise ValueError(f"{out} was started with other options: go on with{describe_options(known)} --resume")


def check_deployed_config(out: Path, config: Any) -> None:
    """Raises ValueError where a federation would go on with another configuration than it was started with."""
    from jaxfed.config.config_files import read_config
    from jaxfed.config.schema import make_config
    from jaxfed.training.run_dir import check_same_config

    known = out / "server" / "config.toml"
    if not known.exists():
        return
    old = make_config(read_config(known))
    check_same_config(out, old, config)
    if old.rounds != config.rounds:
        raise ValueError(
            f"{out} is a federation of {old.rounds} rounds, not {config.rounds}: pass {known} as CONFIG.toml"
        )


def describe_options(known: dict[str, Any]) -> str:
    """The options of a federation, as they are given."""
    return f" --nodes {known['nodes']} --keys {known['keys']}{' --tls' if known['tls'] else ''}"


class TrustWords(NamedTuple):
    """The options by which the server and the nodes trust each other."""

    connection: str  # of the file that `flwr` reads
    superlink: list[str]
    nodes: list[list[str]]


def trust_words(out: Path, args: argparse.Namespace) -> TrustWords:
    """How the programs trust each other: by keys in OUT/keys, or not at all."""
    if not args.tls:
        return TrustWords("insecure = true", ["--insecure"], [["--insecure"]] * args.nodes)
    from jaxfed.deployment.certificates import write_certificates

    keys = out / "keys"
    write_certificates(keys, args.nodes)
    link = ["--ssl-ca-certfile", f"{keys}/ca.crt", "--ssl-certfile", f"{keys}/server.crt"]
    link += ["--ssl-keyfile", f"{keys}/server.key", "--enable-supernode-auth"]
    nodes = [
        ["--root-certificates", f"{keys}/ca.crt", "--private-key", f"{keys}/node{node}"] for node in range(args.nodes)
    ]
    return TrustWords(f'root-certificates = "{keys}/ca.crt"', link, nodes)


def register_node(out: Path, start: Callable[..., subprocess.Popen], node: int, tls: bool) -> None:
    """Tells the SuperLink the public key of a node. Raises ValueError where it does not take it."""
    if tls:
        told = start("register", ["flwr", "supernode", "register", str(out / "keys" / f"node{node}.pub"), "here"])
        if told.wait(60):
            raise ValueError(f"Flower did not take the key of node {node}: see {out}/flower/register.log")


def run_processes(out: Path, args: argparse.Namespace) -> None:
    """Starts Flower's SuperLink and the nodes, then the run, and waits for its end. Raises ValueError where it
    failed, SystemExit after a signal; in any case nothing goes on running."""
    for name in ("flower", "app"):
        (out / name).mkdir(0o700, exist_ok=True)
    server, port = out / "server", find_free_port()
    trust = trust_words(out, args)
    (out / "app" / "pyproject.toml").write_text(APP)
    (out / "flower" / "config.toml").write_text(CONNECTION.format(port=port, trust=trust.connection))
    for stale in ("summary.json", "error.txt"):
        (server / stale).unlink(missing_ok=True)
    stopped: list[int] = []
    kinds = [signal.SIGINT, signal.SIGTERM]
    old = {each: signal.signal(each, lambda number, frame: stopped.append(number)) for each in kinds}
    try:
        with launch_programs(out) as start:
            link = ["flower-superlink", *trust.superlink, "--port", str(port)]
            processes = [start("superlink", [*link, "--disable-runtime-dependency-installation"])]
            keepers: list[subprocess.Popen] = []
            wait_for_port(port, processes, stopped)
            for node in range(args.nodes):
                register_node(out, start, node, args.tls)
                program, of_node = [sys.executable, "-m", "jaxfed"], [f"{out}/nodes/{node}", "--keys", args.keys]
                words = ["connect", *of_node, "--superlink", f"127.0.0.1:{port}", *trust.nodes[node]]
                processes.append(start(f"connect{node}", [*program, *words]))
                keepers.append(start(f"node{node}", [*program, "node", *of_node]))
            settings = f'folder="{server}" nodes={args.nodes} deadline={args.deadline} keys="{args.keys}"'
            submit = start("run", ["flwr", "run", str(out / "app"), "here", "--run-config", settings])
            follow_run(out, processes, keepers, submit, stopped)
    finally:
        for each, handler in old.items():
            signal.signal(each, handler)
    if stopped:
        options = describe_options(list_launch_options(args))
        goes_on = f"jaxfed deploy {quote(f'{server}/config.toml')} --out {quote(str(out))}{options}"
        goes_on += f" --deadline {args.deadline:g} --resume"
        print(f"jaxfed: stopped; go on with: {goes_on}", file=sys.stderr)
        sys.exit(128 + stopped[0])


def wait_for_port(port: int, processes: Sequence[subprocess.Popen], stopped: list[int], seconds: float = 60) -> None:
    """Waits until somebody listens at a port. Raises ValueError where nobody does."""
    import socket

    end = time.monotonic() + seconds
    while not stopped:
        with socket.socket() as probe:
            if not probe.connect_ex(("127.0.0.1", port)):
                return
        if time.monotonic() > end or any(each.poll() is not None for each in processes):
            raise ValueError("Flower's SuperLink did not start: see flower/superlink.log in the run's folder")
        time.sleep(0.1)


def follow_run(
    out: Path,
    processes: Sequence[subprocess.Popen],
    keepers: Sequence[subprocess.Popen],
    submit: subprocess.Popen,
    stopped: list[int],
) -> None:
    """Shows the server's lines until it has ended. Raises ValueError where it failed.

    processes: the SuperLink, and `jaxfed connect` of each node. keepers: `jaxfed node` of each node.
    """
    server, said, watch = out / "server", set[str](), watch_server()
    lines = server / "server.log"
    shown = lines.stat().st_size if lines.exists() else 0
    while not stopped:
        server_is_gone = watch()  # first, as what it leaves is looked for next
        done = (server / "summary.json").exists()
        if lines.exists() and lines.stat().st_size > shown:
            with open(lines, "rb") as file:
                file.seek(shown)
                new = file.read()
            shown += len(new)
            sys.stderr.write(new.decode(errors="replace"))
            sys.stderr.flush()
        if done:
            return
        if (server / "error.txt").exists():
            raise ValueError((server / "error.txt").read_text())
        if server_is_gone:
            raise ValueError(f"the server's process ended: see {out}/flower/superlink.log, then go on with --resume")
        if submit.poll() not in (None, 0):
            raise ValueError(f"Flower did not take the run: see {out}/flower/run.log")
        if processes[0].poll() is not None:
            raise ValueError(f"Flower's SuperLink ended: see {out}/flower/superlink.log")
        gone = [node for node, each in enumerate(processes[1:]) if each.poll() is not None]
        if len(gone) == len(processes) - 1:
            raise ValueError(f"all nodes ended: see {out}/flower/connect0.log")
        closed = [node for node, each in enumerate(keepers) if each.poll() is not None]
        lines_of_ends = [f"node {n} ended, and its clients drop out: see {out}/flower/connect{n}.log\n" for n in gone]
        lines_of_ends += [f"node {n} is opened for each message now: see {out}/flower/node{n}.log\n" for n in closed]
        for line in lines_of_ends:
            if line not in said:
                sys.stderr.write(line)
        said |= {*lines_of_ends}
        time.sleep(0.2)
