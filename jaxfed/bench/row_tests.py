"""Rows of a table beside each other, user by user: standard errors, paired tests, and which rows are the best."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxfed.evaluation.paired_tests import PairedDifference, compare_paired, correct_holm, standard_error
from jaxfed.training.records import HEADLINES
from jaxfed.training.user_figures import UserFigures

BASELINES = ("popularity", "item-kNN", "EASE")  # which others are compared with
COMPARED = "test/full/ndcg@10"
LEVEL = 0.05  # of a corrected p, from which two rows count as equal


def average_users(runs: Sequence[UserFigures]) -> UserFigures:
    """The figures of each user, as means over the runs of a row, which have the same users."""
    first = runs[0]
    assert all(np.array_equal(first["user"], other["user"]) for other in runs)
    return {"user": first["user"]} | {name: np.mean([run[name] for run in runs], 0) for name in first if name != "user"}


def match_users(one: UserFigures, other: UserFigures) -> tuple[np.ndarray, np.ndarray]:
    """The compared figure of two rows, of the users that both have, in one order."""
    _, left, right = np.intersect1d(one["user"], other["user"], return_indices=True)
    return one[COMPARED][left], other[COMPARED][right]


def compare_rows(users: dict[str, UserFigures], name: str) -> dict[str, tuple[PairedDifference, float]]:
    """{other row: (its difference from the row of this name, p corrected over the other rows)}."""
    found = {other: compare_paired(*match_users(users[other], users[name])) for other in users if other != name}
    corrected = correct_holm([each.p for each in found.values()])
    return {other: (each, p) for (other, each), p in zip(found.items(), corrected, strict=True)}


def add_row_tests(rows: Sequence[dict[str, Any]], users: dict[str, UserFigures]) -> list[dict[str, Any]]:
    """Rows with what their users tell.

    Args:
        rows: flat objects, each with its `name` and its means.
        users: {name: figures of its users}.

    Returns:
        The rows, each with `users`, how many there are; FIGURE_se, the standard error over users, for the headlines;
        for each baseline that is among the rows "minus BASELINE", the mean difference of the compared figure, with _se,
        _p of a paired t-test and _p_holm, corrected over the rows; and `place`: "best", "equal" where it does not
        differ significantly from the best, or "".
    """
    best = max(users, key=lambda name: float(users[name][COMPARED].mean()), default="")
    tests = {base: compare_rows(users, base) for base in BASELINES if base in users}
    from_best = compare_rows(users, best) if best else {}
    made = []
    for row in rows:
        name, own = row["name"], users[row["name"]]
        more: dict[str, Any] = {"users": len(own["user"])}
        more |= {f"{figure}_se": standard_error(own[figure]) for figure in HEADLINES if figure in own}
        for base, found in tests.items():
            if name in found:
                difference, p = found[name]
                key = f"minus {base}"
                more |= {key: difference.mean, f"{key}_se": difference.error, f"{key}_p": difference.p}
                more[f"{key}_p_holm"] = p
        equal = name in from_best and not from_best[name][1] < LEVEL
        made.append(row | more | {"place": "best" if name == best else "equal" * equal})
    return made
