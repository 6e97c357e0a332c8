"""The memory that each device needs for a round of a decoder with adapters on clients. Compiles it, and runs nothing.

python scripts/abstract_memory.py [configs/abstract/decoder_1b_lora.toml] [--clients 64] [--lower-only]

No weights, no data and no accelerator are needed: arrays are shapes. For each mesh of the file the round is lowered for
TPU and CUDA on a mesh without devices, and compiled for as many virtual CPU devices as the mesh has. The bytes of
arguments are the same on any device. The bytes of temporary memory are those of the CPU compiler, which multiplies
bfloat16 in float32; other compilers may need less. --lower-only leaves the compilation out.
"""

import argparse
import tomllib
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxfed.algorithms.local_training import local_steps
from jaxfed.channels.average import weighted_mean
from jaxfed.core.channel import chain
from jaxfed.core.client_work import Batches
from jaxfed.core.federate import FrozenParts, make_programs, run_round
from jaxfed.core.method import Method
from jaxfed.core.partition import CLIENTS, MODEL, make_shardings
from jaxfed.core.placement import Placement
from jaxfed.core.state import Plan, initial_state
from jaxfed.core.tables import num_rows
from jaxfed.core.types import Block, Cohort
from jaxfed.models.decoder import PARTITION_RULES, Decoder, DecoderSizes, init_decoder
from jaxfed.models.decoder_weights import TextDecoder
from jaxfed.models.generative import decoder_lora
from jaxfed.models.lora import LoraSettings

PLATFORMS = ("tpu", "cuda")
CONFIG = Path(__file__).parent.parent / "configs/abstract/decoder_1b_lora.toml"


class Arguments(NamedTuple):
    """The arguments of a round, as shapes that know how they lie over a mesh."""

    frozen: Any
    state: Any
    cohort: Cohort
    key: Any


def lay_out(tree: Any, shardings: Any) -> Any:
    """The same shapes, each with its sharding."""
    return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree, shardings)


def make_mesh_placement(mesh: Any) -> Placement:
    """The placement that `jaxfed.core.placement` makes, on a mesh that may have no devices."""

    def constrain(tree, role):
        if role == "divided":
            return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, PartitionSpec(CLIENTS)))
        rules = PARTITION_RULES if role == "server" else ()
        return jax.lax.with_sharding_constraint(tree, make_shardings(mesh, rules, tree))

    return Placement(lambda f: jax.vmap(f, (None, 0)), lambda x: x, constrain, mesh.size, mesh.shape[CLIENTS])


def make_abstract_model(config: dict[str, Any]) -> Any:
    """(the model, the number of the base's parameters): shapes in place of the base's parameters and of the texts."""
    sizes, said = DecoderSizes(**config["decoder"]), config["round"]
    module = Decoder(sizes)
    params = jax.eval_shape(lambda key: init_decoder(module, key)["params"], jax.random.key(0))
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(config["base"]["param_dtype"])), params)
    pieces = np.broadcast_to(np.int32(0), (said["items"], said["pieces"]))
    lora = LoraSettings(**config["lora"])
    decoder = TextDecoder(sizes, params, start=1)
    model = decoder_lora(said["items"], decoder, pieces, said["length"], lora, "bfloat16")
    return model, sum(x.size for x in jax.tree.leaves(params))


