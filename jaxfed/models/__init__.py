"""Recommender models. A Flax module of your own becomes one by `jaxfed.from_module`."""

from jaxfed.models.baselines import popularity
from jaxfed.models.closed_form import ease, ials, item_knn, transitions
from jaxfed.models.features import fm, two_tower
from jaxfed.models.metamf import metamf
from jaxfed.models.mf import mf
from jaxfed.models.model import from_module
from jaxfed.models.neural import fedrap, neumf, pfedrec

__all__ = [
    "ease",
    "fedrap",
    "fm",
    "from_module",
    "ials",
    "item_knn",
    "metamf",
    "mf",
    "neumf",
    "pfedrec",
    "popularity",
    "transitions",
    "two_tower",
]
