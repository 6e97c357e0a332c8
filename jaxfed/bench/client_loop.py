"""Rounds of any model as a loop over clients, one compiled call for each, over one base: for `jaxfed bench`.

The client's own work is that of jaxfed, on the rows and batches that jaxfed packs for it. Around it is what one would
write by hand: a sum in the shape of the whole model, a mean, and a step of the server.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxfed.config.build import RunParts
from jaxfed.core import tables, tree
from jaxfed.core.state import State
from jaxfed.core.types import Broadcast
from jaxfed.data.packing import pack_cohort
from jaxfed.training.rounds import make_run_keys


def begin_client_loop(state: State) -> tuple[Any, Any]:
    """(the shared parameters, what all clients keep), copied from jaxfed's state before the first round."""
    return jax.tree.map(jnp.array, (state.shared.params, state.client_states.work))


def make_client_loop(parts: RunParts, seed: int) -> Any:
    """round(carried, number) -> carried, of `begin_client_loop`: after a round of a weighted mean and SGD of rate 1."""
    step = parts.algorithm.step
    assert isinstance(step, partial)  # `run_round` of these
    plan, _, frozen = step.args
    shapes, key = parts.shapes._replace(steps_per_block=1, most_clients=1), make_run_keys(seed).rounds

    @partial(jax.jit, donate_argnums=(1, 2))
    def train_client(shared, total, kept, base, number, client, rows, data):
        data = data._replace(frozen=tables.take_rows(base, rows)) if jax.tree.leaves(base) else data
        own = tables.gather_client(kept, client, rows)
        secret = jax.random.fold_in(jax.random.fold_in(key, number), client)
        done = plan.method.work.update(Broadcast(tables.take_rows(shared, rows)), own, data, secret)
        share = tree.scale_tree(done.weight, done.update.params), done.weight
        total = tables.add_rows(total[0], rows, share[0]), total[1] + share[1]
        kept = tables.scatter_client_tables(kept, client, rows, done.client_state)
        kept = tables.scatter_client_leaves(kept, client, done.client_state)
        return total, kept

    @partial(jax.jit, donate_argnums=0)
    def finish(shared, total):
        return jax.tree.map(lambda x, change: x - change / total[1], shared, total[0])

    def round(carried, number):
        shared, kept = carried
        ids, present = parts.sampler.draw(seed, number)
        cohort = pack_cohort(parts.data.population, parts.batching, shapes, ids, present, seed, number)
        total = tree.zeros_like(shared), jnp.float32(0)
        held = np.arange(shapes.end) if cohort.rows is None else np.asarray(cohort.rows)
        held = np.append(held, shapes.end)  # what no client holds
        for block in cohort.blocks:
            client, rows = ids[block.slots[0]], held[np.minimum(block.rows[0], len(held) - 1)]
            data = jax.tree.map(lambda x: x[0], block.data)
            total, kept = train_client(shared, total, kept, frozen.clients, number, client, rows, data)
        return finish(shared, total), kept

    return round
