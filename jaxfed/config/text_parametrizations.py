"""Models and parametrizations by text as configurations name them: from the texts of a data set and a folder with a
model."""

from functools import partial
from typing import Literal, NamedTuple

import jax
import numpy as np

from jaxfed.core.model import Model
from jaxfed.core.parametrization import Parametrization
from jaxfed.core.recipe import named
from jaxfed.core.tables import num_rows
from jaxfed.data.item_descriptions import note_texts
from jaxfed.data.sources.pretrained import keep_vectors, read_pretrained, tokenize_texts
from jaxfed.data.sources.untrained import read_untrained
from jaxfed.data.stages import LOGGER, log_stage
from jaxfed.models.adapters import BiasSettings, BottleneckSettings
from jaxfed.models.bert_weights import TextEncoder, convert_bert, init_bert
from jaxfed.models.lora import LoraSettings
from jaxfed.models.model import LossName
from jaxfed.models.quantized_encoder import quantize_encoder
from jaxfed.models.text import text_encoder, text_vectors
from jaxfed.models.text_lora import Rule, text_lora
from jaxfed.models.trained_encoder import ComputeDtype, encode_texts

AdapterName = Literal["lora", "bottleneck", "bitfit", "full"]
Weights = Literal["pretrained", "random"]
BaseDtype = Literal["float32", "int8", "nf4"]


class EncodedTexts(NamedTuple):
    """The texts of a catalogue, read by a pretrained encoder."""

    encoder: TextEncoder
    tokens: np.ndarray  # int32 [N, P]
    vectors: np.ndarray  # float32 [N, W]


def check_texts_given(texts: np.ndarray) -> None:
    """Raises ValueError where no item has a text."""
    if not (texts != "").any():
        raise ValueError(
            "the data have no titles and no features of items, so there are no texts: name a file of them "
            "(data.titles, data.item_features), or take a model and a parametrization without texts"
        )


def encode_catalogue(
    rows: int, texts: np.ndarray, folder: str, max_pieces: int, weights: Weights = "pretrained"
) -> EncodedTexts:
    """The texts of a model's items, as pieces and as vectors, these from the user's cache where they are there.

    rows: of the model's tables, which may be more than there are items. weights: random ones, if that is asked for.

    Raises ValueError where there are no texts, or no encoder can be read.
    """
    check_texts_given(texts)
    if weights == "random":
        pretrained = read_untrained(folder)
        encoder = init_bert(pretrained.config)
    else:
        pretrained = read_pretrained(folder)
        encoder = convert_bert(pretrained.config, pretrained.tensors)
    table = tokenize_texts(pretrained, texts.tolist(), max_pieces)
    for note in note_texts(texts, table.cut, table.ids.shape[1]):
        LOGGER.info("data: %s", note)
    with log_stage(f"encoding {len(texts):,} texts of items"):
        vectors = keep_vectors(pretrained, table.ids, partial(encode_texts, encoder, table.ids))
    return pad_catalogue(rows, EncodedTexts(encoder, table.ids, vectors))


def with_base_dtype(known: EncodedTexts, base_dtype: BaseDtype) -> TextEncoder:
    """The encoder, stored in a type. Raises ValueError for an unknown type."""
    return known.encoder if base_dtype == "float32" else quantize_encoder(known.encoder, base_dtype)


def count_table_rows(model: Model) -> int:
    """The rows of a model's tables."""
    return num_rows(jax.eval_shape(model.init, jax.random.key(0)))


def pad_catalogue(rows: int, encoded: EncodedTexts) -> EncodedTexts:
    """The same with so many rows, if there are fewer."""
    more = max(rows - len(encoded.tokens), 0)
    unused = np.full((more, encoded.tokens.shape[1]), encoded.encoder.sizes.vocabulary, np.int32)
    nothing = np.full((more, encoded.vectors.shape[1]), np.nan, np.float32)  # they count in no mean
    return encoded._replace(
        tokens=np.concatenate([encoded.tokens, unused]), vectors=np.concatenate([encoded.vectors, nothing])
    )


@named("parametrization", "text_vectors")
def read_text_vectors(
    model: Model, texts: np.ndarray, folder: str = "", ids: bool = False, max_pieces: int = 0
) -> Parametrization:
    """Each table of item vectors is a trained projection of fixed vectors of the items' texts.

    Args:
        model: The model whose tables they are.
        texts: str [N]: the text of each item, see `jaxfed.data.item_texts`.
        folder: A folder with a text encoder in Hugging Face's layout. Left out: all-MiniLM-L6-v2, fetched once.
        ids: Whether each item has a trained vector beside, which starts at zero.
        max_pieces: The most pieces of a text that are read. 0: as many as the encoder has positions for.

    Returns:
        The parametrization, see `jaxfed.models.text_vectors`.

    Raises:
        ValueError: no encoder can be read, there are no texts, or the model has no table of item vectors.
    """
    return text_vectors(model, encode_catalogue(count_table_rows(model), texts, folder, max_pieces).vectors, ids)


