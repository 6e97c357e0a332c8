"""Federated learning of recommender models in JAX.

What `__all__` lists is public; everything else is internal and may change without notice. Names are imported when they
are first used, so `import jaxfed` alone costs nothing.

Example:
    >>> import jaxfed as jf
    >>> jf.chain(jf.link(name="nothing")).claims.name
    'nothing'
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_MODULES = {
    "jaxfed.algorithms.group_rates": ("Rates",),
    "jaxfed.config.settings": ("Evaluation", "Privacy", "Run"),
    "jaxfed.config.stages": ("Edges",),
    "jaxfed.core.parametrization": ("Parametrization",),
    "jaxfed.core.recipe": ("named",),
    "jaxfed.config.registry": ("register",),
    "jaxfed.data.batching": ("Batching",),
    "jaxfed.data.clients": ("Clients",),
    "jaxfed.training.experiment": ("Experiment",),
    "jaxfed.training.log": ("Logger",),
    "jaxfed.training.saved_experiment": ("from_config", "load_run", "train_seeds"),
    "jaxfed.core.aggregate": ("SUM", "Aggregator", "gather_then"),
    "jaxfed.core.channel": ("at_client", "at_server", "chain"),
    "jaxfed.core.client": ("client_round", "open_message"),
    "jaxfed.core.client_work": ("Batches", "ClientWork", "local_sgd"),
    "jaxfed.core.federate": ("Algorithm", "federate"),
    "jaxfed.core.link": ("Channel", "Claims", "link"),
    "jaxfed.core.method": ("Method",),
    "jaxfed.core.server": ("server_round",),
    "jaxfed.core.state": ("State", "server_model"),
    "jaxfed.core.tables": ("Table",),
    "jaxfed.core.types": ("Broadcast", "ClientOutput", "Cohort", "Mean", "Mechanism", "Sampler"),
    "jaxfed.data.population": ("Population",),
    "jaxfed.core.model": ("Model",),
    "jaxfed.models.model": ("from_module",),
}
_SUBPACKAGES = ("algorithms", "channels", "data", "models", "sampling")
_WHERE = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "__version__",
    *_SUBPACKAGES,
    *sorted(_WHERE),
]


def __getattr__(name: str) -> Any:
    """A public name, from the module that defines it."""
    if name in _SUBPACKAGES:
        return import_module(f"jaxfed.{name}")
    if name not in _WHERE:
        raise AttributeError(f"module 'jaxfed' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    """What an editor completes."""
    return list(__all__)
