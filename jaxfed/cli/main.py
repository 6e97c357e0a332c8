"""The command line, `jaxfed COMMAND ...`. A user's error: one line, exit code 2."""

import argparse
import contextlib
import ctypes
import difflib
import errno
import os
import signal
import sys
from importlib.metadata import version

# nothing that takes long to import: JAX comes when a command is known
from jaxfed import __version__
from jaxfed.cli import (
    bench,
    compare,
    data,
    deploy,
    device,
    doctor,
    evaluate,
    export,
    init,
    interrupted,
    launch,
    node,
    privacy,
    replay,
    report,
    reproduce,
    serve,
    sweep,
    train,
)
from jaxfed.core.excerpt import shorten

M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1  # of mallopt(3)
DEFAULT_CONFIG = "ml100k_fedavg"
COMMANDS = ["train", "sweep", "evaluate", "recommend", "data", "bench", "privacy", "init"]
COMMANDS += ["reproduce", "launch", "deploy", "doctor", "export", "serve", "device", "aggregate"]
COMMANDS += ["compare", "report", "replay", "node", "connect", "identity"]


def make_parser() -> argparse.ArgumentParser:
    """The commands and what is not in a configuration."""
    main = argparse.ArgumentParser("jaxfed", description="Federated learning of recommender models in JAX.")
    own = f"jaxfed {__version__} (JAX {version('jax')}, Python {sys.version.split()[0]})"
    main.add_argument("--version", action="version", version=own)
    commands = main.add_subparsers(dest="command", required=True)

    def command(name, text, epilog="", **more):
        # allow_abbrev off: `--server` must not be taken for `--server.learning-rate`
        return commands.add_parser(name, help=text, description=text, epilog=epilog, allow_abbrev=False, **more)

    train.add_train_options(command)
    sweep.add_sweep_options(command)
    evaluate.add_evaluate_options(command)
    compare.add_compare_options(command)
    report.add_report_options(command)
    replay.add_replay_options(command)
    data.add_data_options(command)
    bench.add_bench_options(command)
    privacy.add_privacy_options(command)
    init.add_init_options(command)
    reproduce.add_reproduce_options(command)
    launch.add_launch_options(command)
    deploy.add_deploy_options(command)
    node.add_node_options(command)
    doctor.add_doctor_options(command)
    export.add_export_options(command)
    serve.add_serve_options(command)
    device.add_device_options(command)
    return main


def main() -> None:
    """The program."""
    words = with_default_config(sys.argv[1:])
    keys = words[:1] == ["train"] and len(words) > 2 and {"-h", "--help"} & set(words[2:])  # of a configuration
    check_command(words)
    args, rest = make_parser().parse_known_args([word for word in words if not keys or word not in ("-h", "--help")])
    rest += ["--help"] if keys else []
    before = signal.signal(signal.SIGINT, interrupted)  # a run has one of its own, which saves
    try:
        run_command(args, rest)
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
        exit_with_error(f"out of memory: lower run.chunk, run.area or cohort.size ({str(error).splitlines()[0]})", 2)
    finally:
        signal.signal(signal.SIGINT, before)


def run_command(args: argparse.Namespace, rest: list[str]) -> None:
    """Runs the command. rest: options that the parser does not know, for commands that read a configuration."""
    configured = {
        "train": train.train_command,
        "sweep": sweep.sweep_command,
        "replay": replay.replay_command,
        "data": data.data_command,
        "reproduce": reproduce.reproduce_command,
        "privacy": privacy.privacy_command,
        "init": init.init_command,
        "deploy": deploy.deploy_command,
    }
    own = {
        "evaluate": evaluate.evaluate_command,
        "recommend": evaluate.recommend_command,
        "bench": bench.bench_command,
        "compare": compare.compare_command,
        "report": report.report_command,
        "export": export.export_command,
        "serve": serve.serve_command,
        "device": device.device_command,
        "aggregate": device.aggregate_command,
        "node": node.node_command,
        "identity": node.identity_command,
    }
    if args.command not in configured and rest:
        raise ValueError(f"unknown option {rest[0]}")
    if args.command == "launch":
        sys.exit(launch.launch_processes(args))
    if args.command == "doctor":  # before JAX is imported: it may be what is wrong
        doctor.doctor_command(args)
        return
    if args.command == "connect":  # needs no JAX
        node.connect_command(args)
        return
    set_up_process()
    if args.command in configured:
        configured[args.command](args, rest)
    else:
        own[args.command](args)


def with_default_config(words: list[str]) -> list[str]:
    """The words of the command line, in which `train` has a configuration: that which comes with jaxfed, where no word
    or an option comes next."""
    if words[:1] == ["train"] and words[1:2] not in (["-h"], ["--help"]) and not (words[1:] and words[1][:1] != "-"):
        return ["train", DEFAULT_CONFIG, *words[1:]]
    return words


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

    import jaxfed.training.log  # noqa: F401  it shows what takes long

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
