"""The table of results of MovieLens-100K: the runs of every row of it, and what is written of what came of them."""

import argparse
import dataclasses
import json
import re
import sys
import tomllib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxfed.bench.pages import find_table_place, replace_table
from jaxfed.config.central_twin import with_central
from jaxfed.config.config_files import built_in_folder, read_config
from jaxfed.config.overrides import override_config
from jaxfed.config.schema import config_to_table, suggest
from jaxfed.config.settings import Config, Section
from jaxfed.core.excerpt import shorten
from jaxfed.data.clients import Clients
from jaxfed.training.log import log
from jaxfed.training.records import HEADLINES
from jaxfed.training.run_dir import check_folder, write_file
from jaxfed.training.runs import make_cached_loader, shared_runner
from jaxfed.training.sweep_results import average_seeds

QUICK = 20  # rounds
THREE = (0, 1, 2)


class TableRow(NamedTuple):
    """A row of the table."""

    config: str  # configs/ml100k_NAME.toml
    words: str = ""  # added to `jaxfed train`
    seeds: tuple[int, ...] = (0,)
    central: bool = False  # all data in one place


STOP = "--evaluation.patience 10"
SLOW = "--work.optimizer.item.learning-rate 20 --work.optimizer.user.learning-rate 0.2"
VARIATES = (
    "--work.name scaffold --work.by-row --server.learning-rate 1 "
    "--work.optimizer.item.learning-rate 40 --work.optimizer.user.learning-rate 1"
)
FAIR = "--channel.0.name fair --channel.0.q 0.5 --channel.0.rate 60 --server.learning-rate 10"
CODES = "--channel.1.name quantize --channel.1.bits 8"
SUMMED = "--channel.1.name clip --channel.1.bound 1 --channel.2.name ring"
# Rates and strengths of the rows that are not configurations: of a few values the best by validation after 60 rounds,
# by `jaxfed sweep configs/ml100k_fedavg.toml --rounds 60 --evaluation.every 20 --grid KEY=VALUES` and the row's other
# words. FedAdam, FedYogi and FedAdagrad are the best of rates from .03 to 1 and tau from .001 to .1. Mime has
# MimeLite's rates. FedProx was best without its pull.
ROWS = {  # a row more is a line more
    "EASE with transitions": TableRow("transitions", seeds=THREE),
    "EASE with transitions, a test sees the validation item": TableRow(
        "transitions", "--evaluation.history all", THREE
    ),
    "iALS (FCF)": TableRow("ials", seeds=THREE),
    "iALS (FCF), a test sees the validation item": TableRow("ials", "--evaluation.history all"),
    "EASE": TableRow("ease", seeds=THREE),
    "EASE, a test sees the validation item": TableRow("ease", "--evaluation.history all"),
    "item-kNN": TableRow("ease", "--model.name item_knn"),
    "FedAvg of MF": TableRow("fedavg", seeds=THREE),
    "FedAvg of MF, 128 clients a round": TableRow("fedavg", "--cohort.name uniform --cohort.size 128"),
    "FedAvg of NeuMF (FedNCF)": TableRow("neumf"),
    "FedSGD": TableRow("fedsgd"),
    "SASRec": TableRow("sasrec", seeds=THREE),
    "SASRec, all data in one place": TableRow("sasrec", seeds=THREE, central=True),
    "SASRec, codes of 8 bits": TableRow("sasrec", CODES),
    "SASRec, secure sum": TableRow("sasrec", SUMMED),
    "SASRec, pruned to half of the dense weights": TableRow("sasrec_pruned"),
    "BERT4Rec": TableRow("bert4rec"),
    "HSTU": TableRow("hstu"),
    "SASRec with rows of semantic codes": TableRow("codes"),
    "MF, fixed text vectors and ids": TableRow("text_frozen"),
    "MF, text encoder at the server": TableRow("text_server"),
    "LoRA of a text encoder on clients": TableRow("text_lora"),
    "FedProx": TableRow("fedavg", f"--work.proximal 3e-4 {STOP}"),
    "SCAFFOLD": TableRow("fedavg", f"{VARIATES} {STOP}"),
    "FedDyn": TableRow("feddyn"),
    "FedNova": TableRow("fednova"),
    "MimeLite": TableRow("fedavg", f"--work.name mime --work.no-correct --work.optimizer.momentum 0.9 {SLOW} {STOP}"),
    "Mime": TableRow("fedavg", f"--work.name mime --work.optimizer.momentum 0.9 {SLOW} {STOP}"),
    "FedAvgM": TableRow("fedavg", f"--server.momentum 0.9 --server.learning-rate 0.1 {STOP}"),
    "FedAdam": TableRow("fedavg", f"--server.name fedadam --server.learning-rate 0.1 --server.tau 0.01 {STOP}"),
    "FedYogi": TableRow("fedavg", f"--server.name fedyogi --server.learning-rate 0.3 --server.tau 0.01 {STOP}"),
    "FedAdagrad": TableRow("fedavg", f"--server.name fedadagrad --server.learning-rate 1.0 --server.tau 0.1 {STOP}"),
    "q-FedAvg": TableRow("fedavg", f"{FAIR} {STOP}"),
    "agnostic FedAvg": TableRow("fedavg", f"--channel.0.name agnostic --server.learning-rate 2 {STOP}"),
    "HierFAVG, four edges, every five rounds": TableRow("edges"),
    "FedBuff": TableRow("fedbuff"),
    "two devices a user": TableRow("devices"),
    "ten organisations, two local epochs": TableRow("silos"),
    "a tenth of the clients is cold": TableRow("cold"),
    "FedRep": TableRow("fedrep"),
    "FedRecon": TableRow("fedrecon"),
    "IFCA, two models": TableRow("ifca"),
    "APFL": TableRow("apfl"),
    "Ditto": TableRow("ditto"),
    "MetaMF": TableRow("metamf"),
    "PFedRec": TableRow("pfedrec"),
    "GPFedRec": TableRow("gpfedrec_compat", "--data.protocol loo-clean --rounds 400 --evaluation.patience 5"),
    "FedRAP": TableRow("fedrap_compat", "--data.protocol loo-clean"),
    "popularity": TableRow("popularity"),
    "counter of negatives, no model": TableRow("counter"),
    "counter of negatives, compat-pfedrec": TableRow("counter", "--data.protocol compat-pfedrec"),
    "PFedRec, compat-pfedrec": TableRow("pfedrec_compat"),
    "GPFedRec, compat-pfedrec": TableRow("gpfedrec_compat"),
    "FedRAP, compat-pfedrec": TableRow("fedrap_compat"),
}


