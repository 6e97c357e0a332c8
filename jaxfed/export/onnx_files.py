"""Writes the scorers of an export as ONNX files, where the primitives they are traced to allow."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
from onnx import ModelProto, checker, helper

from jaxfed.export.exported_run import ExportedRun
from jaxfed.export.functions import Named, make_functions, name_leaves
from jaxfed.export.lowering import list_inputs
from jaxfed.export.onnx_graph import GraphBuilder, NoOnnxFormError, describe_value
from jaxfed.export.onnx_primitives import convert_equations

OPSET, IR_VERSION = 18, 8  # of onnx 1.13 (2022): what reads ONNX today reads these
MOST_BYTES = 2**31 - 2**20  # of weights: a file of protobuf has less than 2 GB
PRIVATE = "private:"  # begins the names of inputs that clients keep, as in users.npz


def convert_function(function: Callable[[Named, Named], jax.Array], weights: Named, asked: Named) -> ModelProto:
    """Makes an ONNX model of a function of weights and of what is asked.

    Args:
        function: function(weights, asked) -> array.
        weights: {path: array}: become initializers of these names.
        asked: {name: shape}: become inputs of these names. Their first dimension may be symbolic, `b`.

    Returns:
        The model, which `onnx.checker` has checked. Its output is `scores`.

    Raises:
        NoOnnxFormError: the function has a primitive that is not built, or weights that no file of ONNX can hold.
    """
    if sum(weight.nbytes for weight in weights.values()) > MOST_BYTES:
        raise NoOnnxFormError("a file of ONNX holds less than 2 GB, and the weights have more")
    shapes = {name: jax.ShapeDtypeStruct(weight.shape, weight.dtype) for name, weight in weights.items()}
    traced = jax.make_jaxpr(function)(shapes, asked)
    graph, names = GraphBuilder(weights), [*sorted(weights), *sorted(asked)]
    graph.batch = graph.add("Shape", next(iter(sorted(asked))), start=0, end=1)
    (result,) = convert_equations(graph, traced, names)
    graph.nodes.append(helper.make_node("Identity", [graph.name(result)], ["scores"]))
    inputs = [describe_value(name, asked[name]) for name in sorted(asked)]
    outputs = [describe_value("scores", traced.out_avals[0])]
    made = helper.make_graph(graph.nodes, "scorer", inputs, outputs, list(graph.initializers.values()))
    versions: dict[str, Any] = {"opset_imports": [helper.make_opsetid("", OPSET)], "ir_version": IR_VERSION}
    model = helper.make_model(made, producer_name="jaxfed", **versions)
    checker.check_model(model, full_check=True)
    return model


def write_onnx(run: ExportedRun, out: Path) -> dict[str, Any]:
    """Writes NAME.onnx of each function that scores, where it can be one.

    Args:
        run: the run's best model.
        out: the folder.

    Returns:
        What the manifest says: {"opset": of all files, "files": {name of a function: name of its file},
        "refused": {name: the reason}}.
    """
    parts, private = run.parts, name_leaves(jax.eval_shape(run.parts.model.private, jax.random.key(0)))
    functions = make_functions(parts.model, run.shared, private, parts.data.num_items, 1)
    described: dict[str, Any] = {"opset": OPSET, "files": {}, "refused": {}}
    for name, (_, *given) in list_inputs(run, private).items():
        if name not in functions or not name.startswith("score"):
            continue
        own = {f"{PRIVATE}{path}": shape for path, shape in given[0].items()} if len(given) == 2 else {}
        try:
            model = convert_function(partial(call_scorer, functions[name]), run.shared.leaves, own | given[-1])
        except NoOnnxFormError as error:
            described["refused"][name] = str(error)
            continue
        (out / f"{name}.onnx").write_bytes(model.SerializeToString())
        described["files"][name] = f"{name}.onnx"
    return described


def call_scorer(score: Callable[..., jax.Array], weights: Named, asked: Named) -> jax.Array:
    """The scores of a function that takes private parts on their own; in `asked` their names begin with `PRIVATE`."""
    own = {name.removeprefix(PRIVATE): value for name, value in asked.items() if name.startswith(PRIVATE)}
    rest = {name: value for name, value in asked.items() if not name.startswith(PRIVATE)}
    return score(weights, own, rest) if own else score(weights, rest)
