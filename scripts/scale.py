"""What closed forms take of time, memory and messages on data of several shapes, each in a process of its own.

python scripts/scale.py [--only EASE ...] [--out runs/scale]

The shapes are those of `[data] name = "shape"`. Seconds and GB are of the whole process: from its start, with reading,
compiling, evaluating and writing, to its end. `bytes` is what the median client sends, `pairs` four bytes for each
pair of its items, (i, j) and (j, i). A run of an earlier call is deleted.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxfed.config.build import build_from_config, load_data
from jaxfed.config.schema import make_config
from jaxfed.core.pairs import count_pairs


class ScaleRun(NamedTuple):
    """One run: a shape, and the model that is solved for."""

    shape: str
    model: str  # TOML of [model]
    rounds: int = 1


EASE = 'name = "ease"'
PENALTIES = "l2_grid = [100.0, 300.0, 1000.0]"  # a third, once and three times the holders, as jaxfed data suggests
RUNS = {
    "EASE": ScaleRun("sparse-shop", EASE),
    "EASE, five penalties": ScaleRun("sparse-shop", f"{EASE}\nl2_grid = [50.0, 100.0, 200.0, 400.0, 800.0]"),
    "EASE, 200 neighbours": ScaleRun("sparse-shop", f"{EASE}\nneighbours = 200"),
    "transitions": ScaleRun("sparse-shop", 'name = "transitions"'),
    "item-kNN": ScaleRun("sparse-shop", 'name = "item_knn"'),
    "iALS": ScaleRun("dense-films", 'name = "ials"', 12),
    "EASE, dense": ScaleRun("dense-films", EASE),
    "EASE, check-ins, 200 neighbours": ScaleRun("check-ins", f"{EASE}\nneighbours = 200\n{PENALTIES}"),
    "item-kNN, check-ins": ScaleRun("check-ins", 'name = "item_knn"'),
}
TABLE = """channel = []
rounds = {rounds}
[data]
name = "shape"
description = "{shape}"
[model]
{model}
[algorithm]
name = "closed_form"
[cohort]
name = "everyone"
[evaluation]
every = 1
"""


def train_alone(config: Path, run: Path) -> tuple[float, dict]:
    """(seconds, summary) of `jaxfed train` in a process of its own."""
    shutil.rmtree(run, ignore_errors=True)
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "jaxfed", "train", str(config), "--out", str(run)], stdout=-3)
    if done.returncode:
        sys.exit(done.returncode)
    return time.perf_counter() - begin, json.loads((run / "summary.json").read_text())


def median_bytes(config: Path) -> tuple[float, float]:
    """(bytes that the median client sends, four bytes for each of its pairs)."""
    made = make_config(tomllib.loads(config.read_text()))
    data = load_data(made.data)
    parts, lengths = build_from_config(made, data), data.population.num_train
    rows = count_pairs(lengths) if parts.shapes.pairs else lengths
    return float(np.median(parts.wire.up(rows))), float(np.median(4 * lengths**2))


def main() -> None:
    """Run by run."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--only", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--out", type=Path, default=Path("runs/scale"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    figures = "seconds", "solve", "evaluate", "GB", "bytes", "pairs", "NDCG@10", "HR@10"
    print(f"{'':>33}" + "".join(f"{name:>10}" for name in figures))
    for name in args.only:
        config = args.out / f"{name.replace(' ', '_')}.toml"
        config.write_text(TABLE.format(**RUNS[name]._asdict()))
        seconds, summary = train_alone(config, config.with_suffix(""))
        sent, pairs = median_bytes(config)
        times = seconds, summary["seconds/solve"], summary["seconds/evaluate"], summary["peak_memory_mb"] / 1000
        ranks = summary["test/full/ndcg@10"], summary["test/full/hr@10"]
        print(
            f"{name:>33}"
            + "".join(f"{value:>10.1f}" for value in times)
            + f"{sent:>10.0f}{pairs:>10.0f}"
            + "".join(f"{value:>10.4f}" for value in ranks),
            flush=True,
        )


if __name__ == "__main__":
    main()
