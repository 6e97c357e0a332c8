"""Generative recommenders and codes as configurations name them: made of the texts of a data set and of a folder with a
model."""

import numpy as np

from jaxfed.config.text_parametrizations import check_texts_given, count_table_rows, encode_catalogue
from jaxfed.core.model import Model
from jaxfed.core.recipe import named
from jaxfed.data.item_descriptions import note_texts
from jaxfed.data.sources.pretrained import Pretrained, read_pretrained, tokenize_texts
from jaxfed.data.stages import LOGGER
from jaxfed.models.decoder_weights import convert_llama
from jaxfed.models.generative import code_decoder, decoder_lora
from jaxfed.models.lora import LoraSettings
from jaxfed.models.semantic_codes import code_rows, semantic_codes
from jaxfed.models.trained_encoder import ComputeDtype


@named("model", "decoder_lora")
def read_decoder_lora(
    num_items: int,
    texts: np.ndarray,
    folder: str = "",
    length: int = 20,
    lora_rank: int = 8,
    lora_alpha: float = 16.0,
    lora_pattern: str = "q_proj|v_proj",
    max_pieces: int = 16,
    compute_dtype: ComputeDtype = "float32",
    remat: bool = True,
) -> Model:
    """Scores items by the likelihood of their texts after the texts of a history, by a decoder with low-rank adapters.

    Args:
        num_items: Number of items.
        texts: str [N]: the text of each item, see `jaxfed.data.item_texts`.
        folder: A folder with a decoder of the Llama family in Hugging Face's layout. It must be named.
        length: Number of the latest items of a history that are read.
        lora_rank: Rank of the adapters, which clients train and send.
        lora_alpha: What adapters add is scaled by lora_alpha / lora_rank.
        lora_pattern: A regular expression, searched in the paths of layers; those that match are adapted.
        max_pieces: The most pieces of a text that are read. 0: as many as the decoder has positions for.
        compute_dtype: Type in which the decoder's layers compute; its parameters are in float32.
        remat: Compute activations again in the backward pass, instead of keeping them.

    Returns:
        The model, see `jaxfed.models.decoder_lora`.

    Raises:
        ValueError: no decoder can be read, there are no texts, or the length or the adapters are not valid.
    """
    if not folder:
        raise ValueError("model.folder: name a folder with a decoder of the Llama family; there is none to fetch")
    pretrained = read_pretrained(folder)
    decoder = convert_llama(pretrained.config, pretrained.tensors)
    pieces = read_lines(pretrained, texts, num_items, max_pieces)
    lora = LoraSettings(lora_rank, lora_alpha, lora_pattern)
    return decoder_lora(num_items, decoder, pieces, length, lora, compute_dtype, remat)


def read_lines(pretrained: Pretrained, texts: np.ndarray, rows: int, max_pieces: int) -> np.ndarray:
    """int [rows, P]: the pieces of each text, which ends with a line break; past the vocabulary where unused. Raises
    ValueError where there are no texts."""
    check_texts_given(texts)
    table = tokenize_texts(pretrained, [f"{text}\n" if text else "" for text in texts], max_pieces, marks=False)
    for note in note_texts(texts, table.cut, table.ids.shape[1]):
        LOGGER.info("data: %s", note)
    unused = np.full((max(rows - len(texts), 0), table.ids.shape[1]), int(pretrained.config["vocab_size"]), np.int32)
    return np.concatenate([table.ids, unused])


@named("model", "code_decoder")
def read_code_decoder(
    num_items: int,
    texts: np.ndarray,
    folder: str = "",
    length: int = 20,
    dim: int = 64,
    layers: int = 2,
    heads: int = 4,
    beam: int = 0,
    levels: int = 3,
    size: int = 64,
    codes_seed: int = 0,
    max_pieces: int = 0,
) -> Model:
    """Scores items by the likelihood of their semantic codes after the codes of a history; clients train the decoder.

    Args:
        num_items: Number of items.
        texts: str [N]: the text of each item, see `jaxfed.data.item_texts`.
        folder: A folder with a text encoder in Hugging Face's layout. Left out: all-MiniLM-L6-v2, fetched once.
        length: Number of the latest items of a history that are read.
        dim: Width of the decoder.
        layers: Number of its layers.
        heads: Heads of attention; they divide `dim`.
        beam: Number of prefixes of codes that a beam search keeps at each level; items that it does not find come last.
            0: no search, each item is scored.
        levels: Number of codes of an item; one more tells items with the same codes apart.
        size: Number of codes of a level.
        codes_seed: Seed of the k-means that makes codes; everybody may know it.
        max_pieces: The most pieces of a text that are read. 0: as many as the encoder has positions for.

    Returns:
        The model, see `jaxfed.models.code_decoder`.

    Raises:
        ValueError: no encoder can be read, there are no texts, or a size is not possible.
    """
    vectors = encode_catalogue(num_items, texts, folder, max_pieces).vectors
    codes = semantic_codes(vectors, levels, size, codes_seed)
    return code_decoder(num_items, codes, length, dim, layers, heads, beam)


def read_code_rows(
    model: Model,
    texts: np.ndarray,
    folder: str = "",
    levels: int = 3,
    size: int = 256,
    codes_seed: int = 0,
    max_pieces: int = 0,
) -> Model:
    """Each item vector is the sum of rows of codes that clients train: the bytes of a round do not depend on items.

    Args:
        model: The model whose tables they are.
        texts: str [N]: the text of each item, see `jaxfed.data.item_texts`.
        folder: A folder with a text encoder in Hugging Face's layout. Left out: all-MiniLM-L6-v2, fetched once.
        levels: Number of codes of an item; one more tells items with the same codes apart.
        size: Number of codes of a level.
        codes_seed: Seed of the k-means that makes codes; everybody may know it.
        max_pieces: The most pieces of a text that are read. 0: as many as the encoder has positions for.

    Returns:
        The model, see `jaxfed.models.code_rows`.

    Raises:
        ValueError: no encoder can be read, there are no texts, or the model has no table of items.
    """
    vectors = encode_catalogue(count_table_rows(model), texts, folder, max_pieces).vectors
    return code_rows(model, semantic_codes(vectors, levels, size, codes_seed))
