"""A pretrained encoder whose large matrices are stored in 8 or 4 bits a number and turned into float32 to compute."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfed.core.types import Tree
from jaxfed.models.bert_weights import TextEncoder
from jaxfed.models.normal_float import NormalFloatMatrix, quantize_normal_float, restore_normal_float

CodeType = Literal["int8", "nf4"]
LARGEST = 127  # of a code; -128 is not used, so that codes are symmetric
CHANNEL_AXES = {"kernel": 1, "word": 0}  # the axis of the channels: outputs of a layer, pieces of the vocabulary


class QuantizedMatrix(NamedTuple):
    """A matrix as integers (codes): a number is its code times the scale of its channel."""

    codes: Any  # int8 [rows, columns]
    scale: Any  # float32 [1, columns], or [rows, 1]: one for each channel


def quantize_matrix(matrix: np.ndarray, channel_axis: int) -> QuantizedMatrix:
    """Codes. The scale is the largest magnitude of a channel over 127; the error of a number is at most half of it."""
    matrix = np.asarray(matrix, np.float32)
    largest = np.abs(matrix).max(1 - channel_axis, keepdims=True)
    scale = np.where(largest > 0, largest, 1).astype(np.float32) / np.float32(LARGEST)
    return QuantizedMatrix(np.clip(np.rint(matrix / scale), -LARGEST, LARGEST).astype(np.int8), scale)


def quantize_encoder(encoder: TextEncoder, dtype: CodeType = "int8") -> TextEncoder:
    """Stores the matrices of an encoder in 8 or 4 bits a number.

    What clients download once, or the server keeps, is then about a quarter or a seventh as large. Compiled programs
    turn it into float32 where they compute. Biases, norms and positions stay in float32.

    Args:
        encoder: The encoder.
        dtype: int8: whole numbers, with one scale for each output of a layer and each piece of the vocabulary (absmax,
            as in Dettmers et al. 2022, "LLM.int8()"). nf4: 4-bit NormalFloat, with one scale for each 64 numbers of a
            row (Dettmers et al. 2023, "QLoRA"); a matrix with an odd number of columns stays in float32.

    Returns:
        The encoder with codes in place of its matrices, for `text_encoder`, `text_lora` and `encode_texts`.

    Raises:
        ValueError: an unknown type.

    Example:
        >>> from jaxfed.models.bert import BertEncoder, BertSizes
        >>> tokens, sizes = np.zeros((9, 8), np.int32), BertSizes(10, 8, width=4, layers=1, heads=2, hidden=8)
        >>> made = TextEncoder(sizes, BertEncoder(sizes).init(jax.random.key(0), tokens, tokens < 10)["params"])
        >>> quantize_encoder(made).params["layer_0"]["hidden"]["kernel"].codes.dtype
        dtype('int8')
    """
    if dtype not in ("int8", "nf4"):
        raise ValueError(f"base_dtype: no type {dtype!r}: choose float32, int8 or nf4")

    def store(path, x):
        name = path[-1].key
        if name not in CHANNEL_AXES or (dtype == "nf4" and x.shape[1] % 2):
            return x
        return quantize_matrix(x, CHANNEL_AXES[name]) if dtype == "int8" else quantize_normal_float(x)

    return encoder._replace(params=jax.tree_util.tree_map_with_path(store, encoder.params))


def is_quantized(node: Any) -> bool:
    """Whether a node of a tree is a matrix of codes."""
    return isinstance(node, QuantizedMatrix | NormalFloatMatrix)


def restore_floats(params: Tree) -> Tree:
    """Parameters with float32 in place of codes."""

    def restore(node):
        if isinstance(node, NormalFloatMatrix):
            return restore_normal_float(node)
        return jnp.asarray(node.codes, jnp.float32) * node.scale if is_quantized(node) else node

    return jax.tree.map(restore, params, is_leaf=is_quantized)
