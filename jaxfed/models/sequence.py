"""Recommenders of sequences: an encoder turns the latest items of a history into a user vector, whose products with
item vectors are the logits. Nothing is kept of a user: the vector is folded in from the history."""

from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxfed.core.model import Model, SequenceFormat, TimesRead
from jaxfed.core.tables import unwrap, wrap
from jaxfed.core.types import History, Key, Mean, Tree
from jaxfed.models.dropout import fold_key
from jaxfed.models.model import TableDtype, check_positive, normal_variable
from jaxfed.models.sequence_losses import Comparison, SequenceLoss, SequenceLossName, find_sequence_loss

MASK_STREAM = 1 << 20  # of a step's key: which items are masked
PAST_END = np.iinfo(np.int32).max
Targets = Literal["next", "masked"]


class SequenceEncoder(nn.Module):
    """The item vectors, and an encoder of those of a history.

    The encoder has __call__(vectors [T, d], live [T], key, masked [T]) -> [T, d]. key: of its dropout; None: there is
    none. masked: places whose vector it must replace; None: none. One that reads times is given them last, int [T + 1].
    """

    encoder: nn.Module
    num_items: int
    dim: int
    init_scale: float
    table_dtype: TableDtype
    times: TimesRead = "none"

    @nn.compact
    def __call__(
        self,
        sequence: jax.Array,
        key: jax.Array | None = None,
        masked: jax.Array | None = None,
        times: jax.Array | None = None,
    ) -> jax.Array:
        """The user vector [T, d] after each place. sequence int [T]: positions in the table, past the end: unused."""
        shape = self.num_items, self.dim
        table = normal_variable(self, "tables", "item", shape, self.init_scale, self.table_dtype)
        vectors = table.astype(jnp.float32).at[sequence].get(mode="fill", fill_value=0)
        if (times is None) != (self.times == "none"):
            raise ValueError(
                "the model reads times, and none are given" if times is None else "the model reads no times"
            )
        known = () if times is None else (times,)
        return self.encoder(vectors, sequence < table.shape[0], key, masked, *known)


def take_latest(history: History, length: int) -> jax.Array:
    """int [length]: the latest items of a history, earliest first; past the end of everything where unused."""
    places = jnp.arange(length)
    count = jnp.minimum(history.live.sum(), length)
    found = history.rows[jnp.clip(history.live.sum() - count + places, 0, history.rows.shape[0] - 1)]
    return jnp.where(places < count, found, PAST_END)


def take_latest_times(history: History, length: int) -> jax.Array | None:
    """int [length + 1]: the times of the same items and of the request after them; None where they are unknown."""
    if history.times is None:
        return None
    first = history.live.sum() - jnp.minimum(history.live.sum(), length)
    return history.times[jnp.minimum(first + jnp.arange(length + 1), history.times.shape[0] - 1)]


def normalize_vectors(vectors: jax.Array) -> jax.Array:
    """Vectors [..., d] of length 1; a vector of zeros stays one."""
    return vectors * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(vectors), -1, keepdims=True), 1e-12))


def check_sequence_model(
    dim: int, length: int, temperature: float, mask_share: float, targets: str, times: str
) -> None:
    """Raises ValueError for sizes that no model of sequences has, and for targets and times that there are none of."""
    if times not in get_args(TimesRead):
        raise ValueError(f"no times {times!r} of a model of sequences: choose one of {', '.join(get_args(TimesRead))}")
    if times != "none" and targets == "masked":
        raise ValueError('from_encoder: times are those of next items: set times to "none", or targets to "next"')
    if targets not in ("next", "masked"):
        raise ValueError(f"from_encoder: no targets {targets!r}: choose next or masked")
    check_positive("model.dim", dim)
    check_positive("model.length", length)
    if temperature < 0:
        raise ValueError(f"model.temperature is {temperature:g}: it must not be negative")
    if not 0 < mask_share <= 1:
        raise ValueError(f"model.mask_share is {mask_share:g}: it must be above 0 and at most 1")


