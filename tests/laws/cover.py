"""Covers: few combinations that stand for all, in which each value occurs, or every two values of any two axes meet."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest


def pairs(case: dict[str, str], of: int = 2) -> set[tuple]:
    """All pairs of (axis, value) in a case; of: so many of them together."""
    return set(itertools.combinations(sorted(case.items()), of))


def product(axes: dict[str, Sequence[str]]) -> list[dict[str, str]]:
    """Every combination."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def pairwise(axes: dict[str, Sequence[str]], allowed=lambda case: True, of: int = 2) -> list[dict[str, str]]:
    """Greedy: each next case is the one with most pairs that no case had yet. of: 1 covers each value alone; of cases
    with as many new values, the one with most new pairs is next."""
    left_cases = [(case, pairs(case, of), pairs(case)) for case in product(axes) if allowed(case)]
    open_pairs, known_pairs, chosen = set().union(*(met for _, met, _ in left_cases)), set(), []
    while open_pairs:
        best, met, met_pairs = max(left_cases, key=lambda one: (len(one[1] & open_pairs), len(one[2] - known_pairs)))
        open_pairs -= met
        known_pairs |= met_pairs
        chosen.append(best)
    return chosen


def each_value(axes: dict[str, Sequence[str]]) -> list[dict[str, str]]:
    """As many cases as the longest axis has values, each of which takes the next value of every axis."""
    longest = max(map(len, axes.values()))
    return [{axis: values[i % len(values)] for axis, values in axes.items()} for i in range(longest)]


def parametrize_cover(**axes: dict[str, Any]) -> pytest.MarkDecorator:
    """Parametrizes a test by every combination of the axes' values. An axis is {name in the test's id: value}, or a
    list of names that are the values. Combinations outside the cover are marked `full`. The cover is pairwise for three
    or more axes; for two, each value occurs in it."""
    axes = {
        axis: values if isinstance(values, dict) else dict(zip(values, values, strict=True))
        for axis, values in axes.items()
    }
    names = {axis: list(values) for axis, values in axes.items()}
    cover = pairwise(names) if len(names) > 2 else each_value(names)
    cases = [
        pytest.param(
            *(axes[axis][name] for axis, name in case.items()),
            id="-".join(case.values()),
            marks=[] if case in cover else pytest.mark.full,
        )
        for case in product(names)
    ]
    return pytest.mark.parametrize(tuple(axes), cases)
