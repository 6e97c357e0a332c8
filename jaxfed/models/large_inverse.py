"""The inverse of a positive definite matrix with more rows than LAPACK can count: the OpenBLAS of SciPy counts in 32
bits, and ends the process at 40,981 rows."""

import numpy as np

LARGEST_OF_LAPACK = 32_768  # rows; it was seen to work with 33,000
TILE = 2048  # rows of a step


def invert_large(matrix: np.ndarray) -> np.ndarray:
    """Minus the inverse of a symmetric matrix float32 [N, N], in its place; of both the lower triangle alone is used.

    By the sweep operator (Goodnight 1979, "A tutorial on the SWEEP operator"), a tile of rows at a time, in N^3
    operations and with memory for four times N x `TILE` numbers.

    Raises ValueError where the matrix is not positive definite; it holds nothing of use then.
    """
    for low in range(0, len(matrix), TILE):
        tile = slice(low, low + TILE)
        high = min(low + TILE, len(matrix))
        pivot = np.tril(matrix[tile, tile]) + np.tril(matrix[tile, tile], -1).T
        try:
            factor = np.linalg.inv(np.linalg.cholesky(pivot))
        except np.linalg.LinAlgError:
            raise ValueError(
                f"noise has made the sums of {len(matrix):,} items indefinite, too many to solve by elimination: raise "
                "model.l2, or set model.neighbours"
            ) from None
        inverse = factor.T @ factor
        before = np.concatenate([matrix[tile, :low].T, np.zeros_like(pivot), matrix[high:, tile]])
        after = before @ inverse
        for first in range(0, len(matrix), TILE):
            last = min(first + TILE, len(matrix))
            matrix[first:last, :last] -= after[first:last] @ before[:last].T
        matrix[tile, :low], matrix[high:, tile], matrix[tile, tile] = after[:low].T, after[high:], -inverse
    return matrix
