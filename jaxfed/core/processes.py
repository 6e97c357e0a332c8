"""Several processes that are one run: they come together, agree on what they are to do, and tell each other facts.

What is told here goes through the key-value store of JAX's coordination service, not through devices: programs that
span processes must be launched in one order everywhere, so only the main thread may; this is free to be used beside.
"""

import contextlib
import itertools
import os
import socket
import time
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple, TypeVar

import jax
from jax._src.distributed import global_state  # its store has no public name yet; Orbax uses it too

START, HEARTBEAT = 120, 30  # seconds: JAXFED_START_TIMEOUT, JAXFED_HEARTBEAT
PATIENCE = (
    24 * 3600 * 1000
)  # ms to wait for what another will say; one that dies ends this process within the heartbeat

T = TypeVar("T")


class Processes(NamedTuple):
    """Which process this is, of how many.

    meet(topic, words, combine) -> what `combine` makes, in process 0, of the words of all in their order. Every process
    must come, and to a topic always from the same thread.
    """

    rank: int = 0
    size: int = 1
    meet: Callable[[str, bytes, Callable[[list[bytes]], bytes]], bytes] = lambda topic, words, combine: combine([words])


def join_processes() -> Processes:
    """Makes this process one of several where the environment says so; before any other use of JAX.

    Either JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID, or a step of SLURM
    with several tasks, a TPU pod, or JAXFED_DISTRIBUTED=auto, for what JAX finds out by itself. Process 0 listens at
    that address alone (JAX_COORDINATOR_BIND_ADDRESS: at another one), and does not authenticate other processes: use a
    trusted network only. Raises ValueError where the processes do not come together in time.
    """
    address = os.environ.get("JAX_COORDINATOR_ADDRESS", "")
    several = environment_number("SLURM_STEP_NUM_TASKS", 1) > 1 or "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
    several = several or os.environ.get("JAXFED_DISTRIBUTED") == "auto"
    count, index = environment_number("JAX_NUM_PROCESSES", -1), environment_number("JAX_PROCESS_ID", -1)
    if count == 1 or not (address or several) or jax.distributed.is_initialized():
        return this_process()
    start, heartbeat = (
        environment_number("JAXFED_START_TIMEOUT", START),
        environment_number("JAXFED_HEARTBEAT", HEARTBEAT),
    )
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    times: dict[str, Any] = {"heartbeat_timeout_seconds": heartbeat, "shutdown_timeout_seconds": heartbeat}
    if several:
        jax.distributed.initialize(initialization_timeout=start, **times)
        return this_process()
    if not 0 <= index < count or not is_address(address):
        raise ValueError(
            "JAX_COORDINATOR_ADDRESS is set: it must be host:port, with JAX_NUM_PROCESSES processes "
            f"and a JAX_PROCESS_ID below that in each, not {address!r}, {count} and {index}"
        )
    door = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS") or address
    if not is_address(door):
        raise ValueError(f"JAX_COORDINATOR_BIND_ADDRESS must be host:port, not {door!r}")
    gather_processes(address, door, index, count, start)
    times |= {"initialization_timeout": start, "coordinator_bind_address": door}
    jax.distributed.initialize(address, count, index, cluster_detection_method="deactivate", **times)
    return this_process()


def is_address(address: str) -> bool:
    """Whether an address is a host and a port."""
    host, _, port = address.rpartition(":")
    return bool(host) and port.isdecimal() and 0 < int(port) < 1 << 16


def environment_number(name: str, default: int) -> int:
    """A whole number of the environment. Raises ValueError for something else."""
    text = os.environ.get(name, "") or str(default)
    if not text.removeprefix("-").isdecimal():
        raise ValueError(f"{name} is {text!r}: it must be a whole number")
    return int(text)


def gather_processes(address: str, door: str, rank: int, size: int, seconds: float) -> None:
    """Returns once all processes are there; ValueError after so many seconds. door: where process 0 listens.

    JAX would wait as well, but ends a process that waited in vain by an abort, with a stack trace for a message.
    """
    host, _, port = address.rpartition(":")
    end = time.monotonic() + seconds
    if rank:
        call_process(host.strip("[]"), int(port), f"jaxfed {rank} of {size}\n".encode(), end)
        if time.monotonic() < end:
            return
        raise ValueError(
            f"the coordinator at {address} did not answer within {seconds} s: start process 0 of {size} there, "
            "or wait longer (JAXFED_START_TIMEOUT)"
        )
    guests: dict[bytes, socket.socket] = {}
    try:
        receive_processes(door, guests, {f"jaxfed {i} of {size}\n".encode() for i in range(1, size)}, end)
    except OSError as error:
        raise ValueError(f"no coordinator can be at {door}: {error.strerror or error}") from None
    finally:
        for guest in guests.values():
            guest.close()
    if len(guests) < size - 1:
        raise ValueError(
            f"{len(guests) + 1} of {size} processes came to {address} within {seconds} s: start the others, wait "
            "longer (JAXFED_START_TIMEOUT), or make process 0 listen on an address the others can reach "
            "(JAX_COORDINATOR_BIND_ADDRESS=host:port)"
        )