@named("parametrization", "text_encoder")
def read_text_encoder(
    model: Model,
    texts: np.ndarray,
    folder: str = "",
    trained_layers: int = 0,
    encoder_rate: float = 0.01,
    lora_rank: int = 0,
    lora_alpha: float = 16.0,
    lora_pattern: str = "query|value",
    ids: bool = False,
    max_pieces: int = 0,
    compute_dtype: ComputeDtype = "float32",
    base_dtype: BaseDtype = "float32",
    weights: Weights = "pretrained",
) -> Parametrization:
    """Each table of item vectors is what a text encoder gives that the server trains.

    Args:
        model: The model whose tables they are.
        texts: str [N]: the text of each item, see `jaxfed.data.item_texts`.
        folder: A folder with a text encoder in Hugging Face's layout. Left out: all-MiniLM-L6-v2, fetched once.
        trained_layers: Number of upper layers that are trained; the layers below compute once. 0: all, and embeddings.
        encoder_rate: Without adapters: the share of server.learning_rate at which an adaptive optimiser moves it.
        lora_rank: Rank of low-rank adapters, which are then trained alone. 0: all parameters of the trained layers are.
        lora_alpha: What adapters add is scaled by lora_alpha / lora_rank.
        lora_pattern: A regular expression that the paths of adapted layers have in them, such as layer_5/query.
        ids: Whether each item has a trained vector beside, which starts at zero.
        max_pieces: The most pieces of a text that are read. 0: as many as the encoder has positions for.
        compute_dtype: In what the encoder computes; its parameters are in float32.
        base_dtype: In what the pretrained parameters are stored. int8, nf4: matrices as codes of 8 or of 4 bits.
        weights: random: numbers to measure memory and time with, in the shape of a folder's config.json or BERT-base.

    Returns:
        The parametrization, see `jaxfed.models.text_encoder`.

    Raises:
        ValueError: no encoder can be read, there are no texts, or there cannot be such layers or adapters.
    """
    lora = LoraSettings(lora_rank, lora_alpha, lora_pattern) if lora_rank else None
    known = encode_catalogue(count_table_rows(model), texts, folder, max_pieces, weights)
    sizes = trained_layers, lora, encoder_rate, ids, compute_dtype
    return text_encoder(model, with_base_dtype(known, base_dtype), known.tokens, *sizes, known.vectors)


def choose_adapter(
    name: AdapterName, size: int, pattern: str
) -> BottleneckSettings | BiasSettings | Literal["full"] | None:
    """What is trained of an encoder in place of low-rank adapters; None: these are."""
    if name == "full" and pattern:
        raise ValueError("model.adapter full trains whole layers: leave adapter_pattern out, and set trained_layers")
    others: dict[str, BottleneckSettings | BiasSettings | Literal["full"]] = {
        "bottleneck": BottleneckSettings(size, pattern),
        "bitfit": BiasSettings(pattern),
        "full": "full",
    }
    return others.get(name)


@named("model", "text_lora")
def read_text_lora(
    num_items: int,
    texts: np.ndarray,
    num_users: int = 1,
    dim: int = 32,
    folder: str = "",
    rule: Rule = "fedit",
    trained_layers: int = 1,
    lora_rank: int = 8,
    lora_alpha: float = 16.0,
    lora_pattern: str = "query|value",
    loss: LossName = "bce",
    max_pieces: int = 0,
    compute_dtype: ComputeDtype = "float32",
    adapter: AdapterName = "lora",
    adapter_size: int = 16,
    adapter_pattern: str = "",
    base_dtype: BaseDtype = "float32",
    weights: Weights = "pretrained",
) -> Model:
    """Matrix factorisation whose item vectors a text encoder gives, with adapters that clients train.

    Args:
        num_items: Number of items.
        texts: str [N]: the text of each item, see `jaxfed.data.item_texts`.
        num_users: Number of users of a client.
        dim: Numbers in the vector of a user.
        folder: A folder with a text encoder in Hugging Face's layout. Left out: all-MiniLM-L6-v2, fetched once.
        rule: What becomes of the factors of an adapter. fedit: both are averaged. ffa: one is frozen, the other is
            averaged. fedsa: one is averaged, the other is the client's own.
        trained_layers: Number of upper layers that may have adapters; the layers below compute once. 0: all.
        lora_rank: Rank of the adapters.
        lora_alpha: What adapters add is scaled by lora_alpha / lora_rank.
        lora_pattern: A regular expression that the paths of adapted layers have in them, such as layer_5/query.
        loss: bce: cross-entropy. bpr: the click of a pair ranks before the negative. squared: squared error.
        max_pieces: The most pieces of a text that are read. 0: as many as the encoder has positions for.
        compute_dtype: In what the encoder computes; its parameters are in float32.
        adapter: What is trained of the encoder. lora: low-rank adapters. bottleneck: a small network after layers
            (Houlsby et al. 2019). bitfit: biases alone (Ben Zaken et al. 2022). full: all parameters of these layers.
        adapter_size: Number of units of a bottleneck.
        adapter_pattern: A regular expression, searched in the paths of layers, such as layer_5/output. Those that match
            have trained biases, or are followed by a bottleneck.
        base_dtype: In what the pretrained parameters are stored. int8, nf4: matrices as codes of 8 or of 4 bits.
        weights: random: numbers to measure memory and time with, in the shape of a folder's config.json or BERT-base.

    Returns:
        The model, see `jaxfed.models.text_lora`.

    Raises:
        ValueError: no encoder can be read, there are no texts, or there cannot be such layers or adapters.
    """
    known = encode_catalogue(num_items, texts, folder, max_pieces, weights)
    lora = LoraSettings(lora_rank, lora_alpha, lora_pattern)
    chosen = choose_adapter(adapter, adapter_size, adapter_pattern)
    sizes = num_users, dim, lora, rule, trained_layers, loss, compute_dtype
    base = with_base_dtype(known, base_dtype)
    return text_lora(num_items, base, known.tokens, *sizes, known.vectors, chosen)
