"""What a round of `jaxfed deploy` took beyond the work of its slowest node.

python scripts/deployed_overhead.py RUN [--json FILE]

A node's work is the sum of its answers in the round, and of what opening it took (`RUN/nodes/N/requests.jsonl`). A
round's seconds are those of the server (`RUN/server/metrics.jsonl`). The allowance is three times the work of the
slowest node, and 150 ms. Prints a line a round, how many are within the allowance, and the medians of the last half of
the rounds, when most programs are compiled.
"""

import argparse
import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

SHARE, CONSTANT = 3.0, 0.15  # of the slowest node's seconds; seconds


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, one JSON object a line."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def list_rounds(run: Path) -> list[dict[str, float]]:
    """Of each round: its seconds, those of its slowest node, the rest, and what is allowed for it."""
    slowest: dict[int, float] = defaultdict(float)
    for path in run.glob("nodes/*/requests.jsonl"):
        work: dict[int, float] = defaultdict(float)
        for row in read_rows(path):
            work[row.get("round", 0)] += row["open"] + row["answer"]
        for number, seconds in work.items():
            slowest[number] = max(slowest[number], seconds)
    found, before = [], 0.0
    for row in read_rows(run / "server" / "metrics.jsonl"):
        seconds, node = row["seconds"] - before, slowest[row["round"]]
        before = row["seconds"]
        rest, allowed = seconds - node, SHARE * node + CONSTANT
        found.append({"round": row["round"], "seconds": seconds, "node": node, "rest": rest, "allowed": allowed})
    return found


def main() -> None:
    """Prints them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run of jaxfed deploy")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not (args.run / "server" / "metrics.jsonl").is_file():
        sys.exit(f"{args.run} is no run of jaxfed deploy that has finished a round")
    rounds = list_rounds(args.run)
    print("round  seconds  slowest node  the rest  allowed")
    for each in rounds:
        figures = "  ".join(f"{each[name]:8.2f}" for name in ("seconds", "node", "rest", "allowed"))
        print(f"{each['round']:5.0f}  {figures}{'' if each['rest'] <= each['allowed'] else '  over'}")
    late = rounds[len(rounds) // 2 :]
    medians = {name: round(statistics.median(each[name] for each in late), 3) for name in ("seconds", "node", "rest")}
    found = {"rounds": len(rounds), "within": sum(each["rest"] <= each["allowed"] for each in rounds), **medians}
    print(json.dumps(found))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
