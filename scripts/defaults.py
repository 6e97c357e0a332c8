"""What a configuration that says nothing but its data is worth: the defaults against popularity, on three data sets.

python scripts/defaults.py [--seeds 0 1 2] [--only ml-100k ...] [--out runs/defaults] [--section.key value ...]

MovieLens-100K, the built-in synthetic data, and files of 60 people that this script makes, another one for each seed.
Every run is a `jaxfed train` in a folder of its own, resumed where it was; means and standard deviations over seeds, of
test metrics at the best round by validation. Other keys go to the runs of the defaults. Exits with 1 where popularity
is as good.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np

from jaxfed.cli.main import set_up_process
from jaxfed.config.overrides import override_config
from jaxfed.training.runs import shared_runner

METRICS = ("test/sampled/hr@10", "test/sampled/ndcg@10", "test/full/hr@10", "test/full/ndcg@10")
POPULARITY = [
    *("--model.name", "popularity", "--work.name", "gradient", "--channel.0.name", "weighted_mean"),
    *("--cohort.name", "everyone", "--rounds", "1", "--evaluation.every", "1"),
]


def write_people(path: Path, seed: int, people: int = 60, films: int = 120, genres: int = 6) -> list[str]:
    """Writes a csv file of people who like one or two of the genres that films have, and some films more than others;
    returns the words by which it is read."""
    random = np.random.default_rng(seed)
    genre, fame = random.integers(genres, size=films), random.permutation((1.0 + np.arange(films)) ** -0.7)
    lines = ["user,item,rating,time"]
    for person in range(people):
        liked = random.dirichlet(np.full(genres, 0.3))
        chance = fame * (liked[genre] + 0.02)
        count = int(np.clip(random.lognormal(np.log(20), 0.5), 8, films // 2))
        seen = random.choice(films, count, replace=False, p=chance / chance.sum())
        for day, film in enumerate(seen):
            lines.append(f"u{person},film {film},{random.integers(3, 6)},{1_700_000_000 + 86_400 * day + person}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return ["--data.path", str(path)]


def words_of(name: str, seed: int, out: Path) -> list[str]:
    """What brings a data set into the empty configuration."""
    return write_people(out / f"people_{seed}.csv", seed) if name == "60 people" else ["--data.name", name]


def spread(rows: list[dict[str, Any]], metric: str) -> str:
    """`mean ± standard deviation` of a metric."""
    values = [row[metric] for row in rows]
    sd = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{sd}"


def main() -> None:
    """Data set by data set."""
    names = ("ml-100k", "synthetic", "60 people")
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=names, choices=names)
    parser.add_argument("--out", type=Path, default=Path("runs/defaults"))
    args, overrides = parser.parse_known_args()
    set_up_process()
    run, worse = shared_runner(), []
    print("| data | configuration | HR@10, 99 | NDCG@10, 99 | HR@10, full | NDCG@10, full | best round | seconds |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    for name in args.only:
        means = {}
        for method, more in (("popularity", POPULARITY), ("defaults", overrides)):
            rows = []
            for seed in args.seeds:
                folder = args.out / f"{name}_{method}_{seed}".replace(" ", "_")
                words = [*words_of(name, seed, args.out), *more, "--seed", str(seed), "--run.out", str(folder)]
                summary, problem = run(override_config({}, words))
                if problem:
                    sys.exit(f"{name}, {method}: {problem}")
                rows.append(summary)
            means[method] = {metric: statistics.mean(row[metric] for row in rows) for metric in METRICS}
            best, seconds = (statistics.mean(row[key] for row in rows) for key in ("best_round", "seconds"))
            figures = [spread(rows, metric) for metric in METRICS]
            print(f"| {name} | {method} | {' | '.join(figures)} | {best:.0f} | {seconds:.1f} |", flush=True)
        worse += [f"{name}: {m}" for m in METRICS if means["defaults"][m] <= means["popularity"][m]]
    if worse:
        sys.exit(f"popularity is as good: {', '.join(worse)}")


if __name__ == "__main__":
    main()
