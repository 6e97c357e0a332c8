"""Evaluation: rank the whole catalogue and 99 sampled items for every user, in chunks of clients; where rows have
labels, predict those of the held-out ones.

Each client sums the metrics of its users; the sums go through a channel of their own, so the same code is the server's
evaluation (a plain sum) and the clients' (whatever links a deployment puts there).
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial, reduce
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfed.core.aggregate import SUM
from jaxfed.core.client_store import on_host, read_clients
from jaxfed.core.link import Channel, broadcast_state, decode_total, encode_message
from jaxfed.core.model import Model
from jaxfed.core.placement import Placement, make_placement, one_in_flight
from jaxfed.core.streams import CLIENTS, SetupStream, setup_rng
from jaxfed.core.tables import num_rows
from jaxfed.core.types import Array, ClientView, History, Key, Mean, RoundView, Tree
from jaxfed.data.batching import sample_untouched_items
from jaxfed.data.population import ALONE, SAMPLED, Label, Population, ProcessShare
from jaxfed.data.ragged import Ragged, concatenate_ranges
from jaxfed.evaluation.metrics import LABELLED, classification_metrics, exposure_at_k, finalize_metric, ranking_metrics

DRAWS = 5
DECILES = 10
BY_DECILE = ("hr@10", "ndcg@10", "rating/rmse", "click/log_loss")
Past = Literal["", "train", "all"]


class EvalBatch(NamedTuple):
    """What is asked of U users each of m clients."""

    client: np.ndarray  # int [m]: past the end: nobody
    num_train: np.ndarray  # float [m]: train interactions of each
    decile: np.ndarray  # int [m]: of the client's `num_train`, 0 the fewest
    user: np.ndarray  # int [m, U]: positions among the client's users
    targets: np.ndarray  # int [m, U, T]: held-out items; N where unused
    seen: np.ndarray  # int [m, U, L]: items left out of the ranking; N where unused
    history: np.ndarray  # int [m, U, H]: what a model may fold in, earliest first; past all ends where unused
    sampled: np.ndarray  # int [m, U, DRAWS, SAMPLED]: candidates beside the targets; N where a user has fewer
    labels: np.ndarray  # float [m, U, T]: of the targets; [m, U, 0] where every row is a click
    about: np.ndarray  # int [m, U, F]: features of the users; [m, U, 0] where the model reads none


class EvalSplit(NamedTuple):
    """A split to be evaluated on: A clients, their U users numbered client by client, and what each is asked.

    Of several processes each has its own clients here, and all have the same shapes and number of chunks.
    """

    num_items: int
    num_clients: int
    who: np.ndarray  # int32 [A]: clients
    first: np.ndarray  # int64 [A + 1]: the users of each
    num_train: np.ndarray  # float32 [A]
    decile: np.ndarray  # int64 [A]: among all clients
    targets: Ragged  # held-out items of each user
    seen: Ragged  # items left out of the ranking
    history: Ragged  # what a model may fold in; empty where it need not
    sampled: np.ndarray  # int32 [U, DRAWS, SAMPLED]
    labels: Ragged  # of the held-out items; empty where every row is a click
    about: np.ndarray  # int32 [U, F]: features of the users; [U, 0] where the model reads none
    clients: int  # at a time
    users: int  # of each client at a time
    cohort: np.ndarray  # int32: the clients of all processes
    chunks: int  # of clients
    most: tuple[int, int, int, int]  # users of a client, held-out items, items left out and history of a user
    label: Label = "implicit"


def concatenate_ragged(*lists: Ragged) -> Ragged:
    """Joins lists of the same users, user by user."""
    users = [np.repeat(np.arange(len(each.counts)), each.counts) for each in lists]
    order = np.argsort(np.concatenate(users), kind="stable")
    counts = np.sum([each.counts for each in lists], 0)
    values = np.concatenate([each.values for each in lists])[order]
    return Ragged(values, np.concatenate([[0], np.cumsum(counts)]))


def make_eval_split(
    population: Population,
    part: str,
    seed: int = 0,
    most: int = 0,
    devices: int = 1,
    share: ProcessShare = ALONE,
    budget: int = 1 << 22,
    history: Past = "",
    features: tuple[str, ...] = (),
) -> EvalSplit:
    """part: `val` (train items are left out of the ranking) or `test` (train and validation items are).

    most: so many clients are asked, drawn by the seed; 0: all. devices: over which a chunk of clients is spread.
    history: what a model folds in of its users (see `Model.fold_in`): their `train` items; `all` that are left out of
    the ranking, for a test the validation items too; or nothing. features: the sides that the model reads.
    budget: scores and histories [clients, users, N + longest] held at a time: memory does not grow with the population.
    """
    if part not in ("val", "test"):
        raise ValueError(f"no part {part!r}: choose val or test")
    cohort = np.arange(population.num_clients, dtype=np.int32)
    if 0 < most < len(cohort):
        cohort = np.sort(setup_rng(seed, SetupStream.EVALUATED_CLIENTS).choice(cohort, most, replace=False))
    longest = longest_lengths(population, part, cohort, history)
    users = min(longest[0], 64)
    each = users * (population.num_items + sum(longest[1:]))
    clients = int(np.clip(budget // each, 1, min(len(cohort), 256)))
    clients = max(clients // devices, 1) * devices // share.size
    owner = share.owner(cohort, population.num_clients)
    chunks = -(-int(np.bincount(owner).max()) // clients)

    who = cohort[owner == share.rank]
    count = population.client_offsets[who + 1] - population.client_offsets[who]
    asked = concatenate_ranges(population.client_offsets[who], count)
    train, valid, test = (each.some(asked) for each in (population.train, population.valid, population.test))
    targets, seen = (valid, train) if part == "val" else (test, concatenate_ragged(train, valid))
    past = {"": empty_lists(len(asked)), "train": train, "all": seen}[history]
    known, labels = population.labels, empty_lists(len(asked), np.float32)
    if known:
        held, of = (population.valid, known.valid) if part == "val" else (population.test, known.test)
        labels = Ragged(of, held.start).some(asked)
    if population.domains:
        seen = concatenate_ragged(seen, other_domains_items(population, asked))
    edges = np.quantile(population.num_train, np.arange(1, DECILES) / DECILES)
    num_train = population.num_train[who]
    return EvalSplit(
        population.num_items,
        population.num_clients,
        who,
        np.concatenate([[0], np.cumsum(count)]),
        num_train.astype(np.float32),
        np.searchsorted(edges, num_train, "right"),
        targets,
        seen,
        past,
        np.zeros((len(asked), DRAWS, 0), np.int32)
        if known
        else sample_untouched_items(population, asked, DRAWS, SAMPLED, seed),
        labels,
        user_feature_rows(population, features, asked),
        clients,
        users,
        cohort,
        chunks,
        longest,
        known.kind if known else "implicit",
    )


def other_domains_items(population: Population, users: np.ndarray) -> Ragged:
    """The items of other domains than each user's own: nothing to recommend to that user."""
    begin, size = population.span(users)
    assert population.domains
    rest = population.num_items - size
    at = concatenate_ranges(begin + size, rest) % population.num_items
    return Ragged(population.domains.items[at], np.concatenate([[0], np.cumsum(rest)]))


