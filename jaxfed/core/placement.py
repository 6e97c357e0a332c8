"""Where clients run: one function of one client, spread over the clients of a block and the devices at hand.

Not `shard_map`: with its default `check_vma=True`, `jax.grad` with respect to replicated parameters inserts a hidden
`psum` on every local step, and clients silently train together.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxfed.core.tables import map_tables
from jaxfed.core.types import Tree

Kind = Literal["jit", "pmap"]


class Placement(NamedTuple):
    """clients(f) maps f(common, one) over the leading axis of its second argument; block(x) puts a block there.

    common(x) copies arrays to every device; together(x), inside a program, gathers what lies split. server(x) lays what
    the server keeps, inside a program too: on every device, or its tables split by rows. `devices` divides the width of
    every block, of which block(x) is given this process's equal part.
    """

    clients: Callable[[Callable], Callable]
    block: Callable[[Any], Any]
    common: Callable[[Any], Any]
    together: Callable[[Any], Any]
    server: Callable[[Tree], Tree]
    devices: int


def choose_devices(kind: Kind, devices: int, shard_tables: bool) -> list[jax.Device]:
    """The devices of all processes that take part. Raises ValueError for what cannot be."""
    here = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    if jax.process_count() > 1:
        check_processes(kind, devices, here, shard_tables)
        devices = 0
    if not 0 <= devices <= len(here):
        raise ValueError(f"{devices} devices asked for, {len(here)} are there: lower run.devices (0 takes all)")
    return here[: devices or len(here)]


def copy_to_devices(x: Any, everywhere: NamedSharding, here: list[jax.Device]) -> jax.Array:
    """An array that all processes have, on every device: `device_put` would ask them whether they have it."""
    local_shards = [jax.device_put(x, device) for device in here if device.process_index == jax.process_index()]
    return jax.make_array_from_single_device_arrays(x.shape, everywhere, local_shards)


def lay_out_server(tree: Tree, here: list[jax.Device], everywhere: NamedSharding, of_tables: NamedSharding) -> Tree:
    """What the server keeps, on every device, its tables as `of_tables` says. Inside a program, too."""

    def put(x, where):
        if isinstance(x, jax.core.Tracer):
            return jax.lax.with_sharding_constraint(x, where)
        return copy_to_devices(x, everywhere, here) if jax.process_count() > 1 else jax.device_put(x, where)

    def put_table(x):
        if of_tables is not everywhere and x.shape[0] % len(here):
            raise ValueError(
                f"{x.shape[0]:,} rows do not divide among {len(here)} devices: make tables of `padded_table_rows`"
            )
        return put(x, of_tables)

    return map_tables(put_table, partial(put, where=everywhere), tree)


def spread_by_pmap(f: Callable, here: list[jax.Device]) -> Callable:
    """f(common, one) over the leading axis of its second argument, by `jax.pmap`."""
    each = jax.pmap(jax.vmap(f, (None, 0)), axis_name="clients", in_axes=(None, 0), devices=here)

    def over(common, many):
        lead = jax.tree.map(lambda x: x.reshape((len(here), -1, *x.shape[1:])), many)
        return jax.tree.map(lambda x: x.reshape((-1, *x.shape[2:])), each(common, lead))

    return over


def make_placement(kind: Kind = "jit", devices: int = 1, shard_tables: bool = False) -> Placement:
    """`jit`: a vmap whose client axis lies over the mesh axis `clients`; `pmap`: the same through `jax.pmap`.

    devices: how many (0: all); several processes always use all of theirs. shard_tables: each device keeps its share of
    the rows of the server's tables, which then must divide evenly. Raises ValueError for what cannot be.
    """
    here, processes = choose_devices(kind, devices, shard_tables), jax.process_count()
    mesh = Mesh(here, ("clients",))
    everywhere, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("clients"))
    server = partial(lay_out_server, here=here, everywhere=everywhere, of_tables=split if shard_tables else everywhere)

    def common(tree):
        if processes > 1:
            return jax.tree.map(partial(copy_to_devices, everywhere=everywhere, here=here), tree)
        return jax.device_put(tree, everywhere)

    def together(tree):
        return jax.lax.with_sharding_constraint(tree, everywhere)

    def block(tree):
        if processes > 1:
            return jax.tree.map(lambda x: jax.make_array_from_process_local_data(split, x), tree)
        # one CPU: the call takes arrays of the host as they are, faster than a transfer of its own
        return tree if len(here) == 1 and here[0].platform == "cpu" else jax.device_put(tree, split)

    if kind == "jit":
        return Placement(lambda f: jax.vmap(f, (None, 0)), block, common, together, server, len(here))
    if kind != "pmap":
        raise ValueError(f"no placement {kind!r}: choose jit or pmap")
    if shard_tables:
        raise ValueError('run.shard_tables needs run.placement = "jit": pmap copies its model to every device')
    spread = partial(spread_by_pmap, here=here)
    return Placement(spread, lambda tree: tree, common, together, server, len(here))


def one_in_flight(program: Callable) -> Callable:
    """A program whose caller waits for its result, where several processes have several devices each.

    Programs hold collectives. Two of them in flight may come to these in one order on the devices of one process, and
    in another order on those of another: then each waits for the other for ever.
    """
    if jax.process_count() == 1 or jax.local_device_count() == 1:
        return program

    def run_and_wait(*args):
        return jax.block_until_ready(program(*args))

    return run_and_wait


def padded_table_rows(items: int, devices: int, shard_tables: bool) -> int:
    """Rows of the tables of so many items: where each device keeps a share of them, they must divide evenly. The same
    for all powers of two up to 128, so that a run can go on with another number of devices."""
    whole = math.lcm(128, devices)
    return -(-items // whole) * whole if shard_tables else items


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
