"""The command line, `jaxfed COMMAND ...`. A user's error: one line, exit code 2."""

import argparse
import contextlib
import ctypes
import difflib
import errno
import json
import os
import signal
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

# nothing that takes long to import: JAX comes when a command is known
from jaxfed import __version__
from jaxfed.cli import doctor, init, interrupted, launch, privacy, reproduce, sweep
from jaxfed.core.excerpt import shorten

M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1  # of mallopt(3)
EPILOG = "Any key of a configuration can be given as --section.key value, e.g. --server.learning-rate 0.1"
COMMANDS = ["train", "sweep", "evaluate", "recommend", "data", "bench", "privacy", "init"]
COMMANDS += ["reproduce", "launch", "doctor"]
TRACED = 5  # rounds that --profile traces


def make_parser() -> argparse.ArgumentParser:
    """The commands and what is not in a configuration."""
    main = argparse.ArgumentParser("jaxfed", description="Federated learning of recommender models in JAX.")
    own = f"jaxfed {__version__} (JAX {version('jax')}, Python {sys.version.split()[0]})"
    main.add_argument("--version", action="version", version=own)
    commands = main.add_subparsers(dest="command", required=True)

    def command(name, text, epilog="", **more):
        # allow_abbrev off: `--server` must not be taken for `--server.learning-rate`
        return commands.add_parser(name, help=text, description=text, epilog=epilog, allow_abbrev=False, **more)

    train = command("train", "Run a configuration. CONFIG.toml --help lists its keys.", EPILOG)
    train.add_argument(
        "config", metavar="CONFIG.toml", help="a file, a run's folder, or the name of one that comes with jaxfed"
    )
    train.add_argument("--out", metavar="RUN", help="where the run lives (run.out; runs/NAME of the configuration)")
    train.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run that is there; print a finished one, or with --rounds N go on to N rounds",
    )
    train.add_argument(
        "--profile", action="store_true", help=f"trace {TRACED} rounds into RUN/profile; --run.profile N: so many"
    )
    sweep.add_sweep_options(command)
    evaluate = command("evaluate", "Evaluate the best model of a run.")
    evaluate.add_argument("run", metavar="RUN")
    evaluate.add_argument("--part", choices=("val", "test"), default="test")
    evaluate.add_argument("--json", action="store_true", help="print JSON instead of a table")
    recommend = command("recommend", "What the best model of a run recommends to a user.")
    recommend.add_argument("run", metavar="RUN")
    recommend.add_argument("--user", required=True, help="the user's id in the data")
    recommend.add_argument("--client", help="at which client, for a user who is at several")
    recommend.add_argument("-k", type=int, default=10, help="how many items")
    data = command(
        "data", "Fetch a data set and describe it.", "Options of the loader: --path FILE, --user COLUMN, ..."
    )
    data.add_argument("name", metavar="NAME|FILE|CONFIG.toml")
    bench = command("bench", "Time rounds end to end, beside what one would write by hand.")
    bench.add_argument("workloads", nargs="*", metavar="W1 W2 W3 W4", help="which (all)")
    bench.add_argument("--rounds", type=int, default=20, help="of each, at least")
    bench.add_argument(
        "--budget", type=float, default=100.0, help="seconds for a baseline that is slow: fewer rounds then"
    )
    bench.add_argument("--json", metavar="FILE", help="write the figures there, too")
    bench.add_argument("--alone", help=argparse.SUPPRESS)  # one method in this process, for its peak memory
    privacy.add_privacy_options(command)
    init.add_init_options(command)
    reproduce.add_reproduce_options(command)
    launch.add_launch_options(command)
    doctor.add_doctor_options(command)
    return main


