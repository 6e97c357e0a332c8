"""LayerDrop: each client trains some blocks of a transformer, drawn anew in every round."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxfed.algorithms.fedsgd import make_gradient_work
from jaxfed.algorithms.local_training import local_steps
from jaxfed.algorithms.submodels import count_units
from jaxfed.channels.average import By, coordinate_mean
from jaxfed.core.client_work import Batches, ClientWork
from jaxfed.core.leaf_paths import join_path
from jaxfed.core.method import AVERAGE, Method, Submodels
from jaxfed.core.model import Model
from jaxfed.core.recipe import named
from jaxfed.core.types import Broadcast, Tree


def number_blocks(params: Tree) -> Tree:
    """The number of the block of each leaf, such as 0 of params/encoder/block_0/norm_1/scale; -1: it is in no block."""

    def number(path, x):
        found = re.search(r"(^|/)block_(\d+)/", join_path(path))
        return int(found[2]) if found else -1

    return jax.tree_util.tree_map_with_path(number, params)


def count_blocks(params: Tree) -> int:
    """How many blocks a model has."""
    return max(jax.tree.leaves(number_blocks(params)), default=-1) + 1


def check_blocks(params: Tree) -> None:
    """Raises ValueError for a model without blocks, or with blocks of several sizes."""
    numbers, count = np.array(jax.tree.leaves(number_blocks(params))), count_blocks(params)
    sizes = np.array([x.size for x in jax.tree.leaves(params)])
    if not count or len({int(sizes[numbers == each].sum()) for each in range(count)}) > 1:
        raise ValueError("the model has no blocks of one size that can be left out: take sasrec, bert4rec or hstu")


def check_dropped_blocks(model: Model, share: float) -> None:
    """Raises ValueError where that share of the blocks cannot be left out."""
    if not 0 < share <= 1:
        raise ValueError(f"algorithm.share is {share:g}: it must be above 0, up to 1")
    if model.recipe and model.recipe.arguments.get("block") == "authors_code":
        raise ValueError('model.block = "authors_code" has no residual path around a block: take pre_norm or ligr')


def mark_block_coordinates(params: Tree, round: jax.Array) -> Tree:
    """bool [blocks + 1, ...] of each leaf: in which block it is; the last is for no block. Of a table: of one row."""
    blocks = count_blocks(params)

    def mark(number, x, in_table):
        there = jnp.arange(blocks + 1) == (number if number >= 0 else blocks)
        shape = x.shape[in_table:]
        return jnp.broadcast_to(there.reshape(-1, *[1] * len(shape)), (blocks + 1, *shape))

    in_table = jax.tree_util.tree_map_with_path(lambda path, x: "tables" in str(path[0]), params)
    return jax.tree.map(mark, number_blocks(params), params, in_table)


def keep_blocks(params: Tree, kept: jax.Array) -> Tree:
    """Parameters that are zero in the blocks that are not kept, bool [blocks + 1], which then add nothing to their
    residual paths."""
    return jax.tree.map(
        lambda number, x: x if number < 0 else jnp.where(kept[number], x, 0), number_blocks(params), params
    )


def kept_block_shapes(share: float, group: int, broadcast: Broadcast) -> Broadcast:
    """Shapes of what a client downloads: of the first blocks, as all blocks have the same size."""
    kept = count_units(share, count_blocks(broadcast.params))

    def cut(number, x):
        return jax.ShapeDtypeStruct((0,) if number >= kept else x.shape, x.dtype)

    return broadcast._replace(params=jax.tree.map(cut, number_blocks(broadcast.params), broadcast.params))


def make_block_work(
    model: Model, client_optimizer: optax.GradientTransformation, sends_gradient: bool, share: float
) -> ClientWork:
    """A gradient, or local steps, for the blocks that a client draws."""

    def make(model):
        return make_gradient_work(model, client_optimizer) if sends_gradient else local_steps(model, client_optimizer)

    plain = make(model)

    def init(params, key):
        check_blocks(params)
        return plain.init(params, key)

    def update(shared, private, steps: Batches, key):
        blocks = count_blocks(shared.params)
        drawn = jnp.zeros(blocks, bool).at[jax.random.permutation(key, blocks)[: count_units(share, blocks)]].set(True)
        kept = jnp.append(drawn, True)

        def loss(params, private, batch):
            own = {name: params[name] for name in shared.params}
            return model.loss({**params, **keep_blocks(own, kept)}, private, batch)

        report = make(model._replace(loss=loss)).update(shared, private, steps, key)
        part = keep_blocks(report.update.params, kept)
        return report._replace(update=Broadcast(part, kept.astype(jnp.float32)))

    if share == 1:  # masks would change the last bits
        return plain._replace(init=init)

    def update_shapes(sent):
        return sent._replace(extra=jnp.zeros(count_blocks(sent.params) + 1))

    return ClientWork(init, update, update_shapes)


def make_block_method(work: ClientWork, server: optax.GradientTransformation, share: float, by: By, num: int) -> Method:
    """The method of a work on blocks, for `num` clients."""
    if share == 1:
        return Method(work, (coordinate_mean(None, by),), server)
    mean = coordinate_mean(mark_block_coordinates, by, shown=(-1,))
    return Method(work, (mean,), server, submodels=Submodels(np.zeros(num, int), partial(kept_block_shapes, share), 1))


@named("algorithm")
def layerdrop(
    model: Model,
    client_optimizer: optax.GradientTransformation,
    server_optimizer: optax.GradientTransformation = AVERAGE,
    *,
    num_clients: int,
    share: float = 0.5,
    sends_gradient: bool = False,
    by: By = "uniform",
) -> Method:
    """LayerDrop (Fan et al. 2020) over clients: in every round a client draws ceil(share L) of the L blocks of a
    transformer, and downloads, trains and sends only these, beside what is in no block.

    The residual paths go around the others. Each block is averaged over the clients that drew it. Share 1 is FedAvg.

    Args:
        model: The model: sasrec with block pre_norm or ligr, bert4rec or hstu.
        client_optimizer: Optimiser of a client's steps. It sees the pair (shared, private) and starts anew each round.
        server_optimizer: Moves the model by what the channel made of all updates. Left out: optax.sgd(1.0).
        num_clients: Number of all clients.
        share: Share of the blocks that a client trains.
        sends_gradient: true: a client sends one gradient over all its examples. false: it takes local steps.
        by: The weight of an update: the client's training examples, its train interactions (activity), or 1 (uniform).

    Returns:
        The method, what clients and what the server compute.

    Raises:
        ValueError: the share is not valid, or the model has no blocks that can be left out.

    Example:
        >>> import jaxfed as jf, optax
        >>> layerdrop(jf.models.sasrec(num_items=9, dim=8), optax.sgd(0.1), num_clients=9).links[0].claims.name
        'coordinate_mean'
    """
    check_dropped_blocks(model, share)
    work = make_block_work(model, client_optimizer, sends_gradient, share)
    return make_block_method(work, server_optimizer, share, by, num_clients)
