"""Writes an export: a folder with compiled functions, weights, items, a manifest and a model card."""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.export
import numpy as np

from jaxfed import __version__
from jaxfed.config.build import RunParts, load_data
from jaxfed.config.config_files import map_paths, read_config
from jaxfed.config.schema import config_to_table, make_config
from jaxfed.core.model import with_frozen
from jaxfed.core.tables import take_rows
from jaxfed.core.tree import all_finite, to_compute_dtype
from jaxfed.core.types import Tree
from jaxfed.data.packing import empty_cohort
from jaxfed.export import loader
from jaxfed.export.functions import (
    ClientExample,
    Named,
    NamedTree,
    make_functions,
    name_leaves,
    update_client,
)
from jaxfed.export.index import check_index_package, write_index
from jaxfed.export.model_card import write_card
from jaxfed.export.users import collect_users
from jaxfed.training.best_model import open_best_model
from jaxfed.training.recommend import UserPlace, score_items
from jaxfed.training.run_dir import PRIVATE, read_summary
from jaxfed.training.summary import LOWER_RATES

PLATFORMS = ("cpu", "cuda", "tpu")
MOST_ITEMS = 100  # of a list of recommendations
LONGEST_HISTORY = 4096  # of models that read no order: what is longer loses its earliest items


class ExportedRun(NamedTuple):
    """A run's best model, ready to be exported."""

    parts: RunParts
    shared: NamedTree
    private: Tree  # of all clients [clients, ...]
    history_length: int


def export_run(
    folder: str,
    out: Path,
    *,
    users: bool = False,
    index: bool = False,
    platforms: Sequence[str] = PLATFORMS,
    replace: bool = False,
    load: Callable[[Any], Any] = load_data,
) -> dict[str, Any]:
    """Writes the best model of a run to a folder that a process without jaxfed can read.

    Args:
        folder: The folder of the run.
        out: Where to write.
        users: Whether the histories of all users, and what their clients keep, are exported, too.
        index: Whether an approximate index of item vectors is written, too, see `write_index`.
        platforms: What the functions are lowered for: cpu, cuda, tpu.
        replace: Whether an export that is there is replaced.
        load: Reads the data of a [data] section.

    Returns:
        The manifest.

    Raises:
        ValueError: the folder holds no model, or `out` holds something else.
    """
    check_packages()
    if index:
        check_index_package()
    check_out(out, replace)
    config = make_config(read_config(Path(folder) / "config.toml")) if Path(folder).is_dir() else None
    parts, _, (shared, private) = open_best_model(folder, load)
    assert config is not None  # or there is no model
    check_scores(parts, (shared, private), folder)
    run = ExportedRun(parts, name_leaves(with_frozen(shared, parts.model.frozen)), private, find_history_length(parts))
    vectors = find_vectors(run)
    if index and vectors is None:
        raise ValueError("--index: this model has no vector for each item: leave it out")
    partial_out = out.with_name(out.name + ".partial")
    shutil.rmtree(partial_out, ignore_errors=True)
    partial_out.mkdir(PRIVATE if users else 0o777, parents=True)
    try:
        functions = write_functions(run, partial_out, platforms)
        write_weights(run, partial_out)
        write_items(parts, partial_out)
        if users:
            np.savez(partial_out / "users.npz", **collect_users(parts, private))
        shutil.copyfile(loader.__file__, partial_out / "load.py")
        summary = read_summary(Path(folder)) if (Path(folder) / "summary.json").exists() else {}
        manifest = describe_export(run, functions, platforms, config, summary)
        if index and vectors is not None:
            manifest["index"] = write_index(vectors, partial_out / "items.usearch")
        write_card(partial_out / "README.md", manifest, summary)
        manifest["files"] = hash_files(partial_out)
        (partial_out / "manifest.json").write_text(json.dumps(manifest, indent=1))
        put_in_place(partial_out, out)
    finally:
        shutil.rmtree(partial_out, ignore_errors=True)
    return manifest


