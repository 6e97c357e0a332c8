"""Pairwise covers: few combinations in which every two values of any two axes meet."""

import itertools
from collections.abc import Sequence


def pairs(case: dict[str, str]) -> set[tuple]:
    """All pairs of (axis, value) in a case."""
    return set(itertools.combinations(sorted(case.items()), 2))


def product(axes: dict[str, Sequence[str]]) -> list[dict[str, str]]:
    """Every combination."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def pairwise(axes: dict[str, Sequence[str]], allowed=lambda case: True) -> list[dict[str, str]]:
    """Greedy: each next case is the one with most pairs that no case had yet."""
    left_cases = [(case, pairs(case)) for case in product(axes) if allowed(case)]
    open_pairs, chosen = set().union(*(met for _, met in left_cases)), []
    while open_pairs:
        best, met = max(left_cases, key=lambda one: len(one[1] & open_pairs))
        open_pairs -= met
        chosen.append(best)
    return chosen
