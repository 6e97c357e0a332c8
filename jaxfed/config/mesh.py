"""How a configuration lays devices out, and what of the server's arrays lies where on them."""

import re
from dataclasses import dataclass

from jax.sharding import PartitionSpec

from jaxfed.core.partition import CLIENTS, MODEL, PartitionRules


@dataclass(frozen=True)
class MeshAxes:
    """How the devices of a run are laid out.

    Args:
        clients: Number of devices over which the clients of a block lie. 0: run.devices divided by model.
        model: Number of devices among which the arrays that run.partition names are split.

    Example:
        >>> import jaxfed as jf
        >>> jf.MeshAxes(clients=4, model=2).model
        2
    """

    clients: int = 0
    model: int = 1


@dataclass(frozen=True)
class Partition:
    """A rule for what lies where on the mesh of a run.

    Args:
        pattern: A regular expression that is searched in the names of the server's arrays, such as
            params/layer_0/query/kernel. The first rule that matches counts.
        axes: The axis of the mesh for each leading axis of the array: clients, model, or "" for one that stays whole.

    Example:
        >>> import jaxfed as jf
        >>> jf.Partition("kernel$", ("", "model")).axes
        ('', 'model')
    """

    pattern: str = ""
    axes: tuple[str, ...] = ()


def count_devices(mesh: MeshAxes, devices: int) -> int:
    """How many devices a run asks for. Raises ValueError where its mesh has another number."""
    asked = mesh.clients * max(mesh.model, 1)
    if asked and devices not in (1, asked):
        raise ValueError(f"run.mesh has {asked} devices and run.devices is {devices}: leave run.devices out")
    return asked or devices


def make_rules(partition: tuple[Partition, ...]) -> PartitionRules:
    """The partition rules of a configuration. Raises ValueError for what is none."""
    for rule in partition:
        if unknown := sorted({*rule.axes} - {"", CLIENTS, MODEL}):
            raise ValueError(f'run.partition: no axis "{unknown[0]}" of the mesh: there are {CLIENTS} and {MODEL}')
        if not rule.pattern or not any(rule.axes):
            raise ValueError("run.partition: a rule needs a pattern and axes, one of them named")
        try:
            re.compile(rule.pattern)
        except re.error as error:
            raise ValueError(f'run.partition: "{rule.pattern}" is no regular expression: {error}') from None
    return [(rule.pattern, PartitionSpec(*(axis or None for axis in rule.axes))) for rule in partition]
