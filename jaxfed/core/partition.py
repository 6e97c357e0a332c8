"""Which device keeps which part of an array: rules by the names of leaves, for the axes of a mesh."""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxfed.core.leaf_paths import join_path
from jaxfed.core.tables import is_table
from jaxfed.core.types import Tree

CLIENTS, MODEL = "clients", "model"  # the axes of a mesh
WHOLE = PartitionSpec()  # a copy on every device
SHOWN = 5  # names in a message

PartitionRules = Sequence[tuple[str, PartitionSpec]]


def find_spec(rules: PartitionRules, name: str, x: Any) -> PartitionSpec | None:
    """The first rule whose pattern is in the name. None: there is none, or the array has fewer axes than the rule."""
    found = next((spec for pattern, spec in rules if re.search(pattern, name)), None)
    return None if found is None or len(found) > len(x.shape) else found


def check_division(mesh: Mesh, spec: PartitionSpec, name: str, shape: tuple[int, ...], is_rows: bool) -> None:
    """Raises ValueError where an axis of an array does not divide among the devices that share it."""
    for place, (size, axes) in enumerate(zip(shape, spec, strict=False)):
        parts = math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ()))
        if size % parts and is_rows and place == 0:
            raise ValueError(f"{size:,} rows do not divide among {parts} devices: make tables of `padded_table_rows`")
        if size % parts:
            raise ValueError(
                f"run.partition: {name} has an axis of {size:,}, which does not divide among {parts} devices: leave "
                "the axis whole, or change run.mesh"
            )


def make_shardings(mesh: Mesh, rules: PartitionRules, tree: Tree, tables: PartitionSpec = WHOLE) -> Tree:
    """The shardings of a tree over a mesh.

    Args:
        mesh: The devices.
        rules: (pattern, spec): a regular expression that is searched in the name of a leaf, see `join_path`, and the
            axes of the mesh that split its leading axes. The first that matches counts. A leaf with fewer axes than
            the spec, such as the step count of an optimiser, is copied to every device.
        tree: Arrays or shapes, tables marked.
        tables: The spec of tables that no rule matches. Other leaves without a rule are copied to every device.

    Returns:
        The tree, a `NamedSharding` for each array.

    Raises:
        ValueError: an axis does not divide among its devices, or a pattern is no regular expression.

    Example:
        >>> import jax, numpy as np
        >>> from jax.sharding import PartitionSpec
        >>> mesh = jax.make_mesh((1, 1), ("clients", "model"))
        >>> rules = [("kernel$", PartitionSpec(None, "model"))]
        >>> make_shardings(mesh, rules, {"layer": {"kernel": np.zeros((4, 8))}})["layer"]["kernel"].spec[1]
        'model'
    """

    def choose(path, x, is_rows):
        name = join_path(path)
        spec = find_spec(rules, name, x)
        if spec is None:
            spec = tables if is_rows else WHOLE
        check_division(mesh, spec, name, x.shape, is_rows)
        return NamedSharding(mesh, spec)

    def choose_node(path, node):
        if not is_table(node):
            return choose(path, node, False)
        return jax.tree_util.tree_map_with_path(lambda below, x: choose((*path, *below), x, True), node)

    return jax.tree_util.tree_map_with_path(choose_node, tree, is_leaf=is_table)


def check_rules(rules: PartitionRules, *trees: Tree) -> None:
    """Raises ValueError for a rule that matches no leaf of the trees, which are all that a run holds."""
    names = {join_path(path): x for tree in trees for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]}
    for pattern, spec in rules:
        # where rules are applied, names have more before them: a pattern with ^ would match nothing
        if not any(re.search(pattern, f"server/{name}") and len(x.shape) >= len(spec) for name, x in names.items()):
            some = sorted(name for name, x in names.items() if len(x.shape) >= len(spec))[:SHOWN]
            raise ValueError(
                f'run.partition: "{pattern}" is in the name of no array with {len(spec)} or more axes: change it; such '
                f"arrays are {', '.join(some) or 'none'}"
            )
