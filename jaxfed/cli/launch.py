"""`jaxfed launch --processes 2 -- train CONFIG.toml ...`: several processes on this machine.

Only process 0's output is shown; of another process, only the error that ended the run. Ctrl-C is passed on once
to all, who finish the round and leave with a checkpoint. Exit code: that of the process that ended first otherwise than
well.
"""

import argparse
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

HEARTBEAT, START = 30, 120  # seconds, as in jaxfed/processes.py, which takes long to import
# Windows has no SIGHUP; what is not Ctrl-C is passed on as SIGTERM
PASSED_ON = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
GRACE = 10  # seconds beyond the heartbeat before what is left is ended here


def add_launch_options(command: Any) -> None:
    """Adds the command; `command(name, help, ...)` makes a parser. After -- comes the program's own line."""
    launch = command(
        "launch",
        "Run a jaxfed command in several processes on this machine, to test a multi-process run.",
        "Only process 0's output is shown; of another process, only the error that ended the run.",
        usage="jaxfed launch [options] -- COMMAND ...",
    )
    launch.add_argument("--processes", type=int, default=2, help="number of processes (2)")
    launch.add_argument("--local-devices", type=int, default=1, help="simulated CPU devices per process (1)")
    launch.add_argument(
        "--heartbeat", type=int, default=HEARTBEAT, help=f"seconds until a dead process is noticed ({HEARTBEAT})"
    )
    launch.add_argument("--start-timeout", type=int, default=START, help=f"seconds for all to come together ({START})")
    launch.add_argument(
        "words", nargs="+", metavar="-- COMMAND ...", help="command that each process runs, e.g. train CONFIG.toml"
    )


def process_environment(args: argparse.Namespace, index: int, port: int) -> dict[str, str]:
    """What tells a process who it is."""
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
    return {
        **os.environ,
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(args.processes),
        "JAX_PROCESS_ID": str(index),
        "JAXFED_HEARTBEAT": str(args.heartbeat),
        "JAXFED_START_TIMEOUT": str(args.start_timeout),
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={args.local_devices}".strip(),
    }


def find_free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def forward_output(source) -> None:
    """Process 0's standard output without the lines in which gloo announces itself."""
    for line in source:
        if not line.startswith("[Gloo]"):
            sys.stdout.write(line)
            sys.stdout.flush()


def describe_exit(code: int) -> str:
    """How a process ended, in words."""
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def print_line(text: str) -> None:
    """One line."""
    print(f"launch: {text}", file=sys.stderr, flush=True)


def print_errors(error_files: list) -> None:
    """Shows what processes beside 0 said of an error of their own."""
    for index, file in enumerate(error_files[1:], 1):
        file.seek(0)
        lines = file.read().splitlines()
        begin = next((i for i, line in enumerate(lines) if line.startswith(("jaxfed: ", "Traceback"))), len(lines))
        length = 1 if "".join(lines[begin : begin + 1]).startswith("jaxfed") else 30
        for line in lines[begin : begin + length]:
            print(f"process {index}: {line}", file=sys.stderr)


def watch_processes(
    args: argparse.Namespace, processes: list[subprocess.Popen], error_files: list, passed: list[int]
) -> int:
    """Waits for all; returns the exit code; where one died, says which and how to go on. passed: signals sent on."""
    first, deadline, forced = None, 0.0, False
    while any(each.poll() is None for each in processes):
        time.sleep(0.05)
        failed = [i for i, each in enumerate(processes) if each.poll() not in (None, 0)]
        if failed and first is None:
            first, deadline = failed[0], time.monotonic() + args.heartbeat + GRACE
            code = processes[first].returncode
            if code != 2 and not passed:
                print_line(
                    f"process {first} {describe_exit(code)}; "
                    f"the others will stop within {args.heartbeat} s (--heartbeat)"
                )
        if first is not None and time.monotonic() > deadline and not forced:
            forced = True
            for each in processes:
                each.kill()
    failed = [i for i, each in enumerate(processes) if each.returncode]
    if not failed:
        return 0
    first = failed[0] if first is None else first
    code = processes[first].returncode
    words = [word for word in args.words if word != "--resume"]
    layout = f"--processes {args.processes} --local-devices {args.local_devices}"
    again = f"jaxfed launch {layout} -- {shlex.join(words)} --resume"
    if passed:
        print_line(f"stopped; to go on in as many processes: {again}")
        return 128 + passed[0]
    if code > 0 or code == -signal.SIGABRT:  # of its own making, or of another's that JAX then ended
        print_errors(error_files)
    if code != 2:
        print_line(
            f"process {first} of {args.processes} {describe_exit(code)}, and with it the run; go on with: {again}"
        )
    return code if code > 0 else 128 - code


def launch_processes(args: argparse.Namespace) -> int:
    """jaxfed launch; returns the exit code."""
    if args.processes < 1 or args.local_devices < 1 or args.heartbeat < 1 or args.start_timeout < 1:
        raise ValueError("--processes, --local-devices, --heartbeat and --start-timeout must be at least 1")
    if args.words[0] == "jaxfed":  # the command as one types it alone
        args.words = args.words[1:]
    if not args.words:
        raise ValueError("launch runs a command of jaxfed: jaxfed launch -- train CONFIG.toml")
    port, error_files, processes = find_free_port(), [], []
    for index in range(args.processes):
        error_files.append(tempfile.TemporaryFile("w+", errors="replace"))  # noqa: SIM115  closed when this program ends
        processes.append(
            subprocess.Popen(
                [sys.executable, "-u", "-m", "jaxfed", *args.words],
                env=process_environment(args, index, port),
                stdout=error_files[-1] if index else subprocess.PIPE,
                stderr=error_files[-1] if index else None,
                text=True,
                errors="replace",
                start_new_session=True,  # a terminal's Ctrl-C comes to them from here, and once
            )
        )
    reader = threading.Thread(target=forward_output, args=(processes[0].stdout,), daemon=True)
    reader.start()

    passed: list[int] = []

    def pass_on(number, frame):
        passed.append(number)
        for each in processes:
            if each.poll() is None:
                each.send_signal(number if number == signal.SIGINT else signal.SIGTERM)

    for number in PASSED_ON:
        signal.signal(number, pass_on)
    code = watch_processes(args, processes, error_files, passed)
    reader.join(5)
    return code
