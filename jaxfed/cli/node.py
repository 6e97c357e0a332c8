"""jaxfed node, jaxfed connect, jaxfed identity: what whoever runs a node calls there."""

import argparse
import signal
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

FLOWER_GIVES_UP = "_should_giveup"  # the function of Flower that interrupts where a node is refused
NODE_FILES = ("config.toml", "facts.json", "data.npz")


def add_node_options(command: Callable[..., argparse.ArgumentParser]) -> None:
    """The options of `node`, `connect` and `identity`."""
    node = command("node", "Keep a node's data and programs loaded, for jaxfed connect in another terminal.")
    connect = command("connect", "Connect a node to the server of a federation, a SuperLink of Flower.")
    for each in (node, connect):
        each.add_argument("folder", metavar="FOLDER", help="the node's: config.toml, facts.json, data.npz")
        each.add_argument(
            "--keys",
            choices=("own", "reproducible"),
            default="own",
            help="where noise and batches come from: a secret of the node, or the seed; the same for jaxfed node and "
            "jaxfed connect (own)",
        )
    connect.add_argument("--superlink", required=True, metavar="HOST:PORT", help="the server's SuperLink")
    connect.add_argument(
        "--root-certificates",
        metavar="FILE",
        help="of whoever signed the server's certificate (the system's)",
    )
    connect.add_argument(
        "--private-key", metavar="FILE", help="by which Flower knows the node; its public half is registered there"
    )
    connect.add_argument("--insecure", action="store_true", help="without TLS: for a server that was started so")
    identity = command("identity", "Print the public key of a node for secure sums; make it the first time.")
    identity.add_argument("folder", metavar="FOLDER", help="the node's; the private key stays there")


def locate_node_folder(text: str) -> Path:
    """The folder of a node. Raises ValueError where there is none."""
    folder = Path(text).absolute()
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: name the one that holds the node's config.toml and data.npz")
    return folder


def require_flower(command: str) -> None:
    """Raises ValueError where Flower is missing, or is another version."""
    try:
        found = find_spec("flwr.supernode.fleet_http_connection")
    except ModuleNotFoundError:  # a package around it is missing
        found = None
    if found is None:
        raise ValueError(f"{command} needs Flower 1.42: pip install 'jaxfed[flower]'")


def node_command(args: argparse.Namespace) -> None:
    """jaxfed node"""
    from jaxfed.deployment.node_process import answer_requests
    from jaxfed.training.log import log

    answer_requests(locate_node_folder(args.folder), args.keys, log)


def connect_command(args: argparse.Namespace) -> None:
    """jaxfed connect"""
    require_flower("connect")
    from jaxfed.deployment.node_process import ask_node
    from jaxfed.deployment.supernode import ServerContact, answer_server

    folder = locate_node_folder(args.folder)
    named = [None if file is None else Path(file) for file in (args.root_certificates, args.private_key)]
    for file in filter(None, [*named, *(folder / name for name in NODE_FILES)]):
        if not file.is_file():
            raise ValueError(f"{file} is no file")
    contact = ServerContact(args.superlink, args.insecure, *named)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, exit_on_signal)
    answer_server(contact, partial(ask_node, folder, args.keys), partial(print, file=sys.stderr, flush=True))


def exit_on_signal(number: int, frame: Any) -> NoReturn:
    """Ends the program so that Flower can tell the server that the node goes. Flower sends this signal itself where the
    server knows the node no longer."""
    said, code = "the node leaves", 128 + number
    while frame is not None:
        if frame.f_code.co_name == FLOWER_GIVES_UP:
            said, code = "the server no longer knows this node: register its key again, and start this again", 2
        frame = frame.f_back
    print(f"jaxfed: {said}", file=sys.stderr, flush=True)
    sys.exit(code)


def identity_command(args: argparse.Namespace) -> None:
    """jaxfed identity"""
    from jaxfed.deployment.roster import make_node_identity

    print(make_node_identity(locate_node_folder(args.folder)))