def from_encoder(
    encoder: nn.Module,
    num_items: int,
    dim: int,
    length: int,
    loss: SequenceLoss | SequenceLossName = "sampled_softmax",
    targets: Targets = "next",
    *,
    temperature: float = 0.0,
    mask_share: float = 0.2,
    init_scale: float = 0.02,
    table_dtype: TableDtype = "float32",
    times: TimesRead = "none",
) -> Model:
    """Makes a recommender of sequences from a Flax module that encodes them.

    Args:
        encoder: A module with __call__(vectors float32 [T, d], live bool [T], key, masked bool [T] or None) -> float32
            [T, d]. Unused positions (`live` False) come last and must not change the others. For `next`, output t may
            depend on vectors 0 to t alone; for `masked`, none on the vectors at `masked`. key: for dropout; None: none.
            With `times` it has a fifth argument, int32 [T + 1], seconds: entry t is the time of vector t.
        num_items: Number of items.
        dim: Numbers in the vector of an item, and of a user.
        length: Items of a history that the encoder reads, the latest.
        loss: softmax: cross-entropy among all items, for which a client has all their vectors. sampled_softmax: an
            estimate of it from negatives. bce, gbce, bpr, and losses of one's own: see `sequence_losses`.
        targets: next: the item after each place, from those up to it. masked: items that are masked at random, from all
            others (Sun et al. 2019).
        temperature: Above 0: logits are cosines, divided by this number. 0: inner products.
        mask_share: Of masked targets: the share of items that are masked in a step.
        init_scale: Standard deviation of the normal numbers that item vectors start with.
        table_dtype: In what the server stores item vectors and clients download them.
        times: The entries of them that output t may depend on. none: it is given none. known: 0 to t. request: also
            t + 1, the time of the target, which leaks: results are marked LEAKY.

    Returns:
        The model.

    Raises:
        ValueError: a size is below 1, or there is no such loss or such times.

    Example:
        >>> class SumOfItems(nn.Module):
        ...     def __call__(self, vectors, live, key=None, masked=None):
        ...         return vectors.cumsum(0)
        >>> model = from_encoder(SumOfItems(), num_items=100, dim=8, length=20)
        >>> model.sequence.length  # twenty are read, and the item after them is a target
        21
    """
    check_sequence_model(dim, length, temperature, mask_share, targets, times)
    compare = find_sequence_loss(loss) if isinstance(loss, str) else loss
    module = SequenceEncoder(encoder, num_items, dim, init_scale, table_dtype, times)
    share = mask_share if targets == "masked" else 0.0
    loss_of_history = partial(predict_targets, module, compare.value, temperature, share)
    init = partial(init_parameters, module, length + (share > 0), times != "none")
    fold_in = partial(encode_history, module, length, share > 0)
    format = SequenceFormat(length + 1, compare.whole_catalogue, times=times)
    format = format._replace(uniform_negatives=compare.uniform_negatives)
    score = partial(score_folded_in, temperature)
    return Model(init, lambda key: (), sum_over_histories(loss_of_history), score, fold_in=fold_in, sequence=format)


def sum_over_histories(loss: Callable[[Tree, Tree, Tree], Mean]) -> Callable[[Tree, Tree, Tree], Mean]:
    """The loss of batches of one history or of several, from that of one history; see `SequenceFormat`."""

    def value(shared, private, batch):
        if batch["sequence"].ndim == 1:
            return loss(shared, private, batch)
        axes = {name: 0 if name in ("sequence", "dropout", "time") else None for name in batch}
        return jax.tree.map(jnp.sum, jax.vmap(partial(loss, shared, private), (axes,))(batch))

    return value


