"""The hyper-parameters of optimisers, in which runs of one program may differ: learning rates, weight decays and others
that are floats."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from jaxfed.config.schema import config_to_table, iterate_leaves
from jaxfed.config.settings import Config, Section, replace_arguments

OF_OPTIMIZERS = ("work.optimizer.", "server.")


def list_hyperparameters(config: Config) -> dict[str, float]:
    """{dotted key: value} of the clients' optimiser and the server's."""
    leaves = iterate_leaves(config_to_table(config))
    return {key: value for key, value in leaves if key.startswith(OF_OPTIMIZERS) and isinstance(value, float)}


def set_hyperparameters(config: Config, values: dict[str, Any]) -> Config:
    """A configuration with other values, which are not checked and may be traced. values: by their dotted keys."""

    def put(part: Any, path: Sequence[str], value: Any) -> Any:
        first, *rest = path
        new = {first: put(getattr(part, first), rest, value) if rest else value}
        return replace_arguments(part, **new) if isinstance(part, Section) else replace(part, **new)

    for key, value in values.items():
        config = put(config, key.split("."), value)
    return config


def find_different_hyperparameters(configs: Sequence[Config]) -> dict[str, list[float]]:
    """{dotted key: the value of each} of the hyper-parameters that are not the same in all of some configurations with
    the same keys."""
    found = [list_hyperparameters(config) for config in configs]
    every = {key: [values[key] for values in found] for key in found[0]}
    return {key: values for key, values in every.items() if len({*values}) > 1}
