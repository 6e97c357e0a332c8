"""Quality against simulated time: synchronous rounds, over-selection, deadlines, FedBuff and FedAsync on one clock.

python scripts/asynchrony.py [--updates 38400] [--only fedbuff] [--out runs/asynchrony] [--section.key value ...]

Every method is a `jaxfed train` of the configuration in a folder of its own, resumed where it was, for as many rounds
as bring so many client updates; FedBuff, whose whole run takes a fifth of the simulated time, for twice as many. `time`
is the simulated time until validation reaches the best value of the synchronous run (NDCG@10 on the full catalogue;
`share` of that run's own time until it); test metrics are of the best round. Writes table.md
(and, with --page docs/results/asynchrony.md, the table there), rows.json and, where matplotlib is there, figure.png.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from jaxfed.bench.pages import write_page
from jaxfed.config.config_files import read_config
from jaxfed.training.run_dir import write_file
from jaxfed.training.runs import train_in_process

SELECT, PLAIN = "val/full/ndcg@10", "synchronous"
METRICS = ("test/full/hr@10", "test/full/ndcg@10", "test/sampled/hr@10", "test/sampled/ndcg@10")


def methods(clients: int, seconds: float) -> dict[str, dict[str, Any]]:
    """{name: what differs in the configuration}; `clients` are under way at a time."""
    waiting = {"name": "deadline", "size": clients}
    mean, half = {"name": "per_row_mean"}, max(clients // 2, 1)
    mixed = [{"name": "mixing", "rate": 0.5}, {"name": "mean"}]
    return {
        PLAIN: {"cohort": waiting, "channel": [mean]},
        "over-selection 1.3": {"cohort": waiting | {"over": 1.3}, "channel": [mean]},
        f"deadline {seconds:g} s": {"cohort": waiting | {"seconds": seconds}, "channel": [mean]},
        "fedbuff": {
            "cohort": {"name": "buffered", "size": half, "concurrency": clients},
            "channel": [{"name": "staleness"}, mean],
        },
        "fedasync": {
            "cohort": {"name": "buffered", "size": 1, "concurrency": clients, "max_age": 4 * clients},
            "channel": mixed,
            "server": {"name": "sgd", "learning_rate": 1.0},
        },
    }


def configured(table: dict[str, Any], own: dict[str, Any], updates: int, looks: int) -> dict[str, Any]:
    """A method's configuration: rounds for so many updates, evaluated so many times."""
    rounds = max(updates // own["cohort"]["size"], looks)
    asked = table.get("evaluation", {}) | {"every": rounds // looks, "select": SELECT}
    return table | own | {"rounds": rounds, "evaluation": asked}


def curve(folder: Path) -> list[tuple[float, float]]:
    """(simulated seconds, validation) of a run, evaluation by evaluation."""
    rows = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    figures = [(row.get("simulated_seconds"), row.get(SELECT)) for row in rows]  # null: not a number
    return [(time, value) for time, value in figures if time is not None and value is not None]


def reached(points: list[tuple[float, float]], goal: float) -> float:
    """The first time at which a curve is at the goal; infinite if it never is."""
    return next((time for time, value in points if value >= goal), math.inf)


def label(name: str, clients: int) -> str:
    """What the table calls a method."""
    return {"fedbuff": f"FedBuff, buffer of {max(clients // 2, 1)}", "fedasync": "FedAsync"}.get(name, name)


def line(name: str, row: dict[str, Any]) -> str:
    """A row of the table."""
    time = f"{row['time']:,.0f} | {row['share']:.2f}" if math.isfinite(row["time"]) else "not reached | "
    values = [f"{row['best']:.4f}", *(f"{row[metric]:.3f}" for metric in METRICS)]
    facts = " | ".join(each.removeprefix("0") for each in values)
    return f"| {name} | {time} | {facts} | {row['age']:.1f} | {row['dropped']:,} | {row['total']:,.0f} |"


HEAD = (
    "| method | time, s | share | best NDCG@10, validation | HR@10, full | NDCG@10, full | HR@10, 99 neg. "
    "| NDCG@10, 99 neg. | mean age | clients lost | whole run, s |\n|---" + "|---:" * 10 + "|"
)


def draw(curves: dict[str, list[tuple[float, float]]], path: Path) -> None:
    """Validation against simulated time."""
    try:
        import matplotlib
    except ImportError:
        print("no figure: matplotlib is missing: pip install matplotlib")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), label=name, linewidth=1.4)
    axes.set(xscale="log", xlabel="simulated seconds", ylabel="validation NDCG@10, full catalogue")
    axes.grid(True, which="both", alpha=0.2)
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> None:
    """Trains method by method; what there is is written after each."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--config", default="configs/ml100k_fedbuff.toml")
    parser.add_argument("--updates", type=int, default=38_400, help="client updates of each run")
    parser.add_argument("--clients", type=int, default=128, help="under way at a time")
    parser.add_argument("--seconds", type=float, default=30.0, help="of the method with a deadline")
    parser.add_argument("--looks", type=int, default=60, help="evaluations of each run")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="methods; the synchronous run comes with them")
    parser.add_argument("--out", default="runs/asynchrony", help="folder of the runs and of what is written")
    parser.add_argument("--page", metavar="FILE", help="page of docs/results whose table is written, too")
    args, overrides = parser.parse_known_args()
    table, known = read_config(args.config), methods(args.clients, args.seconds)
    if unknown := set(args.only or ()) - set(known):
        sys.exit(f"no method {sorted(unknown)[0]!r}; there are {', '.join(known)}")
    out = Path(args.out) / "_".join([f"{args.updates}_of_{args.clients}", *(word.strip("-") for word in overrides)])
    curves: dict[str, list[tuple[float, float]]] = {}
    rows: dict[str, dict[str, Any]] = {}
    print(HEAD)
    for name in [name for name in known if not args.only or name in {PLAIN, *args.only}]:
        folder = out / name.replace(" ", "_")
        updates = args.updates * (2 if name == "fedbuff" else 1)
        summary = train_in_process(configured(table, known[name], updates, args.looks), folder, overrides)
        curves[name] = curve(folder)
        goal = max(value for _, value in curves[PLAIN])
        time = reached(curves[name], goal)
        told = map(json.loads, (folder / "run/metrics.jsonl").read_text().splitlines())
        ages = [row["clients/age"] for row in told if "clients/age" in row] or [0.0]
        rows[name] = {metric: summary[metric] for metric in METRICS} | {
            "time": time,
            "share": time / reached(curves[PLAIN], goal),
            "best": max(value for _, value in curves[name]),
            "age": sum(ages) / len(ages),
            "dropped": summary["clients/dropped_total"],
            "total": summary["simulated_seconds"],
        }
        lines = [line(label(each, args.clients), row) for each, row in rows.items()]
        print(lines[-1], flush=True)
        write_file(out / "rows.json", json.dumps(rows, indent=1) + "\n")
        write_file(out / "table.md", text := "\n".join([HEAD, *lines]) + "\n")
        write_page(args.page, "asynchrony", text)
        draw(curves, out / "figure.png")
    print(f"{out}/table.md, rows.json, figure.png")


if __name__ == "__main__":
    main()
