"""Recommender models. A Flax module of your own becomes one by `jaxfed.from_module`."""

from jaxfed.models.baselines import popularity
from jaxfed.models.bert_weights import TextEncoder, convert_bert
from jaxfed.models.closed_form import ease, item_knn, transitions
from jaxfed.models.features import fm, two_tower
from jaxfed.models.freezing import freeze_leaves
from jaxfed.models.gru4rec import gru4rec
from jaxfed.models.hstu import hstu
from jaxfed.models.ials import ials
from jaxfed.models.lora import LoraSettings
from jaxfed.models.metamf import metamf
from jaxfed.models.mf import mf
from jaxfed.models.model import from_module
from jaxfed.models.neural import fedrap, neumf, pfedrec
from jaxfed.models.parametrizations import hashed_tables, low_rank_tables
from jaxfed.models.sasrec import bert4rec, sasrec
from jaxfed.models.sequence import from_encoder
from jaxfed.models.text import text_encoder, text_vectors
from jaxfed.models.text_lora import text_lora
from jaxfed.models.trained_encoder import encode_texts

__all__ = [
    "LoraSettings",
    "TextEncoder",
    "bert4rec",
    "convert_bert",
    "ease",
    "encode_texts",
    "fedrap",
    "fm",
    "freeze_leaves",
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
    "text_encoder",
    "text_lora",
    "text_vectors",
    "transitions",
    "two_tower",
]
