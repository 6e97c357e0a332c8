"""What a JAX user would write by hand for FedAvg of a matrix factorisation, and the same in C: for `jaxfed bench`.

Each baseline is given the very examples that jaxfed draws, drawn by the same code, and its programs are compiled for
a few lengths only; what it does with them counts, as it does for jaxfed.
"""

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxfed.config.build import RunParts
from jaxfed.core.state import State
from jaxfed.data.batching import DrawnExamples, draw_examples
from jaxfed.data.ragged import sort_pairs


class Baseline(NamedTuple):
    """begin(state) -> its own state; round(own, number) -> own after one round; params(own) -> {item, bias, user}."""

    begin: Callable[[State], Any]
    round: Callable[[Any, int], Any]
    params: Callable[[Any], dict[str, Any]]


class BaselineModel(NamedTuple):
    """A baseline's model: a table of items [N, d] and their biases [N]; the vectors of all users [C, d]."""

    items: dict[str, jax.Array]
    users: jax.Array


def copy_initial_model(state: State) -> BaselineModel:
    """A copy of jaxfed's model before the first round."""
    tables = state.shared.params["tables"]
    items = {name: jnp.array(tables[name].rows) for name in ("item", "bias")}
    return BaselineModel(items, jnp.array(state.client_states.work["private"]["user"][:, 0]))


def flatten_parameters(model: BaselineModel) -> dict[str, Any]:
    """Flat, to compare."""
    return {**model.items, "user": model.users}


def cohort_examples(parts: RunParts, seed: int, number: int) -> tuple[np.ndarray, DrawnExamples, np.ndarray]:
    """(ids [M], their examples, the first example of each [M + 1]) of a round."""
    ids, _ = parts.sampler.draw(seed, number)
    drawn = draw_examples(parts.data.population, parts.batching, ids, seed, number)
    return ids, drawn, np.concatenate([[0], np.cumsum(drawn.examples)])


