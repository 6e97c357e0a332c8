"""jaxfed identity"""

import argparse
from collections.abc import Callable
from pathlib import Path


def add_identity_options(command: Callable[..., argparse.ArgumentParser]) -> None:
    """The options of `identity`."""
    identity = command("identity", "Print the public key of a node for secure sums; make it the first time.")
    identity.add_argument("folder", metavar="FOLDER", help="the node's; the private key stays there")


def identity_command(args: argparse.Namespace) -> None:
    """jaxfed identity"""
    from jaxfed.deployment.roster import make_identity

    folder = Path(args.folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: name the one that holds the node's config.toml and data.npz")
    print(make_identity(folder))
