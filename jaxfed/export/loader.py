"""Runs an export of jaxfed. It needs jax, numpy and flatbuffers, and no jaxfed: an export holds a copy of this file.

    python load.py FOLDER ITEM [ITEM ...]    recommends to a user who met these items, earliest first
    python load.py FOLDER --users            recommends to all users of the export, a line of JSON each

In a program:

    export = load_export(folder)
    items, scores = recommend_by_history(export, [["50", "181"]], number=10)
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

FORMAT = 1
BATCHES = (1, 4, 16, 64)  # users that are asked for together: each number is compiled once
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "I64": "int64", "I32": "int32", "I16": "int16"}
DTYPES |= {"I8": "int8", "U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64", "BOOL": "bool"}


class Export(NamedTuple):
    """An export that was read: what it says of itself, its weights on the device, and what it computes."""

    manifest: dict[str, Any]
    weights: dict[str, Any]  # {path: array}
    functions: dict[str, Callable[..., Any]]  # compiled when first called
    items: list[str]  # the data's own ids, in the order of the rows of tables
    titles: list[str]  # "" where there is none
    item_numbers: dict[str, int]  # of each id


def read_weights(path: Path) -> dict[str, np.ndarray]:
    """{name: array} of a file of safetensors. Raises ValueError where it is none."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > len(data) - 8:
        raise ValueError(f"{path} is damaged: it ends within its header")
    found = {}
    for name, entry in json.loads(data[8 : 8 + size]).items():
        if name == "__metadata__":
            continue
        kind = jnp.bfloat16 if entry["dtype"] == "BF16" else DTYPES[entry["dtype"]]
        begin, end = (8 + size + offset for offset in entry["data_offsets"])
        found[name] = np.frombuffer(data[begin:end], np.dtype(kind)).reshape(entry["shape"])
    return found


def check_files(folder: Path) -> dict[str, Any]:
    """The manifest of an export. Raises ValueError where a file is missing, or is not the one that was written."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except FileNotFoundError:
        raise ValueError(f"{folder}: no export here (no manifest.json): jaxfed export RUN {folder} makes one") from None
    except ValueError:
        raise ValueError(f"{folder}/manifest.json is damaged: export the run again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{folder} has another format than {FORMAT}, which this program reads: export the run again")
    for name, known in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path} is missing: export the run again")
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != known["sha256"]:
            raise ValueError(f"{path} was changed or damaged (its SHA-256 is not that of manifest.json): export again")
    return manifest


def load_export(folder: str | Path) -> Export:
    """Reads an export, and verifies each of its files.

    Raises ValueError, in one line, where there is none, or it is damaged.
    """
    folder = Path(folder)
    manifest = check_files(folder)
    weights = {name: jnp.asarray(value) for name, value in read_weights(folder / "weights.safetensors").items()}
    functions: dict[str, Callable[..., Any]] = {}
    for name, about in manifest["functions"].items():
        functions[name] = jax.jit(jax.export.deserialize(bytearray((folder / about["file"]).read_bytes())).call)
    listed = json.loads((folder / "items.json").read_text())
    numbers = {item: number for number, item in enumerate(listed["ids"])}
    return Export(manifest, weights, functions, listed["ids"], listed["titles"], numbers)


def pad_lists(lists: Sequence[Sequence[int]], size: int, width: int) -> np.ndarray:
    """int32 [size, width]: lists of items, -1 where unused; of a longer one the last `width`."""
    out = np.full((size, width), -1, np.int32)
    for row, values in zip(out, lists, strict=False):
        latest = values[-width:]
        row[: len(latest)] = latest
    return out


def next_size(count: int, sizes: Sequence[int]) -> int:
    """The smallest of some ascending sizes that is at least `count`; above the last one, a power of two."""
    return next((size for size in sizes if size >= count), 1 << max(count - 1, 1).bit_length())


def score_and_rank(
    export: Export, scores: Any, excluded: Sequence[Sequence[int]], size: int
) -> tuple[np.ndarray, np.ndarray]:
    """(items, scores) of the best for each row of scores [size, N], without those that are excluded."""
    width = next_size(max(map(len, excluded), default=0), (16, 64, 256, 1024))
    items, values = export.functions["top_items"](scores, pad_lists(excluded, size, width))
    return np.asarray(items), np.asarray(values)


def rank_for_histories(
    export: Export, histories: Sequence[Sequence[int]], excluded: Sequence[Sequence[int]], **known: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The best items for users of whom a history is known.

    Args:
        export: the export.
        histories: the numbers of the items that each of at most `BATCHES[-1]` users met, earliest first.
        excluded: the numbers of further items that are not recommended to each.
        known: `times` and `features`, for a model that reads them.

    Returns:
        (int32 [users, most]: numbers of items, -1 where there are no more; float32 [users, most]: scores).
    """
    size = next_size(len(histories), BATCHES)
    asked = {"history": pad_lists(histories, size, export.manifest["history_length"])}
    for name, values in known.items():
        asked[name] = np.concatenate([values, np.zeros((size - len(values), *values.shape[1:]), values.dtype)])
    scores = export.functions["score_histories"](export.weights, asked)
    away = [[*history, *more] for history, more in zip(histories, excluded, strict=True)]
    items, values = score_and_rank(export, scores, away, size)
    return items[: len(histories)], values[: len(histories)]


