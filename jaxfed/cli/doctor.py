"""`jaxfed doctor`: what there is to run on, where things lie, and what is wrong, each in a line."""

import argparse
import os
import re
import shutil
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from jaxfed import __version__

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "pyarrow")
EXTRAS = {  # extra: (the package that tells whether it is there, what it brings)
    "cuda13": ("jax-cuda13-plugin", "runs on NVIDIA GPUs"),
    "tpu": ("libtpu", "runs on TPUs"),
    "homomorphic": ("tenseal", "sums under homomorphic encryption"),
    "all": ("flwr", "all that installs on any machine"),
    "export": ("flatbuffers", "exports of models"),
    "flower": ("flwr", "rounds between machines"),
    "serve": ("fastapi", "recommendations over HTTP"),
    "onnx": ("onnx", "ONNX files, jaxfed export --onnx"),
    "optuna": ("optuna", "searches, jaxfed sweep --trials"),
    "plots": ("matplotlib", "figures of sweeps and reports"),
    "text": ("safetensors", "reads pretrained text encoders"),
    "docs": ("sphinx", "builds the documentation"),
    "dev": ("pytest", "tests, lint and types"),
}
PATIENCE = 0.5  # seconds to measure a folder
ROOM = 1 << 30  # bytes that a disk should have free
OTHERS_MAY_WRITE = 0o022


def add_doctor_options(command: Any) -> None:
    """Adds the command; `command(name, help, ...)` makes a parser."""
    command("doctor", "Say what jaxfed finds here: devices, versions, caches, data, extras; and what is wrong.")


def xla_cache_folder() -> Path:
    """Where programs that JAX compiled are kept: $JAX_COMPILATION_CACHE_DIR, or beside fetched data."""
    from jaxfed.data.sources.movielens_files import cache_folder

    return Path(os.environ.get("JAX_COMPILATION_CACHE_DIR") or cache_folder() / "xla")


def doctor_command(args: argparse.Namespace) -> None:
    """jaxfed doctor. Exits with 1 where something is wrong."""
    problems: list[str] = []
    print(f"jaxfed {__version__}, Python {sys.version.split()[0]}, {sys.platform}")
    for head, lines in {
        "versions": version_lines(problems),
        "devices": device_lines(problems),
        "caches": cache_lines(problems),
        "data": data_lines(problems),
        "extras": extra_lines(),
    }.items():
        print(head, *(f"  {line}" for line in lines), sep="\n")
    print("problems", *(f"  {each}" for each in problems or ["none"]), sep="\n")
    if problems:
        sys.exit(1)


def installed_version(package: str) -> str:
    """The version of an installed package; "" where there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def version_numbers(text: str) -> tuple[int, ...]:
    """The leading numbers of a version: 0.12.8 is (0, 12, 8), 2.0rc1 is (2, 0)."""
    return tuple(int(each) for each in re.match(r"[\d.]*", text)[0].split(".") if each)  # type: ignore[index]


def version_lines(problems: list[str]) -> list[str]:
    """Versions of what matters. Adds to `problems` what is missing, or older than jaxfed needs."""
    try:
        needed = metadata.requires("jaxfed") or []
    except metadata.PackageNotFoundError:  # a checkout that is not installed
        needed = []
    for name, least in re.findall(r"^([\w.-]+)(?:>=([\d.]+))?$", "\n".join(needed), re.MULTILINE):
        found = installed_version(name)
        if not found:
            problems.append(f"{name} is not installed: pip install {name}")
        elif least and version_numbers(found) < version_numbers(least):
            problems.append(f"{name} {found} is older than jaxfed needs: pip install '{name}>={least}'")
    return [f"{name:<18}{installed_version(name) or 'not installed'}" for name in PACKAGES]


def device_lines(problems: list[str]) -> list[str]:
    """The devices that JAX sees. Adds to `problems` where it sees none, or not the accelerator that is here."""
    try:
        import jax

        devices = jax.devices()
    except Exception as error:  # of a broken installation: whatever it is, the rest is still told
        problems.append(f"JAX finds no device: {first_line(error)}")
        return ["none"]
    kinds = [each.device_kind for each in devices]
    if devices[0].platform == "cpu":
        problems.extend(unused_accelerator())
    return [f"{kinds.count(kind)} x {kind} ({devices[0].platform})" for kind in dict.fromkeys(kinds)]


def unused_accelerator() -> list[str]:
    """What to do about an accelerator that is here while JAX computes on the CPU."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    for name, extra, places in (
        ("an NVIDIA GPU", "cuda13", ("/dev/nvidia0", "/proc/driver/nvidia/version")),
        ("a TPU", "tpu", ("/dev/accel0",)),
    ):
        if any(Path(place).exists() for place in places):
            if "cpu" in platforms.split(","):
                return [f"{name} is here and JAX_PLATFORMS={platforms} hides it: unset JAX_PLATFORMS"]
            if installed_version(plugin := EXTRAS[extra][0]):
                return [f"{name} is here and JAX does not use it: its driver may be older than {plugin} needs"]
            return [f"{name} is here and JAX computes on the CPU: pip install 'jaxfed[{extra}]'"]
    return []


