"""What each compressor costs in quality and saves in bytes: trains a configuration with every one of them in turn.

python scripts/rate_quality.py [--rounds 400] [--seeds 0 1 2] [--only "quantize 8" "top_k 10 %"] [--section.key value]

Each row is a `jaxfed train` in a folder of its own under runs/rate_quality, resumed where it was. Writes table.md
(and, with --page docs/results/compression.md, the table there), rows.json (a flat object for each method and seed)
and figure.png (HR@10 on the full catalogue against bytes; needs `pip install matplotlib`). Test metrics of the best
round by validation; mean and standard deviation over seeds, relative figures are those of the same seed.
"""

import argparse
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxfed.bench.pages import write_page
from jaxfed.config.build import build_from_config, load_data
from jaxfed.config.config_files import read_config
from jaxfed.config.schema import LINKS, make_config
from jaxfed.core import tables, wire
from jaxfed.core.link import broadcast_state, encode_message
from jaxfed.core.streams import CLIENTS
from jaxfed.core.tree import to_compute_dtype
from jaxfed.core.types import ClientView
from jaxfed.training import checkpoint
from jaxfed.training.rounds import initial_arrays, make_run_keys, prepare_round
from jaxfed.training.run_dir import write_file
from jaxfed.training.runs import train_in_process

METRICS = ("test/full/hr@10", "test/full/ndcg@10", "test/sampled/hr@10", "test/sampled/ndcg@10")
PLAIN = "none"


def link(name: str, **values: Any) -> dict[str, Any]:
    """A link's section."""
    return {"name": name, **values}


def methods(base: list[dict[str, Any]], dim: int) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """{name: sections of a configuration}: codes to the right of the base's links."""
    codes: dict[str, list[dict[str, Any]]] = {PLAIN: []}
    codes |= {f"quantize {bits}": [link("quantize", bits=bits)] for bits in (8, 4, 2)}
    codes |= {f"rotate, quantize {bits}": [link("rotate"), link("quantize", bits=bits)] for bits in (4, 2)}
    codes |= {"drive": [link("drive")], "sign": [link("sign")], "sign, no feedback": [link("sign", keep_error=False)]}
    codes |= {f"top_k {share} %": [link("top_k", share=share / 100)] for share in (1, 3, 10, 30)}
    codes |= {f"random_k {share} %": [link("random_k", share=share / 100)] for share in (10, 30)}
    ranks = {rank: [link("low_rank", rank=rank, gain=0.0)] for rank in (2, 4, 8, 16, 32) if rank < dim}
    codes |= {f"low_rank {rank}": chosen for rank, chosen in ranks.items()}
    codes |= {f"low_rank {rank}, quantize 4": [*ranks[rank], link("quantize", bits=4)] for rank in (4, 8) if rank < dim}
    made = {name: {"channel": [*base, *code], "download": []} for name, code in codes.items()}
    for name in ("rotate, quantize 2", "top_k 10 %", "sign"):
        made[f"difference, {name}"] = {"channel": [link("difference"), *base, *codes[name]], "download": []}
    for bits in (8, 4):
        made[f"download quantize {bits}"] = {"channel": base, "download": [link("quantize", bits=bits)]}
    for bits, bound in ((20, 2.0), (16, 32.0)):  # 32 bits hold the sum of a thousand clients up to that; beyond is cut
        made[f"ring {bits}"] = {"channel": [*base, link("ring", fraction_bits=bits, bound=bound)], "download": []}
    return made


