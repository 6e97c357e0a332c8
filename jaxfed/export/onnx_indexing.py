"""What primitives of JAX that take parts of an array are in ONNX; see `onnx_primitives`."""

from typing import Any

import numpy as np

from jaxfed.export.onnx_graph import GraphBuilder, is_known_size, refuse_equation


def find_nearest_places(graph: GraphBuilder, indices: Any, last: np.ndarray) -> tuple[str, str]:
    """(indices; the same, moved to 0 to `last`) as int64."""
    wide = graph.cast(indices, np.int64)
    return wide, graph.add("Min", graph.add("Max", wide, np.int64(0)), last)


def match_last(graph: GraphBuilder, first: str, second: str) -> str:
    """Whether two values are the same along their last dimension."""
    same = graph.cast(graph.add("Equal", first, second), np.int32)
    return graph.cast(graph.add("ReduceMin", same, np.array([-1]), keepdims=0), bool)


def convert_gather(graph: GraphBuilder, equation: Any, inputs: list[Any]) -> str:
    """gather of rows: from the leading dimensions, after those that are a batch. Others are taken whole."""
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    table, result = equation.invars[0].aval, equation.outvars[0].aval
    batch, columns = len(numbers.operand_batching_dims), list(numbers.start_index_map)
    own = equation.invars[1].aval.ndim - 1  # dimensions of the result that indices give
    chosen = sorted(place for place in columns if sizes[place] == 1)
    regular = [*numbers.operand_batching_dims] == [*numbers.start_indices_batching_dims] == [*range(batch)]
    regular &= chosen == [*range(batch, batch + len(chosen))] and set(numbers.collapsed_slice_dims) <= set(chosen)
    regular &= [*sizes[batch + len(chosen) :]] == [*table.shape[batch + len(chosen) :]]
    if not chosen or not regular or [*numbers.offset_dims] != [*range(own, result.ndim)]:
        raise refuse_equation(equation, "but for rows of a table")
    last = np.array([table.shape[place] - sizes[place] for place in columns], np.int64)
    wide, near = find_nearest_places(graph, inputs[1], last)
    order = np.array([columns.index(place) for place in chosen], np.int64)
    rows = near if [*order] == [*range(len(columns))] else graph.add("Gather", near, order, axis=-1)
    found = graph.reshape(graph.add("GatherND", inputs[0], rows, batch_dims=batch), result.shape)
    if "FILL" not in str(equation.params["mode"]):
        return found
    if result.dtype == bool or equation.params["fill_value"] is None:
        raise refuse_equation(equation, "of truth values, or with numbers of its own past the end")
    filled = np.array(equation.params["fill_value"], result.dtype)
    within = match_last(graph, wide, near)
    mask = graph.add("Unsqueeze", within, np.arange(own, result.ndim)) if result.ndim > own else within
    return graph.add("Where", mask, found, filled)


def convert_scatter_add(graph: GraphBuilder, equation: Any, inputs: list[Any]) -> str:
    """scatter-add of numbers to the last dimension, others being a batch: past the end nothing is added."""
    numbers, table = equation.params["dimension_numbers"], equation.invars[0].aval
    batch, places = [*range(table.ndim - 1)], equation.invars[1].aval.shape
    regular = [*numbers.operand_batching_dims] == [*numbers.scatter_indices_batching_dims] == batch
    regular &= not numbers.update_window_dims and len(places) == table.ndim + 1
    if not regular or "FILL" not in str(equation.params["mode"]):
        raise refuse_equation(equation, "but of numbers to one dimension")
    wide, near = find_nearest_places(graph, inputs[1], np.array([table.shape[-1] - 1], np.int64))
    added = graph.add("Where", match_last(graph, wide, near), inputs[2], np.zeros((), table.dtype))
    near = graph.add("Squeeze", near, np.array([-1]))
    return graph.add("ScatterElements", inputs[0], near, added, axis=table.ndim - 1, reduction="add")


def convert_slice(graph: GraphBuilder, equation: Any, inputs: list[Any]) -> str:
    """slice: of dimensions that are not taken whole."""
    known, sizes = equation.params, equation.invars[0].aval.shape
    strides = known["strides"] or [1] * len(sizes)
    cuts = zip(known["start_indices"], known["limit_indices"], range(len(sizes)), strides, strict=True)
    cuts_made = [each for each in cuts if each[0] != 0 or each[1] != sizes[each[2]] or each[3] != 1]
    if not all(is_known_size(x) for each in cuts_made for x in each):
        raise refuse_equation(equation, "of the first dimension")
    return graph.add("Slice", inputs[0], *np.array(cuts_made, np.int64).reshape(-1, 4).T) if cuts_made else inputs[0]


def convert_dynamic_slice(graph: GraphBuilder, equation: Any, inputs: list[Any]) -> str:
    """dynamic_slice: begins no later than where it fits."""
    found, sizes = inputs[0], equation.invars[0].aval.shape
    for axis, (size, start) in enumerate(zip(equation.params["slice_sizes"], inputs[1:], strict=True)):
        if size != sizes[axis]:
            _, near = find_nearest_places(graph, graph.reshape(start, (1,)), np.array([sizes[axis] - size], np.int64))
            found = graph.add(
                "Slice", found, near, graph.add("Add", near, np.array([size], np.int64)), np.array([axis])
            )
    return found


def convert_split(graph: GraphBuilder, equation: Any, inputs: list[Any]) -> list[str]:
    """split."""
    sizes, axis = np.array(equation.params["sizes"], np.int64), int(equation.params["axis"])
    found = graph.add("Split", inputs[0], sizes, axis=axis, outputs=len(sizes))
    return [found] if len(sizes) == 1 else found


def convert_unstack(graph: GraphBuilder, equation: Any, inputs: list[Any]) -> list[str]:
    """unstack."""
    axis, ones = int(equation.params["axis"]), np.ones(len(equation.outvars), np.int64)
    if len(ones) == 1:
        return [graph.reshape(inputs[0], equation.outvars[0].aval.shape)]
    found = graph.add("Split", inputs[0], ones, axis=axis, outputs=len(ones))
    return [graph.reshape(part, one.aval.shape) for part, one in zip(found, equation.outvars, strict=True)]
