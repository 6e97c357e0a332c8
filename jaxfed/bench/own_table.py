"""The table of a file of one's own: rows whose hyper-parameters follow the data by rules, compared user by user."""

import argparse
import dataclasses
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxfed.bench.own_table_text import own_table_markdown, print_own_table
from jaxfed.bench.reproduce import (
    QUICK,
    ROWS,
    THREE,
    PlannedRun,
    check_rows,
    collect_rows,
    count_clients,
    is_finished,
    plan_runs,
    run_folder,
    run_plans,
    select_plans,
)
from jaxfed.bench.row_tests import add_row_tests, average_users
from jaxfed.config.overrides import expand_option
from jaxfed.config.schema import make_config
from jaxfed.config.settings import Config, Section
from jaxfed.config.suggestions import (
    CLOSED,
    DataFacts,
    FileData,
    choose_model,
    collect_facts,
    is_suggested_for,
    read_file,
    suggest_table,
)
from jaxfed.data.clients import LEAKY, Clients
from jaxfed.training.log import log, to_json
from jaxfed.training.run_dir import write_file
from jaxfed.training.runs import make_cached_loader
from jaxfed.training.user_figures import UserFigures, read_users

TRANSITIONS = "EASE with transitions"
ROWS_BY_RULE = ("popularity", "item-kNN", "EASE", TRANSITIONS, "iALS (FCF)", "FedAvg of MF")
SEEDS = {"iALS (FCF)": THREE, "FedAvg of MF": THREE}  # of rows that begin with random numbers; others have one
POPULARITY: dict[str, Any] = {
    "rounds": 1,
    "model": {"name": "popularity"},
    "algorithm": {"name": "fedsgd"},
    "channel": [{"name": "weighted_mean"}],
    "cohort": {"name": "everyone"},
    "evaluation": {"every": 1},
}


def suggest_row(file: FileData, model: str) -> tuple[dict[str, Any], dict[str, str]]:
    """As `suggest_table`, but a test sees train items alone: rows are compared, and models that are trained in rounds
    have learnt from those."""
    table, reasons = suggest_table(file, model)
    evaluation = {key: value for key, value in table.get("evaluation", {}).items() if key != "history"}
    return table | {"evaluation": evaluation}, {key: reasons[key] for key in reasons if key != "evaluation.history"}


def make_ials_settings(facts: DataFacts) -> dict[str, Any]:
    """The settings of iALS: the less is known of a user, the larger its penalty. One over the mean length of a history
    is about MovieLens-100K's 0.01, and near the best of 0.01, 0.03 and 0.1 where histories are short."""
    return {
        "rounds": 40,  # at most: six are enough on dense data, and twelve are too few on very sparse ones
        "model": {"name": "ials", "l2": float(f"{facts.users / facts.rows:.1g}")},
        "channel": [{"name": "ring", "bound": 64.0, "fraction_bits": "auto"}],
    }