def map_to_homes(asked: EvalSplit, population: Population) -> EvalSplit:
    """The same questions, each put to the client that holds the private part of who is asked: the first device."""
    homes = population.homes
    return asked._replace(num_clients=population.num_clients, who=homes[asked.who], cohort=homes[asked.cohort])


def empty_lists(users: int, dtype: type = np.int32) -> Ragged:
    """An empty list for each of so many users."""
    return Ragged(np.zeros(0, dtype), np.zeros(users + 1, np.int64))


def user_feature_rows(population: Population, features: tuple[str, ...], users: np.ndarray) -> np.ndarray:
    """int32 [..., F]: the features of users, as far as a model reads those (see `Model.features`); else [..., 0]."""
    if "user" in features and population.user_features:
        return population.user_features.rows(users)
    return np.zeros((*np.shape(users), 0), np.int32)


def longest_lengths(population: Population, part: str, clients: np.ndarray, history: Past) -> tuple[int, int, int, int]:
    """The most users of a client, held-out items of a user, items left out and history: lengths that all processes
    know."""
    count = population.client_offsets[clients + 1] - population.client_offsets[clients]
    users = concatenate_ranges(population.client_offsets[clients], count)
    train, valid, test = (each.counts[users] for each in (population.train, population.valid, population.test))
    targets, seen = (valid, train) if part == "val" else (test, train + valid)
    past = {"": 0, "train": train.max(), "all": seen.max()}[history]
    away = population.num_items - population.span(users)[1]
    return int(count.max()), int(targets.max()), int((seen + away).max()), int(past)


