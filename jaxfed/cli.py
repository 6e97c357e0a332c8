"""The command line, `jaxfed COMMAND ...`. A user's error: one line, exit code 2."""

import argparse
import contextlib
import ctypes
import errno
import io
import json
import os
import re
import signal
import sys
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

# nothing that takes long to import: JAX comes when a command is known
from jaxfed import __version__, cli_init, cli_privacy, cli_reproduce, cli_sweep, launch
from jaxfed.__main__ import interrupted
from jaxfed.excerpt import cut

M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1  # of mallopt(3)
EPILOG = "Any key of a configuration can be given as --section.key value, e.g. --server.learning-rate 0.1"
TRACED = 5  # rounds that --profile traces


def parser() -> argparse.ArgumentParser:
    """The commands and what is not in a configuration."""
    main = argparse.ArgumentParser("jaxfed", description="Federated learning of recommender models in JAX.")
    own = f"jaxfed {__version__} (JAX {version('jax')}, Python {sys.version.split()[0]})"
    main.add_argument("--version", action="version", version=own)
    commands = main.add_subparsers(dest="command", required=True)

    def command(name, text, epilog="", **more):
        # allow_abbrev off: `--server` must not be taken for `--server.learning-rate`
        return commands.add_parser(name, help=text, description=text, epilog=epilog, allow_abbrev=False, **more)

    train = command("train", "Run a configuration. CONFIG.toml --help lists its keys.", EPILOG)
    train.add_argument("config", metavar="CONFIG.toml", help="a file, or the name of one that comes with jaxfed")
    train.add_argument("--out", metavar="RUN", help="where the run lives (run.out)")
    train.add_argument("--resume", action="store_true", help="go on with the run that is there; print a finished one")
    train.add_argument(
        "--profile", action="store_true", help=f"trace {TRACED} rounds into RUN/profile; --run.profile N: so many"
    )
    cli_sweep.options(command)
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
    cli_privacy.options(command)
    cli_init.options(command)
    cli_reproduce.options(command)
    launch.options(command)
    return main


def loader_of(table: dict[str, Any], args: list[str], mend: str = "pass, for example, --data.name csv") -> list[str]:
    """`--data.name=KIND` where `--data.path FILE` says what kind of file the data are, and no name does.

    A file with an ending of its own is csv where a delimiter is given. Raises ValueError, with what to do (`mend`),
    where nothing tells the kind.
    """
    from jaxfed.config import expect_table
    from jaxfed.data.tables import kind_of
    from jaxfed.registry import REGISTRY, arguments

    given = {word.partition("=")[0]: word.partition("=")[2] or after for word, after in pairwise([*args, ""])}
    if "--data.path" not in given or "--data.name" in given:
        return []
    section, path = expect_table(table.get("data", {}), "data"), given["--data.path"]
    now, delimiter = section.get("name", "ml-100k"), given.get("--data.delimiter", section.get("delimiter"))
    kinds = [name for name in REGISTRY["data"] if "path" in arguments("data", name)]
    kind = kind_of(path) or ("csv" if delimiter and now not in kinds else "")
    if kind not in kinds and now not in kinds:
        raise ValueError(f"cannot tell the kind of {cut(path)} from its ending: {mend}")
    return [f"--data.name={kind}"] if kind in kinds and kind != now else []


def renamed(table: dict[str, Any], args: list[str]) -> list[str]:
    """Takes `--section.name NAME` out of the arguments and into the table, whose other keys stay where they still fit.

    A name decides which keys there are, so it must be known before the rest is parsed. A list of links grows by the
    name of the one after its last.
    """
    from jaxfed.config import LINKS, NAMED, expect_table, near
    from jaxfed.registry import REGISTRY, arguments

    args = [*loader_of(table, args), *args]
    rest, i, none = [], 0, {"channel": list(LINKS), "download": []}
    while i < len(args):
        key, equals, value = args[i].partition("=")
        place = re.fullmatch(r"--((?:evaluation\.)?channel\.\d+|download\.\d+|work\.optimizer|[a-z]+)\.name", key)
        if not place or (not equals and i + 1 == len(args)):
            rest.append(args[i])
            i += 1
            continue
        value, i = (value, i + 1) if equals else (args[i + 1], i + 2)
        *outer, last = place[1].split(".")
        listed = {"channel", "download"} & {*outer}
        section = "channel" if listed else last
        parent: Any = table
        for step in outer:
            parent = expect_table(parent, place[1]).setdefault(step, none.get(step, {}))
        if section not in REGISTRY or value not in REGISTRY[section]:
            raise ValueError(f'{place[1]}.name: no {section} "{cut(value)}"{near(value, REGISTRY.get(section, NAMED))}')
        if isinstance(parent, list) and int(last) > len(parent):
            raise ValueError(f"{place[1]}: the configuration has {len(parent)} links")
        if isinstance(parent, list) and int(last) == len(parent):
            parent.append({})  # one more
        if not isinstance(parent, list):
            expect_table(parent, place[1])
        old = expect_table(parent[int(last)] if isinstance(parent, list) else parent.get(last, {}), place[1])
        fits = {*arguments(section, value), *(("optimizer",) if section == "work" else ("item", "user"))}
        new = {k: v for k, v in old.items() if k in fits} | {"name": value}
        parent[int(last) if isinstance(parent, list) else last] = new
    return rest


