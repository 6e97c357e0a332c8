"""Checks of the tensors of a file, by their names, against those of a model; errors name what differs."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxfed.core.leaf_paths import list_leaves
from jaxfed.core.types import Tree

SHOWN = 3  # names in a message
FILE = "model.safetensors"


def list_some(names: list[str]) -> str:
    """A few names, and how many there are beside them."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def check_tensors(held: Mapping[str, Any], wanted: Mapping[str, tuple[int, ...]], kind: str) -> None:
    """Raises ValueError where tensors are missing, are not part of such a model, or have another shape.

    Args:
        held: The tensors of a file, by name.
        wanted: The shape of each tensor of the model.
        kind: What the model is, such as `BERT encoder`.
    """
    for said, names in (("missing", wanted.keys() - held.keys()), (f"of no {kind}", held.keys() - wanted.keys())):
        if names:
            raise ValueError(
                f"{FILE}: {len(names)} tensors are {said} ({list_some(sorted(names))}): take the weights "
                "that belong to config.json"
            )
    for name, shape in wanted.items():
        if held[name].shape != shape:
            raise ValueError(f"{FILE}: {name} is {list(held[name].shape)}, and config.json says {list(shape)}")


def read_numbers(config: Mapping[str, Any], keys: Mapping[str, str], kind: str) -> dict[str, Any]:
    """{field: number} that a config.json says.

    Args:
        config: What the file says.
        keys: {field: its key in the file}.
        kind: What the model is, for the error.

    Raises:
        ValueError: a number is missing, or is not above 0.
    """
    if missing := [key for key in keys.values() if key not in config]:
        raise ValueError(f"config.json: {missing[0]} is missing: take the file that belongs to the weights of a {kind}")
    found = {name: config[key] for name, key in keys.items()}
    for name, value in found.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise ValueError(f"config.json: {keys[name]} is {value!r}: it must be a number above 0")
    return found


def path_shapes(tree: Tree) -> dict[str, tuple[int, ...]]:
    """{path with slashes: shape} of a tree of dicts, arrays or shapes."""
    return {path: x.shape for path, x in list_leaves(tree).items()}


def unflatten_paths(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """A tree of dicts from {path with slashes: array}."""
    tree: dict[str, Any] = {}
    for path, array in arrays.items():
        *folders, name = path.split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = array
    return tree


def lay_out_kernel(path: str, tensor: np.ndarray) -> np.ndarray:
    """Flax's kernel [in, out] of a file's weight [out, in]; what is no kernel stays as it is."""
    return tensor.T if path.endswith("kernel") else tensor