def make_eval_batches(of: EvalSplit) -> Iterator[list[EvalBatch]]:
    """Those asked, in chunks of one shape: for each group of clients the blocks of their users."""
    items, none, longest = of.num_items, int(of.first[-1]), of.most[0]
    past = np.iinfo(np.int32).max  # tables may have more rows than there are items
    every = of.targets, of.seen, of.history, of.labels
    lists = [Ragged(each.values, np.append(each.start, each.start[-1])) for each in every]
    fills, wide = (items, items, past, 0), (*of.most[1:], 0 if of.label == "implicit" else of.most[1])
    # after the last client comes nobody, without users, and after the last user one without lists
    who, first = np.append(of.who, np.int32(of.num_clients)), np.append(of.first, none)
    num_train, decile = np.append(of.num_train, np.float32(0)), np.append(of.decile, 0)
    drawn = np.concatenate([of.sampled, np.full((1, *of.sampled.shape[1:]), items, np.int32)])
    known = np.concatenate([of.about, of.about[:1] if len(of.about) else np.zeros((1, of.about.shape[1]), np.int32)])
    for low in range(0, of.chunks * of.clients, of.clients):
        at = np.minimum(np.arange(low, low + of.clients), len(of.who))
        group = []
        for start in range(0, longest, of.users):
            local = np.broadcast_to(start + np.arange(of.users), (of.clients, of.users))
            user = first[at][:, None] + local
            user = np.where(user < first[at + 1][:, None], user, none)
            targets, seen, history, labels = (
                each.padded(user.ravel(), fill, width).reshape(*user.shape, width)
                for each, fill, width in zip(lists, fills, wide, strict=True)
            )
            local = np.minimum(local, longest - 1).astype(np.int32)
            asked = who[at], num_train[at], decile[at], local, targets, seen, history, drawn[user], labels, known[user]
            group.append(EvalBatch(*asked))
        yield group


def predict_scores(model: Model, shared: Tree, private: Tree, user: Array, history: Array, about: Array) -> jax.Array:
    """float [N]: one user's scores of all items; with a history [H], of a private part that is made of it."""
    known = (about,) if model.features else ()
    if history.shape[0]:
        assert model.fold_in
        user, private = jnp.int32(0), model.fold_in(shared, History(history, history, num_rows(shared)), *known)
    return model.score(shared, private, user, *known)


def user_metrics(
    model: Model,
    shared: Tree,
    private: Tree,
    promoted: np.ndarray,
    user: jax.Array,
    targets,
    seen,
    history,
    sampled,
    labels,
    about,
    label: Label = "implicit",
) -> dict[str, Mean]:
    """Metrics of one user: `full/...` scalars, `full/er@k` [promoted] if any are, `sampled/...` [DRAWS]; where rows
    have labels, `rating/...` or `click/...` scalars in place of ranks."""
    scores = predict_scores(model, shared, private, user, history, about)
    items, real = scores.shape[0], targets < scores.shape[0]
    score = scores.at[targets].get(mode="fill", fill_value=jnp.nan)
    unseen = jnp.ones(items, bool).at[seen].set(False, mode="drop")
    others = unseen.at[targets].set(False, mode="drop")
    full = {} if label in LABELLED else ranking_metrics(score, real, scores, others)
    if len(promoted):
        full |= exposure_at_k(scores, unseen, jnp.array(promoted), others[promoted] & real.any())
    if label in LABELLED:
        each = LABELLED[label](score, labels, real)
        return {f"full/{k}": v for k, v in full.items()} | {f"{label}/{k}": v for k, v in each.items()}

    def drawn(ids):
        args = score, real, scores.at[ids].get(mode="fill", fill_value=0), ids < items
        return ranking_metrics(*args) | classification_metrics(*args)

    by_draw = jax.vmap(drawn)(sampled)
    return {f"full/{k}": v for k, v in full.items()} | {f"sampled/{k}": v for k, v in by_draw.items()}