def train_command(args: argparse.Namespace, overrides: list[str]) -> None:
    """jaxfed train"""
    from jaxfed.core.processes import agree_on, join_processes

    every = join_processes()  # before any other use of JAX

    from jaxfed.config.overrides import override_config
    from jaxfed.config.schema import config_to_toml, expect_table, locate_config, read_config
    from jaxfed.training.loop import train_run as run
    from jaxfed.training.run_dir import holds_run

    def configured():
        file = locate_config(args.config)
        table, folder = read_config(args.config), file.parent
        of_a_run = file.name == "config.toml" and holds_run(folder)  # which goes on where it lies now
        given: dict[str, Any] = {"out": str(folder)} if of_a_run else {}
        given |= {"out": args.out} if args.out else {}
        given |= {"profile": TRACED} if args.profile else {}
        table["run"] = {"out": f"runs/{file.stem}"} | expect_table(table.get("run", {}), "run") | given
        return override_config(table, overrides)

    config = agree_on(every, "configuration", configured, config_to_toml)
    extend = any(word.partition("=")[0] == "--rounds" for word in overrides)
    summary = run(config, args.resume, extend=extend)
    if not every.rank:
        print_summary(summary, f"{config.run.out}: {describe_best(summary, config.evaluation.every)}")


def describe_best(summary: dict[str, Any], every: int) -> str:
    """Which round was chosen, of how many that were evaluated: each of `every`, and the last."""
    rounds = summary["rounds"]
    looks = -(-rounds // every)
    many = f"{looks:,} evaluation{'s' * (looks > 1)} in {rounds:,} round{'s' * (rounds > 1)}"
    return f"best of {many}, by validation: round {summary['best_round']}"


def print_summary(values: dict[str, Any], title: str) -> None:
    """A table of the headline metrics, then the other facts of a summary."""
    from rich.console import Console

    from jaxfed.core.excerpt import printable
    from jaxfed.training.records import ERROR_COLUMNS, RANKING_COLUMNS, TERMINAL_FACTS, format_fact
    from jaxfed.training.terminal_table import print_table

    leaky = " (LEAKY: train negatives exclude the held-out items)" if values.get("leaky") else ""
    out = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    exposed = ("er@10",) if any(name.endswith("/er@10") for name in values) else ()
    ranked = any(name.endswith("/hr@10") for name in values)
    usual = RANKING_COLUMNS if ranked else ERROR_COLUMNS
    columns = [each for each in (*usual, *exposed) if any(name.endswith(f"/{each}") for name in values)]
    first, lines = f"/{columns[0]}" if columns else "", []
    for part in [name.removesuffix(first) for name in values if first and name.endswith(first)]:
        found = (values.get(f"{part}/{column}") for column in columns)
        few = f" (≤ {values['sampled_negatives']} negatives)" if "sampled_negatives" in values else ""
        label = printable(part) + few * part.endswith("sampled")
        lines.append([label, *("" if value is None else f"{value:.4f}" for value in found)])
    print_table(out, printable(title + leaky), ["", *columns], lines)
    spent = {name.removeprefix("seconds/"): value for name, value in values.items() if name.startswith("seconds/")}
    stages = [f"{name} {value:,.1f}" for name, value in spent.items() if value is not None]
    if stages:  # of a run; the first three pass while devices compute
        out.print(printable(f"{'seconds by stage':>26}  {', '.join(stages)}"))
    for fact in TERMINAL_FACTS:
        if value := values.get(fact):
            text = format_fact(fact, value)
            out.print(printable(f"{fact:>26}  {text}"))


def open_best_model(folder: str) -> tuple[Any, Any, Any]:
    """(experiment, seed's keys, (shared, private) of the best round) of a run."""
    from jaxfed.config.build import build_experiment, load_data
    from jaxfed.config.schema import make_config, read_config
    from jaxfed.training import checkpoint
    from jaxfed.training.log import log
    from jaxfed.training.loop import LOWER_RATES
    from jaxfed.training.resume import record_problem, recorded_config
    from jaxfed.training.rounds import initial_arrays, make_run_keys
    from jaxfed.training.run_dir import locate_run

    path = locate_run(folder)
    if not (path / "checkpoints").is_dir():
        raise ValueError(f"{folder} has no checkpoint yet: train it first")
    config, record = (
        make_config(read_config(path / "config.toml")),
        checkpoint.newest_record(path / "checkpoints", record_problem),
    )
    if record:
        recorded_config(path, record, config)
    data = load_data(config.data)
    if record and record["data"] != data.digest:
        raise ValueError(
            f"{folder}: the data (or the order of their rows) differ from those of the run: restore the original files"
        )
    if record and not record["standing"]["best_round"]:
        ended, rounds = record["standing"]["finished"], record["standing"]["round"]
        raise ValueError(
            f"the run in {folder} diverged: train again in another folder, and {LOWER_RATES}"
            if ended
            else f"{folder} has no evaluation yet (it stopped after round {rounds}): jaxfed train "
            f"{folder}/config.toml --resume"
        )
    experiment = build_experiment(config, data)
    with checkpoint.open_checkpoints(path / "checkpoints") as checkpoints:
        found = checkpoint.restore_newest(checkpoints, initial_arrays(experiment, config.seed), log, record_problem)
    if not found:
        raise ValueError(f"{folder} has no checkpoint yet: train it first")
    return experiment, make_run_keys(config.seed), found[0]["best"]


def evaluate_command(args: argparse.Namespace) -> None:
    """jaxfed evaluate"""
    from jaxfed.training.log import to_json
    from jaxfed.training.rounds import count_negatives, mark_leaky
    from jaxfed.training.rounds import evaluate_model as examine

    experiment, keys, best = open_best_model(args.run)
    values = count_negatives(experiment.exams["test"]) | examine(experiment, best, args.part, keys.evaluation)
    values = mark_leaky(experiment, values)
    if args.json:
        print(to_json(values, 1))
    else:
        print_summary(values, f"{args.run}: {args.part} of the best round")


def recommend_command(args: argparse.Namespace) -> None:
    """jaxfed recommend"""
    import numpy as np

    from jaxfed.config.build import read_source_data
    from jaxfed.config.schema import make_config, read_config
    from jaxfed.core.excerpt import printable
    from jaxfed.training.log import log
    from jaxfed.training.loop import LOWER_RATES
    from jaxfed.training.recommend import locate_user, score_items, selected_view

    if args.k < 1:
        raise ValueError(f"-k is {args.k}: it must be at least 1")
    experiment, _, best = open_best_model(args.run)
    config = make_config(read_config(Path(args.run) / "config.toml"))
    source, population = experiment.data.source, experiment.data.population
    seat = locate_user(population, args.user, args.client, lambda: read_source_data(config.data))
    view = selected_view(experiment, config.evaluation.select)
    if seat.home is None:
        log("this user did not take part in training: ranked from their own interactions")
    elif view:
        log(f"by the {view} model, by which the best round was chosen")
    score = score_items(experiment, best, seat, view)
    if np.isnan(score).any():
        raise ValueError(
            f"the run in {args.run} diverged (scores are not numbers): train again in another folder, and {LOWER_RATES}"
        )
    if not np.isfinite(score).any():
        log("nothing to recommend: this user had every item")
    offered = [item for item in np.argsort(-score, kind="stable")[: args.k] if np.isfinite(score[item])]
    if offered:  # to stderr, as the notes: scripts read the lines below
        log(f"{'rank':>4} {'score':>8}  {'item':>8}{'' if source.titles is None else '  title'}")
    for place, item in enumerate(offered, 1):
        title = "" if source.titles is None else f"  {source.titles[item]}"
        print(printable(f"{place:>3}  {score[item]:8.3f}  {source.items[item]:>8}{title}"))
    left = int((~np.isfinite(score)).sum())
    log(f"{left:,} of {len(score):,} items were left out: this user had them, or they are of another catalogue")
    if len(offered) < args.k:
        log(f"-k is {args.k:,}: there are no more than {len(offered):,} other items")


def data_command(args: argparse.Namespace, overrides: list[str]) -> None:
    """jaxfed data"""
    from jaxfed.config.build import load_data
    from jaxfed.config.overrides import override_config
    from jaxfed.config.plugins import import_entry_points
    from jaxfed.config.registry import REGISTRY
    from jaxfed.config.schema import built_in_configs, read_config
    from jaxfed.core.excerpt import printable
    from jaxfed.data.describe import describe_data as text
    from jaxfed.data.sources.tables import file_kind

    name, table = args.name, {}
    import_entry_points()  # they may have data
    own = [*map(init.expand_option, overrides)]
    if name.lower().endswith(".toml") or name in built_in_configs() or (Path(name) / "config.toml").is_file():
        whole = read_config(name)
        table = {"data": whole.get("data", {}), "run": whole.get("run", {})}  # which says what to import
    elif name in REGISTRY["data"]:
        table = {"data": {"name": name}}
    elif file_kind(name) or Path(name).expanduser().exists():
        own = [f"--data.path={name}", *own]
    else:
        names, ends = ", ".join(REGISTRY["data"]), ".csv, .tsv, .parquet or .inter (.gz may follow)"
        raise ValueError(f'no data set "{shorten(name)}": give one of {names}, or a file that ends in {ends}')
    for line in text(load_data(override_config(table, own).data)).split("\n"):
        print(printable(line))


def bench_command(args: argparse.Namespace) -> None:
    """jaxfed bench"""
    from jaxfed.bench import workloads as measuring
    from jaxfed.config.schema import suggest
    from jaxfed.training.log import log
    from jaxfed.training.run_dir import write_file

    for name in args.workloads:
        if name not in measuring.WORKLOADS:
            raise ValueError(f'no workload "{name}"{suggest(name, measuring.WORKLOADS)}')
    if args.rounds < 1:
        raise ValueError(f"--rounds is {args.rounds}: it must be at least 1")
    if args.alone:
        print(json.dumps(measuring.run_alone(args.workloads[0], args.alone)))
        return
    figures = {}
    for name in args.workloads or measuring.WORKLOADS:
        figures[name] = measuring.bench_workload(name, args.rounds, args.budget, log)
        if args.json:
            write_file(Path(args.json), json.dumps(figures, indent=1) + "\n")
    measuring.print_report(figures)


def main() -> None:
    """The program."""
    words = sys.argv[1:]
    keys = words[:1] == ["train"] and len(words) > 2 and {"-h", "--help"} & set(words[2:])  # of a configuration
    check_command(words)
    args, rest = make_parser().parse_known_args([word for word in words if not keys or word not in ("-h", "--help")])
    rest += ["--help"] if keys else []
    before = signal.signal(signal.SIGINT, interrupted)  # a run has one of its own, which saves
    try:
        configured = {
            "train": train_command,
            "sweep": sweep.sweep_command,
            "data": data_command,
            "reproduce": reproduce.reproduce_command,
            "privacy": privacy.privacy_command,
            "init": init.init_command,
        }
        if args.command not in configured and rest:
            raise ValueError(f"unknown option {rest[0]}")
        if args.command == "launch":
            sys.exit(launch.launch_processes(args))
        if args.command == "doctor":  # before JAX is imported: it may be what is wrong
            return doctor.doctor_command(args)
        set_up_process()
        if args.command in configured:
            configured[args.command](args, rest)
        else:
            own = {"evaluate": evaluate_command, "recommend": recommend_command, "bench": bench_command}
            own[args.command](args)
    except ValueError as error:
        if os.environ.get("JAXFED_TRACEBACK"):
            raise
        exit_with_error(str(error), 2)
    except BrokenPipeError:
        sys.exit(1)
    except OSError as error:
        full = "disk full: " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        exit_with_error(f"{full}{error.filename or 'system'}: {error.strerror or error}", 2)
    except MemoryError as error:
        exit_with_error(
            f"out of memory{f' ({error})' if str(error) else ''}: the data or the model are too large for it", 2
        )
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        exit_with_error(
            f"out of memory: set run.chunk to 1, run.area lower, or cohort.size ({str(error).splitlines()[0]})", 2
        )
    finally:
        signal.signal(signal.SIGINT, before)


def check_command(words: list[str]) -> None:
    """Exits with one line where the first word is near to a command, and none."""
    near = difflib.get_close_matches(words[0], COMMANDS, 1) if words and words[0] not in COMMANDS else []
    if near:
        exit_with_error(f'no command "{shorten(words[0])}"; did you mean "{near[0]}"?', 2)


def exit_with_error(text: str, code: int) -> None:
    """One line, and out."""
    from jaxfed.core.excerpt import printable

    with contextlib.suppress(OSError):  # the terminal may be gone
        print(printable(f"jaxfed: {' '.join(text.split())}"), file=sys.stderr)
    sys.exit(code)


def set_up_process() -> None:
    """What a run wants of its process: compiled programs kept on disk, and no chatter of libraries."""
    import logging

    import jax

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(doctor.xla_cache_folder()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    logging.getLogger("absl").setLevel(logging.ERROR)
    with contextlib.suppress(OSError, AttributeError):  # glibc: keep freed memory, or every round faults its pages anew
        allocator = ctypes.CDLL("libc.so.6")
        allocator.mallopt(M_MMAP_THRESHOLD, 1 << 30)
        allocator.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


if __name__ == "__main__":
    main()