class PlannedRun(NamedTuple):
    """One run of a row."""

    name: str
    seed: int
    command: str  # of the row
    config: Config


def plan_runs(rows: dict[str, TableRow], out: Path, quick: bool, words: Sequence[str]) -> list[PlannedRun]:
    """The runs of all rows. words: added to each. Raises ValueError."""
    made = []
    for name, (config, own, seeds, central) in rows.items():
        path = f"configs/ml100k_{config}.toml"
        table = read_config(built_in_folder() / Path(path).name)
        table, path = (with_central(table), f"{path} --central") if central else (table, path)
        several = f"train {path} --seed {seeds[0]}" if quick or len(seeds) == 1 else ""
        several = several or f"sweep {path} --seeds {' '.join(map(str, seeds))}"
        requested = [*own.split(), *words]
        whole = override_config(table, requested)
        short = quick and whole.rounds > QUICK
        command = " ".join(["jaxfed", several, *requested, *([f"--rounds {QUICK}"] if short else [])])
        for seed in seeds[: 1 if quick else None]:
            rounds = QUICK if short else whole.rounds
            run = dataclasses.replace(whole.run, out=run_folder(out, name, seed))
            made.append(PlannedRun(name, seed, command, dataclasses.replace(whole, seed=seed, rounds=rounds, run=run)))
    return made


