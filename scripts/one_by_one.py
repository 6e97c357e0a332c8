"""How much faster it is to train the clients of a cohort in one program. Times rounds of a configuration as they are,
in turn with the same rounds in which each block has one client. Prints the temporary memory of a block, too.

python scripts/one_by_one.py configs/ml100k_sasrec.toml [--clients 128] [--rounds 20] [--KEY VALUE ...]
"""

import argparse
import statistics
from functools import partial

import jax

from jaxfed.bench.workloads import SEED, jaxfed_runner, measure_in_turn
from jaxfed.cli.main import set_up_process
from jaxfed.config.build import RunParts, build_from_config, load_data
from jaxfed.config.config_files import read_config
from jaxfed.config.overrides import override_config
from jaxfed.core.client import run_client_block
from jaxfed.data.packing import empty_cohort
from jaxfed.training.rounds import initial_arrays, make_run_keys

LARGE_AREA = 1 << 30  # of a block, in steps: all clients of a cohort fit into one


def make_parts(path: str, clients: int, area: int, changes: list[str]) -> RunParts:
    """The parts of a configuration with so many clients a round, in blocks of `area` steps."""
    fixed = ["--cohort.name", "uniform", "--cohort.size", str(clients), "--evaluation.clients", "100"]
    config = override_config(read_config(path), [*fixed, "--run.area", str(area), *changes])
    return build_from_config(config, load_data(config.data))


def measure_memory(parts: RunParts) -> int:
    """Bytes of temporary memory of the program of the longest block."""
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
    return analysis.temp_size_in_bytes


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--clients", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=20, help="of each, at least")
    args, changes = parser.parse_known_args()
    set_up_process()
    together, alone = (make_parts(args.config, args.clients, area, changes) for area in (0, 1))
    times = measure_in_turn({"together": jaxfed_runner(together), "one": jaxfed_runner(alone)}, args.rounds, 100.0)
    medians = {name: statistics.median(each) for name, each in times.items()}
    print("| clients | ms a round | one client a block | ratio |\n|---|---|---|---|")
    print(
        f"| {args.clients} | {1e3 * medians['together']:.1f} | {1e3 * medians['one']:.1f} | "
        f"{medians['one'] / medians['together']:.2f} |"
    )
    memory = {
        clients: measure_memory(make_parts(args.config, clients, LARGE_AREA, changes))
        for clients in (max(args.clients // 2, 1), args.clients)
    }
    print("\n| clients in a block | temporary memory, MB |\n|---|---|")
    for clients, size in memory.items():
        print(f"| {clients} | {size / 1e6:.1f} |")


if __name__ == "__main__":
    main()
