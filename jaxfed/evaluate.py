"""Evaluation: rank the whole catalogue and 99 sampled items for every user, in chunks of clients.

Each client sums the metrics of its users; the sums go through a channel of their own, so the same code is the server's
evaluation (a plain sum) and the clients' (whatever links a deployment puts there).
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfed.channel import Channel, total
from jaxfed.data.clients import Population, Ragged
from jaxfed.metrics import classification, ranking
from jaxfed.models.model import Model
from jaxfed.types import Client, Key, Mean, Round, Tree

SAMPLED = 99  # negatives of a draw
DRAWS = 5
DECILES = 10


class Questions(NamedTuple):
    """What is asked of U users each of m clients."""

    client: np.ndarray  # int [m]: past the end: nobody
    activity: np.ndarray  # float [m]: train interactions of each
    decile: np.ndarray  # int [m]: of the client's activity, 0 the least active
    user: np.ndarray  # int [m, U]: positions among the client's users
    targets: np.ndarray  # int [m, U, T]: held-out items; N where unused
    seen: np.ndarray  # int [m, U, L]: items left out of the ranking; N where unused
    sampled: np.ndarray  # int [m, U, DRAWS, SAMPLED]: candidates beside the targets; N where a user has fewer


class Exam(NamedTuple):
    """A split to be evaluated on: who is asked what."""

    population: Population
    targets: Ragged
    seen: Ragged
    sampled: np.ndarray  # int32 [users, DRAWS, SAMPLED]
    who: np.ndarray  # int32 [asked]: clients
    clients: int  # at a time
    users: int  # of each client at a time


def concatenated(*lists: Ragged) -> Ragged:
    """Joins lists of the same users, user by user."""
    users = [np.repeat(np.arange(len(each.counts)), each.counts) for each in lists]
    order = np.argsort(np.concatenate(users), kind="stable")
    counts = np.sum([each.counts for each in lists], 0)
    values = np.concatenate([each.values for each in lists])[order]
    return Ragged(values, np.concatenate([[0], np.cumsum(counts)]))


def never_touched(population: Population, seed: int) -> np.ndarray:
    """int32 [users, DRAWS, SAMPLED]: distinct items that each user never interacted with, by (seed, user, draw)."""
    touched = concatenated(population.train, population.valid, population.test)
    items = population.num_items
    out = np.full((len(population.user_names), DRAWS, SAMPLED), items, np.int32)
    for user in range(len(out)):
        mine = np.unique(touched.of(user))
        gaps, free = mine - np.arange(len(mine)), items - len(mine)
        for number in range(DRAWS):
            random = np.random.Generator(np.random.Philox(key=[seed, 2], counter=[0, user, number, 0]))
            r = random.choice(free, min(free, SAMPLED), replace=False, shuffle=False)
            out[user, number, : len(r)] = r + np.searchsorted(gaps, r, "right")
    return out


def exam(population: Population, part: str, sampled: np.ndarray, budget: int = 1 << 22) -> Exam:
    """part: `val` (train items are left out of the ranking) or `test` (train and validation items are).

    budget: scores and histories [clients, users, N + longest] held at a time: memory does not grow with the population.
    """
    if part not in ("val", "test"):
        raise ValueError(f"no part {part!r}: choose val or test")
    targets = population.valid if part == "val" else population.test
    seen = population.train if part == "val" else concatenated(population.train, population.valid)
    users = min(population.users_per_client, 64)
    each = users * (population.num_items + int(seen.counts.max()) + int(targets.counts.max()))
    clients = int(np.clip(budget // each, 1, min(population.num_clients, 256)))
    return Exam(population, targets, seen, sampled, np.arange(population.num_clients, dtype=np.int32), clients, users)


def questions(of: Exam) -> Iterator[list[Questions]]:
    """Those asked, in chunks of one shape: for each group of clients the blocks of their users."""
    population, items = of.population, of.population.num_items
    edges = np.quantile(population.activity, np.arange(1, DECILES) / DECILES)
    decile = np.searchsorted(edges, population.activity, "right")
    none = len(population.user_names)
    lists = [Ragged(each.values, np.append(each.start, each.start[-1])) for each in (of.targets, of.seen)]
    for low in range(0, len(of.who), of.clients):
        ids = np.full(of.clients, population.num_clients, np.int32)
        ids[: len(of.who) - low] = of.who[low : low + of.clients]
        real = ids < population.num_clients
        at = np.minimum(ids, population.num_clients - 1)
        group = []
        for start in range(0, population.users_per_client, of.users):
            local = np.broadcast_to(start + np.arange(of.users), (of.clients, of.users))
            user = population.first[at][:, None] + local
            user = np.where((user < population.first[at + 1][:, None]) & real[:, None], user, none)
            targets, seen = (each.padded(user.ravel(), items).reshape(*user.shape, -1) for each in lists)
            sampled = np.where((user < none)[..., None, None], of.sampled[np.minimum(user, none - 1)], items)
            local = np.minimum(local, population.users_per_client - 1).astype(np.int32)
            activity = population.activity[at].astype(np.float32)
            group.append(Questions(ids, activity, decile[at], local, targets, seen, sampled))
        yield group


def answer(model: Model, shared: Tree, private: Tree, user: jax.Array, targets, seen, sampled) -> dict[str, Mean]:
    """Metrics of one user: `full/...` scalars, `sampled/...` [DRAWS]."""
    scores = model.score(shared, private, user)
    items, real = scores.shape[0], targets < scores.shape[0]
    score = scores.at[targets].get(mode="fill", fill_value=jnp.nan)
    others = jnp.ones(items, bool).at[seen].set(False, mode="drop").at[targets].set(False, mode="drop")
    full = ranking(score, real, scores, others)

    def drawn(ids):
        args = score, real, scores.at[ids].get(mode="fill", fill_value=0), ids < items
        return ranking(*args) | classification(*args)

    by_draw = jax.vmap(drawn)(sampled)
    return {f"full/{k}": v for k, v in full.items()} | {f"sampled/{k}": v for k, v in by_draw.items()}


def examiner(model: Model, channel: Channel) -> Callable[[Tree, Tree, Exam, Key], dict[str, Mean]]:
    """Builds run(shared, private, exam, key) -> {metric: Mean [DECILES] or [DRAWS, DECILES]}.

    `private` is the client store of the model's private part [clients, ...]; results come through `channel`. Raises
    ValueError for a channel with a reduction of its own.
    """
    if channel.reduce not in (None, total):
        raise ValueError("evaluation.channel: figures are sums, a link with a reduction of its own cannot be used")

    @jax.jit
    def look(shared, private, asked):
        """Each client's sums over some of its users."""

        def client(client, asked):
            mine = jax.tree.map(lambda x: x.at[client].get(mode="fill", fill_value=0), private)
            users = asked.user, asked.targets, asked.seen, asked.sampled
            each = jax.vmap(lambda *one: answer(model, shared, mine, *one))(*users)
            return jax.tree.map(lambda x: x.sum(0), each)

        return jax.vmap(client)(asked.client, asked)

    @jax.jit
    def hear(sums, client, activity, decile, here, cohort, key):
        """(the sum of some clients' messages, the state of the links before the round)."""

        def encode(sums, client, activity, decile):
            spread = jax.nn.one_hot(decile, DECILES)  # the place of the client's decile
            message = jax.tree.map(lambda x: jnp.multiply.outer(x, spread), sums)
            state, memory = channel.init(message)
            secret = jax.random.fold_in(jax.random.fold_in(key, 1), client)
            none = jnp.zeros(0, jnp.int32)
            me = Client(memory, secret, key, client, jnp.float32(1), activity, none, 0, cohort)
            return channel.encode(message, channel.send(state), me)[0], state

        messages, states = jax.vmap(encode)(sums, client, activity, decile)
        kept = jax.tree.map(lambda x: jnp.where(here.reshape((-1,) + (1,) * (x.ndim - 1)), x, 0), messages)
        heard = jax.tree.map(lambda x: jnp.sum(x, 0, dtype=x.dtype), kept)
        return heard, jax.tree.map(lambda x: x[0], states)

    @jax.jit
    def close(heard, state, cohort, key):
        """What the server reads out of the sum."""
        return channel.decode(heard, state, Round(key, cohort, jnp.ones(cohort.shape, bool)))[0]

    def add(a, b):
        return jax.tree.map(jnp.add, a, b)

    def run(shared, private, exam, key):
        heard = None
        for group in questions(exam):
            sums = functools.reduce(add, (look(shared, private, asked) for asked in group))
            one = group[0]
            here = one.client < exam.population.num_clients
            part, state = hear(sums, one.client, one.activity, one.decile, here, exam.who, key)
            heard = part if heard is None else add(heard, part)
        return close(heard, state, exam.who, key)

    return run


def readable(part: str, sums: dict[str, Mean]) -> dict[str, float]:
    """Flat metrics by their run-file names: `test/full/hr@10`, `test/sampled/hr@10` (mean of the draws) and
    `test/sampled/hr@10_sd`; hr@10 and ndcg@10 also per activity decile, `.../decile_1` the least active clients."""
    out = {}
    for name, mean in sums.items():
        total, weight = np.asarray(mean.total, np.float64), np.asarray(mean.weight, np.float64)
        value = total.sum(-1) / np.maximum(weight.sum(-1), 1e-9)
        out[f"{part}/{name}"] = float(value.mean())
        if value.ndim:
            out[f"{part}/{name}_sd"] = float(value.std(ddof=1))
        if name.endswith(("hr@10", "ndcg@10")):
            each = (total / np.maximum(weight, 1e-9)).reshape(-1, DECILES).mean(0)
            some = weight.reshape(-1, DECILES).sum(0) > 0
            out |= {f"{part}/{name}/decile_{i + 1}": float(each[i]) for i in np.flatnonzero(some)}
    return out
