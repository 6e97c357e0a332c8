"""Who takes part in secure sums: the key by which the others know a node, and how many nodes must stay."""

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from jaxfed.training.run_dir import OWNER_ALONE, PRIVATE, write_whole

SECURE = "secure"  # the folder of what a node needs in secure sums, in that of the node
IDENTITY = "identity"


def find_threshold(nodes: int) -> int:
    """How many of so many nodes must stay to the end of a secure sum: more than two thirds."""
    return 2 * nodes // 3 + 1


def make_node_identity(folder: Path) -> str:
    """The public key of a node in hexadecimal; the private one is made the first time, and stays in `SECURE` of the
    node's folder. Raises ValueError where it is damaged."""
    (folder / SECURE).mkdir(PRIVATE, exist_ok=True)
    path = folder / SECURE / IDENTITY
    if not path.exists():
        write_whole(path, Ed25519PrivateKey.generate().private_bytes_raw(), OWNER_ALONE)
    return read_node_identity(folder / SECURE).public_key().public_bytes_raw().hex()


def find_roster_index(roster: tuple[bytes, ...], identity: Ed25519PrivateKey) -> int:
    """The place of a node among the public keys of all. Raises ValueError where it has none."""
    own = identity.public_key().public_bytes_raw()
    if own not in roster:
        raise ValueError("this node's key is not among those of the federation: see keys of facts.json")
    return roster.index(own)


def read_node_identity(folder: Path) -> Ed25519PrivateKey:
    """The private key of a node. Raises ValueError where it has none."""
    try:
        return Ed25519PrivateKey.from_private_bytes((folder / IDENTITY).read_bytes())
    except (OSError, ValueError):
        raise ValueError(
            f"{folder / IDENTITY} is missing or damaged: restore it: the others know this node by it"
        ) from None
