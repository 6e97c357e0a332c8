"""Adapters that are not low-rank: bottlenecks after layers, and biases alone."""

import re
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxfed.core.types import Key, Tree
from jaxfed.models.lora import init_variables, list_layers, refuse_pattern

COLLECTION = "adapter"  # the Flax collection of the variables of bottlenecks


class BottleneckSettings(NamedTuple):
    """Which layers have a bottleneck after them, and of what size (Houlsby et al. 2019, "Parameter-efficient transfer
    learning for NLP", section 2.1).

    h becomes h + U gelu(D h + c) + e. U and e begin with zeros, so at first h does not change.

    Args:
        size: Number of units between down-projection D and up-projection U.
        pattern: A regular expression, searched in the paths of layers; those that match are followed by a bottleneck.
            Possible are `attention_output` and `output` of each layer of an encoder, such as `layer_0/output`.

    Example:
        >>> BottleneckSettings(size=8).pattern
        ''
    """

    size: int = 16
    pattern: str = ""


class BiasSettings(NamedTuple):
    """Which biases are trained, those of layer norms among them, and nothing else (BitFit: Ben Zaken et al. 2022,
    "BitFit: Simple parameter-efficient fine-tuning for transformer-based masked language-models").

    Args:
        pattern: A regular expression, searched in the paths of layers, such as `layer_0/query`. The biases of those
            that match are trained.

    Example:
        >>> BiasSettings().pattern  # all
        ''
    """

    pattern: str = ""


class Bottleneck(nn.Module):
    """A bottleneck after a layer, where the pattern is found in the layer's path; else the identity."""

    settings: BottleneckSettings
    layer: str  # its name

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Like `x` [..., width]."""
        path = "/".join((*self.path[:-1], self.layer))
        if not re.search(self.settings.pattern, path):
            return x
        width, size = x.shape[-1], self.settings.size

        def draw():
            return jax.random.normal(self.make_rng("params"), (width, size)) / width**0.5

        down = self.variable(COLLECTION, "down", draw).value.astype(x.dtype)
        down_bias = self.variable(COLLECTION, "down_bias", jnp.zeros, size).value.astype(x.dtype)
        up = self.variable(COLLECTION, "up", jnp.zeros, (size, width)).value.astype(x.dtype)
        up_bias = self.variable(COLLECTION, "up_bias", jnp.zeros, width).value.astype(x.dtype)
        return x + nn.gelu(x @ down + down_bias, approximate=False) @ up + up_bias


def make_bottleneck(settings: BottleneckSettings) -> Any:
    """make(name) -> the bottleneck after the layer of that name, see `BertEncoder.bottleneck`.

    Raises ValueError where the pattern is no regular expression, or a bottleneck has no units.
    """
    check_pattern(settings.pattern)
    if settings.size < 1:
        raise ValueError(f"adapter_size is {settings.size}: it must be at least 1")
    return lambda layer: Bottleneck(settings, layer, name=f"{layer}_adapter")


def check_pattern(pattern: str) -> None:
    """Raises ValueError for a pattern that is no regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f'adapter_pattern "{pattern}" is no regular expression: {error}') from None


def init_bottlenecks(module: nn.Module, settings: BottleneckSettings, key: Key, *inputs: Any) -> Tree:
    """The variables of a module's bottlenecks, from shapes of its inputs. Raises ValueError where there are none."""

    def refuse(paths):
        refuse_pattern("adapter_pattern", settings.pattern, [path for path in paths if path.endswith("output")])

    return init_variables(module, COLLECTION, refuse, key, *inputs)


def select_biases(params: Tree, settings: BiasSettings) -> Tree:
    """The tree of the biases [width] that are trained, without the other parameters.

    Raises ValueError where the pattern matches no layer.
    """
    check_pattern(settings.pattern)

    def select(node, path):
        found = {}
        for name, each in node.items():
            if name == "bias" and re.search(settings.pattern, path):
                found[name] = each
            elif isinstance(each, dict) and (inner := select(each, f"{path}/{name}".lstrip("/"))):
                found[name] = inner
        return found

    if not (chosen := select(params, "")):
        refuse_pattern("adapter_pattern", settings.pattern, list_layers(params, "bias"))
    return chosen


def add_biases(params: Tree, change: Tree) -> Tree:
    """Parameters whose biases are moved by a change of some of them, see `select_biases`."""
    if not isinstance(params, dict):
        return params + change
    return params | {name: add_biases(params[name], each) for name, each in change.items()}
