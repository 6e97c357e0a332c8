"""jaxfed evaluate, jaxfed recommend: what the best model of a run is worth, and what it says."""

import argparse
from collections.abc import Callable
from pathlib import Path

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


def evaluate_command(args: argparse.Namespace) -> None:
    """jaxfed evaluate"""
    from jaxfed.config.config_files import read_config
    from jaxfed.config.schema import make_config
    from jaxfed.training.best_model import open_best_model
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
    from jaxfed.training.best_model import open_best_model
    from jaxfed.training.log import log
    from jaxfed.training.loop import LOWER_RATES
    from jaxfed.training.recommend import locate_user, score_items, selected_view
    from jaxfed.training.records import LEAKY_NOTE

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
    if parts.leaky:
        log(LEAKY_NOTE)
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
    others = "" if population.domains is None else ", or they are of another catalogue"
    log(f"{left:,} of {len(score):,} items were left out: this user had them{others}")
    if len(offered) < args.k:
        log(f"-k is {args.k:,}: there are no more than {len(offered):,} other items")
