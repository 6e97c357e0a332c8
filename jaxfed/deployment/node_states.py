"""What a node keeps of its clients on its own disk: their private states, and the secret that their keys come from."""

import hashlib
import hmac
import secrets
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import numpy as np

from jaxfed.core.types import Tree
from jaxfed.training.run_dir import OWNER_ALONE, write_arrays, write_whole

SECRET = 32  # bytes
Keys = Literal["own", "reproducible"]


class SavedClient(NamedTuple):
    """What is kept of one client: its state as the server has counted it, and what it answered last.

    The server says in its next request whether it counted that answer: only then the new state holds. So a client whose
    message came too late stands where it stood, as one that dropped out of a round of the simulator.

    Args:
        state: Its state after round `counted`.
        counted: The last round in which its message was counted; -1: none was.
        after: Its state if the answer is counted; None: there is no answer.
        answered: The round of the answer; -1: there is none.
        digest: 32 bytes: the model that the answer is of.
        rows: Number of table rows in the answer.
        message: The answer. None: what it computed was not finite, and nothing is sent; in a secure sum it is zeros.
    """

    state: Tree
    counted: int = -1
    after: Tree = None
    answered: int = -1
    digest: bytes = b""
    rows: int = 0
    message: bytes | None = None

    def settle(self, counted: int) -> "SavedClient":
        """What holds once the server has said which round of the client it counted last.

        Args:
            counted: that round; -1: none.

        Raises:
            ValueError: the client stands after a later round than the server: it would train on what it has already
                learnt.
        """
        if self.answered >= 0 and self.answered == counted:
            return SavedClient(self.after, counted)
        if counted < self.counted:
            raise ValueError(
                f"the node's client stands after round {self.counted}, the server counted round {counted} last: start "
                "the server from its newest checkpoint, or the node with an empty folder of states"
            )
        return self


def write_client(folder: Path, client: int, saved: SavedClient) -> None:
    """Writes what is kept of a client: whole, or not at all."""
    arrays = {f"state{n}": np.asarray(x) for n, x in enumerate(jax.tree.leaves(saved.state))}
    if saved.after is not None:
        arrays |= {f"after{n}": np.asarray(x) for n, x in enumerate(jax.tree.leaves(saved.after))}
    arrays["facts"] = np.array([saved.counted, saved.answered, saved.rows, saved.message is not None], np.int64)
    arrays["digest"] = np.frombuffer(saved.digest, np.uint8)
    arrays["message"] = np.frombuffer(saved.message or b"", np.uint8)
    write_arrays(folder / f"{client}.npz", arrays, OWNER_ALONE)


def read_client(folder: Path, client: int, like: Tree) -> SavedClient | None:
    """What is kept of a client; None: nothing yet. like: its state's shapes. Raises ValueError for a damaged file."""
    path = folder / f"{client}.npz"
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            counted, answered, rows, sends = file["facts"].tolist()
            state = read_tree(file, "state", like)
            after = read_tree(file, "after", like) if answered >= 0 else None
            message = file["message"].tobytes() if sends else None
            return SavedClient(state, counted, after, answered, file["digest"].tobytes(), rows, message)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}): restore it, or remove it to begin anew"
        ) from None


def read_tree(file: "np.lib.npyio.NpzFile", name: str, like: Tree) -> Tree:
    """A tree of arrays of a file. Raises ValueError where its shapes are other ones."""
    leaves, structure = jax.tree.flatten(like)
    found = [file[f"{name}{n}"] for n in range(len(leaves))]
    if any((x.shape, x.dtype) != (leaf.shape, leaf.dtype) for x, leaf in zip(found, leaves, strict=True)):
        raise ValueError("other shapes")
    return jax.tree.unflatten(structure, found)


def read_secret(folder: Path) -> bytes:
    """The secret of a node, which it makes for itself the first time and never sends."""
    path = folder / "secret"
    if not path.exists():
        write_whole(path, secrets.token_bytes(SECRET), OWNER_ALONE)
    found = path.read_bytes()
    if len(found) != SECRET:
        raise ValueError(f"{path} is damaged: restore it, or remove it together with the states beside it")
    return found


def draw_secret_key(secret: bytes, *words: int | str) -> np.ndarray:
    """uint32 [2]: the data of a key of JAX, by HMAC-SHA-256 of the words: nobody without the secret can compute it."""
    made = hmac.new(secret, repr(words).encode(), hashlib.sha256).digest()
    return np.frombuffer(made[:8], np.uint32)


def draw_client_keys(secret: bytes, round: int, clients: Sequence[int]) -> np.ndarray:
    """uint32 [n, 2]: the keys of some clients in a round."""
    return np.stack([draw_secret_key(secret, "client", round, int(client)) for client in clients])


def take_rows_or_zeros(x: np.ndarray, at: np.ndarray) -> np.ndarray:
    """x[at], zeros past the end."""
    inside = at < len(x)
    out = np.zeros((len(at), *x.shape[1:]), x.dtype)
    out[inside] = x[at[inside]]
    return out
