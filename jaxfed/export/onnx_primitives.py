"""What each primitive of JAX is in ONNX.

A converter takes (graph, equation, values of its inputs), and returns the value of its output, or a list of several.
The table has the primitives of the scorers that come with jaxfed, and no more.
"""

import string
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import jax
import numpy as np
from onnx import helper

from jaxfed.export.onnx_graph import GraphBuilder, NoOnnxFormError, describe_value, is_known_size, refuse_equation
from jaxfed.export.onnx_indexing import (
    convert_dynamic_slice,
    convert_gather,
    convert_scatter_add,
    convert_slice,
    convert_split,
    convert_unstack,
)

INLINED = ("jaxpr", "call_jaxpr", "fun_jaxpr", "call")  # parameters that hold what a primitive calls
CALLS = {"jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint", "custom_vmap_call"}
CALLS |= {"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"}
Converter = Callable[[GraphBuilder, Any, list[Any]], Any]


def convert_equations(graph: GraphBuilder, traced: Any, inputs: Sequence[Any]) -> list[Any]:
    """Adds the equations of a jaxpr to a graph. What depends on no weight and no input is computed here.

    Args:
        graph: what is added to.
        traced: the jaxpr, closed or not.
        inputs: the values of its inputs.

    Returns:
        The values of its outputs.

    Raises:
        NoOnnxFormError: a primitive is not built in ONNX.
    """
    jaxpr = getattr(traced, "jaxpr", traced)
    values = dict(zip(jaxpr.invars, inputs, strict=True))
    values |= dict(zip(jaxpr.constvars, getattr(traced, "consts", ()), strict=True))

    def read(variable):
        return np.asarray(variable.val, variable.aval.dtype) if hasattr(variable, "val") else values[variable]

    for equation in jaxpr.eqns:
        found = convert_equation(graph, equation, [read(each) for each in equation.invars])
        several = found if isinstance(found, list | tuple) else [found]
        values |= dict(zip(equation.outvars, several, strict=True))
    return [read(each) for each in jaxpr.outvars]


def convert_equation(graph: GraphBuilder, equation: Any, inputs: list[Any]) -> Any:
    """Adds one equation to a graph; returns the value of its output, or several."""
    name, parameters = equation.primitive.name, equation.params
    if name in CALLS:
        return convert_equations(graph, next(parameters[key] for key in INLINED if key in parameters), inputs)
    sizes = [size for each in equation.outvars for size in each.aval.shape]
    if not any(isinstance(each, str) for each in inputs) and all(map(is_known_size, sizes)):
        return hold_equation(equation, inputs)
    if name not in CONVERTERS:
        raise NoOnnxFormError(f"the primitive {name} is not built in ONNX")
    return CONVERTERS[name](graph, equation, inputs)


def hold_equation(equation: Any, inputs: list[Any]) -> list[Callable[[], Any]]:
    """The values of an equation that depends on nothing asked: they are computed when one of them is read."""

    @cache
    def compute():
        known = [each() if callable(each) else jax.numpy.asarray(each) for each in inputs]
        found = equation.primitive.bind(*known, **equation.params)
        return found if equation.primitive.multiple_results else [found]

    return [partial(lambda number: compute()[number], number) for number in range(len(equation.outvars))]


def convert_by_name(op: str) -> Converter:
    """Of a primitive that is one node with the same inputs."""

    def convert(graph, equation, inputs):
        if op in ("And", "Or", "Not") and equation.outvars[0].aval.dtype != bool:
            raise refuse_equation(equation, "of numbers")
        return graph.add(op, *inputs)

    return convert


def keep_inputs(graph: GraphBuilder, equation: Any, inputs: list[Any]) -> list[Any]:
    """Of a primitive that computes nothing."""
    return inputs


def convert_to_shape(graph: GraphBuilder, equation: Any, inputs: list[Any]) -> str:
    """reshape, squeeze and expand_dims."""
    return graph.reshape(inputs[0], equation.outvars[0].aval.shape)


def convert_broadcast(graph: GraphBuilder, equation: Any, inputs: list[Any]) -> str:
    """broadcast_in_dim: dimensions of length 1 are put between, and expanded."""
    sizes, own = equation.outvars[0].aval.shape, equation.invars[0].aval.shape
    thin: list[Any] = [1] * len(sizes)
    for place, size in zip(equation.params["broadcast_dimensions"], own, strict=True):
        thin[place] = size
    found = inputs[0] if tuple(thin) == tuple(own) else graph.reshape(inputs[0], thin)
    return found if tuple(thin) == tuple(sizes) else graph.add("Expand", found, graph.shape(sizes))


def convert_type(graph: GraphBuilder, equation: Any, inputs: list[Any]) -> Any:
    """convert_element_type."""
    dtype = equation.params["new_dtype"]
    return inputs[0] if equation.invars[0].aval.dtype == dtype else graph.cast(inputs[0], dtype)


def convert_select(graph: GraphBuilder, equation: Any, inputs: list[Any]) -> str:
    """select_n of two cases. Truth values are chosen by logic: not every program has Where of them."""
    which, no, yes = inputs if len(inputs) == 3 else (None, None, None)
    if which is None or equation.invars[0].aval.dtype != bool:
        raise refuse_equation(equation, "of more than two cases")
    if equation.outvars[0].aval.dtype == bool:
        return graph.add("Or", graph.add("And", which, yes), graph.add("And", graph.add("Not", which), no))
    return graph.add("Where", which, yes, no)


