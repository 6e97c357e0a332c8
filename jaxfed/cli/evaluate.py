"""jaxfed evaluate, jaxfed recommend: what the best model of a run is worth, and what it says."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxfed.cli.summary import print_summary


def add_evaluate_options(command: Callable[..., argparse.ArgumentParser]) -> None:
    """The options of `evaluate` and `recommend`."""
    evaluate = command("evaluate", "Evaluate the best model of a run.")
    evaluate.add_argument("run", metavar="RUN")
    evaluate.add_argument("--part", choices=("val", "test"), default="test")
    evaluate.add_argument("--json", action="store_true", help="print JSON instead of a table")
    recommend = command("recommend", "What the best model of a run recommends to a user.")
    recommend.add_argument("run", metavar="RUN")
    recommend.add_argument("--user", required=True, help="the user's id in the data")
    recommend.add_argument("--client", help="at which client, for a user who is at several")
    recommend.add_argument("-k", type=int, default=10, help="how many items")


def open_best_model(folder: str) -> tuple[Any, Any, Any]:
    """(experiment, seed's keys, (shared, private) of the best round) of a run."""
    from jaxfed.config.build import build_from_config, load_data
    from jaxfed.config.config_files import read_config
    from jaxfed.config.schema import make_config
    from jaxfed.training import checkpoint
    from jaxfed.training.log import log
    from jaxfed.training.loop import LOWER_RATES
    from jaxfed.training.resume import check_frozen, record_problem, recorded_config
    from jaxfed.training.rounds import initial_arrays, make_run_keys
    from jaxfed.training.run_dir import locate_run

    path = locate_run(folder)
    if not (path / "checkpoints").is_dir():
        raise ValueError(f"{folder} has no checkpoint yet: train it first")
    config, record = (
        make_config(read_config(path / "config.toml")),
        checkpoint.newest_record(path / "checkpoints", record_problem),
    )
    if record:
        recorded_config(path, record, config)
    data = load_data(config.data)
    if record and record["data"] != data.digest:
        raise ValueError(
            f"{folder}: the data (or the order of their rows) differ from those of the run: restore the original files"
        )
    if record and not record["standing"]["best_round"]:
        ended, rounds = record["standing"]["finished"], record["standing"]["round"]
        raise ValueError(
            f"the run in {folder} diverged: train again in another folder, and {LOWER_RATES}"
            if ended
            else f"{folder} has no evaluation yet (it stopped after round {rounds}): jaxfed train "
            f"{folder}/config.toml --resume"
        )
    parts = build_from_config(config, data)
    if record:
        check_frozen(path, record, parts.model.frozen)
    with checkpoint.open_checkpoints(path / "checkpoints") as checkpoints:
        found = checkpoint.restore_newest(checkpoints, initial_arrays(parts, config.seed), log, record_problem)
    if not found:
        raise ValueError(f"{folder} has no checkpoint yet: train it first")
    return parts, make_run_keys(config.seed), found[0]["best"]


def evaluate_command(args: argparse.Namespace) -> None:
    """jaxfed evaluate"""
    from jaxfed.config.config_files import read_config
    from jaxfed.config.schema import make_config
    from jaxfed.training.log import to_json
    from jaxfed.training.rounds import count_negatives, evaluation_facts, mark_leaky
    from jaxfed.training.rounds import evaluate_model as examine

    parts, keys, best = open_best_model(args.run)
    settings = make_config(read_config(Path(args.run) / "config.toml")).evaluation
    values = evaluation_facts(parts, settings) | count_negatives(parts.eval_splits["test"])
    values = mark_leaky(parts, values | examine(parts, best, args.part, keys.evaluation))
    if args.json:
        print(to_json(values, 1))
    else:
        print_summary(values, f"{args.run}: {args.part} of the best round")


def recommend_command(args: argparse.Namespace) -> None:
    """jaxfed recommend"""
    import numpy as np

    from jaxfed.config.build import read_source_data
    from jaxfed.config.config_files import read_config
    from jaxfed.config.schema import make_config
    from jaxfed.core.excerpt import printable
    from jaxfed.training.log import log
    from jaxfed.training.loop import LOWER_RATES
    from jaxfed.training.recommend import locate_user, score_items, selected_view

    if args.k < 1:
        raise ValueError(f"-k is {args.k}: it must be at least 1")
    parts, _, best = open_best_model(args.run)
    config = make_config(read_config(Path(args.run) / "config.toml"))
    source, population = parts.data.source, parts.data.population
    seat = locate_user(population, args.user, args.client, lambda: read_source_data(config.data))
    view = selected_view(parts, config.evaluation.select)
    if seat.home is None:
        log("this user did not take part in training: ranked from their own interactions")
    elif view:
        log(f"by the {view} model, by which the best round was chosen")
    score = score_items(parts, best, seat, view)
    if np.isnan(score).any():
        raise ValueError(
            f"the run in {args.run} diverged (scores are not numbers): train again in another folder, and {LOWER_RATES}"
        )
    if not np.isfinite(score).any():
        log("nothing to recommend: this user had every item")
    offered = [item for item in np.argsort(-score, kind="stable")[: args.k] if np.isfinite(score[item])]
    if offered:  # to stderr, as the notes: scripts read the lines below
        log(f"{'rank':>4} {'score':>8}  {'item':>8}{'' if source.titles is None else '  title'}")
    for place, item in enumerate(offered, 1):
        title = "" if source.titles is None else f"  {source.titles[item]}"
        print(printable(f"{place:>3}  {score[item]:8.3f}  {source.items[item]:>8}{title}"))
    left = int((~np.isfinite(score)).sum())
    log(f"{left:,} of {len(score):,} items were left out: this user had them, or they are of another catalogue")
    if len(offered) < args.k:
        log(f"-k is {args.k:,}: there are no more than {len(offered):,} other items")
