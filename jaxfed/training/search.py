"""A sweep whose combinations Optuna proposes, one after the other, from ranges: the extra `optuna`.

The study is a journal in the sweep's folder. The sampler of a trial is made for it, from the seed of the search and the
number of trials before it, so that a search which was stopped goes on with the trials that an undisturbed one has.
"""

import math
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxfed.core.excerpt import shorten
from jaxfed.core.streams import SetupStream, setup_rng
from jaxfed.training.records import lower_is_better
from jaxfed.training.sweep import SweepPoint, run_sweep

JOURNAL = "optuna.journal"
DIGITS = 4  # of a number that is proposed: names of folders have them
NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
RANGE = re.compile(rf"({NUMBER}):({NUMBER})(?::(.*))?")


class Range(NamedTuple):
    """Numbers from `low` to `high`, both included."""

    low: float
    high: float
    whole: bool
    log: bool

    def ends(self) -> list[str]:
        """Its lowest and its highest number, as the command line has them."""
        return [str(int(each)) if self.whole else repr(each) for each in (self.low, self.high)]


class Search(NamedTuple):
    """What a search is over.

    ranges: key -> its range, or the values to choose from. trials: how many there are in all. seed: of the proposals.
    select: the figure of validation that is to be the best.
    """

    ranges: dict[str, Range | list[str]]
    trials: int
    seed: int
    select: str


def is_range(values: Sequence[str]) -> bool:
    """Whether the values of a key are a range, low:high."""
    return len(values) == 1 and RANGE.fullmatch(values[0]) is not None


def parse_range(key: str, text: str) -> Range:
    """A range, low:high or low:high:log. Whole numbers at both ends are a range of whole numbers.

    Raises ValueError for what is none.
    """
    found = RANGE.fullmatch(text)
    assert found
    low, high, scale = found.groups()
    if scale not in (None, "log"):
        raise ValueError(f"--grid {key}={shorten(text)}: behind a range there can be :log, not :{shorten(scale)}")
    ends = float(low), float(high)
    if not all(map(math.isfinite, ends)) or ends[0] >= ends[1]:
        raise ValueError(f"--grid {key}={shorten(text)}: the lower end must be below the upper one")
    if scale and ends[0] <= 0:
        raise ValueError(f"--grid {key}={shorten(text)}: a logarithmic range begins above zero")
    return Range(*ends, all(re.fullmatch(r"[-+]?\d+", each) for each in (low, high)), bool(scale))


def parse_ranges(grid: dict[str, list[str]], trials: int) -> dict[str, Range | list[str]]:
    """{key: its range, or its values} of a grid, see `sweep.parse_grid`; nothing where every combination is to be run.

    Args:
        grid: values by key.
        trials: how many combinations are to be proposed; 0: all of the grid are run.

    Raises:
        ValueError: there is a range and no number of trials, or it is none, or nothing to search over.
    """
    found = [key for key, values in grid.items() if is_range(values)]
    if not trials:
        if found:
            raise ValueError(
                f"--grid {found[0]}={grid[found[0]][0]} is a range: pass --trials N, or values with commas"
            )
        return {}
    if trials < 0 or not grid:
        raise ValueError("--trials: a number above zero, and --grid section.key=low:high for what is searched over")
    return {key: parse_range(key, values[0]) if key in found else values for key, values in grid.items()}


def check_ranges(search: Search, point: Callable[[dict[str, str], int | None], SweepPoint]) -> None:
    """Raises ValueError for the end of a range, or a value, that the configuration cannot have.

    point(choice, seed): see `sweep.make_point`.
    """
    for key, values in search.ranges.items():
        for value in values.ends() if isinstance(values, Range) else values:
            if problem := point({key: value}, None).problem:
                raise ValueError(problem)


def import_optuna() -> Any:
    """Optuna, which says nothing by itself. Raises ValueError where it is missing."""
    try:
        import optuna
    except ImportError:
        raise ValueError('--trials: Optuna is missing: pip install "jaxfed[optuna]"') from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def open_study(search: Search, folder: Path) -> Any:
    """The study in a sweep's folder, which is begun where there is none.

    Raises ValueError where it is over other ranges, or by another figure or seed.
    """
    optuna = import_optuna()
    folder.mkdir(parents=True, exist_ok=True)
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(folder / JOURNAL)))
    direction = "minimize" if lower_is_better(search.select) else "maximize"
    study = optuna.create_study(storage=storage, study_name="sweep", direction=direction, load_if_exists=True)
    known = {"ranges": repr(search.ranges), "seed": search.seed, "select": search.select}
    before = study.user_attrs
    for key, value in known.items():
        if before.get(key, value) != value:
            raise ValueError(f"{folder} holds a search with other {key}: pass another --out")
        if key not in before:
            study.set_user_attr(key, value)
    return study


def propose_trial(study: Any, search: Search) -> Any:
    """The next trial of a study."""
    optuna = import_optuna()
    states = optuna.trial.TrialState
    for left in study.get_trials(deepcopy=False, states=(states.RUNNING,)):  # it was stopped in the middle
        study.tell(left.number, state=states.FAIL)
        study.enqueue_trial(left.params)
    done = len(study.get_trials(deepcopy=False, states=(states.COMPLETE, states.PRUNED)))
    seed = int(setup_rng(search.seed, SetupStream.SEARCH, done).integers(1 << 31))
    study.sampler = optuna.samplers.TPESampler(seed=seed)
    trial = study.ask()
    for key, values in search.ranges.items():
        if not isinstance(values, Range):
            trial.suggest_categorical(key, values)
        elif values.whole:
            trial.suggest_int(key, int(values.low), int(values.high), log=values.log)
        else:
            trial.suggest_float(key, values.low, values.high, log=values.log)
    return trial


def format_choice(search: Search, params: dict[str, Any]) -> dict[str, str]:
    """The value of each key in a trial, as the command line has it."""
    found = {}
    for key, values in search.ranges.items():
        value = params[key]
        if isinstance(values, Range) and not values.whole:
            found[key] = repr(min(max(float(f"{value:.{DIGITS}g}"), values.low), values.high))
        else:
            found[key] = str(value)
    return found


def run_search(
    search: Search,
    folder: Path,
    points: Callable[[dict[str, str]], list[SweepPoint]],
    run: Callable[[Any], tuple[dict[str, Any], str]],
    say: Callable[[str], None],
    rows: Sequence[dict[str, Any]] = (),
) -> Iterator[list[dict[str, Any]]]:
    """Runs the trials that are left, and yields the rows of each; those of trials that are done are read.

    Args:
        search: what it is over.
        folder: of the sweep.
        points: points(choice) -> the runs of a trial, one for each seed.
        run: run(config) -> (summary, why there is none); see `runs`.
        say: is told of each run, and of what failed.
        rows: earlier ones, see `run_sweep`.

    Raises:
        ValueError: the folder holds another search, or Optuna is missing.
    """
    study, states = open_study(search, folder), import_optuna().trial.TrialState
    done = study.get_trials(deepcopy=False, states=(states.COMPLETE, states.PRUNED))
    for number in range(1, max(search.trials, len(done)) + 1):
        say(f"trial {number} of {search.trials}")
        before = number <= len(done)  # its runs are read
        trial = done[number - 1] if before else propose_trial(study, search)
        made = [*run_sweep(points(format_choice(search, trial.params)), run, say, rows)]
        values = [each["selected"] for each in made if not each["problem"]]
        if not before and len(values) == len(made):
            study.tell(trial, statistics.mean(values))
        elif not before:  # counts as the worst
            study.tell(trial, state=states.PRUNED)
        yield made
