"""One user on several devices: what wraps an algorithm so that the private part of a user is one."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxfed.core.federate import Algorithm
from jaxfed.core.types import Tree


def with_merged_devices(algorithm: Algorithm, owner: np.ndarray, weight: np.ndarray) -> Algorithm:
    """The same algorithm, whose clients are devices: after each round the private parts of a user's devices that
    reported are averaged by their examples, as FedAvg averages models, and all devices of the user have the result.

    owner int [C]: whose device each client is, from 0; weight float [C]: its examples, above 0. What works keep on
    clients must be the private part alone. Users begin with the part of their first device. A user with one device is a
    client as without. Devices exchange the parts among themselves: the server sees nothing of it, and it is in no count
    of bytes. Differential privacy stays that of a device.
    """
    clients, users = len(owner), int(owner.max()) + 1
    counts = np.bincount(owner, minlength=users)
    order = np.argsort(owner, kind="stable")
    places = np.arange(clients) - np.repeat(np.cumsum(counts) - counts, counts)
    devices = np.full((users, counts.max()), clients, np.int32)  # past the end: none
    devices[owner[order], places] = order
    first, weights = devices[owner, 0], np.asarray(weight, np.float32)

    @partial(jax.jit, donate_argnums=0)
    def begin(states: Tree) -> Tree:
        return jax.tree.map(lambda x: x[first], states)

    @partial(jax.jit, donate_argnums=0)
    def join(states: Tree, ids: jax.Array, present: jax.Array) -> tuple[Tree, jax.Array]:
        """(the parts [C, ...] after the devices `ids` [M] have met, of how many users several reported)."""
        whose = jnp.asarray(owner).at[ids].get(mode="fill", fill_value=users)
        who, slot = jnp.unique(whose, size=ids.size, fill_value=users, return_inverse=True)
        mass = jnp.where(present, jnp.asarray(weights).at[ids].get(mode="fill", fill_value=0), 0)
        total, reports = (jax.ops.segment_sum(x, slot, ids.size) for x in (mass, present.astype(jnp.int32)))
        share = mass / jnp.where(total > 0, total, 1)[slot]  # exactly 1 for a device alone
        to = jnp.asarray(devices).at[who].get(mode="fill", fill_value=clients)
        to = jnp.where((reports > 0)[:, None], to, clients)

        def mean(x):
            parts = x.at[ids].get(mode="fill", fill_value=0)
            parts = share.reshape(share.shape + (1,) * (x.ndim - 1)) * parts
            return x.at[to].set(jax.ops.segment_sum(parts, slot, ids.size)[:, None], mode="drop")

        return jax.tree.map(mean, states), (reports > 1).sum()

    def init(params, key):
        state = algorithm.init(params, key)
        return state._replace(client_states=state.client_states._replace(work=begin(state.client_states.work)))

    def step(state, cohort, key):
        state, info = algorithm.step(state, cohort, key)
        states, several = join(state.client_states.work, cohort.ids, info["clients/present"])
        return state._replace(client_states=state.client_states._replace(work=states)), info | {
            "clients/merged": several
        }

    return Algorithm(init, step)
