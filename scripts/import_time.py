"""How long imports take, beside that of JAX, Flax and Optax: the least CPU seconds of some tries, each in a process.

python scripts/import_time.py

`import jaxfed` may take 1.5 times as long as `import jax, flax, optax`, `jaxfed --help` one second. Exits with 1 where
it is more.
"""

import argparse
import resource
import subprocess
import sys
import time

BASE = "import jax, flax, optax"
STATEMENTS = {
    "import jaxfed": "import jaxfed",
    "all that a run imports": "import jaxfed.training.loop, jaxfed.training.sweep, jaxfed.config.overrides",
}
MOST, HELP = 1.5, 1.0  # times the base; seconds


def cpu_and_wall(command: list[str]) -> tuple[float, float]:
    """(CPU seconds, seconds) of a process."""
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after, seconds = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - begin
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, seconds


def main() -> None:
    """Prints a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=5, help="processes of each, of which the quickest counts")
    tries = parser.parse_args().tries

    def least(*words):
        return [min(each) for each in zip(*(cpu_and_wall([sys.executable, *words]) for _ in range(tries)), strict=True)]

    base, slow = least("-c", BASE)[0], False
    print(f"{BASE:>40}  {base:.2f} s of CPU")
    for name, code in STATEMENTS.items():
        cpu = least("-c", code)[0]
        slow |= cpu > MOST * base
        print(f"{name:>40}  {cpu:.2f} s of CPU, {cpu / base:.2f} times as long (at most {MOST})")
    wall = least("-m", "jaxfed", "--help")[1]
    slow |= wall > HELP
    print(f"{'jaxfed --help':>40}  {wall:.2f} s (at most {HELP:g} s)")
    sys.exit(int(slow))


if __name__ == "__main__":
    main()
