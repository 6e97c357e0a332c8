"""What the rates by rule are worth: the empty configuration against six rates on the same data, and popularity.

python scripts/rates.py [--only small ...] [--sweep hand rule] [--runs "item rate 20" ...] [--seeds 0]
    [--out runs/rates] [--section.key value ...]

The shapes are `[data] name = "shape"`, five descriptions that come with jaxfed. `hand` is the recipe of
configs/ml100k_fedavg.toml at six item rates; `rule` is the rule with all steps of items times six factors. All runs of
a data set have the cohorts, rounds and patience of the empty configuration; other keys go to all of them. Every run is
a `jaxfed train` in a folder of its own, resumed where it was. Test metrics at the best round by validation. The last
column is the rule's NDCG@10, full catalogue, over the best of the other rows of its data. Exits with 1 where popularity
is as good, or a ratio is below 0.95.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from jaxfed.cli.main import set_up_process
from jaxfed.config.overrides import override_config
from jaxfed.training.runs import shared_runner

SHAPES = ("small", "very-sparse-shop", "sparse-shop", "dense-films", "check-ins")
FULL, SAMPLED = "test/full/ndcg@10", "test/sampled/ndcg@10"
POPULARITY = [
    *("--model.name", "popularity", "--work.name", "gradient", "--channel.0.name", "weighted_mean"),
    *("--cohort.name", "everyone", "--rounds", "1", "--evaluation.every", "1"),
]
HAND = [
    *("--work.optimizer.name", "sgd", "--work.optimizer.item.weight-decay", "3e-4", "--server.learning-rate", "0.5"),
    *("--work.optimizer.user.learning-rate", "2", "--work.optimizer.user.weight-decay", "1e-2"),
    *("--channel.0.name", "per_row_mean", "--model.init-scale", "0.1", "--cohort.holders", "160", "--rounds", "400"),
    *("--evaluation.patience", "20"),
]
RATES = ("2", "6", "20", "60", "120", "240")
FACTORS = ("0.1", "0.3", "0.5", "2", "3", "10")
SWEEPS = {
    "hand": [(f"item rate {rate}", [*HAND, "--work.optimizer.item.learning-rate", rate]) for rate in RATES],
    "rule": [(f"rule x {factor}", ["--server.learning-rate", factor]) for factor in FACTORS],
}


def list_runs(data: str, sweeps: list[str], chosen: list[str]) -> list[tuple[str, list[str]]]:
    """(name, words) of the runs of a data set."""
    words = ["--data.name", "shape", "--data.description", data] if data in SHAPES else ["--data.name", data]
    swept = [run for sweep in sweeps for run in SWEEPS[sweep] if run[0] in chosen]
    runs = [("popularity", POPULARITY), ("rule", []), *swept]
    return [(name, [*words, *more]) for name, more in runs]


def average(rows: list[dict[str, Any]], figure: str) -> float:
    """The mean of a figure over runs."""
    return statistics.mean(row[figure] for row in rows)


def main() -> None:
    """Data set by data set."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--only", nargs="+", default=[*SHAPES, "ml-100k"], choices=[*SHAPES, "ml-100k"])
    parser.add_argument("--sweep", nargs="*", default=list(SWEEPS), choices=list(SWEEPS))
    names = [name for sweep in SWEEPS.values() for name, _ in sweep]
    parser.add_argument("--runs", nargs="+", default=names, choices=names, help="those of a sweep")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=Path("runs/rates"))
    args, overrides = parser.parse_known_args()
    set_up_process()
    run, problems = shared_runner(), []
    print("| data | configuration | NDCG@10, full | NDCG@10, 99 | best round | of | rule / best |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for data in args.only:
        found: dict[str, list[dict[str, Any]]] = {}
        for name, words in list_runs(data, args.sweep, args.runs):
            for seed in args.seeds:
                folder = args.out / f"{data}_{name}_{seed}".replace(" ", "_")
                own = [] if name == "popularity" else overrides
                summary, problem = run(
                    override_config({}, [*words, *own, "--seed", str(seed), "--run.out", str(folder)])
                )
                if problem:
                    print(f"| {data} | {name} | {problem} | | | | |", flush=True)
                    continue
                found.setdefault(name, []).append(summary)
            if name in found:
                figures = [f"{average(found[name], key):.4f}" for key in (FULL, SAMPLED)]
                rounds = [f"{average(found[name], key):.0f}" for key in ("best_round", "rounds")]
                print(f"| {data} | {name} | {' | '.join(figures + rounds)} | |", flush=True)
        others = [(average(rows, FULL), name) for name, rows in found.items() if name not in ("popularity", "rule")]
        best, name = max(others, default=(average(found["rule"], FULL), "rule"))
        ratio = average(found["rule"], FULL) / best
        print(f"| {data} | best: {name} | | | | | {ratio:.3f} |", flush=True)
        problems += [f"{data}: {ratio:.3f} of the best rate"] if ratio < 0.95 else []
        lost = [key for key in (FULL, SAMPLED) if average(found["rule"], key) <= average(found["popularity"], key)]
        problems += [f"{data}: popularity is as good by {key}" for key in lost]
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