def run_folder(out: Path, name: str, seed: int) -> str:
    """Where a run of a row is, in the folder of the table."""
    return str(out / re.sub(r"[^\w.-]+", "_", name) / f"seed_{seed}")


def is_headline(name: str) -> bool:
    """Whether a figure is one of the table's, of the server's model or of another view (test/VIEW/full/hr@10)."""
    return name.startswith("test/") and name.endswith(tuple(each.removeprefix("test") for each in HEADLINES))


def is_finished(plan: PlannedRun) -> bool:
    """Whether a run is at its end, and has the settings of its row."""
    folder = Path(plan.config.run.out)
    if not (folder / "summary.json").exists():
        return False
    try:
        check_folder(folder, plan.config, True)
    except ValueError:
        return False
    # of a run that may go on for more rounds; --quick asks for fewer
    return tomllib.loads((folder / "config.toml").read_text())["rounds"] == plan.config.rounds


def run_figures(plan: PlannedRun, clients: int) -> dict[str, Any]:
    """What the table tells of a run that is finished, flat."""
    folder = Path(plan.config.run.out)
    summary = json.loads((folder / "summary.json").read_text())
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    best = next(each for each in log if each["round"] == summary["best_round"] and "bytes_up_total" in each)
    up, down = best["bytes_up_total"], best["bytes_down_total"]
    protocol = {"protocol": summary.get("protocol", plan.config.data.protocol), "leaky": bool(summary.get("leaky"))}
    metrics = {name: value for name, value in summary.items() if is_headline(name)}
    sizes = {"bytes_up": up / clients, "bytes_down": down / clients, "bytes_total": up + down}
    facts = {name: summary[name] for name in ("seconds", "best_round", "rounds")}
    return {"name": plan.name, "seed": plan.seed, **protocol, **metrics, **sizes, **facts, "command": plan.command}


def count_clients(load: Callable[[Section], Clients]) -> Callable[[Config], int]:
    """count(config) -> the clients of its data, which are loaded once."""
    num_clients: dict[str, int] = {}

    def count(config):
        name = json.dumps(config_to_table(config.data), sort_keys=True)
        if name not in num_clients:
            num_clients[name] = load(config.data).num_clients
        return num_clients[name]

    return count


def collect_rows(
    plans: Sequence[PlannedRun], clients: Callable[[Any], int], quick: bool, results: Path | None
) -> list[dict[str, Any]]:
    """A flat object for each row with a run that is finished: means and standard deviations over its seeds. Rows
    without one here stay as the file `results` has them, if they were made by the same command."""
    found = [run_figures(plan, clients(plan.config)) for plan in plans if is_finished(plan)]
    marked = [{"name": each["name"], **({"quick": True} if quick else {}), **each} for each in found]
    rows = {each["name"]: each for each in average_seeds(marked, ["name"])}
    commands = {plan.name: plan.command for plan in plans}
    for each in json.loads(results.read_text()) if results and results.exists() else []:
        if commands.get(each["name"]) == each["command"]:
            rows.setdefault(each["name"], each)
    ordered = [rows[name] for name in commands if name in rows]
    return [{key: value for key, value in each.items() if key != "problem"} for each in ordered]


def format_cell(each: dict[str, Any], name: str, digits: int = 3) -> str:
    """`.123 ± .004`, or nothing."""
    if name not in each:
        return ""
    texts = [f"{each[key]:.{digits}f}" for key in (name, f"{name}_sd") if key in each]
    return " ± ".join(text.removeprefix("0") for text in texts)


