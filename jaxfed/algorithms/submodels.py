"""Sub-models: each client trains a share of every width of the model.

Sub-models are simulated: each client has the whole model in memory, and what lies outside of its sub-model is masked,
so that one program serves all. What is counted as sent is the sub-model.
"""

import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxfed.algorithms.local_training import local_steps
from jaxfed.channels.average import coordinate_mean
from jaxfed.core.client_work import Batches, ClientWork
from jaxfed.core.leaf_paths import list_leaves
from jaxfed.core.method import Method, Submodels
from jaxfed.core.model import Model
from jaxfed.core.streams import SetupStream, setup_rng
from jaxfed.core.tables import unwrap
from jaxfed.core.types import Broadcast, ClientOutput, Key, Tree

Axes = tuple[tuple[int, ...], ...]  # of each axis of a leaf: the widths that lie end to end along it; (): it is not cut


class SubmodelMember(NamedTuple):
    """A client's state: the model's private part, and which of the rates it has."""

    private: Tree
    group: jax.Array  # int []


def count_units(rate: float, width: int) -> int:
    """How many units of a width a client of a rate trains."""
    return math.ceil(round(rate * width, 6))


def find_axes(path: str, shape: tuple[int, ...], product: int) -> Axes:
    """The axes of a shared leaf of `mf`, `pfedrec`, `neumf` or `two_tower`.

    Args:
        path: as "params/item_half/kernel".
        product: width of the vectors that the output of `neumf` reads before the network's last layer.

    Raises:
        ValueError: a leaf of another model.
    """
    if path.startswith("tables/") and len(shape) <= 2:
        return ((), shape[1:]) if len(shape) == 2 else ((),)
    if path == "params/output/kernel":
        return ((product, shape[0] - product), ())
    if path == "params/output/bias" or path == "params/offset":
        return ((),) * len(shape)
    if re.fullmatch(r"params/(user|item)_features", path):
        return ((), shape[1:])
    if re.fullmatch(r"params/((user|item)_(half|output|\d+)|hidden_\d+)/(kernel|bias)", path):
        return tuple((size,) for size in shape)
    raise ValueError(
        f"nobody knows the widths of {path}, so that clients cannot train parts of it: take mf, pfedrec, "
        "neumf or two_tower"
    )


def list_axes(params: Tree) -> list[Axes]:
    """The axes of every leaf of the shared parameters, in order. Raises ValueError for a model without known widths."""
    named_leaves = list_leaves(unwrap(params)).items()
    product = next((leaf.shape[1] for path, leaf in named_leaves if path == "tables/item_product"), 0)
    axes = [find_axes(path, leaf.shape, product) for path, leaf in named_leaves]
    if not any(widths for each in axes for widths in each):
        raise ValueError("the model has no widths to cut: take the model mf, pfedrec, neumf or two_tower")
    return axes


def mark_held_units(rates: Sequence[float], widths: tuple[int, ...], shift: Any) -> jax.Array:
    """bool [rates, sum of widths]: which units each rate holds: of each width d the first ceil(rate d) from `shift`
    on, modulo d."""
    held = [
        (jnp.arange(width) - shift) % width < jnp.array([[count_units(rate, width)] for rate in rates])
        for width in widths
    ]
    return jnp.concatenate(held, 1)


def mark_held_coordinates(rates: Sequence[float], rolls: bool, params: Tree, round: Any) -> Tree:
    """Of each leaf, bool [rates, ...]: which coordinates clients of each rate hold in a round; of a table, of a row."""
    tables = jax.tree.leaves(jax.tree_util.tree_map_with_path(lambda path, x: "tables" in str(path[0]), params))
    masks = []
    for leaf, axes, in_table in zip(jax.tree.leaves(params), list_axes(params), tables, strict=True):
        mask = jnp.ones(len(rates), bool)
        for size, widths in list(zip(leaf.shape, axes, strict=True))[in_table:]:
            held = (
                mark_held_units(rates, widths, round if rolls else 0) if widths else jnp.ones((len(rates), size), bool)
            )
            mask = mask[..., None] & held.reshape(len(rates), *[1] * (mask.ndim - 1), size)
        masks.append(mask)
    return jax.tree.unflatten(jax.tree.structure(params), masks)


def cut_shapes(rates: Sequence[float], group: int, broadcast: Broadcast) -> Broadcast:
    """Shapes of what clients of a group are sent."""

    def cut(leaf, axes):
        sizes = zip(leaf.shape, axes, strict=True)
        kept = (sum(count_units(rates[group], width) for width in widths) if widths else size for size, widths in sizes)
        return jax.ShapeDtypeStruct(tuple(kept), leaf.dtype)

    leaves, structure = jax.tree.flatten(broadcast.params)
    cut_leaves = map(cut, leaves, list_axes(broadcast.params))
    return broadcast._replace(params=jax.tree.unflatten(structure, cut_leaves))


def mask_private(private: Tree, rates: Sequence[float], group: jax.Array, shift: Any) -> Tree:
    """The private part, zero in the units of users' vectors that the group does not hold."""

    def mask(x):
        return jnp.where(mark_held_units(rates, x.shape[-1:], shift)[group], x, 0) if x.ndim == 2 else x

    return jax.tree.map(mask, private)


