"""FedASK: clients send sketches of the products of their low-rank factors; the server finds the mean product from sums.

Wen et al. 2025, "Differentially private federated low rank adaptation beyond fixed-matrix". The form with one message:
Tropp et al. 2017, "Practical sketching algorithms for low-rank matrix approximation".
"""

from functools import partial

import jax
import jax.numpy as jnp
import optax

from jaxfed.algorithms.discordance import check_factors, list_products
from jaxfed.algorithms.local_training import local_steps
from jaxfed.algorithms.rolora import FACTORS, drop_dense, replace_dense
from jaxfed.core.client_work import ClientWork
from jaxfed.core.link import Channel, link
from jaxfed.core.method import AVERAGE, Method
from jaxfed.core.model import Model
from jaxfed.core.recipe import named
from jaxfed.core.types import Broadcast, Key, Tree

Sketches = list[tuple[jax.Array, jax.Array]]  # of each layer: P W [in, p] and V' P [q, out] of its product P


def draw_sketches(size: int, number: jax.Array, params: Tree) -> Sketches:
    """The public random matrices (W [out, p], V [in, 2 p]) of each layer in a round, no wider than the layer."""

    def draw(key: Key, a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
        of_output, of_input = jax.random.split(key)
        small, large = min(size, *b.shape[1:]), min(2 * size, len(a))
        return jax.random.normal(of_output, (b.shape[1], small)), jax.random.normal(of_input, (len(a), large))

    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), number), len(list_products(params)))
    return [draw(key, a, b) for key, (a, b) in zip(keys, list_products(params), strict=True)]


def sketch_products(size: int, number: jax.Array, params: Tree) -> Sketches:
    """(A (B W), (V' A) B) of each layer; A B itself is never computed."""
    drawn = zip(list_products(params), draw_sketches(size, number, params), strict=True)
    return [(a @ (b @ of_output), (of_input.T @ a) @ b) for (a, b), (of_output, of_input) in drawn]


def restore_factors(rank: int, of_output: jax.Array, of_input: jax.Array, drawn: jax.Array) -> tuple:
    """(A, B) of rank r from P W, V' P and V: P is Q X, with Q an orthonormal basis of P W and V' Q X = V' P."""
    basis, _ = jnp.linalg.qr(of_output)
    inner = jnp.linalg.lstsq(drawn.T @ basis, of_input)[0]
    u, s, v = jnp.linalg.svd(inner, full_matrices=False)
    return basis @ u[:, :rank], s[:rank, None] * v[:rank]


def move_by_sketches(size: int, broadcast: Broadcast, delta: Tree, found: Sketches) -> Tree:
    """The server's step, to factors of the mean product: its sketches are those of A B plus their mean changes."""
    params, number = broadcast.params["params"], broadcast.extra
    pairs = (params[name] for name in ("lora_a", "lora_b"))
    (left, structure), (right, _) = (jax.tree.flatten(each) for each in pairs)
    drawn, before = draw_sketches(size, number, params), sketch_products(size, number, params)
    moved: tuple[list, list] = ([], [])
    for a, b, (_, of_input), start, change in zip(left, right, drawn, before, found, strict=True):
        new = restore_factors(a.shape[-1], start[0] + change[0], start[1] + change[1], of_input)
        for each, old, after in zip(moved, (a, b), new, strict=True):
            each.append(after.reshape(old.shape) - old)
    new_left, new_right = (jax.tree.unflatten(structure, each) for each in moved)
    return replace_dense(delta, lora_a=new_left, lora_b=new_right)


def replace_factors_by_sketches(model: Model) -> Channel:
    """The factors stay on the client; their sketches are sent beside the update."""

    def encode(update, sent, client):
        return update._replace(params=drop_dense(update.params, *FACTORS)), client.link_state

    def decode(total, state, round):
        shapes = jax.eval_shape(model.init, jax.random.key(0))["params"]
        zeros = {name: jax.tree.map(lambda x: jnp.zeros(x.shape), shapes[name]) for name in FACTORS}
        return total._replace(params=replace_dense(total.params, **zeros)), state, {}

    return link(encode, decode, l2_gain=lambda bound: bound, is_average=False, name="fedask")


def train_and_sketch(
    model: Model, client_optimizer: optax.GradientTransformation, by_row: bool, size: int
) -> ClientWork:
    """Local steps, and sketches of the change of each product."""

    def init(params, key):
        check_factors("fedask", params)
        rank = jax.tree.leaves(params["params"]["lora_b"])[0].shape[0]
        if size < rank:
            raise ValueError(f"fedask.sketch is {size}: it must be at least the rank of the adapters, {rank}")
        return Broadcast(params, jnp.int32(0)), model.private(key)

    def update(shared, private, steps, key):
        report = local_steps(model, client_optimizer, by_row).update(Broadcast(shared.params), private, steps, key)
        start = shared.params["params"]
        end = jax.tree.map(jnp.subtract, start, report.update.params["params"])
        change = jax.tree.map(jnp.subtract, *(sketch_products(size, shared.extra, each) for each in (end, start)))
        return report._replace(update=Broadcast(report.update.params, change))

    def update_shapes(sent):
        return sent._replace(extra=sketch_products(size, jnp.int32(0), sent.params["params"]))

    return ClientWork(init, update, update_shapes)


@named("algorithm")
def fedask(
    model: Model,
    client_optimizer: optax.GradientTransformation,
    server_optimizer: optax.GradientTransformation = AVERAGE,
    *,
    by_row: bool = True,
    sketch: int = 16,
) -> Method:
    """FedASK (Wen et al. 2025), in one message: sums of sketches give the best factors for the mean of A_i B_i.

    A client sends A_i (B_i W) and (V' A_i) B_i less those of A B, with public random W [out, p] and V [in, 2 p], new in
    each round. With Q a basis of the first sum and X from V' Q X = the second, Q X is the mean product, exactly where
    its rank is at most p. In the paper a client sends two messages, and Q is V; here it sends one (Tropp et al. 2017).

    Args:
        model: The model, which shares the factors `lora_a` and `lora_b`: text_lora with the rule fedit.
        client_optimizer: Optimiser of a client's steps. It sees the pair (shared, private) and starts anew each round.
        server_optimizer: Moves all parameters except the factors. Left out: optax.sgd(1.0).
        by_row: Whether a local step updates only the table rows in its batch, see `fedavg`.
        sketch: The number p, at least the rank of the factors. For each layer p * in + 2 p * out numbers are sent.

    Returns:
        The method, what clients and what the server compute.

    Raises:
        ValueError: when a run begins: the model has no such factors, or `sketch` is below their rank.

    Example:
        >>> import jaxfed as jf, optax
        >>> method = jf.algorithms.fedask(jf.models.mf(num_items=100), optax.sgd(0.1))
        >>> [link.claims.name for link in method.links]
        ['fedask']
    """
    return Method(
        train_and_sketch(model, client_optimizer, by_row, sketch),
        (replace_factors_by_sketches(model),),
        server_optimizer,
        move_extra=lambda extra, update: extra + 1,
        move_params=partial(move_by_sketches, sketch),
        sends_difference=True,
    )