def rank_for_users(export: Export, users: dict[str, np.ndarray], numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The best items for some users of an export, at most `BATCHES[-1]`.

    Args:
        export: the export.
        users: the arrays of its users.npz.
        numbers: int [n]: which of its users.

    Returns:
        (int32 [n, most]: numbers of items, -1 where there are no more; float32 [n, most]: scores).
    """
    start = users["start"]
    histories = [users["history"][start[n] : start[n + 1]].tolist() for n in numbers]
    size, length = next_size(len(numbers), BATCHES), export.manifest["history_length"]
    padded = np.concatenate([numbers, np.zeros(size - len(numbers), numbers.dtype)])
    known = {"features": users["features"][padded]} if users["features"].shape[1] else {}
    private = {name.partition(":")[2]: leaf[users["client"][padded]] for name, leaf in users.items() if ":" in name}
    if not private:
        if "times" in users:
            times = np.zeros((size, length + 1), np.int32)
            for row, n in zip(times, numbers, strict=False):
                latest = users["times"][start[n] : start[n + 1]][-length:]
                row[: len(latest)], row[len(latest) :] = latest, latest[-1] if len(latest) else 0
            known["times"] = times
        return rank_for_histories(export, histories, [[]] * len(numbers), **known)
    asked = {"user": users["user"][padded], **known}
    items, values = score_and_rank(
        export, export.functions["score_private"](export.weights, private, asked), histories, size
    )
    return items[: len(numbers)], values[: len(numbers)]


def recommend_to_users(
    export: Export, path: str | Path, number: int = 10
) -> Iterator[tuple[str, list[str], list[float]]]:
    """(id of a user, ids of the best items, their scores) of all users of a users.npz, by what their clients keep of
    the model, or by their histories."""
    with np.load(path, allow_pickle=False) as found:
        users = dict(found)
    every = np.arange(len(users["ids"]))
    for low in range(0, len(every), BATCHES[-1]):
        items, scores = rank_for_users(export, users, every[low : low + BATCHES[-1]])
        for name, row, values in zip(users["ids"][low:], items, scores, strict=False):
            best = [item for item in row[:number].tolist() if item >= 0]
            yield str(name), [export.items[item] for item in best], values[: len(best)].tolist()


def find_item_numbers(export: Export, ids: Sequence[str]) -> list[int]:
    """The numbers of items. Raises ValueError where one is unknown."""
    for item in ids:
        if item not in export.item_numbers:
            raise ValueError(f"no item {str(item)[:80]!r} in this export")
    return [export.item_numbers[item] for item in ids]


def recommend_by_history(
    export: Export, histories: Sequence[Sequence[str]], number: int = 10
) -> tuple[list[list[str]], list[list[float]]]:
    """(ids of the best items for each user, their scores); users are the ids of items that they met, earliest first.

    Raises ValueError where an item is unknown, or the model does not read histories.
    """
    if "score_histories" not in export.functions:
        raise ValueError("this model scores by what a client keeps, not by a history")
    named, found = [], []
    for low in range(0, len(histories), BATCHES[-1]):
        numbers = [find_item_numbers(export, history) for history in histories[low : low + BATCHES[-1]]]
        items, scores = rank_for_histories(export, numbers, [[]] * len(numbers))
        named += [[export.items[item] for item in row[:number] if item >= 0] for row in items]
        found += [[float(x) for x in row[:number] if x > -np.inf] for row in scores]
    return named, found


def main() -> None:
    """The program."""
    if len(sys.argv) < 3:
        sys.exit("usage: python load.py FOLDER ITEM [ITEM ...], or python load.py FOLDER --users")
    try:
        export = load_export(sys.argv[1])
        if sys.argv[2] == "--users":
            for user, best, values in recommend_to_users(export, Path(sys.argv[1]) / "users.npz"):
                print(json.dumps({"user": user, "items": best, "scores": values}))
            return
        items, scores = recommend_by_history(export, [sys.argv[2:]])
    except (ValueError, OSError) as error:
        sys.exit(f"load.py: {error}")
    for item, score in zip(items[0], scores[0], strict=True):
        print(f"{score:9.4f}  {item}  {export.titles[export.item_numbers[item]]}".rstrip())


if __name__ == "__main__":
    main()
