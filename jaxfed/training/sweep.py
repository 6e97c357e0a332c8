"""A sweep: every combination of some values of a configuration's keys is a run; what came of them in one table."""

import copy
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from jaxfed.config.config_files import config_differences, read_config
from jaxfed.config.schema import make_config
from jaxfed.training.records import SWEEP_FACTS
from jaxfed.training.sweep_results import test_metric


class SweepPoint(NamedTuple):
    """One run of a sweep."""

    choice: dict[str, str]  # key of the grid -> its value, as it was given
    seed: int
    config: Any
    problem: str = ""  # why it cannot be; there is no config then

    def words(self) -> str:
        """What a user would add to `jaxfed train`."""
        return " ".join(option_words(*each) for each in self.choice.items())


def option_words(key: str, value: str) -> str:
    """A key and its value as the command line has them."""
    if value.lower() in ("true", "false"):
        outer, dot, inner = key.rpartition(".")
        return f"--{outer}{dot}{'' if value.lower() == 'true' else 'no-'}{inner}"
    return f"--{key} {value}" if " " in value else f"--{key}={value}"


def parse_grid(grids: Sequence[str]) -> dict[str, list[str]]:
    """{key: values} of some `key=value,value`; a value that is a list has spaces between its parts.

    Raises ValueError for what is none.
    """
    found: dict[str, list[str]] = {}
    for text in grids:
        key, equals, several = text.partition("=")
        key, values = key.strip().lstrip("-").replace("_", "-"), [" ".join(each.split()) for each in several.split(",")]
        if not key or not equals:
            raise ValueError(f"--grid {text}: it must be section.key=value,value")
        if "" in values:
            raise ValueError(f"--grid {text}: a value is missing: section.key=value,value")
        if key in found:
            raise ValueError(f"--grid {key} is given twice: put all of its values behind one")
        if len({*values}) < len(values):
            raise ValueError(f"--grid {text}: a value is there twice")
        found[key] = values
    return found


def sweep_points(
    overridden: Callable[[dict[str, Any], list[str]], Any],
    table: dict[str, Any],
    grid: dict[str, list[str]],
    seeds: Sequence[int],
    overrides: Sequence[str],
    out: Path,
) -> list[SweepPoint]:
    """Every combination with every seed, seeds innermost, each with a folder of its own in `out`.

    overridden(table, words) -> configuration, see `cli`. seeds: none for the configuration's own. Raises ValueError
    for a value that fits neither alone nor with others; a combination that cannot be is a point with its problem.
    """
    check_grid(grid, seeds, overrides)
    point = partial(make_point, overridden, table, overrides, out)
    choices = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    made = [point(choice, seed) for choice in choices for seed in seeds or (None,)]
    for key, value in [(key, value) for key, values in grid.items() for value in values]:
        never = all(each.problem for each in made if each.choice[key] == value)
        if never and (problem := point({key: value}, None).problem):
            raise ValueError(problem)
    if all(each.problem for each in made):
        raise ValueError(made[0].problem)
    return made


def make_point(
    overridden: Callable[[dict[str, Any], list[str]], Any],
    table: dict[str, Any],
    overrides: Sequence[str],
    out: Path,
    choice: dict[str, str],
    seed: int | None,
) -> SweepPoint:
    """One combination, or why it cannot be; see `sweep_points`. seed: None for the configuration's own."""
    words = [word for each in choice.items() for word in option_words(*each).split(" ")]
    folder = out.joinpath(*(quote(f"{key}={value}", safe="=") for key, value in choice.items()))
    fixed = [] if seed is None else [f"--seed={seed}"]
    try:
        config = overridden(copy.deepcopy(table), [*overrides, *words, *fixed])
    except ValueError as error:
        return SweepPoint(choice, seed or 0, None, str(error))
    run = dataclasses.replace(config.run, out=str(folder / f"seed_{config.seed}"))
    return SweepPoint(choice, config.seed, dataclasses.replace(config, run=run))


def check_grid(grid: dict[str, list[str]], seeds: Sequence[int], overrides: Sequence[str]) -> None:
    """Raises ValueError for keys that are said twice, or are not a sweep's to say."""
    given = {word.partition("=")[0].lstrip("-").replace("_", "-") for word in overrides if word.startswith("--")}
    if repeated := sorted(given & grid.keys()):
        raise ValueError(f"{repeated[0]} is given beside --grid {repeated[0]}: leave one of them out")
    if "run.out" in given | grid.keys():
        raise ValueError("run.out: every run of a sweep has a folder of its own: pass --out FOLDER for all of them")
    if seeds and "seed" in given | grid.keys():
        raise ValueError("seed is given beside --seeds: leave one of them out")
    if len({*seeds}) < len(seeds):
        raise ValueError("--seeds: a seed is there twice")
    if not grid and len(seeds) < 2:
        raise ValueError("nothing to sweep: pass --grid section.key=value,value or several --seeds")


