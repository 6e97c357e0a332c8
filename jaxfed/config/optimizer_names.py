"""The name and the numbers of an optimiser of Optax, which remembers neither: found by making candidates and comparing
their functions and what these close over."""

import inspect
import types
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
import optax

from jaxfed.algorithms.group_rates import Rates
from jaxfed.config.optax_functions import OPTIMIZERS
from jaxfed.core.recipe import Recipe, find_recipe

DEEPEST = 30  # functions within functions
NO_MATCH = 1 << 20  # leaves that differ, where not even the functions are the same


def describe_closure(value: Any, numbers: list[Any], depth: int = 0) -> Any:
    """What a function is made of, without its numbers: these are appended to `numbers`, in a fixed order."""
    if depth > DEEPEST:  # it closes over itself
        return "endless", id(value)
    if isinstance(value, partial):
        return "partial", *(
            describe_closure(each, numbers, depth + 1) for each in (value.func, value.args, value.keywords)
        )
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        inner = [
            describe_closure(each, numbers, depth + 1) for each in (*cells, value.__defaults__, value.__kwdefaults__)
        ]
        return value.__module__, value.__qualname__, *inner
    if isinstance(value, tuple | list):
        return type(value).__name__, *(describe_closure(each, numbers, depth + 1) for each in value)
    if isinstance(value, dict):
        return "dict", *((key, describe_closure(each, numbers, depth + 1)) for key, each in sorted(value.items()))
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return value
    if isinstance(value, int | float | np.generic) or (isinstance(value, jax.Array | np.ndarray) and value.ndim == 0):
        numbers.append(float(value))
        return "number"
    return type(value).__name__, id(value)


def count_differences(made: optax.GradientTransformation, wanted: tuple[Any, list[float]]) -> int:
    """How many numbers of an optimiser differ from those wanted; `NO_MATCH`: it is another kind of optimiser."""
    numbers: list[float] = []
    if describe_closure(tuple(made), numbers) != wanted[0] or len(numbers) != len(wanted[1]):
        return NO_MATCH
    return sum(a != b for a, b in zip(numbers, wanted[1], strict=True))


def find_arguments(make: Callable[..., Any], wanted: tuple[Any, list[float]]) -> dict[str, Any] | None:
    """The arguments with which a function of Optax makes the optimiser wanted; None: there are none.

    Tries, argument by argument, the numbers that the optimiser closes over, and keeps what comes nearest.
    """
    values = sorted({abs(x) for x in wanted[1]})
    defaults = {
        name: each.default
        for name, each in inspect.signature(make).parameters.items()
        if name != "learning_rate" and type(each.default) in (bool, int, float)
    }
    found: dict[str, Any] = {"learning_rate": values[0] if values else 0.0} | defaults

    def differences(arguments):
        try:
            return count_differences(make(**arguments), wanted)
        except (TypeError, ValueError, ArithmeticError):
            return NO_MATCH + 1

    for _ in range(2):
        for name in found:
            candidates = [found[name], *([not found[name]] if isinstance(found[name], bool) else values)]
            tried = [differences(found | {name: value}) for value in candidates]
            found[name] = candidates[tried.index(min(tried))]
        if differences(found) == 0:
            return found
    return None


def name_optimizer(optimizer: optax.GradientTransformation) -> dict[str, Any] | None:
    """The table of an optimiser in a configuration, as in [work.optimizer] or [server]; None: it has no name there.

    Example:
        >>> import optax
        >>> name_optimizer(optax.sgd(0.5))["learning_rate"]
        0.5
    """
    if recipe := find_recipe(optimizer):
        return (name_group_rates if recipe.section == "optimizer" else name_server_optimizer)(recipe)
    numbers: list[float] = []
    wanted = describe_closure(tuple(optimizer), numbers), numbers
    for name, make in OPTIMIZERS.items():
        if (found := find_arguments(make, wanted)) is not None:
            return {"name": name, **found, "weight_decay": 0.0}
    return None


def name_server_optimizer(recipe: Recipe) -> dict[str, Any] | None:
    """The table of a server optimiser of our own; None where its learning rate is a schedule."""
    numbers = {key: value for key, value in recipe.arguments.items() if isinstance(value, bool | int | float)}
    return {"name": recipe.name, **numbers} if len(numbers) == len(recipe.arguments) else None


def name_group_rates(recipe: Recipe) -> dict[str, Any] | None:
    """The table of an optimiser of `group_rates`; None where it is of an optimiser without a name."""
    arguments = recipe.arguments
    made = arguments["optimizer"](learning_rate=1.0, **arguments.get("options", {}))
    named = name_optimizer(made)
    if named is None:
        return None
    groups = {name: Rates._asdict(arguments[name]) for name in ("item", "user")}
    given = {name: {key: value for key, value in group.items() if value is not None} for name, group in groups.items()}
    rates = {key: float(arguments[key]) for key in ("learning_rate", "weight_decay")}
    layers = arguments["layers"]
    listed = {"layers": list(layers.patterns), "layer_decay": float(layers.decay)} if layers.patterns else {}
    return named | rates | listed | {name: group for name, group in given.items() if group}
