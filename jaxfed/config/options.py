"""The keys that a section of a configuration may hold for a name of the registry, with their defaults and choices."""

import inspect
import typing
from collections.abc import Callable
from functools import partial
from types import UnionType
from typing import Any, NamedTuple

from jaxfed.config.registry import REGISTRY
from jaxfed.data.batching import Batching
from jaxfed.data.preparation import PopulationOptions


class WorkOptions(NamedTuple):
    """What every work takes beside its batches and its own arguments.

    Args:
        keep_copy: Clients keep what they have trained until their next round, and it is evaluated as `personal`.
        freeze: Regular expressions; shared parameters with one of them in their path, such as block_0/ or tables/item,
            are downloaded once and never trained.
    """

    keep_copy: bool = False
    freeze: tuple[str, ...] = ()


class OptimizerOptions(NamedTuple):
    """What every client optimiser takes beside its own arguments; see `group_rates`.

    Args:
        learning_rate: Learning rate; [work.optimizer.item] and [work.optimizer.user] may override it.
        weight_decay: Decoupled weight decay: each step subtracts learning_rate x weight_decay x parameter.
        layers: Regular expressions, searched in the paths of shared parameters, from the top layer down. Steps of
            parameters whose path has the k-th pattern, counted from 0, are multiplied by layer_decay^k.
        layer_decay: Factor from the steps of one layer to those of the next, see layers.
    """

    learning_rate: float = 0.1
    weight_decay: float = 0.0
    layers: tuple[str, ...] = ()
    layer_decay: float = 1.0


class ServerOptions(NamedTuple):
    """What every server optimiser takes beside its own arguments; see `server_schedule` and `hierarchy`.

    Args:
        learning_rate: Learning rate of the server optimiser. sgd: factor on the aggregated update (1: plain FedAvg).
            Adam and other adaptive optimisers: roughly the size of each step.
        lazy: true: an optimiser with a state updates only the table rows that this round's cohort holds. false: all
            rows in every round.
        schedule: How the learning rate changes over the rounds: constant, or a linear, cosine or exponential decay.
        warmup: Number of rounds at the start in which the learning rate rises from 0.
        final: Learning rate of the last round, divided by the initial one. Not used by constant.
        edges: Number of edge servers (hierarchical FL), each with its own model. 0: none.
        edge_rounds: Number of rounds after which the edge servers average their models.
    """

    learning_rate: float = 1.0
    lazy: bool = True
    schedule: str = "constant"
    warmup: int = 0
    final: float = 0.1
    edges: int = 0
    edge_rounds: int = 1


# whose arguments a section takes beside those of its function
SOURCES: dict[str, tuple[Callable, ...]] = {
    "data": (PopulationOptions,),
    "work": (Batching, WorkOptions),
    "optimizer": (OptimizerOptions,),
    "server": (ServerOptions,),
}
GIVEN = ("data", "pairwise", "ordered", "features", "sequence")  # of these, what the program gives

BESIDE: dict[str, dict[str, Any]] = {
    section: {
        name: each.default
        for source in sources
        for name, each in inspect.signature(source).parameters.items()
        if name not in GIVEN
    }
    for section, sources in SOURCES.items()
}

# in place of these for adaptive optimisers, which are all but sgd and solve: their steps are about as long as their
# rate, whatever the model, loss and batch, while those of sgd are as long as the gradient
STEADY: dict[str, dict[str, float]] = {
    "optimizer": {"learning_rate": 0.05, "weight_decay": 0.5},
    "server": {"learning_rate": 0.05},
}

FROM_DATA = {"density": 0.0}  # where a configuration leaves them out, which 0 stands for, the data say
FILE_TYPES = {bool, int, float, str}  # of the values that a configuration file holds
PROVIDED = ("keep", "num_users")  # have a default for programs; under a configuration the program gives them


def list_batching_keys() -> list[str]:
    """The keys of [work] that say how clients cut their data into batches."""
    return [name for name in BESIDE["work"] if name in Batching._fields]


def section_arguments(section: str, name: str) -> dict[str, Any]:
    """{argument: default} of what a section may hold for this name: numbers, words and tuples of them."""
    function = REGISTRY[section][name]
    fixed = function.keywords if isinstance(function, partial) else {}
    found = {
        each.name: each.default
        for each in inspect.signature(function).parameters.values()
        if type(each.default) in (bool, int, float, str, tuple) and each.name not in (*fixed, *PROVIDED)
    }
    found |= {key: value for key, value in FROM_DATA.items() if key in found}
    return found | BESIDE.get(section, {}) | (STEADY.get(section, {}) if name not in ("sgd", "solve") else {})


def argument_type(section: str, name: str, key: str, default: Any) -> Any:
    """The type of an argument: that of its default; what its function names, where that is a choice of words (a
    Literal), of types, or a tuple of numbers. Another tuple is of one type throughout; an empty one is of words, by
    which a section names items where a link knows their rows."""
    for function in (REGISTRY[section][name], *SOURCES.get(section, ())):
        if key in (parameters := inspect.signature(function, eval_str=True).parameters):
            annotation = parameters[key].annotation
            words = typing.get_origin(annotation) is typing.Literal and isinstance(parameters[key].default, str)
            # a union of what a file can hold: not optax's numbers, which may also be arrays
            types = isinstance(annotation, UnionType) and {*typing.get_args(annotation)} <= FILE_TYPES
            if words or types or annotation == tuple[float, ...]:
                return annotation
    if isinstance(default, tuple):
        return tuple[(type(default[0]) if default else str, ...)]  # type: ignore[misc]
    return type(default)