def make_logits(shared: Tree, vectors: jax.Array, temperature: float) -> jax.Array:
    """[T, rows]: the logits of all rows for user vectors [T, d]; see `from_encoder` of the temperature."""
    table = shared["tables"]["item"].astype(jnp.float32)
    if temperature:
        return normalize_vectors(vectors) @ normalize_vectors(table).T / temperature
    return vectors @ table.T


def score_folded_in(temperature: float, shared: Tree, private: Tree, user: jax.Array) -> jax.Array:
    """[rows]: the logits of all rows for the vector that a history gave; see `encode_history`."""
    return make_logits(unwrap(shared), private["private"]["user"][None], temperature)[0]


def predict_targets(
    module: SequenceEncoder,
    compare: Callable[[Comparison], jax.Array],
    temperature: float,
    mask_share: float,
    shared: Tree,
    private: Tree,
    batch: dict[str, jax.Array],
) -> Mean:
    """The loss over the targets of one history; see `SequenceFormat`. mask_share 0: targets are the next items."""
    shared = unwrap(shared)
    sequence, drawn = batch["sequence"], batch["negative"]
    key, rows = jax.random.wrap_key_data(batch["dropout"], impl="threefry2x32"), shared["tables"]["item"].shape[0]
    if mask_share:
        live = masked = choose_masked(sequence < rows, key, mask_share)
        vectors, target = jnp.asarray(module.apply(shared, sequence, key, masked)), sequence
    else:
        target = sequence[1:]
        live = target < rows  # the last item is only a target: as an input it would shift the positions of the others
        inputs = jnp.where(live, sequence[:-1], PAST_END)
        vectors = jnp.asarray(module.apply(shared, inputs, key, times=batch.get("time")))

    def one(logits, target):
        positive = logits.at[target].get(mode="fill", fill_value=0)
        return compare(Comparison(positive, logits, drawn.at[target].set(0, mode="drop"), batch["catalogue"]))

    each = jax.vmap(one)(make_logits(shared, vectors, temperature), target)
    mean = Mean(jnp.sum(jnp.where(live, each, 0)), jnp.sum(live, dtype=jnp.float32)).value
    # a history weighs as many as it has next items, however many of its items are masked
    weight = jnp.maximum(jnp.sum(sequence < rows, dtype=jnp.float32) - 1, 0)
    return Mean(mean * weight, weight)


def init_parameters(module: SequenceEncoder, places: int, times: bool, key: Key) -> Tree:
    """The shared parameters, the table marked. times: whether the encoder reads any."""
    made = module.init(key, jnp.zeros(places, jnp.int32), times=jnp.zeros(places + 1, jnp.int32) if times else None)
    return {"params": made.get("params", {}), "tables": wrap(made["tables"])}


def encode_history(module: SequenceEncoder, length: int, mask: bool, shared: Tree, history: History) -> Tree:
    """The private part: the user vector after the latest items of a history; zeros after none. mask: that of a masked
    place after them."""
    shared, length = unwrap(shared), min(length, max(history.rows.shape[0], 1))  # more places would only be padding
    latest, count = take_latest(history, length), jnp.minimum(history.live.sum(), length)
    if mask:
        masked = jnp.arange(length + 1) == count
        vectors = module.apply(shared, jnp.where(masked, 0, jnp.append(latest, PAST_END)), None, masked)
    else:
        vectors, count = module.apply(shared, latest, times=take_latest_times(history, length)), count - 1
    return {"private": {"user": vectors[jnp.maximum(count, 0)] * history.live.any()}}


def choose_masked(live: jax.Array, key: jax.Array, share: float) -> jax.Array:
    """bool [T]: which of the items in use are masked: each with the same chance, and the last one where none would be.

    A place has numbers of its own, whatever T is.
    """
    key = jax.random.fold_in(key, MASK_STREAM)
    chance = jax.vmap(jax.random.uniform)(fold_key(key, live.shape[0]))
    chosen = live & (chance < share)
    last = jnp.arange(live.shape[0]) == live.sum() - 1
    return jnp.where(chosen.any(), chosen, last & live)