def check_packages() -> None:
    """Raises ValueError where a package that exports need is not installed."""
    for name in ("flatbuffers", "safetensors"):
        if find_spec(name) is None:
            raise ValueError(f'exports need the package {name}: pip install "jaxfed[export]"')


def check_scores(parts: RunParts, best: tuple[Tree, Tree], folder: str) -> None:
    """Raises ValueError where parameters, or the scores of a user, are not numbers."""
    people = parts.data.population.asked
    seat = UserPlace(people, 0, int(people.client_of[0]), int(parts.data.population.homes[people.client_of[0]]))
    if not bool(all_finite(best)) or np.isnan(score_items(parts, best, seat)).any():
        raise ValueError(f"the run in {folder} diverged: train again in another folder, and {LOWER_RATES}")


def check_out(out: Path, replace: bool) -> None:
    """Raises ValueError where a folder must not be written."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / "manifest.json").is_file():
        raise ValueError(f"{out} holds something that is no export: name another folder")
    if not replace:
        raise ValueError(f"{out} already holds an export: name another folder, or pass --replace")


def put_in_place(made: Path, out: Path) -> None:
    """Moves what was made to its place; an export that is there is removed once the new one is in its place."""
    old = out.with_name(out.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    made.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def find_history_length(parts: RunParts) -> int:
    """The most items of a history that scores are computed from: what a model of sequences reads; else a power of two
    that no history of the data is longer than, or `LONGEST_HISTORY`."""
    if parts.model.sequence:
        return parts.model.sequence.length
    people = parts.data.population.asked
    longest = int((people.train.counts + people.valid.counts + people.test.counts).max())
    return min(max(16, 1 << (longest - 1).bit_length()), LONGEST_HISTORY)


def to_shapes(tree: Tree, *first: Any) -> Tree:
    """The shapes of arrays; `first` replaces the length of the first axis."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((*first, *x.shape[len(first) :]), x.dtype), tree)


def list_inputs(run: ExportedRun, private: NamedTree) -> dict[str, tuple[Any, ...]]:
    """{name of a function: shapes of its arguments}, for any number of users."""
    b, s = jax.export.symbolic_shape("b, s")
    model, weights, length = run.parts.model, to_shapes(run.shared.leaves), run.history_length
    known: Named = {}
    if "user" in model.features and run.parts.data.population.user_features:
        width = run.parts.data.population.user_features.rows(np.zeros(1, int)).shape[-1]
        known["features"] = jax.ShapeDtypeStruct((b, width), np.int32)
    history = {"history": jax.ShapeDtypeStruct((b, length), np.int32), **known}
    if model.sequence and model.sequence.times != "none":
        history["times"] = jax.ShapeDtypeStruct((b, length + 1), np.int32)
    own = {path: jax.ShapeDtypeStruct((b, *x.shape), x.dtype) for path, x in private.leaves.items()}
    scores = jax.ShapeDtypeStruct((b, run.parts.data.num_items), np.float32)
    return {
        "score_histories": (weights, history),
        "score_private": (weights, own, {"user": jax.ShapeDtypeStruct((b,), np.int32), **known}),
        "top_items": (scores, jax.ShapeDtypeStruct((b, s), np.int32)),
    }


def make_client_example(run: ExportedRun) -> ClientExample:
    """What the longest kind of client has in a round, as shapes."""
    parts = run.parts
    block = empty_cohort(parts.data.population, parts.batching, parts.shapes).blocks[0]
    data, rows = jax.tree.map(lambda x: x[0], (block.data, block.rows))
    shared = to_compute_dtype(run.shared.rebuild(run.shared.leaves))
    shared = {name: part for name, part in shared.items() if name not in parts.model.frozen}
    sent, state = jax.eval_shape(parts.method.work.init, shared, jax.random.key(0))
    cut = partial(take_rows, ids=np.zeros(len(rows), np.int32))
    if jax.tree.leaves(parts.model.frozen):
        data = data._replace(frozen=jax.eval_shape(cut, parts.model.frozen))
    return ClientExample(name_leaves(jax.eval_shape(cut, sent)), name_leaves(state), name_leaves(to_shapes(data)))


