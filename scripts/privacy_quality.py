"""What user-level differential privacy costs: trains at several epsilons by several mechanisms and prints a table.

python scripts/privacy_quality.py CONFIG [--epsilons 8 ...] [--mechanisms central ...] [--clip 1] [--page FILE]
[--key value ...]

CONFIG has a cohort.size; its links are replaced by a mean, a clip and noise. Each row is a `jaxfed train` in a folder
of its own, resumed where it was. central: Poisson cohorts, Gaussian noise on the sum; distributed: the same cohorts,
Skellam noise in a ring; dp-ftrl: the clients in a circle, noise correlated over the rounds (banded); local: every
client's own noise, Poisson cohorts. --page docs/results/privacy.md writes the table there, too.
"""

import argparse
from pathlib import Path
from typing import Any

from jaxfed.bench.pages import write_page
from jaxfed.channels.integer_noise import FLOAT, ROOM
from jaxfed.config.build import load_data
from jaxfed.config.config_files import read_config
from jaxfed.config.overrides import override_config
from jaxfed.config.schema import config_to_table, make_config
from jaxfed.privacy.accountant import calibrate_noise
from jaxfed.privacy.releases import Sampling
from jaxfed.sampling.cohort import check_cohort_size, poisson_cohort
from jaxfed.training.runs import train_in_process

METRICS = {"HR@10, full": "test/full/hr@10", "NDCG@10, full": "test/full/ndcg@10", "HR@10, 99": "test/sampled/hr@10"}
BITS = 10  # fractional bits of the ring
KINDS = {
    "central": ("gaussian", "poisson"),
    "distributed": ("skellam", "poisson"),
    "dp-ftrl": ("correlated", "cyclic"),
    "local": ("local", "poisson"),
}


def noise(kind: str, epsilon: float, config: Any, population: int, clip: float) -> float:
    """The multiplier with which the run spends epsilon by Renyi divergences; its final figure may be lower."""
    mechanism, sampler = KINDS[kind]
    size = config.cohort.size
    cap = poisson_cohort(population, size).slots if sampler == "poisson" else 0
    longest = clip * 2.0**BITS * ROOM * FLOAT if mechanism == "skellam" else 0.0
    return calibrate_noise(
        epsilon,
        config.privacy.delta,
        Sampling(sampler, population, size, cap),
        config.rounds,
        mechanism,
        l1=longest**2,
        l2=longest,
    )


def links(kind: str, multiplier: float, size: int, clip: float) -> list[dict[str, Any]]:
    """The chain of a mechanism; without one, the same without noise."""
    noised: dict[str, list[dict[str, Any]]] = {
        "none": [],
        "central": [{"name": "gaussian", "multiplier": multiplier}],
        "distributed": [{"name": "skellam", "multiplier": multiplier, "fraction_bits": BITS}],
        "dp-ftrl": [{"name": "correlated", "multiplier": multiplier}],
        "local": [{"name": "densify"}, {"name": "local_gaussian", "multiplier": multiplier}],
    }
    return [{"name": "mean", "count": size}, {"name": "clip", "bound": clip}, *noised[kind]]


def main() -> None:
    """Trains row by row."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("config")
    parser.add_argument("--mechanisms", nargs="+", default=["central", "distributed", "dp-ftrl"], choices=KINDS)
    parser.add_argument("--epsilons", type=float, nargs="+", default=[2, 8, 32])
    parser.add_argument("--clip", type=float, default=1.0, help="largest norm of an update")
    parser.add_argument("--out", help="folder of the runs; default runs/privacy/CONFIG")
    parser.add_argument("--page", metavar="FILE", help="page of docs/results whose table is written, too")
    args, overrides = parser.parse_known_args()
    table = config_to_table(override_config(read_config(args.config), overrides))
    population = load_data(make_config(table).data).population.num_clients
    table["cohort"]["size"] = check_cohort_size(table["cohort"]["size"], population)
    config = make_config(table)
    out = Path(args.out or f"runs/privacy/{Path(args.config).stem}")
    head = ["mechanism", f"ε at δ = {config.privacy.delta:g}", "noise / bound", *METRICS]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    print(*lines, sep="\n")
    for kind, epsilon in [("none", 0.0), *((kind, each) for kind in args.mechanisms for each in args.epsilons)]:
        multiplier = noise(kind, epsilon, config, population, args.clip) if epsilon else 0.0
        cohort = {"name": KINDS[kind][1] if epsilon else "poisson", "size": config.cohort.size}
        row = table | {"channel": links(kind, multiplier, config.cohort.size, args.clip), "cohort": cohort}
        told = train_in_process(row, out / f"{kind}_{epsilon:g}_clip_{args.clip:g}")
        spent = [f"{told['epsilon']:.2f}", f"{multiplier:.3g}"] if epsilon else ["∞", "0"]
        values = [f"{told[name]:.3f}".removeprefix("0") for name in METRICS.values()]
        lines.append(f"| {' | '.join([kind, *spent, *values])} |")
        print(lines[-1], flush=True)
    write_page(args.page, f"privacy, {population:,} clients", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
