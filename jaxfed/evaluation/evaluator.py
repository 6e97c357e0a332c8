"""Evaluation: rank the whole catalogue and 99 sampled items for every user, in chunks of clients; where rows have
labels, predict those of the held-out ones.

Each client sums the metrics of its users; the sums go through a channel of their own, so the same code is the server's
evaluation (a plain sum) and the clients' (whatever links a deployment puts there).
"""

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfed.core.aggregate import SUM
from jaxfed.core.client_store import on_host, read_clients
from jaxfed.core.link import Channel, broadcast_state, decode_total, encode_message
from jaxfed.core.model import Model, with_frozen
from jaxfed.core.placement import Placement, make_placement, one_in_flight
from jaxfed.core.streams import CLIENTS
from jaxfed.core.tables import num_rows
from jaxfed.core.types import Array, ClientView, History, Key, Mean, RoundView, Tree
from jaxfed.data.population import Label
from jaxfed.evaluation.metrics import (
    CUTOFFS,
    LABELLED,
    classification_metrics,
    exposure_at_k,
    finalize_metric,
    ranking_metrics,
)
from jaxfed.evaluation.split import DECILES, EvalBatch, EvalSplit, iterate_users, make_eval_batches

BY_DECILE = ("hr@10", "ndcg@10", "rating/rmse", "click/log_loss")


def predict_scores(
    model: Model, shared: Tree, private: Tree, user: Array, history: Array, features: Array, times: Array
) -> jax.Array:
    """float [N]: one user's scores of all items; with a history [H], of a private part that is made of it. times
    [H + 1]: see `History`; [0]: unknown."""
    known = (features,) if model.features else ()
    if history.shape[0]:
        assert model.fold_in
        past = History(history, history, num_rows(shared), times if times.shape[0] else None)
        user, private = jnp.int32(0), model.fold_in(shared, past, *known)
    return model.score(shared, private, user, *known)


def user_metrics(
    model: Model,
    shared: Tree,
    private: Tree,
    promoted: np.ndarray,
    user: jax.Array,
    targets,
    masked,
    history,
    sampled,
    labels,
    user_features,
    times,
    label: Label = "implicit",
    cutoffs: tuple[int, ...] = CUTOFFS,
) -> dict[str, Mean]:
    """Metrics of one user: `full/...` scalars, `full/er@k` [promoted] if any are, `sampled/...` [draws] if there are
    candidates; where rows have labels, `rating/...` or `click/...` scalars in place of ranks."""
    scores = predict_scores(model, shared, private, user, history, user_features, times)
    items, real = scores.shape[0], targets < scores.shape[0]
    score = scores.at[targets].get(mode="fill", fill_value=jnp.nan)
    ranked = jnp.ones(items, bool).at[masked].set(False, mode="drop")
    others = ranked.at[targets].set(False, mode="drop")
    full = {} if label in LABELLED else ranking_metrics(score, real, scores, others, cutoffs)
    if len(promoted):
        full |= exposure_at_k(scores, ranked, jnp.array(promoted), others[promoted] & real.any(), cutoffs)
    if label in LABELLED:
        each = LABELLED[label](score, labels, real)
        return {f"full/{k}": v for k, v in full.items()} | {f"{label}/{k}": v for k, v in each.items()}

    def sampled_metrics(ids):
        args = score, real, scores.at[ids].get(mode="fill", fill_value=0), ids < items
        return ranking_metrics(*args, cutoffs) | classification_metrics(*args)

    by_draw = jax.vmap(sampled_metrics)(sampled) if sampled.shape[-1] else {}
    return {f"full/{k}": v for k, v in full.items()} | {f"sampled/{k}": v for k, v in by_draw.items()}


View = Callable[[Tree, Tree], tuple[Tree, Tree]]


