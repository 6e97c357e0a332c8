"""jaxfed serve"""

import argparse
import asyncio
import socket
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("fastapi", "flatbuffers", "prometheus_client", "uvicorn")  # of the extra
LOOK_EVERY = 1.0  # seconds between two looks at whether the export was replaced
PATIENCE = 10  # seconds in which requests may end when the server is stopped


def add_serve_options(command: Callable[..., argparse.ArgumentParser]) -> None:
    """The options of `serve`."""
    serve = command(
        "serve", "Recommend over HTTP from an export. An export that is replaced is served without a break."
    )
    serve.add_argument("export", metavar="OUT", help="the folder that jaxfed export wrote")
    serve.add_argument("--host", default="127.0.0.1", help="the address to listen at (127.0.0.1: this machine alone)")
    serve.add_argument("--port", type=int, default=8000, help="0: any that is free")


def serve_command(args: argparse.Namespace) -> None:
    """jaxfed serve"""
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise ValueError(f'serving needs the package {missing[0]}: pip install "jaxfed[serve]"')

    import uvicorn

    from jaxfed.serving.app import make_app
    from jaxfed.serving.engine import open_served
    from jaxfed.training.log import log

    folder = Path(args.export)
    listening = open_socket(args.host, args.port)
    with listening:
        served = open_served(folder)

        async def watch(serving):
            await watch_export(folder, serving, log)

        host, port = listening.getsockname()[:2]
        log(f"serving {folder} at http://{host}:{port}/ (Ctrl-C stops)")
        config = uvicorn.Config(
            make_app(served, watch), log_level="warning", timeout_graceful_shutdown=PATIENCE, server_header=False
        )
        uvicorn.Server(config).run([listening])


def open_socket(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises ValueError where the address cannot be had."""
    if not 0 <= port < 1 << 16:
        raise ValueError(f"--port is {port}: it must be from 0 to {(1 << 16) - 1}")
    try:
        return socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=512
        )
    except OSError as error:
        raise ValueError(
            f"{host}:{port} cannot be listened at ({error.strerror}): pass another --host or --port"
        ) from None


async def watch_export(folder: Path, serving, log: Callable[[str], None]) -> None:
    """Looks whether the export in a folder was replaced, and swaps it: opened and compiled beside the one that answers.
    One that cannot be opened is left alone until it changes again."""
    from jaxfed.serving.engine import open_served

    def stamp() -> tuple[int, int] | None:
        try:
            found = (folder / "manifest.json").stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_ino

    known = stamp()
    while True:
        await asyncio.sleep(LOOK_EVERY)
        now = stamp()
        if now is None or now == known:
            continue
        known = now
        try:
            served = await asyncio.to_thread(open_served, folder)
        except (ValueError, OSError, KeyError) as error:
            log(f"{folder} was replaced by what cannot be served, and is left alone: {error}")
            continue
        if served.digest != serving.served.digest:
            serving.swap(served)
            log(f"{folder} was replaced: model {served.digest[:12]} answers")