def overridden(table: dict[str, Any], args: list[str]) -> Any:
    """A configuration from a TOML table and command-line overrides. Raises ValueError with one line."""
    import tyro

    from jaxfed.config import check, config_of, leaves, near, table_of

    config = config_of(table if not args else (args := renamed(table, args), table)[1])
    if not args:
        return config
    if {"-h", "--help"} & set(args):
        more = (
            "Beside these: --out RUN, --resume, --profile. Choosing another name changes which keys exist.\n"
            "With L links, numbered 0 to L-1, --channel.L.name NAME appends one;\n"
            "likewise --download.L.name and --evaluation.channel.L.name."
        )
        config = config_of(shown(table_of(config)))
        return tyro.cli(type(config), default=config, args=args, prog="jaxfed train CONFIG.toml", description=more)
    known = [f"--{key.replace('_', '-')}" for key, _ in leaves(table_of(config))]
    known += ["--out", "--resume", "--profile"]  # the command's own, for who misspells them
    groups = [f"--work.optimizer.{who}.{key}" for who in ("item", "user") for key in ("learning-rate", "weight-decay")]
    positive = {re.sub(r"\.no-([^.]*)$", r".\1", word.split("=")[0].replace("_", "-")): word for word in args}
    for flag, word in positive.items():
        if flag.startswith("--") and flag not in known + groups:
            raise ValueError(f"unknown option {word.split('=')[0]}{near(flag, known + groups)}")
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told), contextlib.redirect_stdout(told):
            return check(tyro.cli(type(config), default=config, args=args))
    except SystemExit:
        title, message, *_ = *re.split(r"\s*[-─]{20,}\s*", told.getvalue()), ""  # a box: sections between rules
        plain = " ".join((message or title).split()).split(" Got errors:")[0]  # which names the parser's own types
        raise ValueError(re.sub(r"no type matching \S+ could be instantiated from", "not a value:", plain)) from None


def shown(value: Any) -> Any:
    """A table whose words can be shown in a terminal."""
    from jaxfed.log import printable

    if isinstance(value, dict):
        return {key: shown(each) for key, each in value.items()}
    if isinstance(value, list):
        return [shown(each) for each in value]
    return printable(value) if isinstance(value, str) else value


def train(args: argparse.Namespace, overrides: list[str]) -> None:
    """jaxfed train"""
    from jaxfed.processes import agree, join

    every = join()  # before any other use of JAX

    from jaxfed.config import dumps, expect_table, read
    from jaxfed.folder import holds_run
    from jaxfed.train import train as run

    def configured():
        table, lies = read(args.config), Path(args.config).parent
        of_a_run = Path(args.config).name == "config.toml" and holds_run(lies)  # which goes on where it lies now
        given: dict[str, Any] = {"out": str(lies)} if of_a_run else {}
        given |= {"out": args.out} if args.out else {}
        given |= {"profile": TRACED} if args.profile else {}
        table["run"] = expect_table(table.get("run", {}), "run") | given
        return overridden(table, overrides)

    config = agree(every, "configuration", configured, dumps)
    summary = run(config, args.resume)
    if not every.rank:
        best = f"best of {summary['rounds']} rounds by validation: round {summary['best_round']}"
        show(summary, f"{config.run.out}: {best}")