def coded_share(run: Path, sample: int) -> float | None:
    """`wire.entropy` as a share of the packed size, of the messages that a sample of clients would send after the last
    round of a run; None where they hide all but their sum."""
    config = make_config(read_config(run / "config.toml"))
    made = build_from_config(config, load_data(config.data))
    if made.channel.claims.reveals != "message":
        return None
    with checkpoint.open_checkpoints(run / "checkpoints", config.run.keep) as kept:
        found = checkpoint.restore_newest(kept, initial_arrays(made, config.seed), print)
    assert found
    state, size, number = found[0]["state"], made.shapes.end, int(found[0]["state"].round)
    cohort = prepare_round(made, config.seed, number).cohort
    key = jax.random.fold_in(make_run_keys(config.seed).rounds, number)

    @jax.jit
    def message(id, held, num_train, data):
        mine, theirs = tables.gather_client(state.client_states, id, held)
        secret, noise = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, CLIENTS), id))
        report = made.method.work.update(to_compute_dtype(tables.take_rows(state.shared, held)), mine, data, secret)
        me = ClientView(theirs, noise, key, id, report.weight, num_train, held, size, jnp.asarray(cohort.ids))
        return encode_message(
            made.channel, report.update, tables.take_rows(broadcast_state(made.channel, state.channel), held), me
        )[0]

    asked = np.flatnonzero(np.asarray(cohort.ids) < made.data.population.num_clients)
    chosen = np.random.default_rng(0).choice(asked, min(sample, len(asked)), replace=False)
    coded, packed = 0.0, 0
    for block in cohort.blocks:
        slots, held = np.asarray(block.slots), np.asarray(block.rows)
        held = held if cohort.rows is None else np.append(cohort.rows, size)[np.minimum(held, len(cohort.rows))]
        for j in np.flatnonzero(np.isin(slots, chosen)):
            data = jax.tree.map(lambda x, j=j: jnp.asarray(x[j]), block.data)
            sent = message(jnp.int32(cohort.ids[slots[j]]), jnp.asarray(held[j]), jnp.asarray(block.num_train[j]), data)
            count = int((held[j] < size).sum())
            coded, packed = (
                coded + wire.entropy_bytes(jax.device_get(sent), count),
                packed + int(wire.message_bytes(sent, count)),
            )
    return coded / packed


def row(name: str, seed: int, summary: dict[str, Any], share: float | None) -> dict[str, Any]:
    """A method's figures with one seed, flat."""
    facts = ("rounds", "best_round", "seconds", "bytes_up_per_client", "bytes_down_per_client", "server_sees")
    values = {key: summary[key] for key in (*METRICS, *facts)}
    coded = None if share is None else share * summary["bytes_up_per_client"]
    return {"method": name, "seed": seed, **values, "entropy_bytes_up_per_client": coded}


