"""FLoRA, FedEx-LoRA and FlexLoRA: the server averages the products of low-rank factors, so it reads every message."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxfed.algorithms.discordance import check_factors, flatten_product
from jaxfed.algorithms.local_training import local_steps
from jaxfed.algorithms.rolora import drop_dense, replace_dense
from jaxfed.channels.average import divide_or_zero, per_row_mean
from jaxfed.core.client_work import ClientWork
from jaxfed.core.link import Channel, decode_total, encode_message, link
from jaxfed.core.method import AVERAGE, Method
from jaxfed.core.model import Model
from jaxfed.core.recipe import named
from jaxfed.core.tree import zeros_like
from jaxfed.core.types import Broadcast, Tree

RESIDUAL = "lora_residual"  # of each layer, what is added to the base beside the product A B
SUMMING_RULES = "rolora, fedask, or model.rule = ffa or fedsa, which are sums"


def multiply_factors(params: Tree) -> Tree:
    """A B of each layer, as a tree of layers."""
    dense = params["params"]
    return jax.tree.map(lambda a, b: jnp.tensordot(a, b, 1), dense["lora_a"], dense["lora_b"])


def product_mean(rule: str, residual: bool) -> Channel:
    """The unweighted mean by row, and beside it the covariance over clients of the changes of both factors.

    mean(A_i B_i) = mean(A) mean(B) + C, C = mean(dA_i dB_i) - mean(dA) mean(dB). The product dA_i dB_i is computed from
    each message; a sum of messages does not give it. C is `Broadcast.extra` of the result.
    """
    average = per_row_mean()

    def encode(update, sent, client):
        return encode_message(average, update._replace(params=drop_dense(update.params, RESIDUAL)), sent, client)

    def decode_message(message, sent, client):  # messages weigh 1
        return message, multiply_factors(message[0].params)

    def decode(total, state, round):
        sums, products = total
        update, _, _ = decode_total(average, sums, (), round)
        of_means = multiply_factors(update.params)
        spread = jax.tree.map(lambda x, y: divide_or_zero(x, sums[-1]) - y, products, of_means)
        params = replace_dense(update.params, **({RESIDUAL: zeros_like(spread)} if residual else {}))
        return Broadcast(params, spread), state, {}

    return link(encode, decode, decode_message=decode_message, is_average=True, name=rule, needs_messages=SUMMING_RULES)


def train_beside_residual(
    rule: str, model: Model, client_optimizer: optax.GradientTransformation, by_row: bool, residual: bool
) -> ClientWork:
    """Local steps. residual: clients also receive a change of the base, and do not train it."""

    def init(params, key):
        check_factors(rule, params)
        start = {RESIDUAL: zeros_like(multiply_factors(params))} if residual else {}
        return Broadcast(replace_dense(params, **start), jnp.int32(0)), model.private(key)

    def update(shared, private, steps, key):
        beside = {RESIDUAL: shared.params["params"][RESIDUAL]} if residual else {}

        def loss(params, private, batch):
            return model.loss(replace_dense(params, **beside), private, batch)

        work = local_steps(model._replace(loss=loss), client_optimizer, by_row)
        report = work.update(Broadcast(drop_dense(shared.params, RESIDUAL)), private, steps, key)
        return report._replace(update=Broadcast(replace_dense(report.update.params, **zeros_like(beside))))

    return ClientWork(init, update, lambda sent: sent._replace(extra=()))


def move_factors(params: Tree, delta: Tree) -> tuple[Tree, Tree]:
    """The factors (A, B) after the server's step."""
    before, moved = params["params"], delta["params"]
    left = jax.tree.map(jnp.add, before["lora_a"], moved["lora_a"])
    return left, jax.tree.map(jnp.add, before["lora_b"], moved["lora_b"])


def replace_factors(params: Tree, delta: Tree, left: Tree, right: Tree) -> Tree:
    """The server's step, to factors A and B that are given."""
    new = {"lora_a": left, "lora_b": right}
    return replace_dense(
        delta, **{name: jax.tree.map(jnp.subtract, x, params["params"][name]) for name, x in new.items()}
    )


