"""Semantic codes of items: residual k-means on their text vectors, and models whose item vectors are sums of code
rows."""

import warnings
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.cluster.vq import kmeans2

from jaxfed.core.model import Model
from jaxfed.core.tables import Table, is_table, num_rows, unwrap
from jaxfed.core.types import Key, Tree
from jaxfed.models.model import check_positive
from jaxfed.models.parametrizations import entry_size

STEPS = 30  # of Lloyd's algorithm, for each level


def semantic_codes(vectors: np.ndarray, levels: int = 3, size: int = 256, seed: int = 0) -> np.ndarray:
    """Codes of items by residual k-means on their vectors. TIGER (Rajput et al. 2023, "Recommender systems with
    generative retrieval") has such codes from a residual-quantized autoencoder (RQ-VAE) instead of k-means.

    The code of level 1 is the cluster of a vector; the code of level l is the cluster of the residual that the levels
    before leave. One more digit counts items with the same codes, so that it tells them apart.

    Args:
        vectors: float [N, W]: the vector of each item's text. A row that is not finite is no item: its codes are -1.
        levels: Number of levels.
        size: Number of codes of a level; at most as many as there are different vectors are used.
        seed: Seed of the first centres.

    Returns:
        int32 [N, levels + 1], different for different items; the last digit is 0 where codes were different already.

    Raises:
        ValueError: a size is below 1, or there is no item.

    Example:
        >>> semantic_codes(np.array([[0.0, 0], [0, 1], [9, 0], [9, 0]]), levels=2, size=2)[2:].tolist()[1][-1]
        1
    """
    check_positive("levels", levels)
    check_positive("size", size)
    used = np.isfinite(vectors).all(1)
    if not used.any():
        raise ValueError("semantic_codes: there is no item: give at least one finite vector")
    residual = np.asarray(vectors[used], np.float64)
    generator, found = np.random.default_rng(seed), []
    for _ in range(levels):
        centres = min(size, len(np.unique(residual, axis=0)))
        with warnings.catch_warnings(action="ignore"):  # of a cluster that became empty: its code is not used
            means, code = kmeans2(residual, centres, iter=STEPS, minit="++", seed=generator)
        residual = residual - means[code]
        found.append(code)
    codes = np.stack(found, 1)
    made = np.full((len(vectors), levels + 1), -1, np.int32)
    made[used] = np.column_stack([codes, count_same_before(codes)])
    return made


def count_same_before(codes: np.ndarray) -> np.ndarray:
    """int [N]: how many of the rows before each are equal to it."""
    _, group = np.unique(codes, axis=0, return_inverse=True)
    group = group.ravel()
    order = np.argsort(group, kind="stable")
    start = np.searchsorted(group[order], group[order])
    place = np.empty(len(group), np.int64)
    place[order] = np.arange(len(group)) - start
    return place


def sum_code_rows(rows: jax.Array, codes: jax.Array, begin: np.ndarray) -> jax.Array:
    """[N, ...]: the sum of the rows of each item's codes [N, levels], of rows [sum of sizes, ...]; zeros for none."""
    places = jnp.where(codes < 0, len(rows), codes + begin)
    return jnp.sum(rows.at[places].get(mode="fill", fill_value=0), 1)


def code_rows(model: Model, codes: np.ndarray) -> Model:
    """The model with sums of code rows in place of the rows of its tables (RQFedRec, 2026).

    Row i of a table is the sum over levels of the row of item i's code at that level. Clients hold all code rows, which
    are parameters like others, and the codes of items, which are frozen and downloaded once. In a round every client
    receives and sends the same number of bytes, whatever its items are and however large the catalogue is, and messages
    do not show which items a client has. Biases are sums, too.

    Args:
        model: The model whose tables they are.
        codes: int [N, levels]: the codes of each item, see `semantic_codes`; -1: none.

    Returns:
        The model.

    Raises:
        ValueError: the model has no tables, has another number of items, or is a closed form.

    Example:
        >>> from jaxfed.models.mf import mf
        >>> made = code_rows(mf(100, 1, dim=8), np.arange(200).reshape(100, 2) % 7)
        >>> made.init(jax.random.key(0))["params"]["codes"]["item"].shape
        (14, 8)
    """
    check_code_rows(model, len(codes))
    begin, end = find_level_starts(codes)

    def on_tables(function: Callable[..., Any]) -> Callable[..., Any]:
        return wraps(function)(lambda shared, *more: function(expand_code_rows(begin, shared), *more))

    return model._replace(
        init=partial(init_code_rows, model, codes.shape[1], end),
        loss=on_tables(model.loss),
        score=on_tables(model.score),
        fold_in=model.fold_in and on_tables(model.fold_in),
        frozen={**(model.frozen or {}), "item_codes": Table(np.asarray(codes, np.int32))},
    )


def find_level_starts(codes: np.ndarray) -> tuple[np.ndarray, int]:
    """(int [levels]: the first row of each level's codes in a table of all, their number in all)."""
    ends = np.cumsum(codes.max(0) + 1)
    return np.concatenate([[0], ends[:-1]]), int(ends[-1])


def init_code_rows(model: Model, levels: int, number: int, key: Key) -> Tree:
    """The shared parameters: the model's own, and rows of codes such that their sums have entries as large as the
    model's tables."""
    model_key, own = jax.random.split(key)
    held = model.init(model_key)

    def draw(place: int, table: jax.Array) -> jax.Array:
        numbers = jax.random.normal(jax.random.fold_in(own, place), (number, *table.shape[1:]))
        return (numbers * entry_size(table) / levels**0.5).astype(table.dtype)

    rows = {name: draw(place, table.rows) for place, (name, table) in enumerate(held["tables"].items())}
    return {"params": {"model": held["params"], "codes": rows}}


def expand_code_rows(begin: np.ndarray, shared: Tree) -> Tree:
    """The model's own shared parameters, the rows of its tables as sums; codes are cut to rows as tables would be."""
    codes = jnp.asarray(unwrap(shared["item_codes"]))
    tables = {name: sum_code_rows(jnp.asarray(x), codes, begin) for name, x in shared["params"]["codes"].items()}
    beside = {name: x for name, x in shared.items() if name not in ("params", "item_codes")}
    return {"params": shared["params"]["model"], "tables": tables} | beside


def check_code_rows(model: Model, items: int) -> None:
    """Raises ValueError where a model's tables cannot be sums of code rows."""
    if model.closed is not None:
        raise ValueError("parametrization.codes: a closed form is solved for the tables themselves: leave it out")
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    tables = shapes.get("tables", {}) if isinstance(shapes, dict) else {}
    if not tables or not all(map(is_table, tables.values())):
        raise ValueError("parametrization.codes: the model has no table of items: leave the parametrization out")
    if num_rows(tables) != items:
        raise ValueError(
            f"parametrization.codes: there are codes of {items:,} items, the model has {num_rows(tables):,}: give "
            "those of each"
        )
