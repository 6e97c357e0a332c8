"""Federated learning of recommender models in JAX.

What `__all__` lists is public; everything else is internal and may change without notice. Names are imported when they
are first used, so `import jaxfed` alone costs nothing.

Example:
    >>> import jaxfed as jf
    >>> jf.chain(jf.link(name="nothing")).claims.name
    'nothing'
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors and type checkers, which do not run `__getattr__`
    from jaxfed import algorithms as algorithms
    from jaxfed import channels as channels
    from jaxfed import data as data
    from jaxfed import models as models
    from jaxfed import sampling as sampling
    from jaxfed.config.mesh import MeshAxes as MeshAxes
    from jaxfed.config.mesh import Partition as Partition
    from jaxfed.config.registry import register as register
    from jaxfed.config.settings import Config as Config
    from jaxfed.config.settings import Evaluation as Evaluation
    from jaxfed.config.settings import Privacy as Privacy
    from jaxfed.config.settings import Run as Run
    from jaxfed.config.settings import Section as Section
    from jaxfed.config.stages import Edges as Edges
    from jaxfed.core.aggregate import SUM as SUM
    from jaxfed.core.aggregate import Aggregator as Aggregator
    from jaxfed.core.aggregate import gather_then as gather_then
    from jaxfed.core.channel import at_client as at_client
    from jaxfed.core.channel import at_server as at_server
    from jaxfed.core.channel import chain as chain
    from jaxfed.core.client_work import Batches as Batches
    from jaxfed.core.client_work import ClientWork as ClientWork
    from jaxfed.core.client_work import local_sgd as local_sgd
    from jaxfed.core.federate import Algorithm as Algorithm
    from jaxfed.core.federate import federate as federate
    from jaxfed.core.link import Channel as Channel
    from jaxfed.core.link import Claims as Claims
    from jaxfed.core.link import link as link
    from jaxfed.core.method import Method as Method
    from jaxfed.core.model import Model as Model
    from jaxfed.core.parametrization import Parametrization as Parametrization
    from jaxfed.core.state import State as State
    from jaxfed.core.tables import Table as Table
    from jaxfed.core.types import Broadcast as Broadcast
    from jaxfed.core.types import ClientOutput as ClientOutput
    from jaxfed.core.types import Cohort as Cohort
    from jaxfed.core.types import Mean as Mean
    from jaxfed.core.types import Mechanism as Mechanism
    from jaxfed.core.types import Sampler as Sampler
    from jaxfed.data.batching import Batching as Batching
    from jaxfed.models.model import from_module as from_module
    from jaxfed.training.experiment import Experiment as Experiment
    from jaxfed.training.log import Logger as Logger
    from jaxfed.training.opened_experiment import from_config as from_config
    from jaxfed.training.opened_experiment import load_run as load_run
    from jaxfed.training.opened_experiment import train_seeds as train_seeds

__version__ = "0.3.0"

_MODULES = {
    "jaxfed.config.mesh": ("MeshAxes", "Partition"),
    "jaxfed.config.registry": ("register",),
    "jaxfed.config.settings": ("Config", "Evaluation", "Privacy", "Run", "Section"),
    "jaxfed.config.stages": ("Edges",),
    "jaxfed.core.aggregate": ("SUM", "Aggregator", "gather_then"),
    "jaxfed.core.channel": ("at_client", "at_server", "chain"),
    "jaxfed.core.client_work": ("Batches", "ClientWork", "local_sgd"),
    "jaxfed.core.federate": ("Algorithm", "federate"),
    "jaxfed.core.link": ("Channel", "Claims", "link"),
    "jaxfed.core.method": ("Method",),
    "jaxfed.core.model": ("Model",),
    "jaxfed.core.parametrization": ("Parametrization",),
    "jaxfed.core.state": ("State",),
    "jaxfed.core.tables": ("Table",),
    "jaxfed.core.types": ("Broadcast", "ClientOutput", "Cohort", "Mean", "Mechanism", "Sampler"),
    "jaxfed.data.batching": ("Batching",),
    "jaxfed.models.model": ("from_module",),
    "jaxfed.training.experiment": ("Experiment",),
    "jaxfed.training.log": ("Logger",),
    "jaxfed.training.opened_experiment": ("from_config", "load_run", "train_seeds"),
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