def make_evaluator(
    model: Model,
    channel: Channel,
    placement: Placement | None = None,
    promoted: Sequence[int] = (),
    views: dict[str, Callable[[Tree, Tree], tuple[Tree, Tree]]] | None = None,
) -> Callable[[Tree, Tree, EvalSplit, Key], dict[str, Mean]]:
    """Builds run(shared, private, exam, key) -> {metric: Mean [DECILES], [DRAWS, DECILES] or [promoted, DECILES]}.

    `private` is the client store of the model's private part [clients, ...]; results come through `channel`. promoted:
    items whose exposure is asked for. views: see `ClientWork`; figures of another one than "" begin with its name.
    Raises ValueError for a channel with a reduction of its own.
    """
    place_on, attacked = placement or make_placement(), np.array(promoted, np.int32)
    if channel.aggregator not in (None, SUM):
        raise ValueError("evaluation.channel: figures are sums, a link with a reduction of its own cannot be used")

    @one_in_flight
    @partial(jax.jit, static_argnums=4)
    def look(shared, private, asked, mine, label):
        """(each client's sums over some of its users, who they are, their num_train, their decile), on all devices.
        mine: the clients' private parts [m, ...]; None: they are read here."""
        if mine is None:
            mine = jax.tree.map(lambda x: x.at[asked.client].get(mode="fill", fill_value=0), private)

        def client(mine, asked):
            users = asked[EvalBatch._fields.index("user") :]
            found: dict[str, Mean] = {}
            for name, view in (views or {"": lambda *parts: parts}).items():
                parts = view(shared, mine)
                ask = partial(user_metrics, model, *parts, attacked, label=label)
                each = jax.vmap(lambda *one, ask=ask: ask(*one))(*users)
                found |= {f"{name}/{metric}".lstrip("/"): value for metric, value in each.items()}
            return jax.tree.map(lambda x: x.sum(0), found)

        return place_on.together((jax.vmap(client)(mine, asked), asked.client, asked.num_train, asked.decile))

    @one_in_flight
    @jax.jit
    def hear(sums, client, num_train, decile, end, cohort, key):
        """(the sum of some clients' messages, the state of the links before the round)."""

        def encode(sums, client, num_train, decile):
            spread = jax.nn.one_hot(decile, DECILES)  # the place of the client's decile
            message = jax.tree.map(lambda x: jnp.multiply.outer(x, spread), sums)
            state, memory = channel.init(message)
            secret = jax.random.fold_in(jax.random.fold_in(key, CLIENTS), client)
            none = jnp.zeros(0, jnp.int32)
            me = ClientView(memory, secret, key, client, jnp.float32(1), num_train, none, 0, cohort)
            return encode_message(channel, message, broadcast_state(channel, state), me)[0], state

        messages, states = jax.vmap(encode)(sums, client, num_train, decile)
        here = client < end
        kept = jax.tree.map(lambda x: jnp.where(here.reshape((-1,) + (1,) * (x.ndim - 1)), x, 0), messages)
        heard = jax.tree.map(lambda x: jnp.sum(x, 0, dtype=x.dtype), kept)
        return heard, jax.tree.map(lambda x: x[0], states)

    @one_in_flight
    @jax.jit
    def close(heard, state, cohort, key):
        """What the server reads out of the sum."""
        return decode_total(channel, heard, state, RoundView(key, cohort, jnp.ones(cohort.shape, bool)))[0]

    def add(a, b):
        return jax.tree.map(jnp.add, a, b)

    def run(shared, private, exam, key):
        heard, store, private = (None, private, ()) if on_host(private) else (None, None, private)
        for group in make_eval_batches(exam):
            mine = None if store is None else place_on.block(read_clients(store, group[0].client))
            each = [look(shared, private, place_on.block(asked), mine, exam.label) for asked in group]
            sums = reduce(add, (sums for sums, *_ in each))
            part, state = hear(sums, *each[0][1:], exam.num_clients, exam.cohort, key)
            heard = part if heard is None else add(heard, part)
        return close(heard, state, exam.cohort, key)

    return run


def flatten_metrics(part: str, sums: dict[str, Mean]) -> dict[str, float]:
    """Flat metrics by their run-file names: `test/full/hr@10`, `test/sampled/hr@10` (mean of the draws) and
    `test/sampled/hr@10_sd`, `test/full/er@10` (mean of the promoted items); `BY_DECILE` also per activity decile,
    `.../decile_1` the least active clients."""
    out = {}
    for name, mean in sums.items():
        total, weight = np.asarray(mean.total, np.float64), np.asarray(mean.weight, np.float64)
        value = finalize_metric(name, total.sum(-1) / np.maximum(weight.sum(-1), 1e-9))
        out[f"{part}/{name}"] = float(value.mean())
        if value.size > 1:
            out[f"{part}/{name}_sd"] = float(value.std(ddof=1))
        if name.endswith(BY_DECILE):
            each = finalize_metric(name, total / np.maximum(weight, 1e-9)).reshape(-1, DECILES).mean(0)
            some = weight.reshape(-1, DECILES).sum(0) > 0
            out |= {f"{part}/{name}/decile_{i + 1}": float(each[i]) for i in np.flatnonzero(some)}
    return out
