"""Promotes unpopular items of MovieLens-100K by a share of malicious clients, and prints what each defence is worth.

python scripts/attacks.py [--rounds 100] [--json FILE] [--page FILE] [--only mean median] [--section.key value ...]

Each row is a `jaxfed train` of the configuration in a folder of its own, resumed where it was: once without and
once with the attack. ER@10: share of the users who have not seen a target that find it among their first ten, the mean
of the targets; HR@10 on the full catalogue and against 99 negatives; all on the test part, of the best round. The best
round may be one at which an attack is weak by chance: `last` is ER@10 on the validation part after the last one.
--page docs/results/robustness.md writes the table there, too.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from jaxfed.bench.pages import write_page
from jaxfed.config.build import load_data
from jaxfed.config.config_files import read_config
from jaxfed.config.schema import make_config
from jaxfed.data.interactions import Dataset
from jaxfed.training.run_dir import write_file
from jaxfed.training.runs import train_in_process

EXPOSED = "val/full/er@10"
METRICS = {"ER@10": "test/full/er@10", "last": "last", "HR@10": "test/full/hr@10", "HR@10, 99": "test/sampled/hr@10"}
RARE = 20  # targets have fewer interactions than this


def defences(clients: int, fraction: float, bound: float, row_bound: float) -> dict[str, list[dict[str, Any]]]:
    """{name: links}; to the right of an attack. The rules are told of a few more malicious clients than there are."""
    average, few = {"name": "per_row_mean"}, int(1.25 * fraction * clients)
    return {
        "mean": [average],
        "clip": [{"name": "clip", "bound": bound}, average],
        "clip_per_row": [{"name": "clip_per_row", "bound": row_bound}, average],
        "median": [average, {"name": "median"}],
        "trimmed_mean": [average, {"name": "trimmed_mean", "fraction": min(1.25 * fraction, 0.49)}],
        "geometric_median": [average, {"name": "geometric_median"}],
        "krum": [average, {"name": "krum", "byzantine": few}],
        "multi-krum": [average, {"name": "krum", "byzantine": few, "selected": clients // 2}],
    }


def rare_items(source: Dataset, count: int, seed: int) -> list[str]:
    """So many of the items with fewer than RARE interactions, drawn by the seed."""
    interactions = np.bincount(source.interactions.item, minlength=len(source.items))
    few = np.flatnonzero(interactions < RARE)
    return source.items[np.sort(np.random.default_rng(seed).choice(few, count, replace=False))].tolist()


def configured(table: dict[str, Any], links: list, targets: list[str], attack: bool, args) -> dict[str, Any]:
    """The configuration of a row. Without attack nobody is malicious; what is measured is the same."""
    promote = {"name": "promote", "fraction": args.fraction, "targets": targets, "factor": args.factor}
    lies = {"malicious": args.fraction, "promoted": targets} if attack else {}
    return table | {
        "rounds": args.rounds,
        "data": table["data"] | lies,
        "channel": [promote, *links] if attack else links,
        "evaluation": table["evaluation"] | {"targets": targets},
    }


def measured(table: dict[str, Any], folder: Path, overrides: list[str]) -> dict[str, Any]:
    """The summary of a run, and `last`."""
    summary = train_in_process(table, folder, overrides)
    lines = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    last = [values[EXPOSED] for values in lines if values.get(EXPOSED) is not None][-1]
    return summary | {"last": last}


def labels(args: argparse.Namespace) -> dict[str, str]:
    """What the table calls the defences."""
    few = f"`krum`, {int(1.25 * args.fraction * args.clients)} of {args.clients}"
    share = f"{min(1.25 * args.fraction, 0.49):g}".removeprefix("0")
    named = {"mean": "none: `per_row_mean`", "clip": f"`clip`, {args.bound:g}", "krum": few}
    named |= {"clip_per_row": f"`clip_per_row`, {args.row_bound:g}", "trimmed_mean": f"`trimmed_mean`, {share}"}
    return named | {"multi-krum": f"the same, `selected = {args.clients // 2}`"}


def markdown(figures: dict[str, dict[str, dict[str, float]]], names: dict[str, str]) -> str:
    """The table: each figure without the attack and with it."""
    heads = ["defence", "ER@10, no attack", "ER@10, attacked", "last, attacked"]
    heads += ["HR@10 full", "attacked", "HR@10, 99 neg.", "attacked"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, cases in figures.items():
        both = [("clean", "ER@10"), ("attacked", "ER@10"), ("attacked", "last")]
        both += [(case, metric) for metric in ("HR@10", "HR@10, 99") for case in ("clean", "attacked")]
        values = [f"{cases[case][metric]:.3f}".removeprefix("0") for case, metric in both]
        lines.append(f"| {' | '.join([names.get(name, f'`{name}`'), *values])} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Trains row by row; the figures are written after each."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--config", default="configs/ml100k_fedavg.toml")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--fraction", type=float, default=0.2, help="of the clients, malicious")
    parser.add_argument("--factor", type=float, default=10.0, help="length of their target rows, in mean rows")
    parser.add_argument("--targets", type=int, default=5, help="how many items are promoted")
    parser.add_argument("--bound", type=float, default=10.0, help="of clip: about the median norm of an honest update")
    parser.add_argument("--row-bound", type=float, default=0.3, help="of clip_per_row: the median of honest rows")
    parser.add_argument("--clients", type=int, default=943, help="in a round, where that is not everyone")
    parser.add_argument("--only", nargs="+", help="defences")
    parser.add_argument("--out", default="runs/attacks", help="folder of the runs")
    parser.add_argument("--json", metavar="FILE", help="write the figures there, too")
    parser.add_argument("--page", metavar="FILE", help="page of docs/results whose table is written, too")
    args, overrides = parser.parse_known_args()
    table = read_config(args.config)
    targets = rare_items(load_data(make_config(table).data).source, args.targets, 0)
    every = defences(args.clients, args.fraction, args.bound, args.row_bound)
    if args.clients != 943:
        overrides += ["--cohort.name", "uniform", "--cohort.size", str(args.clients)]
    kind = f"{args.rounds}_rounds_of_{args.clients}_{args.targets}_targets_{args.fraction}_by_{args.factor}"
    kind += f"_within_{args.bound}_{args.row_bound}"
    figures: dict[str, dict[str, dict[str, float]]] = {}
    print(f"items promoted: {', '.join(targets)}")
    print(f"{'':>18} {'without attack':>43} {'attacked':>43}")
    print(f"{'':>18} " + " ".join(f"{name:>10}" for name in [*METRICS, *METRICS]))
    for name in args.only or every:
        figures[name] = {}
        for case, attack in (("clean", False), ("attacked", True)):
            folder = Path(args.out) / kind / f"{name}_{case}"
            summary = measured(configured(table, every[name], targets, attack, args), folder, overrides)
            figures[name][case] = {label: summary[metric] for label, metric in METRICS.items()}
            figures[name][case] |= {key: summary[key] for key in ("best_round", "seconds")}
            if args.json:
                write_file(Path(args.json), json.dumps(figures, indent=1) + "\n")
        values = [figures[name][case][label] for case in ("clean", "attacked") for label in METRICS]
        print(f"{name:>18} " + " ".join(f"{value:>10.4f}" for value in values), flush=True)
        write_page(args.page, "robustness", markdown(figures, labels(args)))


if __name__ == "__main__":
    main()