def add_spread(broadcast: Broadcast, delta: Tree, spread: Tree) -> Tree:
    """The residual moves by the difference of the mean product and the product of means (Singhal et al. 2025)."""
    return replace_dense(delta, **{RESIDUAL: spread})


def merge_and_restart(seed: int, broadcast: Broadcast, delta: Tree, spread: Tree) -> Tree:
    """The mean of the products is added to the residual, and the factors start anew: A random, B zero."""
    left, right = move_factors(broadcast.params, delta)
    merged = jax.tree.map(lambda a, b, c: jnp.tensordot(a, b, 1) + c, left, right, spread)
    key = jax.random.fold_in(jax.random.key(seed), broadcast.extra)
    leaves, structure = jax.tree.flatten(left)
    keys = jax.random.split(key, len(leaves))
    drawn = [
        jax.random.normal(k, x.shape, x.dtype) / np.prod(x.shape[:-1]) ** 0.5 for k, x in zip(keys, leaves, strict=True)
    ]
    moved = replace_factors(broadcast.params, delta, jax.tree.unflatten(structure, drawn), zeros_like(right))
    return replace_dense(moved, **{RESIDUAL: merged})


def decompose_product(a: jax.Array, b: jax.Array, spread: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Factors (A, B) whose product is the best approximation of A B + spread by their rank: U and S V of its SVD."""
    (left, right), rank = flatten_product(a, b), a.shape[-1]
    u, s, v = jnp.linalg.svd(left @ right + spread.reshape(left.shape[0], -1), full_matrices=False)
    return u[:, :rank].reshape(a.shape), (s[:rank, None] * v[:rank]).reshape(b.shape)


def decompose_products(broadcast: Broadcast, delta: Tree, spread: Tree) -> Tree:
    """The factors become the best ones of their rank for the mean of the products."""
    left, right = move_factors(broadcast.params, delta)
    found = jax.tree.map(decompose_product, left, right, spread)
    of_factor = partial(jax.tree.transpose, jax.tree.structure(left), jax.tree.structure((0, 0)))
    return replace_factors(broadcast.params, delta, *of_factor(found))


def make_product_method(
    rule: str,
    move_params: Callable[[Broadcast, Tree, Tree], Tree],
    residual: bool,
    model: Model,
    client_optimizer: optax.GradientTransformation,
    server_optimizer: optax.GradientTransformation,
    by_row: bool,
) -> Method:
    """The method of a rule for which the server reads the product of each message."""
    return Method(
        train_beside_residual(rule, model, client_optimizer, by_row, residual),
        (product_mean(rule, residual),),
        server_optimizer,
        move_extra=lambda extra, update: extra + 1,
        move_params=move_params,
        sends_difference=True,
    )


@named("algorithm")
def flora(
    model: Model,
    client_optimizer: optax.GradientTransformation,
    server_optimizer: optax.GradientTransformation = AVERAGE,
    *,
    by_row: bool = True,
    seed: int = 0,
) -> Method:
    """FLoRA (Wang et al. 2024, "FLoRA: Federated fine-tuning large language models with heterogeneous low-rank
    adaptations"): the server adds the mean of the products A_i B_i to the base, and factors start anew.

    So after a round the adapted kernels are exactly the mean of those of the clients. In every round each client
    downloads the change of the base, as many numbers as the adapted kernels have. (In the paper it downloads the
    factors of all clients of a round, which is less where few took part in few rounds.) B starts at zero in every
    round, so it stays small with few local steps. The server reads each message: beside ring, pads and other links that
    hide or change it, the method is refused.

    Args:
        model: The model, which shares the factors `lora_a` and `lora_b`, and reads `lora_residual`: text_lora
            with the rule fedit.
        client_optimizer: Optimiser of a client's steps. It sees the pair (shared, private) and starts anew each round.
        server_optimizer: Moves the model by what the channel made of all updates. Left out: optax.sgd(1.0), of which
            alone the equation holds.
        by_row: Whether a local step updates only the table rows in its batch, see `fedavg`.
        seed: Seed of the factors A of later rounds.

    Returns:
        The method, what clients and what the server compute.

    Raises:
        ValueError: beside a link that hides or changes messages; or, when a run begins: the model has no such factors.

    Example:
        >>> import jaxfed as jf, optax
        >>> method = jf.algorithms.flora(jf.models.mf(num_items=100), optax.sgd(0.1))
        >>> [link.claims.name for link in method.links]
        ['flora']
    """
    move = partial(merge_and_restart, seed)
    return make_product_method("flora", move, True, model, client_optimizer, server_optimizer, by_row)


@named("algorithm")
def fedex_lora(
    model: Model,
    client_optimizer: optax.GradientTransformation,
    server_optimizer: optax.GradientTransformation = AVERAGE,
    *,
    by_row: bool = True,
) -> Method:
    """FedEx-LoRA (Singhal et al. 2025, "FedEx-LoRA: Exact aggregation for federated and efficient fine-tuning of
    foundation models"): factors are averaged, and the error of that mean, the residual, is added to the base.

    mean(A_i B_i) - mean(A) mean(B) is the covariance of the factors over clients. So after a round the adapted kernels
    are exactly the mean of those of the clients. In every round each client downloads the sum of all residuals, as many
    numbers as the adapted kernels have. The server reads each message: beside ring, pads and other links that hide or
    change it, the method is refused.

    Args:
        model: The model, which shares the factors `lora_a` and `lora_b`, and reads `lora_residual`: text_lora
            with the rule fedit.
        client_optimizer: Optimiser of a client's steps. It sees the pair (shared, private) and starts anew each round.
        server_optimizer: Moves the model by what the channel made of all updates. Left out: optax.sgd(1.0), of which
            alone the equation holds.
        by_row: Whether a local step updates only the table rows in its batch, see `fedavg`.

    Returns:
        The method, what clients and what the server compute.

    Raises:
        ValueError: beside a link that hides or changes messages; or, when a run begins: the model has no such factors.

    Example:
        >>> import jaxfed as jf, optax
        >>> method = jf.algorithms.fedex_lora(jf.models.mf(num_items=100), optax.sgd(0.1))
        >>> [link.claims.name for link in method.links]
        ['fedex_lora']
    """
    return make_product_method("fedex_lora", add_spread, True, model, client_optimizer, server_optimizer, by_row)


@named("algorithm")
def flexlora(
    model: Model,
    client_optimizer: optax.GradientTransformation,
    server_optimizer: optax.GradientTransformation = AVERAGE,
    *,
    by_row: bool = True,
) -> Method:
    """FlexLoRA (Bai et al. 2024, "Federated fine-tuning of large language models under heterogeneous language tasks
    and client resources"): the factors become those of the best product of rank r for the mean of the products A_i B_i.

    By a singular value decomposition of each layer's mean product, at the server: A = U, B = S V. The base stays. All
    clients have the same rank here; for different ones see `raflora`. The server reads each message: beside ring, pads
    and other links that hide or change it, the method is refused.

    Args:
        model: The model, which shares the factors `lora_a` and `lora_b`: text_lora with the rule fedit.
        client_optimizer: Optimiser of a client's steps. It sees the pair (shared, private) and starts anew each round.
        server_optimizer: Moves the model by what the channel made of all updates. Left out: optax.sgd(1.0), of which
            alone the equation holds.
        by_row: Whether a local step updates only the table rows in its batch, see `fedavg`.

    Returns:
        The method, what clients and what the server compute.

    Raises:
        ValueError: beside a link that hides or changes messages; or, when a run begins: the model has no such factors.

    Example:
        >>> import jaxfed as jf, optax
        >>> method = jf.algorithms.flexlora(jf.models.mf(num_items=100), optax.sgd(0.1))
        >>> [link.claims.name for link in method.links]
        ['flexlora']
    """
    return make_product_method("flexlora", decompose_products, False, model, client_optimizer, server_optimizer, by_row)