def parse_number(text: str) -> int | float | str:
    """A value of the grid for a file: a number where it is one."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def result_row(point: SweepPoint, summary: dict[str, Any]) -> dict[str, Any]:
    """What is written of a run, flat; of one that there is not, why."""
    made: dict[str, Any] = {"seed": point.seed}
    if summary:
        made |= {key: summary[key] for key in ("leaky", "protocol") if key in summary}
        select = point.config.evaluation.select
        names = [name for name in summary if name.endswith(("hr@10", "ndcg@10")) or name == test_metric(select)]
        made |= {"run": point.config.run.out, "select": select, "selected": summary[select]}
        made |= {name: summary[name] for name in (*names, *SWEEP_FACTS)}
    return made | {"problem": point.problem} | {key: parse_number(value) for key, value in point.choice.items()}


def run_sweep(
    points: Sequence[SweepPoint],
    run: Callable[[Any], tuple[dict[str, Any], str]],
    say: Callable[[str], None],
    rows: Sequence[dict[str, Any]] = (),
) -> Iterator[dict[str, Any]]:
    """The row of each point, one run after the other.

    Args:
        points: what to run.
        run: run(config) -> (summary, why there is none); see `runs`.
        say: is told of each run, and of what failed.
        rows: earlier ones. Where a run that is finished is refused now, its row stays as it was.
    """
    for place, point in enumerate(points, 1):
        say(f"[{place}/{len(points)}] seed {point.seed}  {point.words()}")
        summary: dict[str, Any] = {}
        if not point.problem:
            summary, problem = run(point.config)
            point = point._replace(problem=problem)
        if point.problem:
            say(f"failed: {point.problem}")
        row = result_row(point, summary)
        same = [each for each in rows if all(each.get(key) == row[key] for key in ("seed", *point.choice))]
        finished = [each for each in same if not each.get("problem")] if point.problem else []
        if finished:
            say("its figures of before are kept")
        yield finished[0] if finished else row


def earlier_rows(
    folder: Path, points: Sequence[SweepPoint], keys: Sequence[str], again: Callable[[dict[str, str], int], SweepPoint]
) -> list[dict[str, Any]]:
    """Rows of earlier sweeps in the folder.

    Args:
        folder: that of the sweep.
        points: what is to be run now.
        keys: those of the grid now.
        again: makes the point of a choice and a seed, as the options are now.

    Raises:
        ValueError: the earlier sweeps were over other keys, or had other options, rounds included: their figures cannot
            be compared with those to come.
    """
    rows = read_rows(folder / "results.json")
    earlier_keys = {key for each in rows for key in each if "." in key and "/" not in key}
    if rows and earlier_keys != {key for key in keys if "." in key}:
        raise ValueError(
            f"{folder} holds a sweep over {', '.join(sorted(earlier_keys)) or 'seeds'}: pass another --out"
        )
    old = [again({key: str(each[key]) for key in keys}, each["seed"]) for each in rows if not each.get("problem")]
    for point in (*old, *points):
        if point.config and (changed := run_differences(point.config)):
            raise ValueError(f"{folder} holds a sweep with other options ({'; '.join(changed)}): pass another --out")
    return rows


def run_differences(config: Any) -> list[str]:
    """`key: old -> new` of a run that lies where a configuration has its own; none where there is no run."""
    path = Path(config.run.out) / "config.toml"
    if not path.is_file():
        return []
    old = make_config(read_config(path))
    rounds = [f"rounds: {old.rounds} -> {config.rounds}"] if old.rounds != config.rounds else []
    return [*rounds, *config_differences(old, config)]


def kept_rows(
    rows: Sequence[dict[str, Any]], points: Sequence[SweepPoint], keys: Sequence[str]
) -> list[dict[str, Any]]:
    """Those of earlier rows that are over other values than the points."""
    now = [({key: parse_number(value) for key, value in point.choice.items()}, point.seed) for point in points]
    return [each for each in rows if ({key: each.get(key) for key in keys}, each["seed"]) not in now]


def replace_rows(
    rows: Sequence[dict[str, Any]], made: Sequence[dict[str, Any]], keys: Sequence[str]
) -> list[dict[str, Any]]:
    """Rows without those of the same values and seed as new ones, then the new ones."""

    def place(row):
        return [row.get(key) for key in (*keys, "seed")]

    now = [place(each) for each in made]
    return [*(each for each in rows if place(each) not in now), *made]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a results.json; none where there is no file. Raises ValueError where it is damaged."""
    try:
        rows = json.loads(path.read_text()) if path.is_file() else []
    except (ValueError, RecursionError):
        rows = None
    if not isinstance(rows, list) or not all(isinstance(each, dict) and "seed" in each for each in rows):
        raise ValueError(f"{path} is damaged: move it away, finished runs are read again without training")
    return rows
