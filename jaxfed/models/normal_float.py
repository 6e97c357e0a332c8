"""Matrices in 4 bits a number: codes of NormalFloat (NF4), two in a byte (Dettmers et al. 2023, "QLoRA: Efficient
finetuning of quantized LLMs")."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 64  # numbers of a row that share a scale
# What the sixteen codes mean: quantiles of the normal distribution, eight above zero, seven below, and zero, divided by
# the largest (appendix E of the paper).
BELOW = (-1.0, -0.6961928, -0.5250731, -0.3949175, -0.28444138, -0.18477343, -0.09105004)
ABOVE = (0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0)
LEVELS = np.array([*BELOW, 0.0, *ABOVE], np.float32)
PAIRS = np.stack(np.broadcast_arrays(LEVELS[:, None], LEVELS), -1).reshape(256, 2)  # what the two codes of a byte mean


class NormalFloatMatrix(NamedTuple):
    """A matrix with an even number of columns in NF4: a number is what its code means times the scale of its block."""

    codes: Any  # uint8 [rows, columns / 2]: the code of an even column times 16, plus that of the next one
    scale: Any  # float32 [rows, columns / 64, rounded up]: the largest magnitude of each block


def spread_scale(scale: Any, columns: int) -> Any:
    """[rows, columns]: the scale of each number of a row; its last block may be short."""
    return scale.repeat(BLOCK, axis=1)[:, :columns]


def quantize_normal_float(matrix: np.ndarray) -> NormalFloatMatrix:
    """NF4 of a matrix [rows, columns], the nearest level for each number.

    The error of a number is at most 0.152 times the scale of its block, half of the widest gap between levels. Raises
    ValueError where the number of columns is odd.
    """
    matrix = np.asarray(matrix, np.float32)
    rows, columns = matrix.shape
    if columns % 2:
        raise ValueError(
            f"NF4 stores two numbers of a row in a byte, and the matrix has {columns} columns: take an even number"
        )
    padded = np.pad(np.abs(matrix), ((0, 0), (0, -columns % BLOCK)))
    largest = padded.reshape(rows, -1, BLOCK).max(-1)
    scale = np.where(largest > 0, largest, 1).astype(np.float32)
    codes = np.searchsorted((LEVELS[1:] + LEVELS[:-1]) / 2, matrix / spread_scale(scale, columns)).astype(np.uint8)
    return NormalFloatMatrix(codes[:, ::2] * 16 + codes[:, 1::2], scale)


def restore_normal_float(stored: NormalFloatMatrix) -> jax.Array:
    """float32 [rows, columns]: what the codes mean."""
    codes = jnp.asarray(stored.codes)
    levels = jnp.asarray(PAIRS)[codes].reshape(len(codes), -1)
    return levels * spread_scale(jnp.asarray(stored.scale), levels.shape[1])