def write_functions(run: ExportedRun, out: Path, platforms: Sequence[str]) -> dict[str, Any]:
    """Writes StableHLO of all functions; returns what the manifest says of them."""
    parts = run.parts
    private = name_leaves(jax.eval_shape(parts.model.private, jax.random.key(0)))
    most = min(MOST_ITEMS, parts.data.num_items)
    functions, inputs = make_functions(parts.model, run.shared, private, parts.data.num_items, most), {}
    inputs = list_inputs(run, private)
    if not parts.method.closed and not parts.method.is_central:
        example = make_client_example(run)
        functions["update_client"] = partial(update_client, parts.method.work.update, example)
        key = jax.ShapeDtypeStruct((2,), np.uint32)
        inputs["update_client"] = (*(to_shapes(each.leaves) for each in example), key)
    described = {}
    for name, function in functions.items():
        exported = jax.export.export(jax.jit(function), platforms=tuple(platforms))(*inputs[name])
        (out / f"{name}.stablehlo").write_bytes(exported.serialize())
        described[name] = {
            "file": f"{name}.stablehlo",
            "inputs": jax.tree.map(describe_array, inputs[name]),
            "outputs": jax.tree.map(describe_array, jax.tree.unflatten(exported.out_tree, exported.out_avals)),
        }
    return described


def describe_array(x: Any) -> str:
    """The type and shape of an array, such as "float32[b,1682]"."""
    return f"{np.dtype(x.dtype).name}[{','.join(map(str, x.shape))}]"


def write_weights(run: ExportedRun, out: Path) -> None:
    """Writes the shared parameters, and what is frozen beside them, by their paths."""
    from safetensors.flax import save_file

    save_file(jax.tree.map(jax.numpy.asarray, run.shared.leaves), out / "weights.safetensors")
    (out / "weights.safetensors").chmod(0o666 & out.stat().st_mode)  # it is written for its owner alone


def write_items(parts: RunParts, out: Path) -> None:
    """Writes the ids and titles of items in the order of the rows of tables."""
    source = parts.data.source
    titles = [""] * len(source.items) if source.titles is None else [str(title) for title in source.titles]
    text = json.dumps({"ids": [str(item) for item in source.items], "titles": titles}, ensure_ascii=False)
    (out / "items.json").write_text(text, encoding="utf-8")


def hash_files(folder: Path) -> dict[str, Any]:
    """{name: size and SHA-256} of all files of a folder."""
    found = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        found[path.name] = {"bytes": path.stat().st_size, "sha256": digest}
    return found


def find_vectors(run: ExportedRun) -> np.ndarray | None:
    """float32 [N, d]: the vectors of items; None: the model has none. A number for each pair of items is no vector."""
    table = run.shared.leaves.get("tables/item")
    if table is None or table.ndim != 2 or table.shape[1] >= table.shape[0]:
        return None
    return np.asarray(table[: run.parts.data.num_items], np.float32)


def describe_export(
    run: ExportedRun, functions: dict[str, Any], platforms: Sequence[str], config: Any, summary: dict[str, Any]
) -> dict[str, Any]:
    """What the manifest says but for the files. Paths of the machine are left out of the configuration."""
    parts = run.parts
    configuration = map_paths(config_to_table(config), lambda path: Path(path).name)
    configuration.pop("run", None)
    return {
        "format": loader.FORMAT,
        "versions": {"jaxfed": __version__, "jax": version("jax"), "numpy": version("numpy")},
        "platforms": list(platforms),
        "num_items": parts.data.num_items,
        "most_items": min(MOST_ITEMS, parts.data.num_items),
        "history_length": run.history_length,
        "item_vectors": "tables/item" if find_vectors(run) is not None else None,
        "protocol": parts.protocol,
        "leaky": parts.leaky,
        "run": {name: summary.get(name) for name in ("rounds", "best_round", "params_sha256", "data_sha256")},
        "functions": functions,
        "configuration": configuration,
    }