def show(values: dict[str, Any], title: str) -> None:
    """A table of the headline metrics, then the other facts of a summary."""
    from rich.console import Console

    from jaxfed.log import printable
    from jaxfed.table import print_table

    leaky = " (LEAKY: train negatives exclude the held-out items)" if values.get("leaky") else ""
    out = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    exposed = ("er@10",) if any(name.endswith("/er@10") for name in values) else ()
    ranked = any(name.endswith("/hr@10") for name in values)
    usual = ("hr@10", "ndcg@10", "hr@20", "ndcg@20", "mrr", "auc") if ranked else ("rmse", "mae", "log_loss", "auc")
    columns = [each for each in (*usual, *exposed) if any(name.endswith(f"/{each}") for name in values)]
    first, lines = f"/{columns[0]}" if columns else "", []
    for part in [name.removesuffix(first) for name in values if first and name.endswith(first)]:
        found = (values.get(f"{part}/{column}") for column in columns)
        lines.append([printable(part), *("" if value is None else f"{value:.4f}" for value in found)])
    print_table(out, printable(title + leaky), ["", *columns], lines)
    spent = {name.removeprefix("seconds/"): value for name, value in values.items() if name.startswith("seconds/")}
    stages = [f"{name} {value:,.1f}" for name, value in spent.items() if value is not None]
    if stages:  # of a run; the first three pass while devices compute
        out.print(printable(f"{'seconds by stage':>26}  {', '.join(stages)}"))
    facts = (
        "simulated_seconds",
        "seconds",
        "compile_seconds",
        "client_updates_per_second",
        "clients/refused_total",
        "clients/dropped_total",
        "clients/clipped_total",
        "epsilon",
        "delta",
        "peak_memory_mb",
        "bytes_up_per_client",
        "bytes_down_per_client",
        "server_sees",
        "params_sha256",
    )
    for fact in facts:
        if value := values.get(fact):
            number = isinstance(value, int | float)
            text = f"{round(value, 6) if fact == 'epsilon' else value:,}" if number else str(value)
            out.print(printable(f"{fact:>26}  {text}"))


def reopened(folder: str) -> tuple[Any, Any, Any]:
    """(experiment, seed's keys, (shared, private) of the best round) of a run."""
    from jaxfed import checkpoint
    from jaxfed.config import config_of, read
    from jaxfed.experiment import assemble, load
    from jaxfed.log import say
    from jaxfed.resume import config_in, problem
    from jaxfed.rounds import fresh, keys_of

    path = Path(folder)
    if not (path / "config.toml").is_file():
        raise ValueError(f"{folder}: no run here (no config.toml)")
    if not (path / "checkpoints").is_dir():
        raise ValueError(f"{folder} has no checkpoint yet: train it first")
    config, record = config_of(read(path / "config.toml")), checkpoint.newest_record(path / "checkpoints", problem)
    if record:
        config_in(path, record, config)
    data = load(config.data)
    if record and record["data"] != data.digest:
        raise ValueError(
            f"{folder}: the data (or the order of their rows) differ from those of the run: restore the original files"
        )
    if record and not record["standing"]["best_round"]:
        ended, rounds = record["standing"]["finished"], record["standing"]["round"]
        raise ValueError(
            f"the run in {folder} diverged: train again in another folder with lower learning rates"
            if ended
            else f"{folder} has no evaluation yet (it stopped after round {rounds}): jaxfed train "
            f"{folder}/config.toml --resume"
        )
    experiment = assemble(config, data)
    with checkpoint.manager(path / "checkpoints") as checkpoints:
        found = checkpoint.restore(checkpoints, fresh(experiment, config.seed), say, problem)
    if not found:
        raise ValueError(f"{folder} has no checkpoint yet: train it first")
    return experiment, keys_of(config.seed), found[0]["best"]


def evaluate(args: argparse.Namespace) -> None:
    """jaxfed evaluate"""
    from jaxfed.log import written
    from jaxfed.rounds import evaluate as examine
    from jaxfed.rounds import marked

    experiment, keys, best = reopened(args.run)
    values = marked(experiment, examine(experiment, best, args.part, keys.evaluation))
    if args.json:
        print(written(values, 1))
    else:
        show(values, f"{args.run}: {args.part} of the best round")


def recommend(args: argparse.Namespace) -> None:
    """jaxfed recommend"""
    import numpy as np

    from jaxfed.config import config_of, read
    from jaxfed.experiment import source_of
    from jaxfed.log import printable, say
    from jaxfed.recommend import scores, seat_of, view_of

    if args.k < 1:
        raise ValueError(f"-k is {args.k}: it must be at least 1")
    experiment, _, best = reopened(args.run)
    config = config_of(read(Path(args.run) / "config.toml"))
    source, population = experiment.data.source, experiment.data.population
    seat = seat_of(population, args.user, args.client, lambda: source_of(config.data))
    view = view_of(experiment, config.evaluation.select)
    if seat.home is None:
        say("this user did not take part in training: ranked from their own interactions")
    elif view:
        say(f"by the {view} model, by which the best round was chosen")
    score = scores(experiment, best, seat, view)
    if np.isnan(score).any():
        raise ValueError(
            f"the run in {args.run} diverged (scores are not numbers): train again in another folder with lower "
            "learning rates"
        )
    if not np.isfinite(score).any():
        say("nothing to recommend: this user had every item")
    for place, item in enumerate(np.argsort(-score, kind="stable")[: args.k], 1):
        if np.isfinite(score[item]):
            title = "" if source.titles is None else f"  {source.titles[item]}"
            print(printable(f"{place:>3}  {score[item]:8.3f}  {source.items[item]:>8}{title}"))


