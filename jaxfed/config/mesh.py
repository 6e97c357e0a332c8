"""How a configuration arranges devices, and how the server's arrays are split over them."""

import re
from dataclasses import dataclass

from jax.sharding import PartitionSpec

from jaxfed.core.partition import CLIENTS, MODEL, PartitionRules


@dataclass(frozen=True)
class MeshAxes:
    """How the devices of a run are arranged.

    Args:
        clients: Number of devices that divide the clients of a block. 0: run.devices divided by model.
        model: Number of devices that divide the arrays that run.partition names.

    Example:
        >>> import jaxfed as jf
        >>> jf.MeshAxes(clients=4, model=2).model
        2
    """

    clients: int = 0
    model: int = 1


@dataclass(frozen=True)
class Partition:
    """A rule for how arrays are split over the mesh of a run.

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
    """How many devices a run asks for. Raises ValueError where run.devices and run.mesh say different numbers."""
    asked = mesh.clients * max(mesh.model, 1)
    if asked and devices not in (1, asked):
        raise ValueError(f"run.mesh has {asked} devices and run.devices is {devices}: leave run.devices out")
    return asked or devices


def make_rules(partition: tuple[Partition, ...]) -> PartitionRules:
    """The partition rules of a configuration. Raises ValueError for a rule that is not valid."""
    for rule in partition:
        if unknown := sorted({*rule.axes} - {"", CLIENTS, MODEL}):
            raise ValueError(f'run.partition: no axis "{unknown[0]}" of the mesh: there are {CLIENTS} and {MODEL}')
        if not rule.pattern or not any(rule.axes):
            raise ValueError("run.partition: a rule needs a pattern and axes, at least one of them named")
        try:
            re.compile(rule.pattern)
        except re.error as error:
            raise ValueError(f'run.partition: "{rule.pattern}" is no regular expression: {error}') from None
    return [(rule.pattern, PartitionSpec(*(axis or None for axis in rule.axes))) for rule in partition]
