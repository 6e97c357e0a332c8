"""Low-rank adapters: LoRA (Hu et al. 2022, "LoRA: Low-rank adaptation of large language models").

A product x W becomes x W + s (x A) B with s = alpha / r, A [in, r] random and B [r, out] zero. Adapters come into a
module of Flax by its hook for products (`dot_general_cls` of `Dense` and `DenseGeneral`, `qkv_dot_general_cls` and
`out_dot_general_cls` of attention). Their factors are the collection `lora`; what they adapt stays as it is.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxfed.core.leaf_paths import list_leaves
from jaxfed.core.types import Key, Tree

COLLECTION, FACTORS = "lora", "factors"  # of the variables; the name of the module within the layer that it adapts
SHOWN = 4  # paths in a message


class LoraSettings(NamedTuple):
    """Which products have an adapter (LoRA, Hu et al. 2022), and of what size.

    Args:
        rank: Number r of columns of A.
        alpha: What is added to a product is alpha / r (x A) B.
        pattern: A regular expression, found in the paths of the layers that are adapted, such as `layer_0/query`.

    Example:
        >>> LoraSettings(rank=8, pattern="query|value").scale
        2.0
    """

    rank: int
    alpha: float = 16.0
    pattern: str = "query|value"

    @property
    def scale(self) -> float:
        """alpha / r."""
        return self.alpha / self.rank


class LoraProduct(nn.Module):
    """A product of a layer, with an adapter where the layer's path has the pattern."""

    settings: LoraSettings

    @nn.compact
    def __call__(self, x: jax.Array, kernel: jax.Array, dims: Any, precision: Any = None, **more: Any) -> jax.Array:
        """As `jax.lax.dot_general`.

        Raises:
            ValueError: the rank is larger than the width of what is adapted, or the product is one of a batch.
        """
        plain = jax.lax.dot_general(x, kernel, dims, precision=precision, **more)
        path, rank = "/".join(self.path[:-1]), self.settings.rank
        if not re.search(self.settings.pattern, path):
            return plain
        (of_x, of_kernel), (batch, _) = dims
        if batch or tuple(of_kernel) != tuple(range(len(of_kernel))):
            raise ValueError(f"lora: {path} multiplies a batch of kernels: leave it out of the pattern")
        rows, columns = kernel.shape[: len(of_kernel)], kernel.shape[len(of_kernel) :]
        width = int(min(np.prod(rows), np.prod(columns)))
        if not 1 <= rank <= width:
            raise ValueError(f"lora_rank is {rank}: {path} has a width of {width}, set it from 1 to that")

        def draw():
            return jax.random.normal(self.make_rng("params"), (*rows, rank)) / np.prod(rows) ** 0.5

        left = self.variable(COLLECTION, "a", draw).value.astype(x.dtype)
        right = self.variable(COLLECTION, "b", jnp.zeros, (rank, *columns)).value.astype(x.dtype)
        low = jax.lax.dot_general(x, left, ((of_x, of_kernel), ((), ())), precision=precision)
        return plain + self.settings.scale * jnp.tensordot(low, right, 1, precision=precision)


def make_lora_product(settings: LoraSettings) -> Callable[..., nn.Module]:
    """What makes the products of layers, for their `dot_general_cls`.

    Args:
        settings: Which products have an adapter, and of what size.

    Returns:
        A function without arguments that gives a module.

    Raises:
        ValueError: the pattern is no regular expression, or the rank is below 1.

    Example:
        >>> layer = nn.Dense(6, dot_general_cls=make_lora_product(LoraSettings(rank=2, pattern="")))
        >>> made = layer.init(jax.random.key(0), jnp.ones((1, 4)))
        >>> jax.tree.map(jnp.shape, made["lora"])
        {'factors': {'a': (4, 2), 'b': (2, 6)}}
    """
    try:
        re.compile(settings.pattern)
    except re.error as error:
        raise ValueError(f'lora_pattern "{settings.pattern}" is no regular expression: {error}') from None
    if settings.rank < 1:
        raise ValueError(f"lora_rank is {settings.rank}: it must be at least 1")
    return partial(LoraProduct, settings, name=FACTORS)


def list_layers(params: Tree, leaf: str) -> list[str]:
    """The paths of the layers that have a leaf of some name, such as kernel, with slashes."""
    parts = [path.rpartition("/") for path in list_leaves(params)]
    return [layer for layer, _, name in parts if name == leaf]


def refuse_pattern(key: str, pattern: str, paths: Sequence[str]) -> None:
    """Raises ValueError, in one line that names some paths: the pattern under a key is in none of them."""
    more = f" and {len(paths) - SHOWN} more" if len(paths) > SHOWN else ""
    raise ValueError(f'{key} "{pattern}" is in the path of no layer: there are {", ".join(paths[:SHOWN])}{more}')


def init_variables(
    module: nn.Module, collection: str, refuse: Callable[[list[str]], None], key: Key, *inputs: Any
) -> Tree:
    """The first variables of a collection of a module, from shapes of its inputs. refuse: raises ValueError where there
    are none, from the paths of the module's layers."""
    made = jax.eval_shape(module.init, key, *inputs)
    if collection not in made:
        refuse(list_layers(made["params"], "kernel"))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), inputs)
    return jax.jit(lambda key: module.init(key, *zeros)[collection])(key)


def init_lora(module: nn.Module, settings: LoraSettings, key: Key, *inputs: Any) -> Tree:
    """The factors of a module with adapters.

    Args:
        module: has `make_lora_product(settings)` where it makes products.
        settings: of its adapters.
        key: of A.
        inputs: of the module, or their shapes.

    Returns:
        The collection `lora`.

    Raises:
        ValueError: the pattern is that of no layer; one line that names some there are.
    """
    return init_variables(module, COLLECTION, partial(refuse_pattern, "lora_pattern", settings.pattern), key, *inputs)


def merge_lora(params: Tree, factors: Tree, scale: float) -> Tree:
    """Parameters that give without adapters what they give with them: kernels W + s A B.

    Args:
        params: The parameters that are adapted.
        factors: The collection `lora`.
        scale: alpha / r.

    Returns:
        New parameters.

    Example:
        >>> factors = {"factors": {"a": jnp.ones((4, 2)), "b": jnp.ones((2, 6))}}
        >>> merge_lora({"kernel": jnp.zeros((4, 6))}, factors, 0.5)["kernel"][0, 0].item()
        1.0
    """
    if FACTORS in factors:
        low = factors[FACTORS]
        return add_products(params, {FACTORS: jnp.tensordot(low["a"], low["b"], 1)}, scale)
    return params | {name: merge_lora(params[name], each, scale) for name, each in factors.items()}


def add_products(params: Tree, products: Tree, scale: float) -> Tree:
    """Parameters with kernels W + s P, of products P by layer, see `merge_lora`."""
    if FACTORS in products:
        return params | {"kernel": params["kernel"] + scale * products[FACTORS]}
    return params | {name: add_products(params[name], each, scale) for name, each in products.items()}
