"""Writes an export: a folder with lowered functions, weights, items, a manifest and a model card."""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import jax
import numpy as np

from jaxfed import __version__
from jaxfed.config.build import RunParts, load_data
from jaxfed.config.config_files import map_paths
from jaxfed.config.schema import config_to_table
from jaxfed.export import loader
from jaxfed.export.exported_run import ExportedRun, find_vectors, open_exported_run
from jaxfed.export.index import check_index_package, write_index
from jaxfed.export.lowering import MOST_ITEMS, write_functions
from jaxfed.export.model_card import write_card
from jaxfed.export.users import collect_users
from jaxfed.training.run_dir import PRIVATE, read_summary

PLATFORMS = ("cpu", "cuda", "tpu")


def export_run(
    folder: str,
    out: Path,
    *,
    users: bool = False,
    index: bool = False,
    onnx: bool = False,
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
        onnx: Whether the functions that score are written as ONNX, too, where they can be.
        platforms: What the functions are lowered for: cpu, cuda, tpu.
        replace: Whether an export that is there is replaced.
        load: Reads the data of a [data] section.

    Returns:
        The manifest.

    Raises:
        ValueError: the folder holds no model, or one that cannot be exported; or `out` holds something else.
    """
    check_packages(index, onnx)
    out = out.resolve()
    check_out(out, replace)
    run, config = open_exported_run(folder, load)
    vectors = find_vectors(run)
    if index and vectors is None:
        raise ValueError("--index: this model has no vector for each item: leave it out")
    kept = collect_users(run) if users else {}
    out.parent.mkdir(parents=True, exist_ok=True)
    made = Path(mkdtemp(prefix=f"{out.name}.", dir=out.parent))  # of a name that nobody has
    try:
        functions = write_functions(run, made, platforms)
        write_weights(run, made)
        write_items(run.parts, made)
        if users:
            np.savez(made / "users.npz", **kept)
        shutil.copyfile(loader.__file__, made / "load.py")
        summary = read_summary(Path(folder)) if (Path(folder) / "summary.json").exists() else {}
        manifest = describe_export(run, functions, platforms, config, summary) | {"users": len(kept.get("ids", ()))}
        if index and vectors is not None:
            manifest["index"] = write_index(vectors, made / "items.usearch")
        if onnx:
            manifest["onnx"] = write_scorers(run, made)
        write_card(made / "README.md", manifest, summary)
        manifest["files"] = hash_files(made)
        (made / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        put_in_place(made, out, users)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return manifest


def check_packages(index: bool, onnx: bool = False) -> None:
    """Raises ValueError where a package that exports need is not installed."""
    for name in ("flatbuffers", "safetensors"):
        if find_spec(name) is None:
            raise ValueError(f'exports need the package {name}: pip install "jaxfed[export]"')
    if onnx and find_spec("onnx") is None:
        raise ValueError('--onnx needs the package onnx: pip install "jaxfed[onnx]"')
    if index:
        check_index_package()


def check_out(out: Path, replace: bool) -> None:
    """Raises ValueError where a folder must not be written."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / "manifest.json").is_file():
        raise ValueError(f"{out} holds something that is no export: name another folder")
    if not replace:
        raise ValueError(f"{out} already holds an export: name another folder, or pass --replace")


def put_in_place(made: Path, out: Path, private: bool) -> None:
    """Moves what was made to its place; an export that is there is removed once the new one is in its place.

    private: whether its owner alone may read it.
    """
    made.chmod(PRIVATE if private else 0o755)
    old = Path(mkdtemp(prefix=f"{out.name}.", dir=out.parent))
    try:
        if out.exists():
            out.rename(old / "old")
        made.rename(out)
    except OSError:
        if (old / "old").exists():
            (old / "old").rename(out)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def write_weights(run: ExportedRun, out: Path) -> None:
    """Writes the shared parameters, and what is frozen beside them, by their paths."""
    from safetensors.flax import save_file

    save_file(jax.tree.map(jax.numpy.asarray, run.shared.leaves), out / "weights.safetensors")
    (out / "weights.safetensors").chmod(0o644)  # it is written for its owner alone; the folder may be private


def write_scorers(run: ExportedRun, out: Path) -> dict[str, Any]:
    """Writes ONNX files; returns what the manifest says of them. See `write_onnx`, which needs an extra."""
    from jaxfed.export.onnx_files import write_onnx

    return write_onnx(run, out)


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
        "federation": {
            "num_clients": parts.data.population.num_clients,
            "users_per_client": parts.data.population.users_per_client,
            "label": parts.data.population.labels.kind if parts.data.population.labels else "implicit",
            "protocol": parts.data.population.protocol,
            "round": run.round,
        },
        "run": {name: summary.get(name) for name in ("rounds", "best_round", "params_sha256", "data_sha256")},
        "functions": functions,
        "configuration": configuration,
    }
