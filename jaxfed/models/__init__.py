"""Recommender models. A Flax module of your own becomes one by `jaxfed.from_module`."""

from jaxfed.models.baselines import popularity
from jaxfed.models.closed_form import ease, item_knn, transitions
from jaxfed.models.features import fm, two_tower
from jaxfed.models.gru4rec import gru4rec
from jaxfed.models.hstu import hstu
from jaxfed.models.ials import ials
from jaxfed.models.metamf import metamf
from jaxfed.models.mf import mf
from jaxfed.models.model import from_module
from jaxfed.models.neural import fedrap, neumf, pfedrec
from jaxfed.models.parametrizations import hashed_tables, low_rank_tables
from jaxfed.models.sasrec import bert4rec, sasrec
from jaxfed.models.sequence import from_encoder

__all__ = [
    "bert4rec",
    "ease",
    "fedrap",
    "fm",
    "from_encoder",
    "from_module",
    "gru4rec",
    "hashed_tables",
    "hstu",
    "ials",
    "item_knn",
    "low_rank_tables",
    "metamf",
    "mf",
    "neumf",
    "pfedrec",
    "popularity",
    "sasrec",
    "transitions",
    "two_tower",
]