def cache_lines(problems: list[str]) -> list[str]:
    """Where caches lie and how large they are. Adds to `problems` where they cannot be written."""
    from jaxfed.data.sources.movielens_files import cache_folder

    lines = []
    for name, variable, folder in (
        ("data", "JAXFED_DATA", cache_folder()),
        ("programs", "JAX_COMPILATION_CACHE_DIR", xla_cache_folder()),
    ):
        given = f" (${variable})" if os.environ.get(variable) else ""
        lines.append(f"{name:<10}{folder}{given}  {folder_size(folder)}")
        problems.extend(folder_problems(folder, variable))
    return lines


def folder_size(folder: Path) -> str:
    """How large a folder is, in words; of a very large one, how large at least."""
    if not folder.is_dir():
        return "not there yet"
    end, total, files, least = time.monotonic() + PATIENCE, 0, 0, ""
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(root, name)).st_size
            except OSError:  # another process removed it
                continue
            files += 1
        if time.monotonic() > end:
            least = "at least "
            break
    return f"{least}{total / 1e6:,.1f} MB in {files:,} files"


def folder_problems(folder: Path, variable: str) -> list[str]:
    """What is wrong with a folder of a cache, or with where it will be made."""
    existing = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    hint = f"set {variable} to a folder of your own"
    if not existing.is_dir():
        return [f"{existing} is a file, a folder is needed: {hint}"]
    if not os.access(existing, os.W_OK | os.X_OK):
        return [f"no write access to {existing}: {hint}"]
    if existing == folder and existing.stat().st_mode & OTHERS_MAY_WRITE:
        return [f"other users may write to {existing}, so it cannot be trusted: chmod go-w {existing}"]
    free = shutil.disk_usage(existing).free
    return [f"only {free / 1e6:,.0f} MB are free at {existing}: free some space"] if free < ROOM else []


def data_lines(problems: list[str]) -> list[str]:
    """The data that were found."""
    from jaxfed.data.sources.movielens_files import cache_folder, find_intact, raw_files

    folder, fetched = cache_folder() / "ml-100k", "not fetched: jaxfed data ml-100k"
    try:
        if raw_files(folder):
            fetched = "fetched"
            if not find_intact(folder):
                problems.append(f"{folder} is damaged: remove it, then jaxfed data ml-100k")
        prepared = [each for each in (cache_folder() / "prepared").glob("*") if each.is_dir()]
    except OSError as error:
        problems.append(f"{folder} cannot be read: {error.strerror}")
        return ["unknown"]
    return [f"{'ml-100k':<18}{fetched}", f"{'prepared sets':<18}{len(prepared)}"]


def extra_lines() -> list[str]:
    """What each extra brings, and whether it is installed."""
    try:
        offered = metadata.metadata("jaxfed").get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:
        offered = [*EXTRAS]
    lines = []
    for extra in (each for each in EXTRAS if each in offered):
        package, extra_packages = EXTRAS[extra]
        found = installed_version(package) or f"no: pip install 'jaxfed[{extra}]'"
        lines.append(f"{extra:<14}{extra_packages:<36}{found}")
    return lines


def first_line(error: BaseException) -> str:
    """The first line of an error."""
    return next(iter(str(error).splitlines()), type(error).__name__)
