"""A data set replayed in time order: clients train on what has arrived, and each interaction is predicted before.

Time is cut into windows. At the start of a window models know what happened before it, and nothing else: users and
items are those that had appeared. The interactions of the window are then predicted one by one, and learnt after it
(prequential evaluation: Dawid 1984; Gama, Sebastiao and Rodrigues 2013).
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from jaxfed.config.settings import Config
from jaxfed.data.interactions import Dataset, drop_repeats
from jaxfed.data.population import TIME_UNITS
from jaxfed.data.preparation import PopulationOptions
from jaxfed.evaluation.prequential import TimeLine, make_timeline, rank_rows, summarize_ranks
from jaxfed.training.live_model import LiveModel, rank_by_model, train_live_model

MOST_WINDOWS = 2_000
# options of [data] that are read, or that say nothing here
LEFT_ALONE = {"clients", "protocol", "ratio", "deal", "malice"}


class ReplayOptions(NamedTuple):
    """How a data set is replayed.

    first: seconds of the first part, on which models train before anything is predicted. window: seconds of a window.
    update_rounds: rounds of the online model after each window. retrain_every: windows after which a model is trained
    anew; 0: never. cutoffs: the k of HR@k and NDCG@k.
    """

    first: int
    window: int
    update_rounds: int
    retrain_every: int
    cutoffs: tuple[int, ...] = (10,)


class TimedRows(NamedTuple):
    """A data set whose rows are in time order, and when each was: seconds since the first of them."""

    data: Dataset
    seconds: np.ndarray  # int64 [n], ascending


def order_by_time(data: Dataset) -> TimedRows:
    """The rows of a data set in time order, without repeats of a user and an item, of which the earliest stays.

    Raises ValueError where the rows have no times, not all of them, or only an order.
    """
    if not data.has_times or not data.one_clock:
        raise ValueError("replay: the data have no times, or not all rows have: name their column (--data.time)")
    data = drop_repeats(data)
    time = data.interactions.time
    if time.min() == 0 and time.max() < len(time) and np.bincount(time).all():
        raise ValueError("replay: the times are an order, 0, 1, 2, ...: write seconds or dates (--data.time)")
    place = np.arange(len(time))
    order = np.lexsort((place if data.ties_in_order else -place, time))
    first = int(time[order[0]])
    unit = next((unit for least, unit in TIME_UNITS if abs(first) >= least), 1)
    rows = data.interactions.at(order)
    columns = {name: column[order] for name, column in data.columns.items()}
    return TimedRows(data._replace(interactions=rows, columns=columns, ties_in_order=True), (rows.time - first) // unit)


def list_windows(seconds: np.ndarray, options: ReplayOptions) -> list[tuple[int, int, int]]:
    """(seconds at its start, its first row, the row after its last) of each window that has rows.

    Raises ValueError where there is nothing to train on first, nothing to predict, or too much of it.
    """
    if options.first > seconds[-1]:
        days = f"{seconds[-1] / 86_400:,.1f}"
        raise ValueError(f"replay: all rows are in the first part, the data span {days} days: shorten --first")
    count = int((seconds[-1] - options.first) // options.window) + 1
    if count > MOST_WINDOWS:
        raise ValueError(f"replay: {count:,} windows, there can be {MOST_WINDOWS:,}: take a longer --window")
    starts = options.first + options.window * np.arange(count + 1)
    rows = np.searchsorted(seconds, starts)
    return [(int(starts[n]), int(rows[n]), int(rows[n + 1])) for n in range(count) if rows[n] < rows[n + 1]]


def check_replay(config: Config) -> None:
    """Raises ValueError for what of a configuration cannot be replayed."""
    for name, default in PopulationOptions()._asdict().items():
        if name not in LEFT_ALONE and getattr(config.data, name) != default:
            raise ValueError(f"replay: data.{name} would look ahead, or is no part of a replay: leave it out")
    if config.data.clients != "user":
        raise ValueError("replay: each user is a client: leave data.clients out")
    if config.start.run:
        raise ValueError("replay: models begin by themselves: leave start.run out")


def replay_rows(
    config: Config, timed: TimedRows, options: ReplayOptions, say: Callable[[str], None] = lambda text: None
) -> Iterator[dict[str, Any]]:
    """Replays a data set.

    Args:
        config: what is trained: `rounds` rounds on the first part, and wherever a model is trained anew.
        timed: the rows in time order.
        options: how they are replayed.
        say: is told what is trained.

    Returns:
        A row for each window with interactions, see `window_row`.

    Raises:
        ValueError: the configuration cannot be replayed.
    """
    check_replay(config)
    config = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, negatives=0))  # nobody asks
    windows = list_windows(timed.seconds, options)
    if not windows[0][1]:
        raise ValueError("replay: there are no rows in the first part: lengthen --first")
    models: dict[str, LiveModel] = {}
    line = make_timeline(timed.data.interactions.user, timed.data.interactions.item)
    for number, (start, first, last) in enumerate(windows):
        say(f"window {number + 1} of {len(windows)}: day {start / 86_400:,.1f}, {last - first:,} interactions")
        models = train_models(config, timed.data, first, models, number, options)
        ranks = {name: rank_by_model(model, timed.data, line, first, last) for name, model in models.items()}
        ranks["popularity"] = rank_by_popularity(timed.data, line, first, last)
        yield window_row(line, (start, first, last), ranks, options)


def train_models(
    config: Config, data: Dataset, rows: int, before: dict[str, LiveModel], number: int, options: ReplayOptions
) -> dict[str, LiveModel]:
    """The models at the start of a window, which know the first `rows` rows. before: those of the window before."""
    if not before:
        fresh = train_live_model(config, data, rows, config.rounds)
        return {"online": fresh, "once": fresh, **({"retrained": fresh} if options.retrain_every else {})}
    found = before | {"online": train_live_model(config, data, rows, options.update_rounds, before["online"])}
    if options.retrain_every and number % options.retrain_every == 0:
        found["retrained"] = train_live_model(config, data, rows, config.rounds)
    return found


def rank_by_popularity(data: Dataset, line: TimeLine, first: int, last: int) -> np.ndarray:
    """The ranks of rows by how many rows before the window have each item, see `rank_rows`."""
    counts = np.bincount(data.interactions.item[:first], minlength=len(data.items)).astype(np.float64)
    scores = np.where(counts > 0, counts, -np.inf)[None]
    return rank_rows(line, scores, np.zeros(last - first, np.int64), first)


def window_row(
    line: TimeLine, window: tuple[int, int, int], ranks: dict[str, np.ndarray], options: ReplayOptions
) -> dict[str, Any]:
    """What came of a window.

    Args:
        line: the rows in time order.
        window: see `list_windows`.
        ranks: of each method, float [interactions of the window].
        options: the cut-offs.

    Returns:
        {"day", "interactions", "known" (of users who were there before the window), "new_users" and "new_items"
        (shares of the interactions), METHOD/hr@k, METHOD/ndcg@k, and METHOD/known/hr@k, ... of known users}.
    """
    start, first, last = window
    known = np.isin(line.user[first:last], line.user[:first])
    new_items = ~np.isin(line.item[first:last], line.item[:first])
    row: dict[str, Any] = {"day": start / 86_400, "interactions": last - first, "known": int(known.sum())}
    row |= {"new_users": 1 - float(known.mean()), "new_items": float(new_items.mean())}
    for name, each in ranks.items():
        row |= {f"{name}/{figure}": value for figure, value in summarize_ranks(each, options.cutoffs).items()}
    for name, each in ranks.items():
        found = summarize_ranks(each[known], options.cutoffs)
        row |= {f"{name}/known/{figure}": value for figure, value in found.items()}
    return row


def summarize_replay(rows: list[dict[str, Any]], options: ReplayOptions) -> dict[str, Any]:
    """A replay in JSON's types: its windows, and means over all interactions."""
    overall: dict[str, Any] = {name: sum(row[name] for row in rows) for name in ("interactions", "known")}
    for name in [name for name in rows[0] if name not in ("day", "interactions", "known")]:
        weight = "known" if "/known/" in name else "interactions"
        some = [row for row in rows if row[weight]]
        total = sum(row[weight] for row in some)
        overall[name] = sum(row[name] * row[weight] for row in some) / total if total else float("nan")
    return {"options": options._asdict(), "overall": overall, "windows": rows}


def replay_data(config: Config, data: Dataset, options: ReplayOptions, say: Any = lambda text: None) -> dict[str, Any]:
    """Replays a data set, see `replay_rows` and `summarize_replay`. Raises ValueError."""
    return summarize_replay([*replay_rows(config, order_by_time(data), options, say)], options)