def add_settings(base: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """A configuration with further settings, those of [evaluation] beside what it has there."""
    return base | settings | {"evaluation": base["evaluation"] | settings.get("evaluation", {})}


def make_rule_tables(file: FileData, facts: DataFacts) -> dict[str, dict[str, Any]]:
    """{row: its configuration, which follows the data as `jaxfed init` suggests it}, without the rows that the data
    are not for, see `list_left_out`. Raises ValueError where nobody is ranked among enough for NDCG@10."""
    factorization, _ = suggest_row(file, "mf")
    base = {key: factorization[key] for key in ("data", "evaluation")}
    if 10 not in base["evaluation"].get("at", (10,)):
        raise ValueError(
            "reproduce --table FILE: its methods are compared by NDCG@10, and there are fewer than 9 given negatives: "
            "leave --negatives out"
        )
    tables = {
        "popularity": add_settings(base, POPULARITY),
        "iALS (FCF)": add_settings(base, CLOSED | make_ials_settings(facts)),
        "FedAvg of MF": base,
    }
    left_out = list_left_out(facts)
    if "EASE" not in left_out:
        tables["EASE"] = ease = suggest_row(file, "ease")[0]
        tables["item-kNN"] = ease | {"model": {"name": "item_knn"}}
    if TRANSITIONS not in left_out:
        tables[TRANSITIONS] = suggest_row(file, "transitions")[0]
    return {name: tables[name] for name in ROWS_BY_RULE if name in tables}


def list_left_out(facts: DataFacts) -> dict[str, str]:
    """{row: why the data are not for it}."""
    large = choose_model(facts)
    if large.value == "mf":
        return dict.fromkeys(("item-kNN", "EASE", TRANSITIONS), large.reason)
    return {} if facts.has_order else {TRANSITIONS: "the data do not say in which order a user's rows came"}


def describe_rules(file: FileData) -> list[str]:
    """`key = value: why` of what the data suggest for the rows in closed form."""
    table, reasons = suggest_row(file, "ease")
    keys = [key for key in reasons if key != "model.name"]
    return [f"{key} = {table[key.partition('.')[0]][key.partition('.')[2]]}: {reasons[key]}" for key in keys]


class TableRequest(NamedTuple):
    """What `jaxfed reproduce --table FILE` was asked for."""

    path: str
    options: tuple[str, ...]  # of the loader
    out: Path
    quick: bool
    only: tuple[str, ...]  # rows; none: those by rules
    seeds: tuple[int, ...] | None  # None: all


def plan_rule_runs(tables: dict[str, dict[str, Any]], asked: TableRequest) -> list[PlannedRun]:
    """The runs of the rows by rules."""
    made, quick = [], asked.quick
    for name, table in tables.items():
        words = ["jaxfed", "reproduce", "--table", asked.path, *asked.options, *["--quick"] * quick, "--only", name]
        for seed in SEEDS.get(name, (0,))[: 1 if quick else None]:
            config = make_config(table | {"seed": seed, "run": {"out": run_folder(asked.out, name, seed)}})
            config = dataclasses.replace(config, rounds=min(config.rounds, QUICK)) if quick else config
            made.append(PlannedRun(name, seed, shlex.join(words), config))
    return made


def plan_other_runs(file: FileData, asked: TableRequest, protocol: str) -> list[PlannedRun]:
    """The runs of rows of MovieLens-100K's table, with its hyper-parameters, that are asked for or were begun before.

    protocol: of the rows by rules. Raises ValueError for a row that leaks.
    """
    others = {
        name: row
        for name, row in ROWS.items()
        if name not in ROWS_BY_RULE and (name in asked.only or Path(run_folder(asked.out, name, 0)).parent.exists())
    }
    if leaky := [plan.name for plan in plan_runs(others, asked.out, True, []) if plan.config.data.protocol == LEAKY]:
        raise ValueError(f'row "{leaky[0]}" has a leaky protocol: only --table ml100k has it')
    words = [f"--data.path={asked.path}", *map(expand_option, asked.options)]
    words += [] if "protocol" in file.table else [f"--data.protocol={protocol}"]
    return plan_runs(others, asked.out, asked.quick, words)


def check_file(file: FileData) -> None:
    """Raises ValueError for data that the rows are not for."""
    path, label = file.table["path"], file.section.label
    if label != "implicit":
        raise ValueError(
            f'reproduce --table FILE: its methods learn from clicks, not from labels: leave --label "{label}" out, or '
            f"measure errors by: jaxfed train CONFIG --data.path {path} --data.label {label}"
        )
    if not is_suggested_for(file.section):
        raise ValueError(
            "reproduce --table FILE: its methods take each user for a client, and train all clients: leave --clients, "
            "--cold and --malicious out"
        )


def check_same_data(folder: Path, digest: str) -> None:
    """Raises ValueError where a finished run was of other data than those that are in the file now."""
    if json.loads((folder / "summary.json").read_text()).get("data_sha256") != digest:
        raise ValueError(f"{folder} was run on other data than the file has now: pass another --out, or remove it")


def describe_negatives(summary: dict[str, Any]) -> str:
    """What a held-out item is ranked among in the `sampled` figures of a run; "": there are none."""
    most = summary.get("sampled_negatives")
    return summary.get("negatives", "") + (f" (fewer for some users, {most} at most)" if most else "")


def collect_own_rows(
    plans: Sequence[PlannedRun],
    load: Callable[[Section], Clients],
    clients: Callable[[Config], int],
    quick: bool,
) -> list[dict[str, Any]]:
    """A flat object for each row with a run that is finished: as of `collect_rows`, with standard errors over users,
    and tests. load(section) -> its data. clients(config) -> how many clients its data have."""
    runs: dict[str, list[UserFigures]] = {}
    facts: dict[str, dict[str, Any]] = {}
    for plan in filter(is_finished, plans):
        folder = Path(plan.config.run.out)
        try:
            runs.setdefault(plan.name, []).append(read_users(folder, load))
        except ValueError as error:  # the other rows are compared all the same
            log(f"{plan.name}: no figures of each user: {error}")
            continue
        negatives = describe_negatives(json.loads((folder / "summary.json").read_text()))
        asked = load(plan.config.data).population.asked
        facts[plan.name] = {"negatives": negatives, "all_users": len(asked.user_names)}
    users = {name: average_users(each) for name, each in runs.items()}
    rows = [row for row in collect_rows(plans, clients, quick, None) if row["name"] in users]
    return add_row_tests([row | facts[row["name"]] for row in rows], users)


def plan_table(file: FileData, asked: TableRequest) -> tuple[list[PlannedRun], list[PlannedRun]]:
    """(the runs that are asked for, the first seed of all rows first; all runs that the table may hold). Raises
    ValueError for what cannot be."""
    facts = collect_facts(file.clients)
    tables = make_rule_tables(file, facts)
    for name, why in list_left_out(facts).items():
        if name in asked.only:
            raise ValueError(f"{name}: {why}: leave the row out")
        log(f"no row {name}: {why}")
    for line in describe_rules(file) if "EASE" in tables else []:
        log(f"rule: {line}")
    rules = plan_rule_runs(tables, asked)
    plans = rules + plan_other_runs(file, asked, rules[0].config.data.protocol)
    todo = select_plans(plans if asked.only else rules, asked.only, asked.seeds)
    return sorted(todo, key=lambda plan: plan.seed), plans


def read_request(args: argparse.Namespace, options: list[str]) -> TableRequest:
    """What is asked for. Raises ValueError for a file or a row that is not there."""
    if not Path(args.table).expanduser().exists():
        raise ValueError(f"no table {args.table!r}: give ml100k, or a file that is there")
    check_rows(args.only, [*ROWS_BY_RULE, *(name for name in ROWS if name not in ROWS_BY_RULE)])
    out = Path(args.out or f"runs/reproduce/{Path(args.table).stem}{'_quick' if args.quick else ''}")
    seeds = None if args.seeds is None else tuple(args.seeds)
    return TableRequest(args.table, tuple(options), out, args.quick, tuple(args.only), seeds)


def reproduce_own_table(args: argparse.Namespace, options: list[str]) -> None:
    """jaxfed reproduce --table FILE: row by row. Exits with 2 where a run failed."""
    asked = read_request(args, options)
    file = read_file(asked.path, asked.options)
    check_file(file)
    todo, plans = plan_table(file, asked)
    before = {plan.config.run.out for plan in plans if is_finished(plan)}
    for folder in before:
        check_same_data(Path(folder), file.clients.digest)
    load = make_cached_loader()
    clients = count_clients(load)

    def write(plan: PlannedRun | None = None) -> list[dict[str, Any]]:
        if plan and plan.config.run.out in before:  # it was finished when the command began: the table is as it was
            return []
        rows = collect_own_rows(plans, load, clients, asked.quick)
        if not rows:  # no run is finished: the first one failed
            return []
        asked.out.mkdir(parents=True, exist_ok=True)
        write_file(asked.out / "table.md", own_table_markdown(rows))
        write_file(asked.out / "results.json", to_json(rows, 1) + "\n")
        return rows

    failed = run_plans(todo, write, load)
    if not todo:
        print("nothing to run")
    elif rows := write():
        print_own_table(rows, asked.path)
        print(f"{asked.out}/table.md, results.json")
    if failed:
        sys.exit(2)
