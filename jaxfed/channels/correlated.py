"""DP-FTRL: noise that later rounds take back in part, so that the sum of many rounds has little of it.

The noise of round t is row t of C^-1 Z, Z independent normals: the whole run releases C X + Z, a Gaussian mechanism
whose sensitivity is that of C for the rounds that one client takes part in. No sampling has to be secret.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxfed.channels.noise import add_normal_noise, check_sensitivity
from jaxfed.core.aggregate import SUM
from jaxfed.core.link import Channel, link
from jaxfed.core.recipe import named
from jaxfed.core.types import Key, Mechanism, Sampler, Tree

LONGEST = 4096  # rounds: the sensitivity is computed from the whole matrix
BUFFERS = 3  # of a BLT; more take minutes to optimise and gain a few per cent
Kind = Literal["tree", "banded", "blt"]


def participation_patterns(kind: str, population: int, size: int, rounds: int) -> np.ndarray:
    """bool [patterns, rounds]: the rounds that clients of a `cyclic` or `everyone` sampler take part in, each once.

    Raises ValueError for samplers that leave it to chance.
    """
    if kind == "everyone":
        return np.ones((1, rounds), bool)
    if kind != "cyclic":
        raise ValueError(
            f"correlated: {kind} cohorts do not say which rounds a client takes part in: "
            'set cohort.name = "cyclic" or "everyone"'
        )
    start = np.arange(rounds) * size % population
    places = np.unique(np.concatenate([start, (start + size) % population]))  # between them nothing changes
    return np.unique((places[:, None] - start) % population < size, axis=0)


def strategy_norm(strategy: np.ndarray, patterns: np.ndarray) -> float:
    """The largest L2 norm of C X for a client whose updates have norm 1, in the rounds of one of some patterns.

    strategy: C [T, T]; patterns: bool [P, T]. sqrt of the sum of |C'C| over the pattern: no direction of the updates
    does more (Choquette-Choo et al. 2023, "Multi-epoch matrix factorization mechanisms", theorem 2).
    """
    gram, chosen = np.abs(strategy.T @ strategy), patterns.astype(np.float64)
    return float(np.sqrt(np.einsum("pt,pt->p", chosen @ gram, chosen).max()))


def tree_strategy(rounds: int) -> np.ndarray:
    """C of binary tree aggregation: row t sums the rounds of the dyadic interval that ends with t (as in a Fenwick
    tree; Dwork et al. 2010; Kairouz et al. 2021)."""
    end = np.arange(1, rounds + 1)[:, None]
    column = np.arange(rounds)
    return ((column < end) & (column >= end - (end & -end))).astype(np.float64)


def tree_noise_stream(rounds: int) -> Any:
    """Its inverse as a stream: each round draws a node, and takes back those that its interval contains."""
    from jax_privacy.matrix_factorization.streaming_matrix import StreamingMatrix

    levels = rounds.bit_length()

    def init(like):
        return jnp.zeros((levels, *like.shape), like.dtype), jnp.int32(1)

    def following(drawn, state):
        nodes, end = state
        level = jax.lax.population_count((end & -end) - 1)  # of the interval that ends here
        at = jnp.arange(levels).reshape(-1, *(1,) * drawn.ndim)
        below = jnp.where(at < level, nodes, 0)
        return drawn - below.sum(0), (jnp.where(at == level, drawn, nodes - below), end + 1)

    return StreamingMatrix.from_array_implementation(init, following)


@functools.cache
def noise_strategy(kind: str, rounds: int, separation: int, times: int) -> tuple[np.ndarray, Any]:
    """(C [T, T], C^-1 as a stream) for clients in at most `times` rounds, which are at least `separation` apart.

    Both are jax-privacy's, optimised for the mean (banded) or largest (BLT) error of the sums of the first rounds.
    """
    if kind == "tree":
        return tree_strategy(rounds), tree_noise_stream(rounds)
    from jax_privacy.matrix_factorization import buffered_toeplitz, toeplitz  # seconds to import

    if kind == "banded":
        coefficients = toeplitz.optimize_banded_toeplitz(rounds, min(separation, rounds))
        matrix = toeplitz.materialize_lower_triangular(toeplitz.pad_coefs_to_n(coefficients, rounds))
        return np.asarray(matrix, np.float64), toeplitz.inverse_as_streaming_matrix(coefficients)
    with jax.enable_x64():
        options = {"n": rounds, "min_sep": separation, "max_participations": times}
        optimal = buffered_toeplitz.optimize(**options, min_buffers=BUFFERS, max_buffers=BUFFERS)
        matrix = np.asarray(optimal.materialize(rounds))
    single = jax.tree.map(lambda x: np.asarray(x, np.float32), optimal)
    return matrix, single.inverse_as_streaming_matrix()


def fit_strategy(kind: str, rounds: int, patterns: np.ndarray) -> tuple[np.ndarray, Any]:
    """`noise_strategy` for clients that take part in the rounds of one of the patterns, bool [patterns, rounds]."""
    separation = min((int(np.diff(np.flatnonzero(each)).min(initial=rounds)) for each in patterns), default=rounds)
    return noise_strategy(kind, rounds, separation, int(patterns.sum(1).max()))


def add_streamed_noise(stream: Any, total: Tree, state: Tree, stddev: float, key: Key) -> tuple[Tree, Tree]:
    """(a sum with the next noise of a stream, the stream's state); stddev: of the numbers that the stream mixes."""
    leaves, structure = jax.tree.flatten(total)
    drawn = add_normal_noise([jnp.zeros_like(x) for x in leaves], stddev, key)
    noise, state = stream.multiply_next(drawn, state)
    return jax.tree.unflatten(structure, [x + n for x, n in zip(leaves, noise, strict=True)]), state


@named("channel")
def correlated(
    rounds: int, num_clients: int, sampler: Sampler, multiplier: float = 1.0, kind: Kind = "banded"
) -> Channel:
    """Differential privacy by noise that is correlated over the rounds (DP-FTRL, Kairouz et al. 2021).

    The sampler must fix in which rounds a client takes part. The server keeps copies of the model: log2(rounds) of them
    for a tree, as many as there are bands, or 3 for blt.

    Args:
        rounds: Number of rounds of the run.
        num_clients: Number of all clients.
        sampler: How the clients of a round are drawn.
        multiplier: Standard deviation of the noise, divided by the most that one client can change in the whole run.
        kind: tree; banded (BandMF, Choquette-Choo et al. 2023), with as many bands as there are rounds between two
            rounds of a client; or blt (Dvijotham et al. 2024; McMahan et al. 2024).

    Returns:
        The link.

    Raises:
        ValueError: there are more than 4096 rounds, or the sampler leaves to chance when a client takes part.

    Example:
        >>> import jaxfed as jf
        >>> cohort = jf.sampling.cyclic(8)(num_clients=64)
        >>> jf.channels.correlated(16, 64, cohort, multiplier=2.0, kind="tree").claims.mechanisms(1.0)[0].multiplier
        2.0
    """
    if rounds > LONGEST:
        raise ValueError(f"correlated: its matrix is for {LONGEST:,} rounds at most, and the run has {rounds:,}")
    patterns = participation_patterns(sampler.kind, num_clients, sampler.size, rounds)
    matrix, stream = fit_strategy(kind, rounds, patterns)

    def init(example):
        return stream.init_multiply(jax.tree.leaves(example)), ()

    def mechanisms(bound):
        return (Mechanism("correlated", multiplier, l2=check_sensitivity("correlated", multiplier, bound)),)

    def decode(total, state, round):
        bound = check_sensitivity("correlated", multiplier, round.bound)
        stddev = multiplier * strategy_norm(matrix, patterns) * bound
        noisy, state = add_streamed_noise(stream, total, state, stddev, round.key)
        return noisy, state, {"noise/stddev": jnp.float32(stddev)}

    return link(
        decode=decode,
        init=init,
        aggregator=SUM,
        is_average=False,
        l2_gain=lambda bound: bound,
        mechanisms=mechanisms,
        needs_all_rows=True,
        name="correlated",
    )
