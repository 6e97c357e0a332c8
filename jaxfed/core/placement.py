"""Where clients run: one function of one client, spread over the clients of a block and the devices at hand.

Not `shard_map`: with its default `check_vma=True`, `jax.grad` with respect to replicated parameters inserts a hidden
`psum` on every local step, and clients silently train together.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxfed.core.partition import CLIENTS, MODEL, PartitionRules, make_shardings
from jaxfed.core.types import Tree

Kind = Literal["jit", "pmap"]
Role = Literal["copied", "server", "divided"]


class Placement(NamedTuple):
    """clients(f) maps f(common, one) over the leading axis of its second argument; block(x) puts a block there.

    constrain(x, role) lays arrays out, inside a program too: "copied" is a copy on every device, "server" is what the
    server keeps, or what is frozen: its tables split by rows where that was asked for, and every leaf that a partition
    rule names split as the rule says. "divided" has a leading axis that lies over the devices as clients do. `devices`
    take part; `client_devices` of them divide the width of every block, of which block(x) is given this process's equal
    part; inside a program, all of it.
    """

    clients: Callable[[Callable], Callable]
    block: Callable[[Any], Any]
    constrain: Callable[[Tree, Role], Tree]
    devices: int
    client_devices: int


def choose_devices(kind: Kind, devices: int, shard_tables: bool) -> list[jax.Device]:
    """The devices of all processes that take part. Raises ValueError for what cannot be."""
    here = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    if jax.process_count() > 1:
        check_processes(kind, devices, here, shard_tables)
        devices = 0
    if not 0 <= devices <= len(here):
        raise ValueError(f"{devices} devices asked for, {len(here)} are there: lower run.devices (0: all) or run.mesh")
    return here[: devices or len(here)]


def make_mesh(here: list[jax.Device], model: int) -> Mesh:
    """Devices as a mesh of (clients, model). Raises ValueError where they do not divide."""
    if len(here) % model:
        raise ValueError(
            f"run.mesh: {len(here)} devices do not divide among {model} of the model axis: set run.devices to a "
            "multiple of it"
        )
    return Mesh(np.array(here).reshape(-1, model), (CLIENTS, MODEL))


def copy_to_devices(x: Any, everywhere: NamedSharding) -> jax.Array:
    """An array that all processes have, on every device: `device_put` would ask them whether they have it."""
    of_process = [device for device in everywhere.mesh.devices.flat if device.process_index == jax.process_index()]
    local_shards = [jax.device_put(x, device) for device in of_process]
    return jax.make_array_from_single_device_arrays(x.shape, everywhere, local_shards)


def is_traced(tree: Tree) -> bool:
    """Whether a tree is of a program that is being traced."""
    return any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(tree))


def lay_out(tree: Tree, shardings: Tree) -> Tree:
    """Arrays on their devices, inside a program too."""
    if is_traced(tree):
        return jax.lax.with_sharding_constraint(tree, shardings)
    if jax.process_count() > 1:
        return jax.tree.map(copy_to_devices, tree, shardings)
    return jax.device_put(tree, shardings)


def spread_by_pmap(f: Callable, here: list[jax.Device]) -> Callable:
    """f(common, one) over the leading axis of its second argument, by `jax.pmap`."""
    each = jax.pmap(jax.vmap(f, (None, 0)), axis_name="clients", in_axes=(None, 0), devices=here)

    def over(common, many):
        lead = jax.tree.map(lambda x: x.reshape((len(here), -1, *x.shape[1:])), many)
        return jax.tree.map(lambda x: x.reshape((-1, *x.shape[2:])), each(common, lead))

    return over


def split_parts(tree: Tree, parts: int) -> Tree:
    """Arrays [m, ...] as [parts, m / parts, ...]. One part has no axis more, here and below: programs of one device
    would copy what they add."""
    if parts == 1:
        return tree
    return jax.tree.map(lambda x: x.reshape((parts, x.shape[0] // parts, *x.shape[1:])), tree)


def flatten_parts(tree: Tree, parts: int) -> Tree:
    """Arrays [parts, m, ...] as [parts * m, ...]."""
    if parts == 1:
        return tree
    return jax.tree.map(lambda x: x.reshape((x.shape[0] * x.shape[1], *x.shape[2:])), tree)


def map_parts(f: Callable, parts: int) -> Callable:
    """f over the leading axis of all its arguments."""
    return f if parts == 1 else jax.vmap(f)


def check_kind(kind: str, shard_tables: bool, splits_model: bool) -> None:
    """Raises ValueError for a placement that there is not, or that cannot split what it is asked to."""
    if kind not in ("jit", "pmap"):
        raise ValueError(f"no placement {kind!r}: choose jit or pmap")
    if kind == "pmap" and (shard_tables or splits_model):
        raise ValueError(
            'run.placement = "pmap" copies its model to every device: choose jit for run.shard_tables, run.mesh and '
            "run.partition"
        )
    if splits_model and jax.process_count() > 1:
        raise ValueError("run.mesh and run.partition work in one process: leave them out for several")


def make_placement(
    kind: Kind = "jit", devices: int = 1, shard_tables: bool = False, model: int = 1, rules: PartitionRules = ()
) -> Placement:
    """`jit`: a vmap whose client axis lies over the mesh axis `clients`; `pmap`: the same through `jax.pmap`.

    Args:
        kind: `jit`, or `pmap` for a mesh of one axis.
        devices: How many (0: all); several processes always use all of theirs.
        shard_tables: Each device keeps its share of the rows of the server's tables, which then must divide evenly.
        model: Size of the mesh axis `model`; the axis `clients` has the other devices.
        rules: What of the server's arrays lies over which axes, see `make_shardings`.

    Returns:
        The placement.

    Raises:
        ValueError: what cannot be.
    """
    here, processes = choose_devices(kind, devices, shard_tables), jax.process_count()
    check_kind(kind, shard_tables, bool(rules) or model > 1)
    mesh = make_mesh(here, model)
    everywhere, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(CLIENTS))
    of_tables = PartitionSpec((CLIENTS, MODEL)) if shard_tables else PartitionSpec()

    def constrain(tree, role):
        if role == "copied":
            return lay_out(tree, jax.tree.map(lambda _: everywhere, tree))
        if role == "divided":
            return lay_out(tree, jax.tree.map(lambda _: split, tree))
        return lay_out(tree, make_shardings(mesh, rules, tree, of_tables))

    def block(tree):
        if is_traced(tree):
            return tree if len(here) == 1 else jax.lax.with_sharding_constraint(tree, split)
        if processes > 1:
            return jax.tree.map(lambda x: jax.make_array_from_process_local_data(split, x), tree)
        # one CPU: the call takes arrays of the host as they are, faster than a transfer of its own
        return tree if len(here) == 1 and here[0].platform == "cpu" else jax.device_put(tree, split)

    if kind == "pmap":
        return Placement(partial(spread_by_pmap, here=here), lambda tree: tree, constrain, len(here), len(here))
    return Placement(lambda f: jax.vmap(f, (None, 0)), block, constrain, len(here), len(here) // model)


def one_in_flight(program: Callable, devices: int) -> Callable:
    """A program whose caller waits for its result, where it runs on several devices of several processes, or on several
    forced devices of a CPU.

    Programs hold collectives. Two of them in flight may come to these in one order on the devices of one process, and
    in another order on those of another: then each waits for the other for ever. Forced devices share the threads of a
    pool: there a collective can wait for a thread that another program holds.

    devices: on which the program runs, of all processes.
    """
    if devices == jax.process_count() or (jax.process_count() == 1 and jax.default_backend() != "cpu"):
        return program

    def run_and_wait(*args):
        return jax.block_until_ready(program(*args))

    return run_and_wait


def padded_table_rows(items: int, devices: int, splits_tables: bool) -> int:
    """Rows of the tables of so many items: where each device keeps a share of them, they must divide evenly. The same
    for all powers of two up to 128, so that a run can go on with another number of devices."""
    whole = math.lcm(128, devices)
    return -(-items // whole) * whole if splits_tables else items


def check_processes(kind: Kind, devices: int, there: list[jax.Device], shard_tables: bool) -> None:
    """Raises ValueError for what several processes cannot do."""
    if shard_tables:
        raise ValueError("run.shard_tables works in one process: leave it out for several")
    if kind == "pmap":
        raise ValueError("run.placement pmap works in one process: choose jit for several")
    if devices not in (0, 1, len(there)):  # 1 is what a configuration says that does not care
        raise ValueError(f"{devices} devices asked for: several processes use all {len(there)}, leave run.devices out")
    counts = {sum(other.process_index == device.process_index for other in there) for device in there}
    if len(counts) > 1:
        raise ValueError(f"processes with {sorted(counts)} devices: each must have as many")
