"""jaxfed serve"""

import argparse
import asyncio
import os
import socket
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PACKAGES = ("fastapi", "fastapi_offline", "flatbuffers", "prometheus_client", "uvicorn")  # of the extra
LOOK_EVERY = 1.0  # seconds between two looks at whether the export was replaced
LOOPBACK = ("127.0.0.1", "::1")
MOST_CONNECTIONS = 512  # at once; more are answered by 503
DEFAULT_RATE = 100.0  # requests a second of one address, where others than this machine can ask
PATIENCE = 10  # seconds in which requests may end when the server is stopped


def add_serve_options(command: Callable[..., argparse.ArgumentParser]) -> None:
    """The options of `serve`."""
    serve = command(
        "serve", "Recommend over HTTP from an export. An export that is replaced is served without a break."
    )
    serve.add_argument("export", metavar="OUT", help="the folder that jaxfed export wrote")
    serve.add_argument("--host", default="127.0.0.1", help="the address to listen at (127.0.0.1: this machine alone)")
    serve.add_argument("--port", type=int, default=8000, help="0: any that is free")
    serve.add_argument(
        "--rate",
        type=float,
        help="requests a second that one address may make, with bursts of twice as many; further ones are answered by "
        f"429; 0: no limit ({DEFAULT_RATE:g}, or no limit where --host is a loopback address)",
    )


def serve_command(args: argparse.Namespace) -> None:
    """jaxfed serve"""
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise ValueError(f'serving needs the package {missing[0]}: pip install "jaxfed[serve]"')

    import uvicorn

    from jaxfed.serving.app import make_app
    from jaxfed.serving.engine import open_served
    from jaxfed.serving.rate_limit import check_rate
    from jaxfed.training.log import log

    folder = Path(args.export)
    check_rate(args.rate or 0)
    with open_socket(args.host, args.port) as listening:
        known = stamp_export(folder)  # before it is read: what is replaced meanwhile is seen later
        served = open_served(folder)

        async def watch(serving):
            await watch_export(folder, serving, log, known)

        host, port = listening.getsockname()[:2]
        local = host in LOOPBACK
        shown = f"[{host}]" if ":" in host else host
        log(f"serving {folder} at http://{shown}:{port}/ (Ctrl-C stops)")
        hosts = (*LOOPBACK, "[::1]", "localhost") if local else ("*",)
        app = make_app(served, watch, hosts, choose_rate(args.rate, local))
        config = uvicorn.Config(
            app,
            log_level="warning",
            limit_concurrency=MOST_CONNECTIONS,
            timeout_graceful_shutdown=PATIENCE,
            server_header=False,
            forwarded_allow_ips=os.environ.get("FORWARDED_ALLOW_IPS", ""),  # uvicorn trusts this machine without it
        )
        uvicorn.Server(config).run([listening])


def choose_rate(given: float | None, local: bool) -> float:
    """Requests a second that one address may make; 0: no limit. At a loopback address all who ask are this machine."""
    return given if given is not None else 0 if local else DEFAULT_RATE


def open_socket(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises ValueError where the address cannot be had."""
    if not host:
        raise ValueError("--host is empty, which would be every address of this machine: say 0.0.0.0 if you mean that")
    if not 0 <= port < 1 << 16:
        raise ValueError(f"--port is {port}: it must be from 0 to {(1 << 16) - 1}")
    try:
        return socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=512
        )
    except OSError as error:
        raise ValueError(f"{host}:{port} is not free ({error.strerror}): pass another --host or --port") from None


def stamp_export(folder: Path) -> tuple[int, int] | None:
    """What changes when an export is replaced; None: there is none at the moment."""
    try:
        found = (folder / "manifest.json").stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino


async def watch_export(folder: Path, serving: Any, log: Callable[[str], None], known: tuple[int, int] | None) -> None:
    """Looks whether the export in a folder was replaced, and swaps it: opened and compiled beside the one that answers.
    One that cannot be opened is left alone until it changes again.

    known: the stamp of the export that answers.
    """
    from jaxfed.serving.engine import open_served

    while True:
        await asyncio.sleep(LOOK_EVERY)
        now = stamp_export(folder)
        if now is None or now == known:
            continue
        known = now
        try:
            served = await asyncio.to_thread(open_served, folder)
        except Exception as error:  # whatever it is, the old export goes on
            line = " ".join(str(error).split())[:200]
            log(f"{folder} was replaced by what cannot be served, and is left alone: {line}")
            continue
        if served.digest != serving.served.digest:
            serving.swap(served)
            log(f"{folder} was replaced: model {served.digest[:12]} answers")
