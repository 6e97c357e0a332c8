"""Runs beside each other: what differs between their configurations, their figures, and a paired bootstrap over users
of each against the first."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxfed.config.config_files import tabulate_differences
from jaxfed.evaluation.paired_tests import RESAMPLES, BootstrapDifference, bootstrap_paired, correct_holm
from jaxfed.reports.run_records import RunRecord
from jaxfed.training.runs import make_cached_loader
from jaxfed.training.user_figures import UserFigures, read_users_of

FACTS = ("best_round", "rounds", "bytes_up_total", "bytes_down_total", "bytes_up_per_client", "epsilon", "seconds")
SAMPLES = ("negatives", "draws", "seed", "negative_sampling")  # of [evaluation]: what `sampled` figures rank among


class PairedResult(NamedTuple):
    """A figure of a run against that of the first run, over the users of both."""

    run: str
    metric: str
    users: int
    difference: BootstrapDifference
    p_holm: float  # p, corrected over the runs that are compared by this figure


class RunComparison(NamedTuple):
    """Runs beside each other."""

    records: list[RunRecord]
    part: str
    metrics: list[str]
    differences: dict[str, list[str]]  # key of the configuration -> its value in each run
    paired: list[PairedResult]
    notes: list[str]  # what is not compared, and why


def compare_runs(
    records: Sequence[RunRecord],
    part: str,
    metrics: Sequence[str],
    load: Callable[[Any], Any] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> RunComparison:
    """Compares runs with the first of them.

    Args:
        records: the runs, all of them finished where they are to be compared user by user.
        part: the held-out items, "val" or "test".
        metrics: names of figures, such as "test/full/ndcg@10".
        load: reads the data of a [data] section; None: what was read last is kept.
        say: is told what takes long.

    Returns:
        The comparison. A run on other data, under another protocol or with other held-out items is not compared user by
        user, and a note says why.
    """
    load, first, notes = load or make_cached_loader(), records[0], list[str]()
    found: list[tuple[str, str, int, BootstrapDifference]] = []
    base: tuple[UserFigures, str] | None = None
    for other in records[1:]:
        if reason := list_obstacles(first, other):
            notes.append(f"{other.folder} is not compared with {first.folder} user by user: {reason}")
            continue
        try:
            if base is None:
                say(f"figures of each user: {first.folder}")
                base = read_users_of(Path(first.folder), load, part)
            say(f"figures of each user: {other.folder}")
            users, held_out = read_users_of(Path(other.folder), load, part)
        except ValueError as error:
            notes.append(f"{other.folder} is not compared user by user: {error}")
            continue
        if held_out != base[1]:
            notes.append(f"{other.folder} is not compared with {first.folder} user by user: other held-out items")
            continue
        if first.summary.get("history") != other.summary.get("history"):
            notes.append(
                f"{other.folder}: its test knows other items of a user than that of {first.folder} "
                "(evaluation.history), and differences are of that, too"
            )
        found += compare_users(other, users, base[0], metrics)
        if not has_same_samples(first, other) and any("/sampled/" in name for name in metrics):
            notes.append(f"{other.folder}: sampled figures are not compared: other negatives than in {first.folder}")
            found = [each for each in found if each[0] != other.folder or "/sampled/" not in each[1]]
    differences = tabulate_differences([each.config for each in records])
    return RunComparison(list(records), part, list(metrics), differences, correct_results(found), notes)


def list_obstacles(first: RunRecord, other: RunRecord) -> str:
    """Why two runs cannot be compared user by user, as far as their summaries tell; "": nothing is in the way."""
    for each in (first, other):
        if not each.summary:
            return f"{each.folder} is not finished"
    for key, words in (("data_sha256", "other data"), ("protocol", "another protocol")):
        if first.summary.get(key) != other.summary.get(key):
            return words
    return ""


def has_same_samples(first: RunRecord, other: RunRecord) -> bool:
    """Whether `sampled` figures of two runs rank among the same candidates."""
    return all(getattr(first.config.evaluation, key) == getattr(other.config.evaluation, key) for key in SAMPLES)


def compare_users(
    other: RunRecord, users: UserFigures, base: UserFigures, metrics: Sequence[str]
) -> list[tuple[str, str, int, BootstrapDifference]]:
    """(run, figure, users, difference) of the figures that both have of each user."""
    mine, theirs = (np.argsort(each["user"], kind="stable") for each in (users, base))
    return [
        (other.folder, name, len(mine), bootstrap_paired(users[name][mine], base[name][theirs]))
        for name in metrics
        if name in users and name in base
    ]


def correct_results(found: Sequence[tuple[str, str, int, BootstrapDifference]]) -> list[PairedResult]:
    """The results, each with its p corrected over the runs that have the same figure."""
    corrected: dict[int, float] = {}
    for metric in {each[1] for each in found}:
        places = [place for place, each in enumerate(found) if each[1] == metric]
        corrected |= dict(zip(places, correct_holm([found[place][3].p for place in places]), strict=True))
    return [PairedResult(*each, corrected[place]) for place, each in enumerate(found)]


def describe_bootstrap(comparison: RunComparison) -> str:
    """What the table of paired differences is, in a line."""
    return (
        f"Difference from {comparison.records[0].folder}: paired bootstrap over users, {RESAMPLES:,} resamples; 95 % "
        "interval; p two-sided"
        + (", and corrected over the runs (Holm)" if len({each.run for each in comparison.paired}) > 1 else "")
    )


def tabulate_comparison(comparison: RunComparison) -> dict[str, Any]:
    """A comparison in JSON's types."""
    names = [*comparison.metrics, *FACTS, "protocol", "history", "server_sees"]
    runs = [
        {"run": each.folder, "leaky": each.leaky, **{name: each.summary.get(name) for name in names}}
        for each in comparison.records
    ]
    paired = [
        {
            "run": each.run,
            "metric": each.metric,
            "users": each.users,
            **each.difference._asdict(),
            "p_holm": each.p_holm,
        }
        for each in comparison.paired
    ]
    return {
        "part": comparison.part,
        "runs": runs,
        "differences": comparison.differences,
        "paired": paired,
        "notes": comparison.notes,
    }