def make_client_metrics(
    model: Model, promoted: np.ndarray, views: dict[str, View], cutoffs: tuple[int, ...]
) -> Callable[..., dict[str, Mean]]:
    """Builds look(shared, private, frozen, batch, own, label) -> {metric: Mean [m, U, ...]}: the metrics of each of
    some clients' users, by each view.

    own: the clients' private parts [m, ...]; None: they are read from `private`.
    """

    def look(shared, private, frozen, batch, own, label):
        if own is None:
            own = jax.tree.map(lambda x: x.at[batch.client].get(mode="fill", fill_value=0), private)

        def client(own, batch):
            users = batch[EvalBatch._fields.index("user") :]
            found: dict[str, Mean] = {}
            for name, view in views.items():
                params, part = view(shared, own)
                known = model, with_frozen(params, frozen), part, promoted
                metrics_of_user = partial(user_metrics, *known, label=label, cutoffs=cutoffs)
                each = jax.vmap(lambda *one, metrics_of_user=metrics_of_user: metrics_of_user(*one))(*users)
                found |= {f"{name}/{metric}".lstrip("/"): value for metric, value in each.items()}
            return found

        return jax.vmap(client)(own, batch)

    return look


class ClientSums(NamedTuple):
    """The metrics of m clients, each summed over its users, and what a client says with them."""

    sums: dict[str, Mean]  # [m, ...]
    client: jax.Array  # int [m]
    num_train: jax.Array  # float [m]
    decile: jax.Array  # int [m]


def make_client_sums(
    model: Model,
    place_on: Placement,
    promoted: np.ndarray,
    views: dict[str, View],
    cutoffs: tuple[int, ...],
) -> Callable[..., ClientSums]:
    """Builds look(shared, private, frozen, batch, own, label): what clients compute of some users, on all devices; see
    `make_client_metrics`."""
    metrics, devices = make_client_metrics(model, promoted, views, cutoffs), place_on.devices

    @partial(one_in_flight, devices=devices)
    @partial(jax.jit, static_argnums=5)
    def look(shared, private, frozen, batch, own, label):
        found = metrics(shared, private, frozen, batch, own, label)
        sums = jax.tree.map(lambda x: x.sum(1), found)
        return place_on.constrain(ClientSums(sums, batch.client, batch.num_train, batch.decile), "copied")

    return look


def make_user_evaluator(
    model: Model, placement: Placement | None = None, view: View | None = None, cutoffs: tuple[int, ...] = CUTOFFS
) -> Callable[[Tree, Tree, EvalSplit], dict[str, Mean]]:
    """Builds run(shared, private, exam) -> {metric: Mean [U] or [U, draws]}: the metrics of each user of the split, as
    NumPy arrays. No channel is between: only a simulation sees them.

    view: whose model is scored; None: the server's. The other arguments are those of `make_evaluator`.
    """
    place_on, views = placement or make_placement(), {"": view or (lambda *parts: parts)}
    metrics = make_client_metrics(model, np.zeros(0, np.int32), views, cutoffs)
    look, frozen = jax.jit(metrics, static_argnums=5), place_on.constrain(model.frozen, "server")

    def run(shared, private, exam):
        store, private = (private, ()) if on_host(private) else (None, private)
        users = int(exam.first[-1])
        found: dict[str, Mean] = {}
        for group, (_, blocks) in zip(make_eval_batches(exam), iterate_users(exam), strict=True):
            own = None if store is None else place_on.block(read_clients(store, group[0].client))
            for batch, user in zip(group, blocks, strict=True):
                each = jax.device_get(look(shared, private, frozen, place_on.block(batch), own, exam.label))
                found = found or jax.tree.map(lambda x: np.zeros((users, *x.shape[2:]), x.dtype), each)
                jax.tree.map(lambda x, y, at=user: put_users(x, y, at), found, each)
        return found

    return run


def put_users(whole: np.ndarray, some: np.ndarray, user: np.ndarray) -> None:
    """Writes the values of some users [m, U, ...] into those of all [users, ...]; past the end is nobody."""
    real = user < len(whole)
    whole[user[real]] = some[real]


