"""Short runs of six configurations, and the SHA-256 of what they end with: equal before and after a change that is to
change nothing.

    python scripts/golden_runs.py              # prints name and params_sha256
    git stash; python scripts/golden_runs.py   # the same of what was there before

The figures belong to a machine and a version of JAX: compare two checkouts on one machine.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
RUNS = {
    "FedAvg of MF": "configs/ml100k_fedavg.toml --rounds 4",
    "SCAFFOLD": "configs/ml100k_fedavg.toml --rounds 4 --work.name scaffold --work.by-row --cohort.name uniform",
    "private": "configs/ml100k_private.toml --rounds 6",
    "FedBuff": "configs/ml100k_fedbuff.toml --rounds 12",
    "EASE with transitions": "configs/ml100k_transitions.toml",
    "IFCA": "configs/ml100k_ifca.toml --rounds 3",
}


def final_digest(words: list[str]) -> str:
    """The params_sha256 of `jaxfed train WORDS`. Exits with the code of a run that fails."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "jaxfed",
            "train",
            *words,
            "--evaluation.every",
            "100",
            "--out",
            f"{folder}/run",
        ]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        if done.returncode:
            sys.exit(done.returncode)
        return json.loads(Path(folder, "run", "summary.json").read_text())["params_sha256"]


def main() -> None:
    """Prints a line for each run."""
    for name, words in RUNS.items():
        print(f"{name:>22}  {final_digest(words.split())}", flush=True)


if __name__ == "__main__":
    main()
