"""jaxfed node, jaxfed identity: what whoever runs a node calls there."""

import argparse
from collections.abc import Callable
from pathlib import Path


def add_node_options(command: Callable[..., argparse.ArgumentParser]) -> None:
    """The options of `node` and `identity`."""
    node = command(
        "node", "Keep a node's data and programs loaded, so that rounds start faster; beside Flower's SuperNode."
    )
    node.add_argument("folder", metavar="FOLDER", help="the node's: config.toml, facts.json, data.npz")
    node.add_argument(
        "--keys", choices=("own", "reproducible"), default="own", help="as in the SuperNode's --node-config (own)"
    )
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


def identity_command(args: argparse.Namespace) -> None:
    """jaxfed identity"""
    from jaxfed.deployment.roster import make_node_identity

    print(make_node_identity(locate_node_folder(args.folder)))