def call_process(host: str, port: int, word: bytes, end: float) -> None:
    """Says who this is to process 0 until it says the same back, or it is `end`."""
    while (left := end - time.monotonic()) > 0:
        with contextlib.suppress(OSError), socket.create_connection((host, port), left) as line:
            line.settimeout(max(end - time.monotonic(), 0.01))
            line.sendall(word)
            if line.recv(len(word)) == word:
                return
        time.sleep(0.1)


def receive_processes(address: str, guests: dict[bytes, socket.socket], names: set[bytes], end: float) -> None:
    """Waits at an address for guests of these names until all are there, and tells each; or until it is `end`."""
    host, _, port = address.rpartition(":")
    family, *_, place = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
    with socket.create_server(place, family=family) as door:
        while guests.keys() != names and (left := end - time.monotonic()) > 0:
            door.settimeout(left)
            with contextlib.suppress(TimeoutError, ConnectionError):
                guest, _ = door.accept()
                guest.settimeout(1)
                if (name := guest.recv(100)) in names:
                    guests[name] = guest
        for name, guest in guests.items() if guests.keys() == names else ():
            guest.sendall(name)


def this_process() -> Processes:
    """This process among those of `jax.distributed`, or alone."""
    return joined_process() if jax.distributed.is_initialized() else Processes()


@cache
def joined_process() -> Processes:
    """This process among others. Cached, as meetings are counted."""
    client: Any = global_state.client
    index, count = jax.process_index(), jax.process_count()
    numbers: dict[str, itertools.count] = defaultdict(itertools.count)

    def meet(topic, words, combine):
        turn = next(numbers[topic])
        place = f"jaxfed/{topic}/{turn}"
        if index:
            client.key_value_set_bytes(f"{place}/{index}", words)
            return client.blocking_key_value_get_bytes(f"{place}/all", PATIENCE)
        all_words = [words, *(client.blocking_key_value_get_bytes(f"{place}/{i}", PATIENCE) for i in range(1, count))]
        combined = combine(all_words)
        client.key_value_set_bytes(f"{place}/all", combined)
        for i in range(1, count):
            client.key_value_delete(f"{place}/{i}")
        client.key_value_delete(f"jaxfed/{topic}/{turn - 1}/all")  # all are here, so all have read it
        return combined

    return Processes(index, count, meet)


def agree_on(here: Processes, what: str, work: Callable[[], T], mark: Callable[[T], str]) -> T:
    """Each process does the work; its result, where all succeeded and all have the same mark.

    Else process 0 raises its own error, or ValueError with one line that says who differs, and the others leave
    without a word: SystemExit(2).
    """
    if here.size == 1:
        return work()
    made, error = None, None
    try:
        made = work()
        words = "=" + mark(made)
    except (ValueError, OSError) as problem:
        error, words = problem, f"!{problem}"
    verdict = here.meet(
        what, words.encode(), lambda found: find_disagreement(what, [each.decode() for each in found]).encode()
    )
    if not verdict:
        return made  # type: ignore[return-value]
    if here.rank:
        raise SystemExit(2)
    raise error or ValueError(verdict.decode())


def find_disagreement(what: str, by_process: list[str]) -> str:
    """What is wrong with the words of all processes: `!error` or `=mark`; nothing where all say the same."""
    first = by_process[0].splitlines()
    for index, words in enumerate(by_process):
        if words.startswith("!"):
            return f"process {index}: {words[1:]}"
    for index, words in enumerate(by_process):
        if words != by_process[0]:
            pairs = itertools.zip_longest(first, words.splitlines(), fillvalue="")
            one, other = next(pair for pair in pairs if pair[0] != pair[1])
            return (
                f"process {index} has another {what} than process 0 ({other.lstrip('=')} instead of "
                f"{one.lstrip('=')}): start all processes with the same"
            )
    return ""


def run_on_first(here: Processes, what: str, work: Callable[[], str]) -> str:
    """Process 0 does the work, all have its result; where it raises, the others leave without a word."""
    text = ""

    def work_on_first():
        nonlocal text
        text = work() if here.rank == 0 else ""

    agree_on(here, what, work_on_first, lambda made: "")
    return here.meet(what, text.encode(), lambda words: words[0]).decode()
