"""Pruning of dense weights in the course of a run, by a schedule that the server and all clients share."""

import re

import jax

from jaxfed.core.model import Model
from jaxfed.core.parametrization import Parametrization
from jaxfed.core.pruning import Pruning, clear_pruned, fill_zeros, find_masks, list_dense_paths
from jaxfed.core.recipe import named
from jaxfed.core.tables import take_rows


def check_schedule(pruning: Pruning) -> None:
    """Raises ValueError for a schedule that is not possible."""
    if not 0 <= pruning.sparsity < 1:
        raise ValueError(f"parametrization.sparsity is {pruning.sparsity:g}: it must be from 0 to below 1")
    for name, least in (("start", 0), ("end", max(pruning.start, 1)), ("every", 1)):
        if (value := getattr(pruning, name)) < least:
            raise ValueError(f"parametrization.{name} is {value}: it must be at least {least}")


def find_pruned_paths(model: Model, pattern: str) -> tuple[str, ...]:
    """The paths of a model's dense leaves in which a regular expression is found. Raises ValueError where there are
    none."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f'parametrization.pattern "{pattern}" is no regular expression: {error}') from None
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    if not (paths := list_dense_paths(shapes, pattern)):
        known = list_dense_paths(shapes, "")
        there = f"there are {', '.join(known[:4])}" if known else "the model has tables alone"
        raise ValueError(f'parametrization.pattern "{pattern}" is in the path of no dense leaf: {there}')
    return paths


@named("parametrization", "pruned")
def pruned_weights(
    model: Model, sparsity: float = 0.5, start: int = 0, end: int = 100, every: int = 10, pattern: str = "kernel$"
) -> Parametrization:
    """Dense weights of small magnitude are set to zero, more and more of them (Zhu and Gupta 2017, "To prune, or not to
    prune: exploring the efficacy of pruning for model compression").

    The server prunes its own parameters. Before round t the share s (1 - (1 - (t - start) / (end - start))^3) of each
    leaf is zero. Clients read from the model which weights are kept. A pruned weight is zero in the model, in gradients
    and in messages, and stays so. Clients download and send only the kept weights, and download a bit for each weight.
    The best round is chosen among those from `end` on.

    Args:
        model: The model whose weights they are.
        sparsity: Share s of the weights of each leaf that is pruned in the end.
        start: Number of rounds after which pruning starts.
        end: Number of rounds after which the share is reached.
        every: Number of rounds between two steps of the schedule.
        pattern: A regular expression, searched in the paths of leaves; those that match are pruned. Tables never are.

    Returns:
        The parametrization, for `jaxfed.Experiment`.

    Raises:
        ValueError: the pattern is found in no path, or the schedule is not possible.

    Example:
        >>> import jaxfed as jf
        >>> model = jf.models.sasrec(num_items=100, dim=8, length=20)
        >>> jf.models.pruned_weights(model, 0.5, pattern="block_0/.*kernel$").pruning.paths[-1]
        'params/encoder/block_0/feed_forward/output/kernel'
    """
    pruning = Pruning(find_pruned_paths(model, pattern), sparsity, start, end, every)
    check_schedule(pruning)

    def forward(theta, rows):
        kept = clear_pruned(theta, find_masks(pruning, theta))  # this drops noise on pruned weights
        return kept if rows is None else take_rows(kept, rows)

    return Parametrization(lambda key: fill_zeros(pruning, model.init(key)), forward, pruning=pruning)
