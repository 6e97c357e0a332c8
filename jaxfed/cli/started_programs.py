"""Programs that `jaxfed deploy` starts, all of which end with it."""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil

SERVER_LOOKS = 3.0  # seconds between two looks for the process of the ServerApp
GRACE = 10  # seconds in which processes end by themselves
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1"}


def make_environment(out: Path) -> dict[str, str]:
    """The environment of Flower's programs: they find each other, this package, and a home in the run's folder."""
    programs, package = str(Path(sys.executable).parent), str(Path(__file__).parents[2])
    path = os.pathsep.join([programs, os.environ.get("PATH", "")])
    python = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, **QUIET, "PATH": path, "PYTHONPATH": python, "FLWR_HOME": str(out / "flower")}


@contextlib.contextmanager
def launch_programs(out: Path) -> Iterator[Callable[[str, Sequence[str]], subprocess.Popen]]:
    """Yields start(name, words), whose output goes to OUT/flower/NAME.log; on leaving all have ended, and what they
    started, too."""
    started: list[subprocess.Popen] = []
    environment = make_environment(out)
    tied = ["setpriv", "--pdeathsig", "TERM"] if shutil.which("setpriv") else []  # they end if this process is killed

    def start(name, words):
        program = shutil.which(words[0], path=environment["PATH"])
        if program is None:
            raise ValueError(f"{words[0]} is missing: pip install 'jaxfed[flower]'")
        with open(out / "flower" / f"{name}.log", "ab") as file:
            started.append(
                subprocess.Popen(
                    [*tied, program, *words[1:]],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # a terminal's Ctrl-C comes to them from here
                )
            )
        return started[-1]

    try:
        yield start
    finally:
        exit_processes(started)


def list_descendants(started: Sequence[subprocess.Popen]) -> list[psutil.Process]:
    """Some processes, and all that these have started: Flower gives some of them sessions of their own."""
    found = []
    for each in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            found += [psutil.Process(each.pid), *psutil.Process(each.pid).children(recursive=True)]
    return found


def exit_processes(started: Sequence[subprocess.Popen]) -> None:
    """Ends some processes and all that these have started, by force where they do not end by themselves."""
    every = list_descendants(started)
    for each in every:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.terminate()
    end = time.monotonic() + GRACE
    while time.monotonic() < end and psutil.wait_procs(every, timeout=0.1)[1]:
        every += [each for each in list_descendants(started) if each not in every]
    for each in every:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    psutil.wait_procs(every, timeout=GRACE)
    for each in started:
        each.wait()


def watch_server() -> Callable[[], bool]:
    """ended() -> whether the process of the ServerApp was there and is gone, looked for every few seconds."""
    found: list[psutil.Process] = []
    next_look = 0.0

    def ended():
        nonlocal next_look
        if found:
            try:
                return not found[0].is_running() or found[0].status() == psutil.STATUS_ZOMBIE
            except psutil.NoSuchProcess:
                return True
        if time.monotonic() >= next_look:
            next_look = time.monotonic() + SERVER_LOOKS
            for each in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    found.extend([each] * any("flwr-serverapp" in word for word in each.cmdline()))
        return False

    return ended