def train_submodel(
    model: Model,
    client_optimizer: optax.GradientTransformation,
    by_row: bool,
    rates: tuple[float, ...],
    rolls: bool,
    scales: bool,
    shared: Broadcast,
    member: SubmodelMember,
    steps: Batches,
    key: Key,
) -> ClientOutput:
    """Local steps of the sub-model that a client holds; the rest is not trained. scales: whether the output of a layer
    is divided by the rate."""
    rate, shift = jnp.array(rates)[member.group], shared.extra if rolls else 0
    held = jax.tree.map(lambda x: x[member.group], mark_held_coordinates(rates, rolls, shared.params, shift))
    structure = jax.tree.structure(unwrap(shared.params))
    widens = jax.tree.unflatten(structure, [bool(axes and axes[-1]) for axes in list_axes(shared.params)])

    def cut(x, held, wide):
        return jnp.where(held, x, 0) / rate if wide and scales else jnp.where(held, x, 0)

    def loss(params, private, batch):
        whole = {name: params[name] for name in shared.params}
        part = jax.tree.map(cut, whole, unwrap(held), widens)
        return model.loss({**params, **part}, mask_private(private, rates, member.group, shift), batch)

    work = local_steps(model._replace(loss=loss), client_optimizer, by_row)
    report = work.update(Broadcast(shared.params), member.private, steps, key)
    part = jax.tree.map(lambda x, held: jnp.where(held, x, 0), report.update.params, held)
    ones = jax.tree.map(lambda x: jnp.ones_like(x, bool), member.private)
    own = mask_private(ones, rates, member.group, shift)
    private = jax.tree.map(lambda new, old, own: jnp.where(own, new, old), report.client_state, member.private, own)
    member, update = member._replace(private=private), Broadcast(part, jax.nn.one_hot(member.group, len(rates)))
    return report._replace(update=update, client_state=member)


def make_submodel_work(
    model: Model,
    client_optimizer: optax.GradientTransformation,
    by_row: bool,
    rates: tuple[float, ...],
    rolls: bool,
    scales: bool = True,
) -> ClientWork:
    """Local steps of the sub-model that a client holds, see `train_submodel`."""

    def init(params, key):
        list_axes(params)
        private = model.private(key)
        if jax.tree.leaves(private.get("private_tables", ())):
            raise ValueError(
                "the model keeps tables on clients, which cannot be cut: take mf, pfedrec, neumf or two_tower"
            )
        return Broadcast(params, jnp.int32(0) if rolls else ()), SubmodelMember(private, jnp.int32(0))

    def train_whole(shared, member, steps, key):
        train = local_steps(model, client_optimizer, by_row).update
        report = train(Broadcast(shared.params), member.private, steps, key)
        return report._replace(client_state=member._replace(private=report.client_state))

    def update(shared, member, steps, key):
        return train_submodel(model, client_optimizer, by_row, rates, rolls, scales, shared, member, steps, key)

    def view(params, member):
        return params, member.private if rolls else mask_private(member.private, rates, member.group, 0)

    if rates == (1.0,):  # masks would change the last bits
        return ClientWork(init, train_whole, lambda sent: sent._replace(extra=()), {"": view})
    return ClientWork(init, update, lambda sent: sent._replace(extra=jnp.zeros(len(rates))), {"": view})


def check_rates(rates: Sequence[float]) -> None:
    """Raises ValueError where rates are missing or not from above 0 to 1."""
    if not rates or not all(0 < rate <= 1 for rate in rates):
        raise ValueError(f"rates are {', '.join(map(str, rates)) or 'missing'}: set each above 0, up to 1")


def draw_groups(rates: Sequence[float], seed: int, num_clients: int) -> np.ndarray:
    """int [clients]: which of the rates each client has, drawn at random. See `check_rates`."""
    check_rates(rates)
    return setup_rng(seed, SetupStream.SUBMODELS, num_clients).integers(len(rates), size=num_clients)


def make_submodel_method(
    work: Callable[..., ClientWork],
    rates: Sequence[float],
    rolls: bool,
    server: optax.GradientTransformation,
    groups: np.ndarray,
) -> Method:
    """The method of a work on sub-models. groups: int [clients], which of the rates each has. Raises ValueError where
    no client trains some part of the model."""
    if not rolls and max(rates) < 1:
        raise ValueError(f"rates are {', '.join(map(str, rates))}: nobody would train the rest of the model: add 1.0")
    places = jnp.asarray(groups, jnp.int32)
    holds = None if tuple(rates) == (1.0,) else partial(mark_held_coordinates, tuple(rates), rolls)
    return Method(
        work(rates=tuple(rates), rolls=rolls),
        (coordinate_mean(holds),),
        server,
        move_extra=lambda extra, update: extra + 1 if rolls else (),
        init_client_state=lambda member, client: member._replace(group=places[client]),
        submodels=Submodels(groups, partial(cut_shapes, tuple(rates)), len(rates)),
    )
