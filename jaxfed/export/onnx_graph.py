"""A graph of ONNX, as nodes are added to it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from onnx import ValueInfoProto, helper, numpy_helper

from jaxfed.export.functions import Named


class NoOnnxFormError(ValueError):
    """A function uses what is not converted to ONNX, or does not fit into a file."""


class GraphBuilder:
    """The nodes and constants of a graph, as they are added.

    A value is the name of a result, or an array that is known, or a function that computes such an array.

    batch: the name of the result that holds the length of the first dimension, int64 [1].
    """

    def __init__(self, weights: Named) -> None:
        self.nodes: list[Any] = []
        self.weights = weights
        self.initializers: dict[str, Any] = {}
        self.numbers: dict[Any, str] = {}  # names of constants by what they hold
        self.count = 0
        self.batch = ""

    def make_name(self) -> str:
        """A name that nothing has."""
        self.count += 1
        return f"v{self.count}"

    def name(self, value: Any) -> str:
        """The name of a value; a weight, or an array that is known, becomes an initializer when it is first read."""
        if isinstance(value, str):
            if value in self.weights and value not in self.initializers:
                self.initializers[value] = numpy_helper.from_array(np.asarray(self.weights[value]), value)
            return value
        array = np.asarray(value() if callable(value) else value)
        key = array.dtype.name, array.shape, array.tobytes()
        if key not in self.numbers:
            self.numbers[key] = name = self.make_name()
            self.initializers[name] = numpy_helper.from_array(array, name)
        return self.numbers[key]

    def add(self, op: str, *inputs: Any, outputs: int = 1, **attributes: Any) -> Any:
        """Adds a node. Returns the name of its output, or the list of their names."""
        made = [self.make_name() for _ in range(outputs)]
        self.nodes.append(helper.make_node(op, [self.name(each) for each in inputs], made, **attributes))
        return made[0] if outputs == 1 else made

    def shape(self, sizes: Any) -> Any:
        """A shape as a value, int64."""
        if all(map(is_known_size, sizes)):
            return np.array(sizes, np.int64)
        if odd := [size for size in sizes if not is_known_size(size) and str(size) != "b"]:
            raise NoOnnxFormError(f"a dimension of the length {odd[0]} is not built in ONNX")
        parts = [np.array([size], np.int64) if is_known_size(size) else self.batch for size in sizes]
        return self.add("Concat", *parts, axis=0)

    def reshape(self, value: Any, sizes: Any) -> str:
        """A value in another shape, of which one dimension at most is no number."""
        if sum(not is_known_size(size) for size in sizes) > 1:
            return self.add("Reshape", value, self.shape(sizes))
        return self.add("Reshape", value, np.array([size if is_known_size(size) else -1 for size in sizes], np.int64))

    def cast(self, value: Any, dtype: Any) -> str:
        """A value in another type."""
        return self.add("Cast", value, to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    @contextmanager
    def inside(self) -> Iterator[list[Any]]:
        """Nodes that are added meanwhile go to a list of their own."""
        outer, self.nodes = self.nodes, []
        try:
            yield self.nodes
        finally:
            self.nodes = outer


def is_known_size(size: Any) -> bool:
    """Whether a dimension has a length that is known."""
    return isinstance(size, int | np.integer)


def describe_value(name: str, like: Any, shape: bool = True) -> ValueInfoProto:
    """The type of a value; without its shape where that is left open."""
    sizes = [int(size) if is_known_size(size) else str(size) for size in like.shape] if shape else None
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(like.dtype)), sizes)


def refuse_equation(equation: Any, what: str) -> NoOnnxFormError:
    """The error of a primitive that is built, but not so."""
    return NoOnnxFormError(f"the primitive {equation.primitive.name} is not built in ONNX {what}")
