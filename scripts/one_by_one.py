"""How much faster it is to train the clients of a cohort in one program, and how much memory it takes. Times rounds of
a configuration as they are, in turn with the same rounds in which each block has one client. Then prints the memory of
the compiled program of a block with so many clients, and with twice as many.

python scripts/one_by_one.py configs/ml100k_sasrec.toml [--clients 128] [--rounds 20] [--KEY VALUE ...]
python scripts/one_by_one.py configs/ml100k_text_lora.toml --clients 64 --memory

Beside the times it prints how many local steps are computed for each one that the clients have: in a block, short
clients are padded to the longest. With --run.area N, blocks of N steps are compared with those of one client.

With --memory two rounds are run as they are, in place of the comparison: the most memory that this process held, before
them and by their end, and the time of the second one. Programs that a round needs first are compiled within its time.
"""

import argparse
import statistics
import time
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxfed.bench.runners import SEED, jaxfed_runner
from jaxfed.bench.workloads import measure_in_turn
from jaxfed.cli.main import set_up_process
from jaxfed.config.build import RunParts, build_from_config, load_data
from jaxfed.config.config_files import read_config
from jaxfed.config.overrides import override_config
from jaxfed.core.client import run_client_block
from jaxfed.data.batching import measure_clients
from jaxfed.data.blocks import plan_blocks
from jaxfed.data.packing import empty_cohort
from jaxfed.training.rounds import initial_arrays, make_run_keys, run_rounds
from jaxfed.training.timing import peak_megabytes

LARGE_AREA = 1 << 30  # of a block, in steps: all clients of a cohort fit into one


def fix_cohort(clients: int, changes: list[str]) -> list[str]:
    """Options of the command line for so many clients a round."""
    return ["--cohort.name", "uniform", "--cohort.size", str(clients), "--evaluation.clients", "100", *changes]


def make_parts(path: str, clients: int, area: int, changes: list[str]) -> RunParts:
    """The parts of a configuration with so many clients a round, in blocks of `area` steps; 0: as configured."""
    blocks = ["--run.area", str(area)] if area else []
    config = override_config(read_config(path), [*fix_cohort(clients, changes), *blocks])
    return build_from_config(config, load_data(config.data))


def measure_block_memory(parts: RunParts) -> Any:
    """What XLA says of the memory of the program of the longest block."""
    step = parts.algorithm.step
    assert isinstance(step, partial)  # `run_round` of these
    plan, _, frozen = step.args
    cohort = empty_cohort(parts.data.population, parts.batching, parts.shapes)
    state = jax.eval_shape(lambda: initial_arrays(parts, SEED)["state"])
    key, block = make_run_keys(SEED).rounds, cohort.blocks[-1]
    run = jax.jit(lambda *args: run_client_block(plan, *args))
    given = state, cohort.ids, cohort.present, cohort.rows, None, key, block, None, None, frozen.clients
    analysis = run.lower(*given).compile().memory_analysis()
    assert analysis  # every back end that is built in has one
    return analysis


def print_block_memory(path: str, clients: int, changes: list[str]) -> None:
    """Prints a table of the memory of blocks with so many clients, and with twice as many."""
    print("\n| clients in a block | arguments, MB | temporary, MB | of each further client, MB |\n|---|---|---|---|")
    before = 0
    for count in (clients, 2 * clients):
        found = measure_block_memory(make_parts(path, count, LARGE_AREA, changes))
        arguments, temporary = found.argument_size_in_bytes / 1e6, found.temp_size_in_bytes / 1e6
        more = f"{(temporary - before) / clients:.1f}" if before else ""
        print(f"| {count} | {arguments:,.0f} | {temporary:,.0f} | {more} |", flush=True)
        before = temporary


def print_peak_memory(path: str, clients: int, changes: list[str]) -> None:
    """Runs two rounds, and prints the most memory that the process held until their end."""
    config = override_config(read_config(path), fix_cohort(clients, changes))
    parts = build_from_config(config, load_data(config.data))
    loaded, ends = peak_megabytes(), []
    for done in run_rounds(parts, initial_arrays(parts, SEED)["state"], SEED, 0, 2):
        jax.block_until_ready(done.state)
        ends.append(time.perf_counter())
    print("| clients | most memory before the rounds, MB | with the rounds, MB | second round, s |\n|---|---|---|---|")
    print(f"| {clients} | {loaded:,.0f} | {peak_megabytes():,.0f} | {ends[1] - ends[0]:.1f} |", flush=True)


def measure_padding(parts: RunParts, rounds: int = 50) -> float:
    """The steps that blocks compute in some rounds, for each step that their clients have."""
    computed = needed = 0
    for number in range(rounds):
        ids, _ = parts.sampler.draw(SEED, number)
        sizes = measure_clients(parts.data.population, parts.batching, ids)
        computed += plan_blocks(parts.shapes, sizes, np.zeros(len(ids), int)).sizes[1]
        needed += sizes.steps.sum()
    return computed / needed


def print_times(path: str, clients: int, rounds: int, changes: list[str]) -> None:
    """Prints a table of the times of rounds, with blocks as they are and with one client in a block."""
    together, alone = (make_parts(path, clients, area, changes) for area in (0, 1))
    times = measure_in_turn({"together": jaxfed_runner(together), "one": jaxfed_runner(alone)}, rounds, 100.0)
    medians = {name: statistics.median(each) for name, each in times.items()}
    print(
        "| clients | ms a round | one client a block | ratio | steps computed for each needed |\n|---|---|---|---|---|"
    )
    print(
        f"| {clients} | {1e3 * medians['together']:.1f} | {1e3 * medians['one']:.1f} | "
        f"{medians['one'] / medians['together']:.2f} | {measure_padding(together):.2f} |",
        flush=True,
    )


def main() -> None:
    """Prints Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--clients", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=20, help="of each, at least")
    parser.add_argument("--memory", action="store_true", help="of two rounds and of their programs, in place of times")
    args, changes = parser.parse_known_args()
    set_up_process()
    if args.memory:
        print_peak_memory(args.config, args.clients, changes)
    else:
        print_times(args.config, args.clients, args.rounds, changes)
    print_block_memory(args.config, args.clients, changes)


if __name__ == "__main__":
    main()
