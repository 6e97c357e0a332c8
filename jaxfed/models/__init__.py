"""Recommender models. A Flax module of your own becomes one by `jaxfed.from_module`."""

from jaxfed.models.adapters import BiasSettings, BottleneckSettings
from jaxfed.models.baselines import popularity
from jaxfed.models.bert_weights import TextEncoder, convert_bert
from jaxfed.models.closed_form import ease, item_knn, transitions
from jaxfed.models.decoder import DecoderSizes
from jaxfed.models.decoder_weights import TextDecoder, convert_llama
from jaxfed.models.features import fm, two_tower
from jaxfed.models.freezing import freeze_leaves
from jaxfed.models.generative import code_decoder, decoder_lora
from jaxfed.models.gru4rec import gru4rec
from jaxfed.models.hstu import hstu
from jaxfed.models.ials import ials
from jaxfed.models.lora import LoraSettings
from jaxfed.models.metamf import metamf
from jaxfed.models.mf import mf
from jaxfed.models.model import from_module
from jaxfed.models.neural import fedrap, neumf, pfedrec
from jaxfed.models.parametrizations import hashed_tables, low_rank_tables
from jaxfed.models.pruned import pruned_weights
from jaxfed.models.quantized_encoder import quantize_encoder
from jaxfed.models.sasrec import bert4rec, sasrec
from jaxfed.models.semantic_codes import code_rows, semantic_codes
from jaxfed.models.sequence import from_encoder
from jaxfed.models.structured_pruning import merge_rows, shrink_blocks
from jaxfed.models.text import text_encoder, text_vectors
from jaxfed.models.text_lora import text_lora
from jaxfed.models.trained_encoder import encode_texts

__all__ = [
    "BiasSettings",
    "BottleneckSettings",
    "DecoderSizes",
    "LoraSettings",
    "TextDecoder",
    "TextEncoder",
    "bert4rec",
    "code_decoder",
    "code_rows",
    "convert_bert",
    "convert_llama",
    "decoder_lora",
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
    "merge_rows",
    "metamf",
    "mf",
    "neumf",
    "pfedrec",
    "popularity",
    "pruned_weights",
    "quantize_encoder",
    "sasrec",
    "semantic_codes",
    "shrink_blocks",
    "text_encoder",
    "text_lora",
    "text_vectors",
    "transitions",
    "two_tower",
]
