"""What links cost: rounds of the benchmark's first workload with them, in turn with the plain round, and their ratios.

python scripts/link_cost.py [--rounds 20] [--only NAME ...]
"""

import argparse
import statistics
from typing import Any

from jaxfed.bench.runners import jaxfed_runner
from jaxfed.bench.workloads import PLAIN, WORKLOADS, make_bench_experiment, measure_in_turn
from jaxfed.cli.main import set_up_process

CLIP, MEAN = {"name": "clip", "bound": 1.0}, {"name": "mean", "count": 128}
CHAINS: dict[str, list[dict[str, Any]]] = {
    "clip": [*PLAIN, CLIP],
    "clip, quantize 8": [*PLAIN, CLIP, {"name": "quantize", "bits": 8}],
    "rotate, quantize 4": [*PLAIN, {"name": "rotate"}, {"name": "quantize", "bits": 4}],
    "top_k 10 %": [*PLAIN, {"name": "top_k"}],
    "low_rank 8": [*PLAIN, {"name": "low_rank", "rank": 8}],
    "clip, ring": [*PLAIN, CLIP, {"name": "ring"}],
    "clip, gaussian": [MEAN, CLIP, {"name": "gaussian"}],
    "clip, skellam": [MEAN, CLIP, {"name": "skellam"}],
    "median": [*PLAIN, {"name": "median"}],
}
PROMISED = {"clip, quantize 8": 1.3, "clip, ring": 1.5}


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="of each, at least")
    parser.add_argument("--only", nargs="+", choices=CHAINS, default=list(CHAINS))
    args = parser.parse_args()
    set_up_process()
    chains = {"plain": PLAIN} | {name: CHAINS[name] for name in args.only}
    runners = {name: jaxfed_runner(make_bench_experiment(WORKLOADS["W1"], links)) for name, links in chains.items()}
    times = measure_in_turn(runners, args.rounds, 100.0)
    medians = {name: statistics.median(each) for name, each in times.items()}
    print("| links | ms a round | ratio to the plain round | promised |\n|---|---|---|---|")
    for name, seconds in medians.items():
        promise = f"≤ {PROMISED[name]}" if name in PROMISED else ""
        print(f"| {name} | {1e3 * seconds:.1f} | {seconds / medians['plain']:.2f} | {promise} |")


if __name__ == "__main__":
    main()
