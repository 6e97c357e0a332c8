"""Small problems, and comparisons with a reason for their tolerance."""

import inspect
import os
import subprocess
from contextlib import contextmanager
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxfed.algorithms.local_training import local_steps
from jaxfed.config.registry import REGISTRY
from jaxfed.core.client_work import Batches
from jaxfed.core.federate import federate
from jaxfed.core.method import Method
from jaxfed.core.model import Model
from jaxfed.core.tables import Table
from jaxfed.core.types import Block, Cohort, Mean
from jaxfed.sampling.cohort import cyclic_cohort

ROOT = Path(__file__).parents[1]
EIGHT = "--xla_force_host_platform_device_count=8"  # of tests/conftest.py
KEY = jax.random.key(0)
BY_TEXT = ("text_lora", "decoder_lora", "code_decoder")  # models that read a pretrained one: see their own tests
OF_ADAPTERS = ("rolora", "fedask", "raflora", "flora", "fedex_lora", "flexlora")  # methods for that model alone
SEQUENCES = ("sasrec", "gru4rec", "hstu", "bert4rec")  # models of histories in their order
EPS = 2e-6  # float32 sums of a few dozen terms of size one, in another order


def no_private(key):
    return ()


def loss_model(loss, private=no_private, init=None):
    """The model of a loss alone, which is not scored."""
    return Model(init, private, loss, None)


def close(a, b, atol=EPS, rtol=1e-5):
    """Equal but for the order of sums."""
    chex.assert_trees_all_close(a, b, atol=atol, rtol=rtol)


def same(a, b):
    """Equal bit by bit."""
    chex.assert_trees_all_equal(a, b)


def private_links():
    """The names of the registry's links that release something under noise."""
    known = {
        "slots": 8,
        "num_clients": 11,
        "rounds": 12,
        "sampler": cyclic_cohort(11, 4),
        "num_train": [1, 2],
    }

    def made(make):
        asked = inspect.signature(make).parameters
        return make(**{name: value for name, value in known.items() if name in asked})

    return {name for name, make in REGISTRY["channel"].items() if made(make).claims.mechanisms}


def child_environment(**more):
    """The environment of a program that a test starts: compiled as the suite is, on the devices that there are."""
    flags = os.environ.get("XLA_FLAGS", "").replace(EIGHT, "").strip()
    return {**os.environ, "XLA_FLAGS": flags, **more}


@contextmanager
def start_program(words, **kind):
    """A program in a process of its own, which is killed at the end: a failed assertion must not wait for it."""
    with subprocess.Popen(words, text=True, cwd=ROOT, env=child_environment(), **kind) as process:
        try:
            yield process
        finally:
            process.kill()


# --- runs: a configuration as a file, and as a table ----------------------------------------

SMALL = """
seed = 0
rounds = 12
[data]
name = "synthetic"
users = 60
items = 50
mean_length = 8.0
[model]
dim = 4
[work]
batch_size = 64
[work.optimizer]
name = "sgd"
learning_rate = 0.5
[[channel]]
name = "per_row_mean"
[server]
name = "adam"
learning_rate = 0.05
[cohort]
size = 20
[evaluation]
every = 4
[run]
checkpoint_every = 3
"""
TABLE = {
    "rounds": 4,
    "data": {"name": "synthetic", "users": 40, "items": 50, "mean_length": 6.0},
    "model": {"dim": 4},
    "work": {"batch_size": 64, "optimizer": {"name": "sgd"}},
    "channel": [{"name": "weighted_mean"}],
    "cohort": {"name": "everyone", "dropout": 0.2},
    "evaluation": {"every": 2},
}

# --- dense: a linear model, every client with the same amount of data ----------------------------------------

N, M, S, B, D = 12, 6, 4, 3, 5
X = jax.random.normal(jax.random.key(1), (N, S, B, D))
Y = jax.random.normal(jax.random.key(2), (N, S, B))
DENSE = {"w": jax.random.normal(jax.random.key(3), (D,)), "b": jnp.zeros(())}
IDS = np.array([3, 1, 4, 7, 9, 2])


def mse(params, private, batch):
    """Mean squared error of a linear model."""
    x, y = batch
    return Mean(jnp.sum((x @ params["w"] + params["b"] - y) ** 2), jnp.float32(y.size))


def dense_cohort(ids=IDS, present=None, xy=None):
    """One block of clients without tables."""
    x, y = xy or (X, Y)
    ids = np.asarray(ids)
    m, s = len(ids), x.shape[1]
    examples = np.full(m, float(s * x.shape[2]), np.float32)
    steps = Batches(np.zeros((m, s, 0), np.int32), np.ones((m, s), bool), (x[ids], y[ids]), examples)
    block = Block(np.arange(m, dtype=np.int32), np.zeros((m, 0), np.int32), examples, steps)
    return Cohort(np.asarray(ids, np.int32), np.ones(m, bool) if present is None else np.array(present, bool), (block,))


# --- rows: matrix factorisation with private user vectors ----------------------------------------

