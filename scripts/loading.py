"""How long a large file takes from disk to clients, and in how much memory: seconds and peak memory by stage.

python scripts/loading.py [--rows 20000000] [--kinds csv parquet] [--ids numbers words]

Each file is made in a temporary folder (some 50 bytes a row, deleted at the end), in the order of its times, with one
row in ten repeated, and read as `jaxfed data FILE` reads it, in a process of its own. Exits with 1 where a file of 20
million rows takes more than 25 s or 3 GB.
"""

import argparse
import json
import logging
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

USERS, ITEMS = 140_000, 27_000
MOST_SECONDS, MOST_GB, FULL = 25.0, 3.0, 20_000_000


def write_table(path: Path, rows: int, words: bool) -> None:
    """Writes interactions with long-tailed users and items, ids shuffled."""
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    random = np.random.default_rng(0)
    users, items = max(min(USERS, rows // 10), 1), max(min(ITEMS, rows // 10), 1)
    activity, popularity = random.lognormal(0, 1.1, users), np.arange(1, items + 1) ** -0.8
    ids = {
        "user": (random.permutation(users), random.choice(users, rows, p=activity / activity.sum())),
        "item": (random.permutation(items), random.choice(items, rows, p=popularity / popularity.sum())),
    }
    columns = {
        side: pa.array([f"{side}-{i:x}" if words else i for i in names.tolist()]).take(pa.array(number))
        for side, (names, number) in ids.items()
    }
    columns["rating"] = pa.array(random.integers(1, 11, rows) / 2)
    columns["time"] = pa.array(1_000_000_000 + np.sort(random.integers(0, 500_000_000, rows)))
    write = pa.parquet.write_table if path.suffix == ".parquet" else pa.csv.write_csv
    write(pa.table(columns), path)


class Clock(logging.Handler):
    """Adds up the seconds of each stage, and notes the most memory held until its end."""

    def __init__(self) -> None:
        super().__init__()
        self.stages: dict[str, list[float]] = {}
        self.name_of_stage, self.begin = "", 0.0

    def emit(self, record: logging.LogRecord) -> None:
        """A stage begins or ends; none is inside of another."""
        from jaxfed.training.timing import peak_megabytes

        if getattr(record, "stage_begins", False):
            self.name_of_stage, self.begin = record.getMessage(), time.perf_counter()
            return
        seconds = time.perf_counter() - self.begin
        before = self.stages.get(self.name_of_stage, [0.0])[0]
        self.stages[self.name_of_stage] = [before + seconds, peak_megabytes() / 1000]


def load_file(path: str) -> None:
    """Loads a file as the command line does, and prints what it took as JSON."""
    from jaxfed.cli.main import set_up_process
    from jaxfed.config.build import load_data
    from jaxfed.config.schema import make_config
    from jaxfed.training.timing import peak_megabytes

    set_up_process()
    clock, logger = Clock(), logging.getLogger("jaxfed.data")
    logger.handlers[:] = [clock]
    section = make_config({"data": {"name": path.rpartition(".")[2], "path": path}}).data
    begin = time.perf_counter()
    clients = load_data(section)
    seconds = time.perf_counter() - begin
    usage = resource.getrusage(resource.RUSAGE_SELF)
    found = {"stages": clock.stages, "seconds": seconds, "cpu": usage.ru_utime + usage.ru_stime}
    print(json.dumps(found | {"gb": peak_megabytes() / 1000, "clients": clients.num_clients}))


def measure_file(path: Path, cache: Path) -> dict:
    """What `load_file` says in a fresh process with an empty cache."""
    command = [sys.executable, __file__, "--load", str(path)]
    found = subprocess.run(command, env=os.environ | {"JAXFED_DATA": str(cache)}, stdout=subprocess.PIPE, check=True)
    return json.loads(found.stdout.splitlines()[-1])


def main() -> None:
    """Prints a table for each file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=FULL)
    parser.add_argument("--kinds", nargs="+", choices=("csv", "parquet"), default=["csv", "parquet"])
    parser.add_argument("--ids", nargs="+", choices=("numbers", "words"), default=["numbers", "words"])
    parser.add_argument("--load", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        load_file(args.load)
        return
    missed = False
    for kind in args.kinds:
        for ids in args.ids:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / f"{ids}.{kind}"
                write_table(path, args.rows, ids == "words")
                print(f"{kind}, ids are {ids}: {args.rows:,} rows, {path.stat().st_size / 1e6:,.0f} MB", flush=True)
                first = measure_file(path, Path(folder) / "cache")
                again = measure_file(path, Path(folder) / "cache")
            for stage, (seconds, gigabytes) in first["stages"].items():
                print(f"  {stage:45} {seconds:6.2f} s, peak until then {gigabytes:.2f} GB")
            print(f"  {'all':45} {first['seconds']:6.2f} s, peak {first['gb']:.2f} GB, {first['cpu']:.1f} s of CPU")
            print(f"  {'once more, from the prepared data':45} {again['seconds']:6.2f} s, peak {again['gb']:.2f} GB")
            missed |= args.rows <= FULL and (first["seconds"] > MOST_SECONDS or first["gb"] > MOST_GB)
    sys.exit(int(missed))


if __name__ == "__main__":
    main()
