"""Times the negatives of a round drawn on the host, as jaxfed does, against the same draw inside a compiled program.

python scripts/negatives.py [--clients 128] [--rounds 20]
"""

import argparse
import statistics
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxfed.config.build import load_data
from jaxfed.config.schema import make_config
from jaxfed.data.batching import Batching, draw_examples, draw_negatives


def on_device(population, batching, clients):
    """A compiled draw(ids, round) of [clients, most positives x negatives]: uniform over a user's negatives."""
    most = int(population.train.counts.max())
    excluded = population.excluded.padded(np.arange(population.num_clients), 1 << 30)
    gaps = jnp.asarray(np.where(excluded < 1 << 30, excluded - np.arange(excluded.shape[1]), excluded))
    num_negatives = jnp.asarray(population.num_items - population.excluded.counts)

    @jax.jit
    def draw(ids, round):
        def one(id):
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), round), id)
            r = jax.random.randint(key, (most * batching.negatives,), 0, num_negatives[id])
            return r + jnp.searchsorted(gaps[id], r, side="right")

        return jax.vmap(one)(ids)

    return draw


def main() -> None:
    """Medians over rounds, the two in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    population, batching = load_data(make_config({}).data).population, Batching()
    device = on_device(population, batching, args.clients)
    times: dict[str, list[float]] = {"host, negatives": [], "host, shuffle and negatives": [], "device, negatives": []}
    random = np.random.default_rng(0)
    for round in range(args.rounds + 1):
        ids = random.choice(population.num_clients, args.clients, replace=False)
        user = np.repeat(ids, population.num_train[ids])
        bits = random.integers(0, 1 << 32, (len(user), batching.negatives), np.uint64)
        for name, run in (
            ("host, negatives", partial(draw_negatives, population, user, bits)),
            ("host, shuffle and negatives", partial(draw_examples, population, batching, ids, 0, round)),
            ("device, negatives", partial(device, ids, round)),
        ):
            begin = time.perf_counter()
            jax.block_until_ready(run())
            times[name].append(time.perf_counter() - begin)
    for name, seconds in times.items():
        print(f"{name:>28}  {1e3 * statistics.median(seconds[1:]):7.2f} ms")


if __name__ == "__main__":
    main()