def summarised(every: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One flat object a method: mean and sd over its seeds; NDCG@10 relative to the plain run of the same seed."""
    plain = {each["seed"]: each for each in every if each["method"] == PLAIN}
    out = []
    for name in dict.fromkeys(each["method"] for each in every):
        mine = [each for each in every if each["method"] == name]
        made: dict[str, Any] = {"method": name, "seeds": len(mine)}
        columns = {metric: [each[metric] for each in mine] for metric in METRICS}
        for part in ("full", "sampled"):
            metric = f"test/{part}/ndcg@10"
            pairs = [(each[metric], plain[each["seed"]][metric]) for each in mine if each["seed"] in plain]
            columns[f"relative/{part}"] = [100 * (value / of - 1) for value, of in pairs]
        for key, values in columns.items():
            made[key] = statistics.mean(values) if values else math.nan
            made[f"{key}_sd"] = statistics.stdev(values) if len(values) > 1 else math.nan
        for key in ("bytes_up_per_client", "bytes_down_per_client", "entropy_bytes_up_per_client"):
            known = [each[key] for each in mine if each[key] is not None]
            made[key] = statistics.mean(known) if known else math.nan
        out.append(made)
    return out


def spread(value: float, sd: float, digits: int) -> str:
    """`mean`, or `mean ± sd`."""
    text = "n/a" if math.isnan(value) else f"{value:+.{digits}f}" if digits == 1 else f"{value:.{digits}f}"
    return text if math.isnan(sd) else f"{text} ± {sd:.{digits}f}"


def markdown(every: list[dict[str, Any]]) -> str:
    """The table."""
    heads = ["HR@10, full", "NDCG@10, full", "HR@10, 99", "NDCG@10, 99"]
    heads += ["NDCG@10 full, %", "NDCG@10 99, %", "bytes up", "bytes down", "entropy"]
    lines = [f"| method | {' | '.join(heads)} | seeds |", "|---" + "|---:" * (len(heads) + 1) + "|"]
    for each in every:
        cells = [spread(each[metric], each[f"{metric}_sd"], 4) for metric in METRICS]
        cells += [spread(each[f"relative/{part}"], each[f"relative/{part}_sd"], 1) for part in ("full", "sampled")]
        sizes = ("bytes_up_per_client", "bytes_down_per_client", "entropy_bytes_up_per_client")
        cells += ["n/a" if math.isnan(each[key]) else f"{each[key]:,.0f}" for key in sizes]
        lines.append(f"| {each['method']} | {' | '.join(cells)} | {each['seeds']} |")
    return "\n".join(lines) + "\n"


def ticks(low: float, high: float) -> list[int]:
    """1, 2 and 5 times the powers of ten between two numbers."""
    return [k * 10**n for n in range(12) for k in (1, 2, 5) if low <= k * 10**n <= high]


def draw(every: list[dict[str, Any]], path: Path) -> None:
    """HR@10 on the full catalogue against the bytes that the method is about; names in a column, joined to points."""
    try:
        import matplotlib
    except ImportError:
        print("no figure: matplotlib is missing: pip install matplotlib")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    height = max(4.0, 0.27 * len(every))
    figure, axes = pyplot.subplots(figsize=(9, height), layout="constrained")
    metric, down = "test/full/hr@10", [each["method"].startswith("download") for each in every]
    order = sorted(range(len(every)), key=lambda i: every[i][metric])
    for place, i in enumerate(order):
        each, colour = every[i], "tab:orange" if down[i] else "tab:blue"
        x = each["bytes_down_per_client" if down[i] else "bytes_up_per_client"]
        sd = each[f"{metric}_sd"]
        shape = {"fmt": "s" if down[i] else "o", "color": colour, "markersize": 4, "elinewidth": 0.7}
        axes.errorbar(x, each[metric], None if math.isnan(sd) else sd, **shape)
        axes.annotate(
            each["method"], (x, each[metric]), (1.06, (place + 0.5) / len(every)), textcoords="axes fraction",
            fontsize=8, va="center", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": "0.8", "linewidth": 0.6, "shrinkB": 3, "relpos": (0, 0.5)},
        )  # fmt: skip
    axes.set(xscale="log", xlabel="bytes per client and round: up (circles), down (squares)")
    axes.set_ylabel("test HR@10, full catalogue")
    axes.xaxis.set_minor_formatter("")
    axes.set_xticks(*zip(*((x, f"{x:,}") for x in ticks(*axes.get_xlim())), strict=True))
    axes.grid(True, which="both", alpha=0.2)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> None:
    """Trains method by method; table, rows and figure are written after each."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--config", default="configs/ml100k_fedavg.toml")
    parser.add_argument("--rounds", type=int, help="default: those of the configuration")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="methods; the plain run comes with them")
    parser.add_argument("--sample", type=int, default=32, help="clients whose messages the entropy is the mean of")
    parser.add_argument("--out", default="runs/rate_quality", help="folder of the runs and of what is written")
    parser.add_argument("--page", metavar="FILE", help="page of docs/results whose table is written, too")
    args, overrides = parser.parse_known_args()
    table = read_config(args.config)
    table["rounds"] = args.rounds or table.get("rounds", 100)
    table.pop("run", None)
    known = methods(table.get("channel", list(LINKS)), table.get("model", {}).get("dim", 32))
    if unknown := set(args.only or ()) - set(known):
        sys.exit(f"no method {sorted(unknown)[0]!r}; there are {', '.join(known)}")
    asked = [name for name in known if not args.only or name in {PLAIN, *args.only}]
    kind = "_".join([Path(args.config).stem, f"{table['rounds']}_rounds", *(x.strip("-") for x in overrides)])
    out, every = Path(args.out) / kind, []
    for name in asked:
        for seed in args.seeds:
            folder = out / f"{name.replace(' ', '_').replace(',', '')}_{seed}"
            summary = train_in_process(table | known[name] | {"seed": seed}, folder, overrides)
            if not (folder / "row.json").exists():
                made = row(name, seed, summary, coded_share(folder / "run", args.sample))
                write_file(folder / "row.json", json.dumps(made))
            every.append(json.loads((folder / "row.json").read_text()))
        write_file(out / "rows.json", json.dumps(every, indent=1) + "\n")
        write_file(out / "table.md", text := markdown(summarised(every)))
        write_page(args.page, f"compression, seeds: {len(args.seeds)}", text)
        print(text.splitlines()[-1], flush=True)
        draw(summarised(every), out / "figure.png")
    print(f"{out}/table.md, rows.json, figure.png")


if __name__ == "__main__":
    main()
