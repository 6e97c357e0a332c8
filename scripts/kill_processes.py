"""Kills the processes of `jaxfed deploy` at random moments, and compares the run with one that nobody disturbs.

python scripts/kill_processes.py [--kills 20] [--rounds 24] [--nodes 3] [--seed 0] [--json FILE]

A kill is `kill -9` of one of three: the whole federation; the server's process, after which the script ends the rest;
or the process that keeps one node open. After the first two the federation is resumed. After the third, each message
opens the node by itself. Prints how many rounds are
missing or there twice, in how many rounds another number of messages was counted, and whether the parameters at the
end are the same to the last bit.
"""

import argparse
import contextlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import psutil

CONFIG = """
[data]
name = "synthetic"
users = 40
items = 60
mean_length = 9.0
[model]
name = "mf"
dim = 4
[cohort]
name = "uniform"
size = 12
[evaluation]
every = 1000
"""
LONGEST = 120.0  # seconds that a start of the federation and a round may take


class Disturbed(NamedTuple):
    """A run at its end."""

    rounds: list[int]
    reported: list[int]
    digest: str
    kills: Counter


def start_federation(folder: Path, args: argparse.Namespace) -> subprocess.Popen:
    """`jaxfed deploy` in a process of its own; it goes on where one was killed."""
    words = ["deploy", str(folder / "config.toml"), "--out", str(folder / "run"), "--rounds", str(args.rounds)]
    words += ["--nodes", str(args.nodes), "--resume"]
    with open(folder / "deploy.log", "ab") as log:
        return subprocess.Popen([sys.executable, "-m", "jaxfed", *words], stdout=log, stderr=subprocess.STDOUT)


def find_victim(deploy: psutil.Process, kind: str, draw: random.Random) -> psutil.Process | None:
    """The process of a kind: federation, server or node; None: it is not there at this moment."""
    if kind == "federation":
        return deploy
    found = []
    for each in deploy.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            words = " ".join(each.cmdline())
            if ("flwr-serverapp" in words) if kind == "server" else ("-m jaxfed node" in words):
                found.append(each)
    return draw.choice(found) if found else None


def end_federation(process: subprocess.Popen) -> None:
    """Kills what is left of a federation, and waits until all of it has ended."""
    children = []
    with contextlib.suppress(psutil.NoSuchProcess):
        children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    for each in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    psutil.wait_procs(children, timeout=LONGEST)


def count_rounds(folder: Path) -> int:
    """Rounds that the server has written down."""
    path = folder / "run" / "server" / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for_rounds(folder: Path, process: subprocess.Popen, rounds: int) -> None:
    """Waits until so many rounds are written. Raises RuntimeError where the federation ends before or stands still."""
    known, end = -1, time.monotonic() + LONGEST
    while (now := count_rounds(folder)) < rounds:
        if now > known:
            known, end = now, time.monotonic() + LONGEST
        if process.poll() is not None or time.monotonic() > end:
            told = (folder / "deploy.log").read_text()[-2000:]
            raise RuntimeError(f"round {now} of {rounds}: the federation ended or stood still: {told}")
        time.sleep(0.02)


def run_until_done(folder: Path, args: argparse.Namespace, kills: int) -> Disturbed:
    """A run that is killed so often, at moments between two of its rounds or within one."""
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(CONFIG)
    draw, done = random.Random(args.seed), Counter[str]()
    process = start_federation(folder, args)
    try:
        # kills come after rounds that are spread over the run, and a moment later
        for rounds in sorted(draw.sample(range(1, args.rounds), kills)):
            wait_for_rounds(folder, process, rounds)
            time.sleep(draw.uniform(0.0, 0.6))
            kind = draw.choice(["federation", "server", "node"])
            victim = find_victim(psutil.Process(process.pid), kind, draw)
            if victim is None:  # it has not begun yet: the whole federation is there
                kind, victim = "federation", psutil.Process(process.pid)
            if kind != "federation":
                victim.send_signal(signal.SIGKILL)
            done[kind] += 1
            print(f"after round {rounds}: killed {kind}, {count_rounds(folder)} rounds written", flush=True)
            if kind != "node":
                end_federation(process)
                process = start_federation(folder, args)
        wait_for_rounds(folder, process, args.rounds)
        process.wait(timeout=LONGEST)
    finally:
        end_federation(process)
    if process.returncode:
        raise RuntimeError(f"the federation failed: {(folder / 'deploy.log').read_text()[-2000:]}")
    rows = [json.loads(line) for line in (folder / "run" / "server" / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "run" / "server" / "summary.json").read_text())
    numbers, reported = [row["round"] for row in rows], [row["clients/reported"] for row in rows]
    return Disturbed(numbers, reported, summary["shared_sha256"], done)


def main() -> None:
    """Runs both, and prints how they compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("kills", 20), ("rounds", 24), ("nodes", 3), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        calm = run_until_done(Path(folder, "calm"), args, 0)
        disturbed = run_until_done(Path(folder, "disturbed"), args, args.kills)
    missing, twice = {*calm.rounds} - {*disturbed.rounds}, len(disturbed.rounds) - len({*disturbed.rounds})
    others = sum(x != y for x, y in zip(calm.reported, disturbed.reported, strict=False))
    is_same = calm.digest == disturbed.digest
    found = {
        "kills": dict(disturbed.kills),
        "rounds": len(calm.rounds),
        "missing": len(missing),
        "twice": twice,
        "other_counts": others,
        "same_parameters": is_same,
    }
    print(json.dumps(found))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))
    sys.exit(0 if is_same and not missing and not twice and not others else 1)


if __name__ == "__main__":
    main()
