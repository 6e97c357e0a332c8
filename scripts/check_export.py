"""Whether an export recommends to every user what its run does, and how long it takes to load.

    python scripts/check_export.py RUN EXPORT

EXPORT: what `jaxfed export RUN EXPORT --users` wrote. A process of its own loads it without jaxfed.
"""

import argparse
import json
import subprocess
import sys
import time

import numpy as np

from jaxfed.training.best_model import open_best_model
from jaxfed.training.recommend import locate_user, score_items

ALONE = """
import sys, time
sys.modules["jaxfed"] = None  # an import of it fails
sys.path.insert(0, sys.argv[1])
begin = time.perf_counter()
import load
export = load.load_export(sys.argv[1])
loaded = time.perf_counter() - begin
sys.stderr.write(str(loaded))
sys.argv.append("--users")
load.main()
"""


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("export", metavar="EXPORT")
    args = parser.parse_args()
    begin = time.perf_counter()
    alone = subprocess.run([sys.executable, "-c", ALONE, args.export], capture_output=True, text=True, check=True)
    whole = time.perf_counter() - begin
    found = {each["user"]: each["items"] for each in map(json.loads, alone.stdout.splitlines())}
    parts, _, best = open_best_model(args.run)
    ids, same = parts.data.source.items, 0
    for user, items in found.items():
        scores = score_items(parts, best, locate_user(parts.data.population, user, None))
        top = [i for i in np.argsort(-scores, kind="stable")[:10] if np.isfinite(scores[i])]
        same += [str(ids[i]) for i in top] == items
    print(f"loaded in {float(alone.stderr):.2f} s; all users recommended to in a process of {whole:.2f} s")
    print(f"the ten best items are those of the run for {same} of {len(found)} users")


if __name__ == "__main__":
    main()