def pad_examples(
    drawn: DrawnExamples, low: int, high: int, steps: int, size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(items, labels, weights), each [steps, size], of one client's examples."""
    out = np.zeros((3, steps * size), np.float32)
    items, count = np.zeros(steps * size, np.int32), high - low
    items[:count], out[1, :count], out[2, :count] = drawn.item[low:high, 0], drawn.label[low:high], 1
    return items.reshape(steps, size), *out[1:].reshape(2, steps, size)


def train_client_densely(rate: float, items: dict[str, jax.Array], user: jax.Array, data: Any) -> tuple[Any, jax.Array]:
    """(end - start of the whole table, the user's new vector): mini-batch SGD on [S, B] examples."""

    def step(carry, batch):
        item, label, weight = batch

        def loss(carry):
            tables, user = carry
            logit = tables["item"][item] @ user + tables["bias"][item]
            each = optax.sigmoid_binary_cross_entropy(logit, label) * weight
            return each.sum() / jnp.maximum(weight.sum(), 1)

        return jax.tree.map(lambda x, g: x - rate * g, carry, jax.grad(loss)(carry)), None

    (end, user), _ = jax.lax.scan(step, (items, user), data)
    return jax.tree.map(jnp.subtract, end, items), user


def sequential_baseline(parts: RunParts, rate: float, seed: int) -> Baseline:
    """One jitted client at a time, each with the whole table."""
    size, lengths = parts.batching.batch_size, np.unique([steps for steps, _ in parts.shapes.kinds])

    @partial(jax.jit, donate_argnums=(1, 2))
    def one(items, total, users, id, weight, data):
        update, user = train_client_densely(rate, items, users[id], data)
        return jax.tree.map(lambda t, u: t + weight * u, total, update), users.at[id].set(user)

    @partial(jax.jit, donate_argnums=0)
    def finish(items, total, weight):
        return jax.tree.map(lambda x, t: x + t / weight, items, total)

    def round(model, number):
        ids, drawn, first = cohort_examples(parts, seed, number)
        total, users = jax.tree.map(jnp.zeros_like, model.items), model.users
        for id, low, high in zip(ids, first[:-1], first[1:], strict=True):
            steps = int(lengths[np.searchsorted(lengths, -(-(high - low) // size))])
            data = pad_examples(drawn, low, high, steps, size)
            total, users = one(model.items, total, users, id, np.float32(high - low), data)
        return BaselineModel(finish(model.items, total, np.float32(first[-1])), users)

    return Baseline(copy_initial_model, round, flatten_parameters)


def dense_vmap_baseline(parts: RunParts, rate: float, seed: int) -> Baseline:
    """All clients at once under vmap, each with its own copy of the whole table, padded to the longest."""
    size, lengths = parts.batching.batch_size, np.unique([steps for steps, _ in parts.shapes.kinds])

    @partial(jax.jit, donate_argnums=(0, 1))
    def all_of_them(items, users, ids, weight, data):
        updates, new = jax.vmap(partial(train_client_densely, rate), (None, 0, 0))(items, users[ids], data)
        mean = jax.tree.map(lambda u: jnp.tensordot(weight / weight.sum(), u, 1), updates)
        return jax.tree.map(jnp.add, items, mean), users.at[ids].set(new)

    def round(model, number):
        ids, drawn, first = cohort_examples(parts, seed, number)
        count = np.diff(first)
        steps = int(lengths[np.searchsorted(lengths, -(-count.max() // size))])
        each = [pad_examples(drawn, low, high, steps, size) for low, high in pairwise(first)]
        data = tuple(np.stack(x) for x in zip(*each, strict=True))
        return BaselineModel(*all_of_them(model.items, model.users, ids, count.astype(np.float32), data))

    return Baseline(copy_initial_model, round, flatten_parameters)


def compile_c_library() -> ctypes.CDLL | None:
    """`limit.c` by the machine's C compiler; None where there is none."""
    if not (compiler := shutil.which("cc")):
        return None
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "limit.so"
        source = Path(__file__).with_name("limit.c")
        flags = ["-O3", "-march=native", "-shared", "-fPIC"]
        subprocess.run([compiler, *flags, "-o", library, source, "-lm"], check=True)
        return ctypes.CDLL(str(library))


def lay_out_cohort(parts: RunParts, seed: int, num_items: int) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """The first cohort as `limit.c` reads it: (ids [M], (the first example of each client, the position of each
    example's item among the client's rows, labels, the first row of each client, the items of the rows))."""
    ids, drawn, first = cohort_examples(parts, seed, 0)
    client = np.repeat(drawn.client, drawn.examples)
    pair, order = sort_pairs(client, drawn.item[:, 0], len(ids), num_items)
    fresh = np.diff(pair, prepend=-1) != 0
    held, owner = drawn.item[order, 0][fresh], client[order][fresh]
    start = np.searchsorted(owner, np.arange(len(ids) + 1))
    position = np.empty(len(order), np.int32)
    position[order] = np.cumsum(fresh) - 1 - start[client[order]]
    examples = first.astype(np.int32), position, drawn.label.astype(np.float32)
    return ids, (*examples, start.astype(np.int32), held)


def c_baseline(parts: RunParts, rate: float, seed: int) -> Baseline | None:
    """The arithmetic in C on one core. Its state holds a cohort laid out beforehand: a round is arithmetic alone."""
    if (library := compile_c_library()) is None:
        return None
    floats, ints = (np.ctypeslib.ndpointer(kind, flags="C") for kind in (np.float32, np.int32))
    library.fed_round.restype = None
    numbers = [ctypes.c_int] * 3 + [ctypes.c_float]
    library.fed_round.argtypes = [floats] * 4 + [ints] * 2 + [floats] + [ints] * 2 + numbers + [floats] * 4

    def begin_c(state):
        model = copy_initial_model(state)
        items = {name: np.array(x) for name, x in model.items.items()}
        ids, laid = lay_out_cohort(parts, seed, model.items["item"].shape[0])
        most, dim = np.diff(laid[3]).max(), model.users.shape[1]
        scratch = (
            np.zeros((most, dim), np.float32),
            np.zeros(most, np.float32),
            *(np.zeros_like(items[n]) for n in items),
        )
        return items, np.array(model.users), ids, laid, scratch

    def round(own, number):
        items, users, ids, laid, scratch = own
        trained = np.empty((len(ids), users.shape[1]), np.float32)
        shape = len(ids), parts.batching.batch_size, users.shape[1]
        library.fed_round(items["item"], items["bias"], users[ids], trained, *laid, *shape, rate, *scratch)
        users[ids] = trained
        return own

    return Baseline(begin_c, round, lambda own: {**own[0], "user": own[1]})
