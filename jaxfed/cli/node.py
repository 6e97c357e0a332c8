"""jaxfed node, jaxfed connect, jaxfed identity: what whoever runs a node calls there."""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path


def add_node_options(command: Callable[..., argparse.ArgumentParser]) -> None:
    """The options of `node`, `connect` and `identity`."""
    node = command("node", "Keep a node's data and programs loaded; beside jaxfed connect.")
    connect = command("connect", "Connect a node to the server of a federation, a SuperLink of Flower.")
    for each, other in ((node, "connect"), (connect, "node")):
        each.add_argument("folder", metavar="FOLDER", help="the node's: config.toml, facts.json, data.npz")
        each.add_argument("--keys", choices=("own", "reproducible"), default="own", help=f"as of jaxfed {other} (own)")
    connect.add_argument("--superlink", required=True, metavar="HOST:PORT", help="the server's SuperLink")
    connect.add_argument("--root-certificates", metavar="FILE", help="of whoever certified the server (the system's)")
    connect.add_argument("--private-key", metavar="FILE", help="the node's, for Flower; registered at the SuperLink")
    connect.add_argument("--insecure", action="store_true", help="without TLS: for tests on one machine")
    identity = command("identity", "Print the public key of a node for secure sums; make it the first time.")
    identity.add_argument("folder", metavar="FOLDER", help="the node's; the private key stays there")


def locate_node_folder(text: str) -> Path:
    """The folder of a node. Raises ValueError where there is none."""
    folder = Path(text).absolute()
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: name the one that holds the node's config.toml and data.npz")
    return folder


def node_command(args: argparse.Namespace) -> None:
    """jaxfed node"""
    from jaxfed.deployment.node_process import answer_requests
    from jaxfed.training.log import log

    answer_requests(locate_node_folder(args.folder), args.keys, log)


def connect_command(args: argparse.Namespace) -> None:
    """jaxfed connect"""
    from jaxfed.deployment.node_process import ask_node
    from jaxfed.deployment.supernode import ServerContact, answer_server

    folder = locate_node_folder(args.folder)
    files = [None if file is None else Path(file) for file in (args.root_certificates, args.private_key)]
    for file in filter(None, files):
        if not file.is_file():
            raise ValueError(f"{file} is no file")
    contact = ServerContact(args.superlink, args.insecure, *files)
    answer_server(contact, partial(ask_node, folder, args.keys), partial(print, file=sys.stderr, flush=True))


def identity_command(args: argparse.Namespace) -> None:
    """jaxfed identity"""
    from jaxfed.deployment.roster import make_node_identity

    print(make_node_identity(locate_node_folder(args.folder)))
