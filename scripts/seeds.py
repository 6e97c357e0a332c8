"""Runs a configuration with several seeds and prints each test result and their median.

python scripts/seeds.py configs/ml100k_fedavg.toml --seeds 0 1 2 [--section.key value ...]
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from jaxfed.training.records import LEAKY_NOTE

METRICS = ("test/sampled/hr@10", "test/sampled/ndcg@10", "test/full/hr@10", "test/full/ndcg@10")


def main() -> None:
    """One `jaxfed train` a seed, each in a folder of its own, resumed where it was."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("config")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", help="folder of the runs; default runs/seeds/CONFIG")
    args, overrides = parser.parse_known_args()
    out = Path(args.out or f"runs/seeds/{Path(args.config).stem}")
    rows = []
    for seed in args.seeds:
        run = out / f"seed_{seed}"
        command = ["train", args.config, "--out", str(run), "--seed", str(seed), "--resume", *overrides]
        done = subprocess.run([sys.executable, "-m", "jaxfed", *command], stdout=subprocess.DEVNULL)
        if done.returncode:
            sys.exit(done.returncode)
        rows.append(json.loads((run / "summary.json").read_text()))
    if any(row.get("leaky") for row in rows):
        print(LEAKY_NOTE)
    print(f"{'seed':>8} {'best':>6} {'seconds':>8} " + " ".join(f"{name:>21}" for name in METRICS))
    for seed, row in zip(args.seeds, rows, strict=True):
        values = " ".join(f"{row[name]:>21.4f}" for name in METRICS)
        print(f"{seed:>8} {row['best_round']:>6} {row['seconds']:>8.1f} {values}")
    medians = " ".join(f"{statistics.median(row[name] for row in rows):>21.4f}" for name in METRICS)
    print(f"{'median':>8} {'':>6} {statistics.median(row['seconds'] for row in rows):>8.1f} {medians}")


if __name__ == "__main__":
    main()