def make_cohort(said: dict[str, int]) -> Cohort:
    """The shapes of a cohort: one block of clients, each with as many steps over its history."""
    clients, steps, length = said["clients"], said["steps"], said["length"]

    def shape(*sizes, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(sizes, dtype)

    examples = shape(clients, dtype=jnp.float32)
    batch = {"sequence": shape(clients, steps, length)}
    data = Batches(shape(clients, steps, length), shape(clients, steps, dtype=jnp.bool), batch, examples)
    block = Block(shape(clients), shape(clients, length), examples, data)
    return Cohort(shape(clients), shape(clients, dtype=jnp.bool), (block,))


def make_round(mesh: Any, config: dict[str, Any], model: Any) -> tuple[Any, Arguments]:
    """(the jitted round, its arguments) over a mesh."""
    said = config["round"]
    if said["clients"] % mesh.shape[CLIENTS]:
        raise ValueError(
            f"{said['clients']} clients do not divide among the {mesh.shape[CLIENTS]} devices of the axis clients: "
            "choose another mesh"
        )
    frozen = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), model.frozen)
    method = Method(local_steps(model, optax.sgd(0.1)), server=optax.adam(1e-3))
    plan = Plan(
        method=method,
        channel=chain(weighted_mean()),
        num_clients=said["clients"],
        place=make_mesh_placement(mesh),
        padded_shape=None,
        client_memory_budget=8e9,
        chunk=0,
        store_on_host=False,
        download=None,
        capacity=0,
        history_length=0,
        frozen_rows=num_rows(frozen),
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(partial(initial_state, plan), jax.eval_shape(model.init, key), key)
    cohort = make_cohort(said)
    split = NamedSharding(mesh, PartitionSpec(CLIENTS))
    on_all = partial(make_shardings, mesh, ())  # adapters are on every device
    blocks = tuple(lay_out(block, jax.tree.map(lambda _: split, block)) for block in cohort.blocks)
    arguments = Arguments(
        lay_out(frozen, make_shardings(mesh, PARTITION_RULES, frozen)),
        lay_out(state, on_all(state)),
        lay_out(cohort._replace(blocks=()), on_all(cohort._replace(blocks=())))._replace(blocks=blocks),
        lay_out(key, on_all(key)),
    )
    programs = make_programs(plan)

    def one_round(frozen, state, cohort, key):
        return run_round(plan, programs, FrozenParts(frozen, ()), state, cohort, key)

    return jax.jit(one_round, donate_argnums=1), arguments


def device_bytes(tree: Any) -> int:
    """Bytes of a tree of shapes on one device."""
    leaves = jax.tree.leaves(tree)
    return sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in leaves)


def describe_mesh(clients: int, model: int, config: dict[str, Any], compile_too: bool) -> str:
    """A line of the table: what a mesh's devices hold."""
    made, _ = make_abstract_model(config)
    axes, types = (CLIENTS, MODEL), (AxisType.Auto, AxisType.Auto)
    program, arguments = make_round(AbstractMesh((clients, model), axes, axis_types=types), config, made)
    program.trace(*arguments).lower(lowering_platforms=PLATFORMS)
    base, kept = device_bytes(arguments.frozen), device_bytes(arguments.state)
    found = [f"{clients} x {model}", clients * model, f"{base / 1e6:,.0f}", f"{kept / 1e6:,.0f}"]
    if compile_too:
        devices = np.array(jax.devices()[: clients * model]).reshape(clients, model)
        program, arguments = make_round(Mesh(devices, axes, axis_types=types), config, made)
        memory = program.lower(*arguments).compile().memory_analysis()
        found += [f"{each / 1e6:,.0f}" for each in (memory.argument_size_in_bytes, memory.temp_size_in_bytes)]
    return " | ".join(map(str, found))


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", type=Path, default=CONFIG)
    parser.add_argument("--clients", type=int, help="of a round; left out: what the file says")
    parser.add_argument("--lower-only", action="store_true")
    asked = parser.parse_args()
    config = tomllib.loads(asked.config.read_text())
    config["round"]["clients"] = asked.clients or config["round"]["clients"]
    jax.config.update("jax_num_cpu_devices", max(each["clients"] * each["model"] for each in config["mesh"]))
    jax.config.update("jax_platforms", "cpu")
    model, count = make_abstract_model(config)
    adapters = sum(x.size for x in jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0))))
    print(
        f"{count / 1e9:.2f} billion parameters of the base; {adapters:,} of the adapters, {4 * adapters / 1e6:.1f} MB"
    )
    print("MB a device:")
    print(
        "clients x model | devices | base and texts | server" + ("" if asked.lower_only else " | arguments | temporary")
    )
    for each in config["mesh"]:
        print(describe_mesh(each["clients"], each["model"], config, not asked.lower_only), flush=True)


if __name__ == "__main__":
    main()
