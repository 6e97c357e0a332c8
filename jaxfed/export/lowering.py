"""The functions of an export, lowered for several platforms and any number of users."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np

from jaxfed.core.tables import take_rows
from jaxfed.core.tree import to_compute_dtype
from jaxfed.core.types import Tree
from jaxfed.data.packing import empty_cohort
from jaxfed.export.exported_run import ExportedRun
from jaxfed.export.functions import ClientExample, Named, NamedTree, make_functions, name_leaves, update_client

MOST_ITEMS = 100  # of a list of recommendations


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
