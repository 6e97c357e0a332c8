"""Makes the model of a finished run smaller: heads, units of feed-forward layers and rows of items are removed.

python scripts/structured_pruning.py RUN [--heads 2] [--hidden 64] [--rows 0.5]

RUN is the folder of a run of `sasrec` or `bert4rec`. The weakest heads and units of each block are removed, and the
rows of items with the fewest train interactions among the clients of the last rounds. There is no more training.
Prints, for the best model before and after: numbers of the dense part, bytes that a client with 300 rows would send,
bytes of the model at the server, and the figures of the test.
"""

import argparse
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxfed.cli.main import set_up_process
from jaxfed.config.build import RunParts, build_from_config
from jaxfed.config.config_files import read_config
from jaxfed.config.schema import make_config
from jaxfed.core.tables import unwrap, wrap
from jaxfed.core.tree import count_bytes
from jaxfed.core.types import Tree
from jaxfed.models.structured_pruning import merge_rows, shrink_blocks
from jaxfed.training.best_model import open_best_model
from jaxfed.training.rounds import evaluate_model

HELD = 300  # rows of a client whose bytes are printed
SHOWN = ("test/full/hr@10", "test/full/ndcg@10")


def count_use(parts: RunParts, seed: int, rounds: range) -> np.ndarray:
    """int [items]: train interactions of the clients that some rounds asked, each client counted once a round."""
    population, use = parts.data.population, np.zeros(parts.data.num_items, np.int64)
    for number in rounds:
        ids, present = parts.sampler.draw(seed, number)
        asked = np.isin(population.client_of, ids[present & (ids < population.num_clients)])
        use += np.bincount(population.train.some(np.flatnonzero(asked)).values, minlength=len(use))
    return use


def print_model(name: str, parts: RunParts, shared: Tree, key: jax.Array, merged: int = 0) -> None:
    """A line of the table. merged: rows of items of which one is stored, beside an id of each row."""
    figures = evaluate_model(parts, (wrap_tables(shared), ()), "test", key)
    dense, table = count_bytes(shared["params"]), count_bytes(shared["tables"])
    rows = parts.data.num_items
    table = table - table * max(merged - 1, 0) // rows + 4 * rows * bool(merged)
    sent = int(parts.wire.up(np.array([HELD]))[0])
    print(f"{name:24} {dense // 4:>8,} {sent:>8,} {dense + table:>9,} " + " ".join(f"{figures[x]:.4f}" for x in SHOWN))


def wrap_tables(shared: Tree) -> Tree:
    """Plain parameters with their tables marked."""
    return {**shared, "tables": wrap(shared["tables"])}


def main() -> None:
    """Opens the run, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--heads", type=int, default=0, help="heads that each block keeps; 0: all")
    parser.add_argument("--hidden", type=int, default=0, help="units that each feed-forward layer keeps; 0: all")
    parser.add_argument("--rows", type=float, default=0.0, help="share of the rows of items that is dropped")
    parser.add_argument("--last", type=int, default=100, help="rounds whose clients say which rows are in use")
    args = parser.parse_args()
    set_up_process()
    table: dict[str, Any] = read_config(Path(args.run) / "config.toml")
    parts, keys, (marked, _) = open_best_model(args.run)
    shared = unwrap(marked)
    print(f"{'':24} {'dense':>8} {'sent':>8} {'stored':>9} " + " ".join(SHOWN))
    print_model("as it is", parts, shared, keys.evaluation)
    width = shared["params"]["encoder"]["block_0"]["attention"]["value"]["kernel"].shape[2]
    sizes = {"heads": args.heads, "head_width": width} if args.heads else {}
    sizes |= {"hidden_width": args.hidden} if args.hidden else {}
    if sizes:
        parts = build_from_config(make_config({**table, "model": {**table["model"], **sizes}}), parts.data)
        shared = shrink_blocks(shared, args.heads, args.hidden)
        print_model(" ".join(f"{name} {size}" for name, size in sizes.items()), parts, shared, keys.evaluation)
    if args.rows:
        config = make_config(table)
        use = count_use(parts, config.seed, range(max(config.rounds - args.last, 0), config.rounds))
        dropped = np.argsort(use, kind="stable")[: int(args.rows * len(use))]
        kept = ~np.isin(np.arange(len(shared["tables"]["item"])), dropped)
        shared = {**shared, "tables": {**shared["tables"], "item": merge_rows(shared["tables"]["item"], kept)}}
        print_model(f"rows -{args.rows:.0%}", parts, shared, keys.evaluation, len(dropped))


if __name__ == "__main__":
    main()