USERS, ITEMS, DIM, BATCH = 14, 60, 4, 4
_random = np.random.default_rng(0)
DATA = {
    c: (_random.permutation(ITEMS)[:k], _random.integers(0, 2, k).astype(np.float32))
    for c, k in enumerate(_random.integers(3, 33, USERS))
}
WHO = [3, 1, 4, 7, 9, 2, 11, 13]
PLAIN = {"item": jax.random.normal(KEY, (ITEMS, DIM)), "bias": jnp.zeros(ITEMS), "scale": jnp.ones(())}
MARKED = {"item": Table(PLAIN["item"]), "bias": Table(PLAIN["bias"]), "scale": PLAIN["scale"]}


def bce(params, private, batch):
    """Cross-entropy of every row of the tables given, weighed."""
    y, w = batch
    logit = params["scale"] * (params["item"] @ private["user"]) + params["bias"]
    return Mean(jnp.sum(optax.sigmoid_binary_cross_entropy(logit, y) * w), jnp.sum(w))


def user(key):
    """A user vector."""
    return {"user": 0.3 * jax.random.normal(key, (DIM,))}


def row_block(slots, whole=False, steps=8):
    """Clients of WHO with their rows, or with the whole catalogue as their slice."""
    m, k = len(slots), ITEMS if whole else steps * BATCH
    rows, at = np.full((m, k), ITEMS, np.int32), np.full((m, steps, BATCH), ITEMS, np.int32)
    y, w = np.zeros((2, m, steps, BATCH), np.float32)
    live, examples = np.zeros((m, steps), bool), np.zeros(m, np.float32)
    for j, slot in enumerate(slots):
        if slot >= len(WHO):
            continue
        items, labels = DATA[WHO[slot]]
        n = len(items)
        rows[j, : ITEMS if whole else n] = np.arange(ITEMS) if whole else items
        at[j].ravel()[:n] = items if whole else np.arange(n)
        y[j].ravel()[:n], w[j].ravel()[:n], live[j, : -(-n // BATCH)], examples[j] = labels, 1, True, n
    return Block(np.array(slots, np.int32), rows, examples, Batches(at, live, (y, w), examples))


def row_cohort(whole=False, present=None, blocks=((0, 1, 2, 3), (4, 5, 6, 7))):
    """The clients of WHO in blocks."""
    there = np.ones(len(WHO), bool) if present is None else np.array(present, bool)
    return Cohort(np.array(WHO, np.int32), there, tuple(row_block(slots, whole) for slots in blocks))


def on_rows(cohort, room=ITEMS + 3):
    """The same cohort with the list of the rows it holds, and room for more."""
    held = np.unique(np.concatenate([block.rows.ravel() for block in cohort.blocks]))
    held = held[held < ITEMS]
    position = np.full(ITEMS + 1, room, np.int32)
    position[held] = np.arange(len(held))
    blocks = tuple(block._replace(rows=position[block.rows]) for block in cohort.blocks)
    rows = np.concatenate([held, np.arange(ITEMS, ITEMS + room - len(held))]).astype(np.int32)
    return cohort._replace(blocks=blocks, rows=rows)


def factorisation(channel, optimizer=None, server=None, by_row=True, **more):
    """FedAvg of the matrix factorisation above."""
    work = local_steps(loss_model(bce, user), optimizer or optax.sgd(0.1), by_row=by_row)
    return federate(Method(work, server=server or optax.sgd(1.0)), channel, USERS, **more)


def run(algorithm, cohort, params=MARKED, rounds=3):
    """(state, info) after some rounds of the same cohort."""
    state, info = algorithm.init(params, KEY), {}
    for _ in range(rounds):
        state, info = algorithm.step(state, cohort, KEY)
    return state, info


@jax.jit
def slopes(params, own, items, labels):
    """Gradients of a batch's mean cross-entropy, of the whole tables and of the user vector."""

    def loss(p, u):
        logit = p["scale"] * (p["item"][items] @ u["user"]) + p["bias"][items]
        return jnp.mean(jnp.logaddexp(0, logit) - labels * logit)

    return jax.grad(loss, (0, 1))(params, own)


def by_hand(weighted=False, rounds=3, data=DATA):
    """The same without a line of jaxfed: every client trains a copy of the whole table, in turn."""
    users = {c: user(jax.random.fold_in(KEY, c)) for c in WHO}
    params = PLAIN
    for _ in range(rounds):
        total, weight = jax.tree.map(jnp.zeros_like, params), 0.0
        for c in WHO:
            (items, labels), mine, own = data[c], params, users[c]
            for s in range(0, len(items), BATCH):
                g, h = slopes(mine, own, items[s : s + BATCH], labels[s : s + BATCH])
                mine, own = (jax.tree.map(lambda a, b: a - 0.1 * b, *pair) for pair in ((mine, g), (own, h)))
            w = len(items) if weighted else 1.0
            total = jax.tree.map(lambda t, a, b: t + w * (b - a), total, params, mine)
            weight, users[c] = weight + w, own
        params = jax.tree.map(lambda p, t: p + t / weight, params, total)
    return params, users