def convert_dot(graph: GraphBuilder, equation: Any, inputs: list[Any]) -> str:
    """dot_general."""
    (left_sum, right_sum), (left_batch, right_batch) = equation.params["dimension_numbers"]
    dtype, letters = equation.outvars[0].aval.dtype, iter(string.ascii_letters)
    left = [next(letters) for _ in equation.invars[0].aval.shape]
    right = [next(letters) for _ in equation.invars[1].aval.shape]
    for a, b in zip((*left_sum, *left_batch), (*right_sum, *right_batch), strict=True):
        right[b] = left[a]
    free = [x for i, x in enumerate(left) if i not in (*left_sum, *left_batch)]
    free += [x for i, x in enumerate(right) if i not in (*right_sum, *right_batch)]
    kept = "".join([*(left[i] for i in left_batch), *free])
    factors = zip(inputs, equation.invars, strict=True)
    factors_cast = [x if one.aval.dtype == dtype else graph.cast(x, dtype) for x, one in factors]
    return graph.add("Einsum", *factors_cast, equation=f"{''.join(left)},{''.join(right)}->{kept}")


def convert_reduction(op: str, graph: GraphBuilder, equation: Any, inputs: list[Any]) -> str:
    """reduce_sum and its like; of truth values by 0 and 1."""
    axes, logical = np.array(equation.params["axes"], np.int64), equation.invars[0].aval.dtype == bool
    if not len(axes):
        return inputs[0]
    found = graph.add(op, graph.cast(inputs[0], np.int32) if logical else inputs[0], axes, keepdims=0)
    return graph.cast(found, bool) if logical else found


def convert_power(graph: GraphBuilder, equation: Any, inputs: list[Any]) -> str:
    """integer_pow and square."""
    power = equation.params.get("y", 2)
    if power == 2:
        return graph.add("Mul", inputs[0], inputs[0])
    return graph.add("Pow", inputs[0], np.array(power, equation.invars[0].aval.dtype))


def convert_scan(graph: GraphBuilder, equation: Any, inputs: list[Any]) -> Any:
    """scan over something, forwards: its body is a graph that reads constants from the graph around it."""
    body = equation.params["jaxpr"]
    own = getattr(body, "jaxpr", body)
    pairs = zip((*equation.invars, *equation.outvars), (*own.invars, *own.outvars), strict=True)
    whole = [one.aval.ndim == inner.aval.ndim for one, inner in pairs]  # constants, and what a step hands to the next
    first, carried = sum(whole[: len(inputs)]), sum(whole[len(inputs) :])
    held = first - carried
    if equation.params["reverse"] or first == len(inputs):
        raise refuse_equation(equation, "backwards, or over nothing")
    names = [graph.make_name() for _ in inputs[held:]]
    with graph.inside() as nodes:
        found = convert_equations(graph, body, [*inputs[:held], *names])
        results = [graph.add("Identity", each) for each in found]
    given = [describe_value(name, one.aval, False) for name, one in zip(names, own.invars[held:], strict=True)]
    given_back = [describe_value(name, one.aval, False) for name, one in zip(results, own.outvars, strict=True)]
    steps = {"body": helper.make_graph(nodes, graph.make_name(), given, given_back)}
    return graph.add("Scan", *inputs[held:], outputs=len(results), num_scan_inputs=len(inputs) - first, **steps)


ONE_NODE = {
    "add": "Add", "add_any": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "max": "Max", "min": "Min", "pow": "Pow",
    "neg": "Neg", "abs": "Abs", "sign": "Sign", "sqrt": "Sqrt", "exp": "Exp", "log": "Log", "tanh": "Tanh",
    "logistic": "Sigmoid", "erf": "Erf", "floor": "Floor", "and": "And", "or": "Or", "not": "Not", "eq": "Equal",
    "lt": "Less", "le": "LessOrEqual", "gt": "Greater", "ge": "GreaterOrEqual",
}  # fmt: skip
REDUCTIONS = {"reduce_sum": "ReduceSum", "reduce_max": "ReduceMax", "reduce_min": "ReduceMin"}
REDUCTIONS |= {"reduce_or": "ReduceMax", "reduce_and": "ReduceMin"}
CONVERTERS: dict[str, Converter] = {
    **{name: convert_by_name(op) for name, op in ONE_NODE.items()},
    **{name: partial(convert_reduction, op) for name, op in REDUCTIONS.items()},
    **dict.fromkeys(("copy", "copy_p", "stop_gradient", "optimization_barrier"), keep_inputs),
    **dict.fromkeys(("reshape", "squeeze", "expand_dims"), convert_to_shape),
    **dict.fromkeys(("integer_pow", "square"), convert_power),
    "broadcast_in_dim": convert_broadcast,
    "concatenate": lambda graph, equation, inputs: graph.add("Concat", *inputs, axis=int(equation.params["dimension"])),
    "convert_element_type": convert_type,
    "cumsum": lambda graph, equation, inputs: graph.add(
        "CumSum", inputs[0], np.int64(equation.params["axis"]), reverse=int(equation.params["reverse"])
    ),
    "dot_general": convert_dot,
    "dynamic_slice": convert_dynamic_slice,
    "erfc": lambda graph, equation, inputs: graph.add(
        "Sub", np.ones((), equation.outvars[0].aval.dtype), graph.add("Erf", inputs[0])
    ),
    "gather": convert_gather,
    "ne": lambda graph, equation, inputs: graph.add("Not", graph.add("Equal", *inputs)),
    "rsqrt": lambda graph, equation, inputs: graph.add("Reciprocal", graph.add("Sqrt", inputs[0])),
    "scan": convert_scan,
    "scatter-add": convert_scatter_add,
    "select_n": convert_select,
    "slice": convert_slice,
    "split": convert_split,
    "unstack": convert_unstack,
    "transpose": lambda graph, equation, inputs: graph.add(
        "Transpose", inputs[0], perm=[int(place) for place in equation.params["permutation"]]
    ),
}
