"""Strict JAX, eight devices made of the CPU, and compiled programs kept between runs of the suite.

Most of the suite's time is the compiler's. So `make test` has it optimise nothing (`PLAIN` in the Makefile) but for
tests marked `optimised`, which hold two programs to the same bits, or run long. `make test-all` optimises all.
"""

import gc
import itertools
import os
import subprocess
import sys
import tomllib
from pathlib import Path

CACHE = Path(__file__).parent.parent / ".cache"
EIGHT = "--xla_force_host_platform_device_count=8"


def known_flags(flags: str) -> str:
    """Those of the XLA flags that the installed jaxlib knows. Any other would abort the process, and they come and go
    with versions: 0.12 has no `--xla_cpu_use_fusion_emitters`."""

    def works(flags):
        probe = [sys.executable, "-c", "from jaxlib import xla_client; xla_client.make_cpu_client()"]
        return not subprocess.run(probe, env={**os.environ, "XLA_FLAGS": flags}, capture_output=True).returncode

    return flags if works(flags) else " ".join(flag for flag in flags.split() if works(flag))


if EIGHT not in os.environ.get("XLA_FLAGS", ""):  # a worker of pytest-xdist has what its master set
    os.environ["XLA_FLAGS"] = f"{known_flags(os.environ.get('XLA_FLAGS', ''))} {EIGHT}"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")  # places in Python take a tenth of the time

import jax
import pytest

from jaxfed.config.build import load_data
from jaxfed.config.schema import make_config

MAIN_CASES = tomllib.loads((Path(__file__).parent / "main_cases.toml").read_text())


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Marks as `full` what main_cases.toml leaves out. A case in it that does not exist is an error: otherwise a
    renamed case would silently drop out of `make test`."""
    missing = {}
    for item in items:
        file, name = item.path.relative_to(Path(__file__).parent).as_posix(), getattr(item, "originalname", item.name)
        cases = MAIN_CASES.get(file, {}).get(name)
        if cases is None:
            continue
        named = cases["without"] if isinstance(cases, dict) else cases
        is_named = hasattr(item, "callspec") and item.callspec.id in named
        missing.setdefault((file, name), {*named}).discard(is_named and item.callspec.id)
        if is_named == isinstance(cases, dict):
            item.add_marker(pytest.mark.full)
    missing = {key: cases for key, cases in missing.items() if cases}
    if missing and not any("::" in word for word in config.args):  # of a single case the others are not collected
        raise pytest.UsageError(f"main_cases.toml lists cases that do not exist: {missing}: correct or remove them")


gc.set_threshold(50_000, 10, 5)  # JAX makes many small objects
TESTS = itertools.count()


@pytest.fixture(autouse=True)
def _look_for_cycles_of_recent_tests_alone():
    """Freezes old objects, so that `gc.collect` looks at those of recent tests alone. Each checkpoint calls it; over
    all objects of the suite that took a sixth of the time. Every 400 tests all objects are looked at."""
    test = next(TESTS)
    if test % 20 == 0:
        if test % 400 == 0:
            gc.unfreeze()
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session")
def ml100k():
    """MovieLens-100K as 943 clients under the clean protocol. Fetched, as a user would fetch it."""
    return load_data(make_config({}).data)


@pytest.fixture
def compiled():
    """A list that grows by one for each program that is lowered."""
    seen = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/jaxpr_to_mlir_module_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)