def make_message_sum(channel: Channel, devices: int) -> Callable[..., tuple[Tree, Tree]]:
    """Builds add(clients, end, cohort, key) -> (the sum of some clients' messages, the state of the links before the
    round). end: from this number on a client is nobody."""

    @partial(one_in_flight, devices=devices)
    @jax.jit
    def hear(clients, end, cohort, key):
        def encode(sums, client, num_train, decile):
            spread = jax.nn.one_hot(decile, DECILES)  # the place of the client's decile
            message = jax.tree.map(lambda x: jnp.multiply.outer(x, spread), sums)
            state, link_state = channel.init(message)
            secret = jax.random.fold_in(jax.random.fold_in(key, CLIENTS), client)
            rows = jnp.zeros(0, jnp.int32)
            view = ClientView(link_state, secret, key, client, jnp.float32(1), num_train, rows, 0, cohort)
            return encode_message(channel, message, broadcast_state(channel, state), view)[0], state

        messages, states = jax.vmap(encode)(*clients)
        counts = clients.client < end
        kept = jax.tree.map(lambda x: jnp.where(counts.reshape((-1,) + (1,) * (x.ndim - 1)), x, 0), messages)
        total = jax.tree.map(lambda x: jnp.sum(x, 0, dtype=x.dtype), kept)
        return total, jax.tree.map(lambda x: x[0], states)

    return hear


def make_evaluator(
    model: Model,
    channel: Channel,
    placement: Placement | None = None,
    promoted: Sequence[int] = (),
    views: dict[str, View] | None = None,
    cutoffs: tuple[int, ...] = CUTOFFS,
) -> Callable[[Tree, Tree, EvalSplit, Key], dict[str, Mean]]:
    """Builds run(shared, private, exam, key) -> {metric: Mean [DECILES], [draws, DECILES] or [promoted, DECILES]}.

    `private` is the client store of the model's private part [clients, ...]; results come through `channel`. promoted:
    items whose exposure is asked for. views: see `ClientWork`; figures of another one than "" begin with its name.
    cutoffs: the k of hr@k, ndcg@k, ...
    Raises ValueError for a channel with a reduction of its own.
    """
    if channel.aggregator not in (None, SUM):
        raise ValueError("evaluation.channel: figures are sums, a link with a reduction of its own cannot be used")
    place_on, views = placement or make_placement(), views or {"": lambda *parts: parts}
    devices = place_on.devices
    client_sums = make_client_sums(model, place_on, np.array(promoted, np.int32), views, cutoffs)
    message_sum, frozen = make_message_sum(channel, devices), place_on.constrain(model.frozen, "server")

    @partial(one_in_flight, devices=devices)
    @jax.jit
    def close(total, state, cohort, key):
        """What the server reads out of the sum."""
        return decode_total(channel, total, state, RoundView(key, cohort, jnp.ones(cohort.shape, bool)))[0]

    def add(a, b):
        return jax.tree.map(jnp.add, a, b)

    def run(shared, private, exam, key):
        total, store, private = (None, private, ()) if on_host(private) else (None, None, private)
        for group in make_eval_batches(exam):
            own = None if store is None else place_on.block(read_clients(store, group[0].client))
            each = [client_sums(shared, private, frozen, place_on.block(batch), own, exam.label) for batch in group]
            clients = each[0]._replace(sums=reduce(add, (some.sums for some in each)))
            part, state = message_sum(clients, exam.num_clients, exam.cohort, key)
            total = part if total is None else add(total, part)
        return close(total, state, exam.cohort, key)

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


def flatten_user_metrics(part: str, means: dict[str, Mean]) -> dict[str, np.ndarray]:
    """Rankings of each user, by their run-file names: float [users]; of sampled figures the mean of the draws. Over the
    users with held-out items their means are the figures of `flatten_metrics`."""
    ranked = {name: mean for name, mean in means.items() if "@" in name or name.endswith(("/mrr", "/auc"))}
    totals = {name: np.asarray(mean.total, np.float64) for name, mean in ranked.items()}
    return {f"{part}/{name}": total.reshape(len(total), -1).mean(1) for name, total in totals.items()}