def table_markdown(every: Sequence[dict[str, Any]]) -> str:
    """The table; a row whose clients have a model of their own is followed by that model's."""
    heads = ["method", "HR@10, 99", "NDCG@10, 99", "HR@10, full", "NDCG@10, full"]
    heads += ["best round", "MB up", "MB down", "seconds", "seeds"]
    lines = [f"| {' | '.join(heads)} |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    for each in every:
        marks = ["LEAKY"] * each["leaky"] + ["QUICK"] * bool(each.get("quick"))
        sizes = [f"{each[key] / 1e6:,.2f}" for key in ("bytes_up", "bytes_down")]
        facts = [f"{each['best_round']:.0f}", *sizes, f"{each['seconds']:,.1f}", str(each["seeds"])]
        for view in dict.fromkeys(name[5:].rpartition("/")[0].rpartition("/")[0] for name in each if "/hr@10" in name):
            inside = f"test/{view}/" if view else "test/"
            metrics = [
                format_cell(each, f"{inside}{part}/{m}@10") for part in ("sampled", "full") for m in ("hr", "ndcg")
            ]
            name = ": ".join([f"{each['name']}{', ' + view if view else ''}", *([" ".join(marks)] if marks else [])])
            lines.append(f"| {' | '.join([name, *metrics, *(facts if not view else [''] * len(facts))])} |")
    return "\n".join(lines) + "\n"


def write_table(every: Sequence[dict[str, Any]], out: Path, results: Path | None, page: Path | None) -> None:
    """table.md and results.json beside the runs; for the real table (results) its JSON and its page, too."""
    out.mkdir(parents=True, exist_ok=True)
    table, text = table_markdown(every), json.dumps(every, indent=1) + "\n"
    write_file(out / "table.md", table)
    write_file(out / "results.json", text)
    if results:
        results.parent.mkdir(parents=True, exist_ok=True)
        write_file(results, text)
    if results and page:
        write_file(page, replace_table(page.read_text(), results.stem, table))


def check_rows(only: Sequence[str], names: Iterable[str]) -> None:
    """Raises ValueError where a row is asked for that the table does not have."""
    if unknown := [each for each in only if each not in names]:
        raise ValueError(f'no row "{shorten(unknown[0])}"{suggest(unknown[0], names)}')


def select_plans(plans: Sequence[PlannedRun], only: Sequence[str], seeds: Sequence[int] | None) -> list[PlannedRun]:
    """Those of some rows and some seeds; of all where none are named."""
    named = [plan for plan in plans if not only or plan.name in only]
    return [plan for plan in named if seeds is None or plan.seed in seeds]


def run_plans(todo: Sequence[PlannedRun], tell: Callable[[PlannedRun], Any], load: Callable[[Section], Clients]) -> int:
    """Runs one after the other, and `tell`s of each that is done; returns how many failed."""
    run, failed = shared_runner(load), 0
    for place, plan in enumerate(todo, 1):
        log(f"[{place}/{len(todo)}] {plan.name}, seed {plan.seed}: {plan.command}")
        _, problem = run(plan.config)
        failed += bool(problem)
        log(f"failed: {problem}" if problem else f"{plan.name}: done")
        tell(plan)
    return failed


def reproduce_table(args: argparse.Namespace, words: list[str]) -> None:
    """jaxfed reproduce --table ml100k: row by row. Exits with 2 where a run failed."""
    if words:
        raise ValueError(f"{words[0]}: loader options are only for --table FILE, not for --table ml100k")
    check_rows(args.only, ROWS)
    out = Path(args.out or f"runs/reproduce/ml100k{'_quick' if args.quick else ''}")
    load = make_cached_loader()
    plans, clients = plan_runs(ROWS, out, args.quick, []), count_clients(load)
    results = Path(args.results) if args.results and not args.quick else None
    clients(plans[0].config)
    page = find_table_place(Path(args.page), results.stem) if args.page and results else None

    def write(plan: PlannedRun) -> None:
        write_table(collect_rows(plans, clients, args.quick, results), out, results, page)

    todo = select_plans(plans, args.only, args.seeds)
    failed = run_plans(todo, write, load)
    text = table_markdown(collect_rows(plans, clients, args.quick, results)) if todo else "nothing to run"
    print(text, end="")
    if failed:
        sys.exit(2)
