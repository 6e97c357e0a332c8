"""Times `jaxfed serve`, beside a plain server that scores by NumPy and `argpartition`.

    python scripts/serving_load.py EXPORT [--million] [--soak MINUTES]

EXPORT: what `jaxfed export RUN EXPORT --users` wrote. Prints milliseconds of a request (median, 99th percentile) and
requests a second, for one client and for sixteen, each of which asks again as soon as it is answered. `--million`
measures an export of a million items with random vectors instead, and needs no EXPORT. `--soak` asks for some minutes
while the export is replaced every twenty seconds, and prints requests, failures, swaps and the server's memory.
"""

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil

SECONDS = 10.0  # of each measurement
BETWEEN_SWAPS = 20.0
CLIENTS = (1, 16)
HEAD = b"POST /recommend HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
HEAD += b"content-length: %d\r\n\r\n"


async def ask_again(port: int, bodies: list[bytes], until: float, spent: list[float]) -> None:
    """One client: keeps its connection, and asks until the time is over."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    number = 0
    while time.perf_counter() < until:
        body = bodies[number % len(bodies)]
        begin = time.perf_counter()
        writer.write(HEAD % len(body) + body)
        answer = await reader.readuntil(b"\r\n\r\n")
        status, length = answer.split()[1], 0
        for line in answer.lower().split(b"\r\n"):
            if line.startswith(b"content-length:"):
                length = int(line.split(b":")[1])
        await reader.readexactly(length)
        if status != b"200":
            raise RuntimeError(f"a request was answered by {status.decode()}")
        spent.append(time.perf_counter() - begin)
        number += 1
    writer.close()


def measure_load(port: int, bodies: list[bytes]) -> None:
    """Prints a line for each number of clients."""
    for clients in CLIENTS:
        asyncio.run(load_server(port, bodies, clients, 1.0))  # not counted
        spent = asyncio.run(load_server(port, bodies, clients, SECONDS))
        p50, p99 = np.percentile(np.array(spent) * 1e3, (50, 99))
        print(f"{clients:>4} clients: p50 {p50:6.2f} ms, p99 {p99:6.2f} ms, {len(spent) / SECONDS:7,.0f} requests/s")


def soak_server(export: Path, bodies: list[bytes], minutes: float) -> None:
    """Asks while the export is replaced again and again by a copy of itself with another manifest."""
    with tempfile.TemporaryDirectory() as folder:
        served = Path(folder) / "served"
        shutil.copytree(export, served)
        with start_program("-m", "jaxfed", "serve", str(served)) as port:
            server = psutil.Process().children()[-1]
            swaps, memory, spent = 0, [], 0
            until = time.monotonic() + 60 * minutes
            while time.monotonic() < until:
                found = asyncio.run(load_server(port, bodies, 4, BETWEEN_SWAPS))  # it raises where a request fails
                spent, swaps = spent + len(found), swaps + 1
                memory.append(server.memory_info().rss / 1e6)
                fresh = Path(folder) / "fresh"
                shutil.copytree(served, fresh)
                manifest = json.loads((fresh / "manifest.json").read_text()) | {"swap": swaps}
                (fresh / "manifest.json").write_text(json.dumps(manifest))
                served.rename(Path(folder) / "old")
                fresh.rename(served)
                shutil.rmtree(Path(folder) / "old")
            text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
            seen = next(line.split()[1] for line in text.splitlines() if line.startswith("jaxfed_swaps_total"))
    print(f"{spent:,} requests, none failed; {float(seen):.0f} swaps of {swaps}")
    print(f"memory of the server, MB: {memory[0]:.0f} before the first swap, {memory[len(memory) // 2]:.0f} half way, "
          f"{memory[-1]:.0f} at the end, {max(memory):.0f} at most")  # fmt: skip


async def load_server(port: int, bodies: list[bytes], clients: int, seconds: float) -> list[float]:
    """Seconds of each request of so many clients."""
    spent: list[float] = []
    until = time.perf_counter() + seconds
    each = [bodies[i % len(bodies) :] + bodies[: i % len(bodies)] for i in range(clients)]
    await asyncio.gather(*(ask_again(port, some, until, spent) for some in each))
    return spent


@contextlib.contextmanager
def start_program(*words: str) -> Iterator[int]:
    """The port of a server that is started as a program of its own."""
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
    server = subprocess.Popen([sys.executable, *words, "--port", str(port)], env=os.environ)
    try:
        while True:
            if server.poll() is not None:
                sys.exit("the server ended")
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1) as door:
                door.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
                if b"200" in door.recv(100):
                    break
            time.sleep(0.2)
        yield port
    finally:
        server.terminate()
        server.wait()


def make_plain_server(export: Path) -> Callable:
    """What one would write by hand: a product of matrix and vector, and `argpartition`, one request at a time."""
    from jaxfed.export.loader import load_export

    loaded = load_export(export)
    table = np.ascontiguousarray(np.asarray(loaded.weights["tables/item"], np.float32)[: len(loaded.items)])
    bias = np.asarray(loaded.weights.get("tables/bias", np.zeros(len(table))), np.float32)[: len(table)]
    with np.load(export / "users.npz") as found:
        users = dict(found)
    vectors = users.get("private:private/user", np.zeros((len(users["ids"]), 1, table.shape[1]), np.float32))
    numbers = {str(name): number for number, name in enumerate(users["ids"])}

    async def answer(reader, writer):
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = 0
                for line in head.lower().split(b"\r\n"):
                    if line.startswith(b"content-length:"):
                        length = int(line.split(b":")[1])
                body, found = await reader.readexactly(length), []
                if length:
                    number = numbers[json.loads(body)["user"]]
                    scores = table @ vectors[users["client"][number], users["user"][number]] + bias
                    scores[users["history"][users["start"][number] : users["start"][number + 1]]] = -np.inf
                    best = np.argpartition(-scores, 10)[:10]
                    best = best[np.argsort(-scores[best])]
                    found = [{"id": loaded.items[i], "score": float(scores[i])} for i in best]
                text = json.dumps({"items": found}).encode()
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(text) + text)

    return answer


def make_million(folder: Path) -> Path:
    """An export of matrix factorisation with a million items, d = 64, with random vectors and a thousand users."""
    import jax

    import jaxfed as jf
    from jaxfed.export.bundle import describe_array, hash_files
    from jaxfed.export.functions import make_functions, name_leaves

    items, users, out = 1_000_000, 1000, folder / "million"
    out.mkdir()
    random = np.random.default_rng(0)
    model = jf.models.mf(items, dim=64)
    shared = name_leaves(jax.tree.map(np.asarray, model.init(jax.random.key(0))))
    private = name_leaves(jax.eval_shape(model.private, jax.random.key(0)))
    functions = make_functions(model, shared, private, items, 100)
    b, s = jax.export.symbolic_shape("b, s")
    shape = jax.ShapeDtypeStruct
    weights = {path: shape(x.shape, x.dtype) for path, x in shared.leaves.items()}
    inputs = {
        "score_private": (weights, {"private/user": shape((b, 1, 64), np.float32)}, {"user": shape((b,), np.int32)}),
        "top_items": (shape((b, items), np.float32), shape((b, s), np.int32)),
    }
    described = {}
    for name, given in inputs.items():
        exported = jax.export.export(jax.jit(functions[name]), platforms=("cpu",))(*given)
        (out / f"{name}.stablehlo").write_bytes(exported.serialize())
        described[name] = {"file": f"{name}.stablehlo", "inputs": jax.tree.map(describe_array, given)}
    from safetensors.numpy import save_file

    save_file(shared.leaves, out / "weights.safetensors")
    ids = [str(item) for item in range(items)]
    (out / "items.json").write_text(json.dumps({"ids": ids, "titles": [""] * items}))
    history = random.integers(0, items, (users, 50)).astype(np.int32)
    arrays: dict[str, Any] = {
        "ids": np.arange(users).astype(str),
        "start": np.arange(users + 1, dtype=np.int64) * 50,
        "history": history.ravel(),
        "client": np.arange(users, dtype=np.int32),
        "user": np.zeros(users, np.int32),
        "features": np.zeros((users, 0), np.int32),
        "private:private/user": random.normal(size=(users, 1, 64)).astype(np.float32),
    }
    np.savez(out / "users.npz", **arrays)
    manifest: dict[str, Any] = {
        "format": 1,
        "num_items": items,
        "most_items": 100,
        "history_length": 64,
        "leaky": False,
    }
    manifest |= {"item_vectors": "tables/item", "functions": described, "files": hash_files(out)}
    (out / "manifest.json").write_text(json.dumps(manifest))
    return out


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("export", nargs="?", metavar="EXPORT")
    parser.add_argument("--million", action="store_true", help="measure a million items with random vectors")
    parser.add_argument("--soak", type=float, metavar="MINUTES", help="replace the export all the time instead")
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)  # this program as the plain server
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.export and not args.million:
        parser.error("name an export, or pass --million")
    if args.plain:

        async def serve():
            server = await asyncio.start_server(make_plain_server(Path(args.export)), "127.0.0.1", args.port)
            await server.serve_forever()

        asyncio.run(serve())
        return
    with tempfile.TemporaryDirectory() as folder:
        export = make_million(Path(folder)) if args.million else Path(args.export)
        with np.load(export / "users.npz") as found:
            users = [str(name) for name in found["ids"][:200]]
            by_private = any(name.startswith("private:") for name in found)
        bodies = [json.dumps({"user": user, "k": 10}).encode() for user in users]
        if args.soak:
            soak_server(export, bodies, args.soak)
            return
        print("jaxfed serve, users of the export")
        with start_program("-m", "jaxfed", "serve", str(export)) as port:
            measure_load(port, bodies)
        if by_private:
            print("a plain server: NumPy and argpartition")
            with start_program(__file__, str(export), "--plain") as port:
                measure_load(port, bodies)


if __name__ == "__main__":
    main()
