"""One client of a round in a process of its own: python -m tests.core.client_process CHANNEL IN OUT.

IN holds what a client is sent and what it has; OUT its message as bytes, and what it says of itself.
"""

import pickle
import sys

import jax
import numpy as np
import optax

from jaxfed.algorithms.local_training import local_steps
from jaxfed.channels.average import mean, per_row_mean
from jaxfed.channels.clip import clip
from jaxfed.channels.compress import quantize
from jaxfed.channels.secure_sum import ring
from jaxfed.core.channel import chain
from jaxfed.core.client import client_round
from jaxfed.core.wire import pack_message
from tests.small import ITEMS, bce, loss_model, user

CHANNELS = {
    "floats": lambda: chain(per_row_mean(), clip(0.5)),
    "codes": lambda: chain(mean(), quantize(8)),
    "integers": lambda: chain(mean(), clip(0.5), ring(8)),
}


def client_work():
    return local_steps(loss_model(bce, user), optax.sgd(0.1))


def main(name, source, target):
    with open(source, "rb") as file:
        received, own, public, key = pickle.load(file)
    public, key = public._replace(key=jax.random.wrap_key_data(public.key)), jax.random.wrap_key_data(key)
    done = jax.jit(lambda r, o, p, k: client_round(client_work(), CHANNELS[name](), r, o, public._replace(key=p), k))(
        received, own, public.key, key
    )
    held = own.rows[own.rows < ITEMS]
    with open(target, "wb") as file:
        facts = {"is_finite": bool(done.is_finite), "weight": float(done.weight)}
        pickle.dump((pack_message(jax.tree.map(np.asarray, done.message), held), facts), file)


if __name__ == "__main__":
    main(*sys.argv[1:])