def describe(args: argparse.Namespace, overrides: list[str]) -> None:
    """jaxfed data"""
    from jaxfed.config import known, read
    from jaxfed.data.describe import describe as text
    from jaxfed.data.tables import kind_of
    from jaxfed.experiment import load
    from jaxfed.log import printable
    from jaxfed.registry import REGISTRY

    name, table = args.name, {}
    own = [re.sub(r"^--(?!data\.)", "--data.", word) for word in overrides]
    if name.lower().endswith(".toml") or name in known():
        table = {"data": read(name).get("data", {})}
    elif name in REGISTRY["data"]:
        table = {"data": {"name": name}}
    elif kind_of(name) or Path(name).expanduser().exists():
        own = [f"--data.path={name}", *own]
    else:
        names, ends = ", ".join(REGISTRY["data"]), ".csv, .tsv, .parquet or .inter (.gz may follow)"
        raise ValueError(f'no data set "{cut(name)}": give one of {names}, or a file that ends in {ends}')
    for line in text(load(overridden(table, own).data)).split("\n"):
        print(printable(line))


def bench(args: argparse.Namespace) -> None:
    """jaxfed bench"""
    from jaxfed import bench as measuring
    from jaxfed.config import near
    from jaxfed.folder import write_file
    from jaxfed.log import say

    for name in args.workloads:
        if name not in measuring.WORKLOADS:
            raise ValueError(f'no workload "{name}"{near(name, measuring.WORKLOADS)}')
    if args.rounds < 1:
        raise ValueError(f"--rounds is {args.rounds}: it must be at least 1")
    if args.alone:
        print(json.dumps(measuring.alone(args.workloads[0], args.alone)))
        return
    figures = {}
    for name in args.workloads or measuring.WORKLOADS:
        figures[name] = measuring.bench(name, args.rounds, args.budget, say)
        if args.json:
            write_file(Path(args.json), json.dumps(figures, indent=1) + "\n")
    measuring.report(figures)


def main() -> None:
    """The program."""
    words = sys.argv[1:]
    keys = words[:1] == ["train"] and len(words) > 2 and {"-h", "--help"} & set(words[2:])  # of a configuration
    args, rest = parser().parse_known_args([word for word in words if not keys or word not in ("-h", "--help")])
    rest += ["--help"] if keys else []
    before = signal.signal(signal.SIGINT, interrupted)  # a run has one of its own, which saves
    try:
        configured = {
            "train": train,
            "sweep": cli_sweep.sweep,
            "data": describe,
            "reproduce": cli_reproduce.reproduce,
            "privacy": cli_privacy.privacy,
        }
        if args.command not in configured and rest:
            raise ValueError(f"unknown option {rest[0]}")
        if args.command == "launch":
            sys.exit(launch.launch(args))
        start()
        if args.command in configured:
            configured[args.command](args, rest)
        else:
            own = {"evaluate": evaluate, "recommend": recommend, "bench": bench, "init": cli_init.init}
            own[args.command](args)
    except ValueError as error:
        if os.environ.get("JAXFED_TRACEBACK"):
            raise
        fail(str(error), 2)
    except BrokenPipeError:
        sys.exit(1)
    except OSError as error:
        full = "disk full: " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        fail(f"{full}{error.filename or 'system'}: {error.strerror or error}", 2)
    except MemoryError as error:
        fail(f"out of memory{f' ({error})' if str(error) else ''}: the data or the model are too large for it", 2)
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        fail(f"out of memory: set run.chunk to 1, run.area lower, or cohort.size ({str(error).splitlines()[0]})", 2)
    finally:
        signal.signal(signal.SIGINT, before)


def fail(text: str, code: int) -> None:
    """One line, and out."""
    from jaxfed.log import printable

    with contextlib.suppress(OSError):  # the terminal may be gone
        print(printable(f"jaxfed: {' '.join(text.split())}"), file=sys.stderr)
    sys.exit(code)


def start() -> None:
    """What a run wants of its process: compiled programs kept on disk, and no chatter of libraries."""
    import logging

    import jax

    from jaxfed.data.movielens_files import cache

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(cache() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    logging.getLogger("absl").setLevel(logging.ERROR)
    with contextlib.suppress(OSError, AttributeError):  # glibc: keep freed memory, or every round faults its pages anew
        allocator = ctypes.CDLL("libc.so.6")
        allocator.mallopt(M_MMAP_THRESHOLD, 1 << 30)
        allocator.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


if __name__ == "__main__":
    main()
