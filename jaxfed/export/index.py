"""An approximate index of item vectors (HNSW, Malkov and Yashunin 2018, as usearch has it), for large catalogues."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

ASKED = 1000  # items of which the recall is measured
NEAREST_FOUND = 10


def check_index_package() -> None:
    """Raises ValueError where usearch is not installed."""
    if find_spec("usearch") is None:
        raise ValueError('--index needs the package usearch: pip install "jaxfed[serve]"')


def write_index(vectors: np.ndarray, path: Path) -> dict[str, Any]:
    """Builds and writes the index of item vectors by their cosine.

    Args:
        vectors: float32 [N, d].
        path: the file.

    Returns:
        What the manifest says of it: `recall@10`, the share of an item's ten nearest that the index finds, on average
        over at most `ASKED` items that are drawn at random.
    """
    from usearch.index import Index

    index = Index(ndim=vectors.shape[1], metric="cos", dtype="f32")
    index.add(np.arange(len(vectors)), vectors, threads=0)
    index.save(str(path))
    random = np.random.default_rng(0)
    asked = random.choice(len(vectors), min(ASKED, len(vectors)), replace=False)
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    found = 0.0
    for item in asked:
        cosines = unit @ unit[item]
        nearest = np.argpartition(-cosines, min(NEAREST_FOUND, len(cosines) - 1))[:NEAREST_FOUND]
        keys = index.search(vectors[item], NEAREST_FOUND).keys
        found += len(np.intersect1d(nearest, keys)) / len(nearest)
    return {"file": path.name, "recall@10": round(found / len(asked), 4), "items": len(asked)}


def open_index(path: Path) -> Any:
    """The index in a file. Raises ValueError where usearch is not installed."""
    check_index_package()
    from usearch.index import Index

    return Index.restore(str(path))
