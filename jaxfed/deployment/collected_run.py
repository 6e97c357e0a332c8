"""A federation that is tried out on one machine: its folders before, and a run of the usual form after it.

In a real deployment nobody can make the latter: what clients keep is theirs. Here all folders lie on one disk.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxfed.config.build import RunParts
from jaxfed.config.config_files import config_to_toml, with_absolute_paths
from jaxfed.config.settings import Config
from jaxfed.core.state import State
from jaxfed.core.tables import unwrap
from jaxfed.core.types import Tree
from jaxfed.deployment.finished_run import write_finished_run
from jaxfed.deployment.node_data import (
    PublicFacts,
    find_facts,
    make_empty_population,
    wrap_population,
    write_facts,
    write_node_data,
)
from jaxfed.deployment.node_states import Keys, read_client
from jaxfed.deployment.noise_shares import can_share_noise, find_share_variance
from jaxfed.deployment.party import config_digest, make_deployed_pieces
from jaxfed.deployment.roster import make_node_identity
from jaxfed.training.checkpoint import open_checkpoints, restore_newest
from jaxfed.training.log import log
from jaxfed.training.rounds import Progress, initial_arrays
from jaxfed.training.run_dir import PRIVATE, write_file


def lay_out_federation(
    out: Path, config: Config, parts: RunParts, nodes: int, keys: Keys = "reproducible"
) -> PublicFacts:
    """Writes the folders of a server and of some nodes, each with what it may have: OUT/server, OUT/nodes/0, ...

    Args:
        out: The run's folder.
        config: What to run.
        parts: What the simulator makes of it.
        nodes: How many; clients are dealt to them in turn.
        keys: See `open_node`. With `own`, nodes add the noise of `skellam` in shares.

    Returns:
        The facts that all parties hold.

    Raises:
        ValueError: there are fewer clients than nodes, or the configuration cannot be deployed.
    """
    population = parts.data.population
    if not 1 <= nodes <= population.num_clients:
        raise ValueError(f"--nodes is {nodes}: there are {population.num_clients:,} clients, each at one node")
    unfit = {
        "data.cold": population.cold is not None,
        'data.clients = "device" or data.merge': population.owner is not None or population.domains is not None,
        "data.label_flip": population.label_flipped is not None,
    }
    if found := [key for key, holds in unfit.items() if holds]:
        raise ValueError(f"deploy: {found[0]} is not built for real clients: leave it out")
    facts = find_facts(population, parts.shapes.kinds, parts.data.source.items)
    nobody = wrap_population(make_empty_population(facts), facts)
    hides = make_deployed_pieces(config, facts, nobody).wire.sees == "sum"  # raises for what cannot be deployed
    if hides and nodes < 2:
        raise ValueError("--nodes is 1: this channel hides messages in a sum, which takes two nodes at least")
    shares = hides and keys == "own" and can_share_noise(parts.channel)
    if shares:
        find_share_variance(parts.channel, nodes)  # raises before anything is written
    places = [out / "nodes" / str(node) for node in range(nodes)]
    for place in (out, out / "server", out / "nodes", *places):
        place.mkdir(PRIVATE, parents=True, exist_ok=True)
    if hides:
        facts = facts._replace(keys=tuple(make_node_identity(place) for place in places), noise_shares=shares)
    text = config_to_toml(with_absolute_paths(config))
    for place in (out / "server", *places):
        write_file(place / "config.toml", text)
        write_facts(place / "facts.json", facts)
    for node in range(nodes):
        path = out / "nodes" / str(node) / "data.npz"
        if not path.exists():
            write_node_data(path, population, np.arange(population.num_clients)[node::nodes])
    return facts


def collect_run(out: Path, config: Config, parts: RunParts, facts: PublicFacts, nodes: int) -> dict[str, Any]:
    """Makes a run of the usual form of what lies in the folders of a federation, and returns its summary.

    There are no evaluations between rounds, for which the server has no data: the last model counts as the best one.
    """
    state, progress = read_federation(out, config, initial_arrays(parts, config.seed)["state"], facts, nodes)
    rows = (out / "server" / "metrics.jsonl").read_bytes()
    return write_finished_run(out, config, parts, state, progress, rows)


def read_federation(out: Path, config: Config, first: State, facts: PublicFacts, nodes: int) -> tuple[State, Progress]:
    """(the state of a whole federation, where its server stands). first: the state before the first round.

    Raises ValueError where the server has no checkpoint of this run.
    """
    counted = np.full(facts.num_clients, -1, np.int32)
    digest = config_digest(config, facts).hex()
    with open_checkpoints(out / "server" / "checkpoints") as checkpoints:
        template = {"state": first._replace(client_states=(), model_history=()), "counted": counted}
        found = restore_newest(checkpoints, template, log, lambda record: "" if record["digest"] == digest else "other")
    if found is None:
        raise ValueError(f"{out}/server has no checkpoint: no round was done")
    saved, record, _ = found
    store = jax.tree.map(np.array, first.client_states)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), store)
    for node in range(nodes):
        folder = out / "nodes" / str(node) / "states"
        for path in folder.glob("*.npz"):
            put_client(store, int(path.stem), folder, like, int(saved["counted"][int(path.stem)]))
    state = saved["state"]._replace(client_states=jax.tree.map(jnp.asarray, store))
    if jax.tree.leaves(first.model_history):  # the server of a federation keeps no older models
        repeated = jax.tree.map(lambda old, now: jnp.broadcast_to(now, old.shape), first.model_history, state.shared)
        state = state._replace(model_history=repeated)
    return state, Progress(**record["standing"])


def put_client(store: Tree, client: int, folder: Path, like: Tree, counted: int) -> None:
    """Puts what a node keeps of a client into a store of all clients, in place."""
    kept = read_client(folder, client, like)
    assert kept
    jax.tree.map(lambda x, new: np.copyto(x[client], new), unwrap(store), unwrap(kept.settle(counted).state))
