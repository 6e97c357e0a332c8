"""jaxfed train"""

import argparse
from collections.abc import Callable
from typing import Any

from jaxfed.cli.summary import describe_best, print_summary

EPILOG = "Any key of a configuration can be given as --section.key value, e.g. --server.learning-rate 0.1"
TRACED = 5  # rounds that --profile traces


def add_train_options(command: Callable[..., argparse.ArgumentParser]) -> None:
    """The options of `train`."""
    train = command("train", "Run a configuration. CONFIG.toml --help lists its keys.", EPILOG)
    train.add_argument(
        "config",
        metavar="CONFIG.toml",
        help="a file, a run's folder, or a name that comes with jaxfed (ml100k_fedavg)",
    )
    train.add_argument("--out", metavar="RUN", help="where the run lives (run.out; runs/NAME of the configuration)")
    train.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run that is there; print a finished one, or with --rounds N go on to N rounds",
    )
    train.add_argument(
        "--central",
        action="store_true",
        help="train the same model on the same data in one place (central training): one server step a round",
    )
    train.add_argument(
        "--profile", action="store_true", help=f"trace {TRACED} rounds into RUN/profile; --run.profile N: so many"
    )


def train_command(args: argparse.Namespace, overrides: list[str]) -> None:
    """jaxfed train"""
    from jaxfed.core.processes import agree_on, join_processes

    every = join_processes()  # before any other use of JAX

    from jaxfed.config.central_twin import with_central
    from jaxfed.config.config_files import config_to_toml, locate_config, read_config
    from jaxfed.config.overrides import override_config
    from jaxfed.config.schema import expect_table
    from jaxfed.training.loop import train_run as run
    from jaxfed.training.run_dir import holds_run

    def configured():
        file = locate_config(args.config)
        table, folder = read_config(args.config), file.parent
        of_a_run = file.name == "config.toml" and holds_run(folder)  # which goes on where it lies now
        given: dict[str, Any] = {"out": str(folder)} if of_a_run and not args.central else {}
        given |= {"out": args.out} if args.out else {}
        given |= {"profile": TRACED} if args.profile else {}
        table["run"] = {"out": f"runs/{file.stem}"} | expect_table(table.get("run", {}), "run") | given
        if args.central and "out" not in given:
            table["run"]["out"] += "_central"
        return override_config(with_central(table) if args.central else table, overrides)

    config = agree_on(every, "configuration", configured, config_to_toml)
    extend = any(word.partition("=")[0] == "--rounds" for word in overrides)
    summary = run(config, args.resume, extend=extend)
    if not every.rank:
        print_summary(summary, f"{config.run.out}: {describe_best(summary, config.evaluation.every)}")
