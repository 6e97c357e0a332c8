"""Covers: few combinations that stand for all, in which each value occurs, or every two values of any two axes meet."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest


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


def each_value(axes: dict[str, Sequence[str]]) -> list[dict[str, str]]:
    """As many cases as the longest axis has values, each of which takes the next value of every axis."""
    longest = max(map(len, axes.values()))
    return [{axis: values[i % len(values)] for axis, values in axes.items()} for i in range(longest)]


def parametrize_cover(**axes: dict[str, Any]) -> pytest.MarkDecorator:
    """Every combination of the values of some axes, {its name in a test: value} each, or a list of names that are the
    values. Those that are `full` are beyond a pairwise cover, and of two axes beyond one in which each value occurs."""
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
