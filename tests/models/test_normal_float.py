"""NF4: its levels by their definition, how far off a number can be, and where the codes lie."""

from statistics import NormalDist

import jax
import numpy as np
import pytest

from jaxfed.core.tree import count_bytes
from jaxfed.models.bert import BertEncoder, BertSizes
from jaxfed.models.bert_weights import TextEncoder
from jaxfed.models.normal_float import LEVELS, quantize_normal_float, restore_normal_float
from jaxfed.models.quantized_encoder import quantize_encoder
from tests.small import KEY

MINILM = BertSizes(vocabulary=30522, positions=512, width=384, layers=6, heads=12, hidden=1536)


def test_levels_are_quantiles_of_the_normal_distribution():
    """Equally spaced probabilities up to between the middles of the last of 16 and of 15 shares, eight above zero and
    seven below; the quantiles are divided by the largest."""
    ends = 1 - (1 / 32 + 1 / 30) / 2
    above = [NormalDist().inv_cdf(0.5 + (ends - 0.5) * i / 8) for i in range(1, 9)]
    below = [-NormalDist().inv_cdf(0.5 + (ends - 0.5) * i / 7) for i in range(1, 8)]
    levels = np.array(sorted([*above, 0.0, *below])) / max(above)
    np.testing.assert_allclose(LEVELS, levels, atol=1e-6)
    assert len(set(LEVELS.tolist())) == 16


@pytest.mark.parametrize("columns", [2, 12, 64, 128, 130])
def test_a_number_is_off_by_half_the_gap_between_levels(columns):
    """Of its block, whose numbers may be far larger or smaller than those of the next, or all zero."""
    rng = np.random.default_rng(columns)
    matrix = (
        rng.normal(size=(5, columns)) * 10.0 ** rng.integers(-4, 4, (5, -(-columns // 64))).repeat(64, 1)[:, :columns]
    )
    matrix[2] = 0
    stored = quantize_normal_float(matrix)
    found = np.asarray(restore_normal_float(stored))
    assert found.shape == matrix.shape
    assert found.dtype == np.float32
    assert stored.codes.shape == (5, columns // 2)
    assert stored.codes.dtype == np.uint8
    assert stored.scale.shape == (5, -(-columns // 64))
    levels = np.array(sorted(LEVELS.tolist()), np.float64)
    for row in range(5):
        for start in range(0, columns, 64):
            block = matrix[row, start : start + 64]
            top = np.abs(block).max()
            nearest = np.abs(block[:, None] - top * levels).min(1)
            off = np.abs(found[row, start : start + 64] - block)
            np.testing.assert_allclose(off, nearest, atol=1e-6 * top)
            assert (off <= 0.1521 * top).all()
    assert (found[2] == 0).all()


def test_what_codes_mean_is_stored_as_it_is():
    """The largest of each block is a level, so a second time nothing changes."""
    once = restore_normal_float(quantize_normal_float(np.random.default_rng(0).normal(size=(3, 100))))
    stored = quantize_normal_float(np.asarray(once))
    np.testing.assert_array_equal(restore_normal_float(stored), once)


def test_two_codes_are_a_byte():
    """The even column is in the upper four bits; zero has code 7."""
    stored = quantize_normal_float(np.array([[-2.0, 2.0, 0.0, -2.0]]))
    assert stored.codes.tolist() == [[0x0F, 0x70]]
    assert stored.scale.tolist() == [[2.0]]


def test_odd_columns():
    """Refused for a matrix. An encoder keeps such matrices in float32."""
    with pytest.raises(ValueError, match="^NF4 stores two numbers of a row in a byte, and the matrix has 3 columns: "):
        quantize_normal_float(np.ones((2, 3)))
    sizes, tokens = BertSizes(10, 8, width=4, layers=1, heads=2, hidden=5), np.zeros((1, 8), np.int32)
    params = BertEncoder(sizes).init(KEY, tokens, tokens < 10)["params"]
    stored = quantize_encoder(TextEncoder(sizes, params), "nf4").params["layer_0"]
    assert stored["hidden"]["kernel"] is params["layer_0"]["hidden"]["kernel"]
    assert stored["output"]["kernel"].codes.shape == (5, 2)


def test_memory_of_a_base_as_large_as_minilm():
    """Random weights of its shape: a seventh of float32, and 4.5 bits for each number of a matrix."""
    tokens = np.zeros((1, 8), np.int32)
    shapes = jax.eval_shape(BertEncoder(MINILM).init, KEY, tokens, tokens < 1)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
    assert count_bytes(params) == 4 * 22_565_376
    stored = quantize_encoder(TextEncoder(MINILM, params), "nf4")
    matrices = 30522 * 384 + 6 * (4 * 384 * 384 + 2 * 384 * 1536)
    assert count_bytes(stored.params) == 4 * (22_565_376 - matrices) + matrices * 9 // 16
