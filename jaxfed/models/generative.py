"""Generative recommenders: a decoder reads the texts or the codes of a history, and the score of an item is the
likelihood of its own text or codes. Users have no trained parameters: keys and values of the history are folded in."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxfed.core.model import Model, SequenceFormat
from jaxfed.core.tables import Table, unwrap
from jaxfed.core.types import History, Key, Mean, Tree
from jaxfed.models.beam_search import TrieLevel, build_trie, score_found, search_codes
from jaxfed.models.decoder import Decoder, DecoderSizes, PastPieces, init_decoder
from jaxfed.models.decoder_weights import TextDecoder
from jaxfed.models.lora import COLLECTION, LoraSettings, init_lora, make_lora_product
from jaxfed.models.model import check_positive
from jaxfed.models.sequence import sum_over_histories, take_latest
from jaxfed.models.trained_encoder import ComputeDtype, encode_in_batches
from jaxfed.models.transformer import MASKED_LOGIT


class GenerativeModel(NamedTuple):
    """What the functions of a generative recommender share."""

    module: Decoder
    variables: Callable[[Tree], Tree]  # of the module, from the shared parameters
    start: int  # the piece that begins a history
    length: int  # number of the latest items of a history that are read


class Prompt(NamedTuple):
    """A history as pieces, those in use first."""

    pieces: jax.Array  # int [S]
    live: jax.Array  # bool [S]


def pack_pieces(pieces: jax.Array, vocabulary: int) -> Prompt:
    """Pieces int [...] one after the other. Unused ones, which are past the vocabulary, come last."""
    flat = pieces.ravel()
    order = jnp.argsort(flat >= vocabulary, stable=True)
    return Prompt(flat[order], flat[order] < vocabulary)


def take_texts(made: GenerativeModel, shared: Tree, sequence: jax.Array) -> Prompt:
    """The pieces of some items int [T], one after the other; positions past the rows given have none."""
    vocabulary = made.module.sizes.vocabulary
    found = jnp.asarray(shared["text"]["pieces"]).at[sequence].get(mode="fill", fill_value=vocabulary)
    return pack_pieces(found, vocabulary)


def sum_piece_losses(made: GenerativeModel, shared: Tree, private: Tree, batch: dict[str, jax.Array]) -> Mean:
    """The mean cross-entropy of the pieces of a history, each after those before it; see `SequenceFormat`.

    A history weighs as many as it has items, however many pieces these have.
    """
    shared = unwrap(shared)
    pieces, live = take_texts(made, shared, batch["sequence"])
    read = jnp.concatenate([jnp.array([made.start]), pieces[:-1]])
    logits, _ = made.module.apply(made.variables(shared), read[None], live[None])
    each = optax.softmax_cross_entropy_with_integer_labels(logits[0], jnp.where(live, pieces, 0))
    mean = Mean(jnp.sum(jnp.where(live, each, 0)), jnp.sum(live, dtype=jnp.float32)).value
    items = jnp.sum(batch["sequence"] < shared["text"]["pieces"].shape[0], dtype=jnp.float32)
    return Mean(mean * items, items)


def read_history(made: GenerativeModel, shared: Tree, history: History) -> Tree:
    """The private part: keys and values of a history's latest items, and the logits of the piece after them."""
    shared = unwrap(shared)
    pieces, live = take_texts(made, shared, take_latest(history, made.length))
    pieces, live = (jnp.concatenate([jnp.array([first]), x]) for first, x in ((made.start, pieces), (True, live)))
    logits, past = made.module.apply(made.variables(shared), pieces[None], live[None])
    return {"private": {"past": tuple(past), "logits": logits[0, live.sum() - 1]}}


def make_likelihoods(made: GenerativeModel, shared: Tree, private: Tree, user: Any) -> jax.Array:
    """[rows]: the mean log-likelihood of the pieces of each row's text after the history; for an empty text
    `MASKED_LOGIT`."""
    shared, past = unwrap(shared), PastPieces(*private["private"]["past"])
    variables, vocabulary = made.variables(shared), made.module.sizes.vocabulary

    def judge(pieces):
        live = pieces < vocabulary
        logits, _ = made.module.apply(variables, pieces[None, :-1], live[None, 1:], past)
        every = jnp.concatenate([private["private"]["logits"][None], logits[0]])
        found = jnp.take_along_axis(jax.nn.log_softmax(every), jnp.where(live, pieces, 0)[:, None], 1)[:, 0]
        mean = jnp.sum(jnp.where(live, found, 0)) / jnp.maximum(live.sum(), 1)
        return jnp.where(live.any(), mean, MASKED_LOGIT)

    return encode_in_batches(jax.vmap(judge), (shared["text"]["pieces"],))


def search_items(made: GenerativeModel, beam: int, shared: Tree, private: Tree, user: Any) -> jax.Array:
    """[rows]: the mean log-likelihood of each row's codes where a beam search finds them; else `MASKED_LOGIT`."""
    shared, past = unwrap(shared), PastPieces(*private["private"]["past"])
    trie = tuple(TrieLevel(children) for children in shared["text"]["trie"])
    found = search_codes(made.module, made.variables(shared), past, private["private"]["logits"], trie, beam)
    return score_found(found, jnp.asarray(shared["text"]["pieces"]))


def make_generative_model(
    made: GenerativeModel, init: Callable[[Key], Tree], text: dict[str, Any], beam: int = 0
) -> Model:
    """The model. init: init(key) -> the shared parameters. text: what is frozen, with `pieces` int [N, P] as a table.
    beam: width of the beam search for items; 0: each item is scored."""
    if beam:
        found = np.asarray(text["pieces"].rows)
        text = text | {"trie": tuple(level.children for level in build_trie(found, made.start))}
    return Model(
        init,
        lambda key: (),
        sum_over_histories(partial(sum_piece_losses, made)),
        partial(search_items, made, beam) if beam else partial(make_likelihoods, made),
        fold_in=partial(read_history, made),
        frozen={"text": text},
        sequence=SequenceFormat(made.length, compares=False),
    )


def check_prompt(sizes: DecoderSizes, num_items: int, pieces: Any, length: int) -> None:
    """Raises ValueError where a decoder has too few positions for a history and an item after it."""
    check_positive("model.length", length)
    texts, width = pieces.shape
    if texts != num_items:
        raise ValueError(f"decoder: there are {texts:,} texts for {num_items:,} items: give one for each")
    if 1 + (length + 1) * width > sizes.positions:
        most = (sizes.positions - 1) // width - 1
        raise ValueError(
            f"model.length is {length}: with {width} pieces of an item, {sizes.positions} positions of the decoder "
            f"hold a history of {max(most, 0)} items: lower it, or model.max_pieces"
        )


def make_adapted_decoder(
    decoder: TextDecoder, lora: LoraSettings, dtype: ComputeDtype, remat: bool, length: int
) -> tuple[GenerativeModel, Callable[[Key], Tree]]:
    """(a frozen decoder with adapters, init(key) -> the adapters as shared parameters)."""
    module = Decoder(decoder.sizes, remat, jnp.dtype(dtype), make_lora_product(lora))
    some = jax.ShapeDtypeStruct((1, 1), jnp.int32), jax.ShapeDtypeStruct((1, 1), jnp.bool)

    def init(key):
        return {"params": {"lora": init_lora(module, lora, key, *some)}}

    def variables(shared):
        return {"params": shared["text"]["base"], COLLECTION: shared["params"]["lora"]}

    jax.eval_shape(init, jax.random.key(0))  # refuses what cannot be
    return GenerativeModel(module, variables, decoder.start, length), init


def decoder_lora(
    num_items: int,
    decoder: TextDecoder,
    pieces: np.ndarray,
    length: int = 20,
    lora: LoraSettings | None = None,
    compute_dtype: ComputeDtype = "float32",
    remat: bool = True,
) -> Model:
    """Scores items by the mean log-likelihood of their texts after the texts of a history. All clients have the frozen
    decoder; they train and send its low-rank adapters (Hu et al. 2022, "LoRA").

    Args:
        num_items: Number of items.
        decoder: The pretrained decoder. Shapes in place of its parameters: for a model that is compiled and not run.
        pieces: int [num_items, P]: the pieces of each item's text, past the vocabulary where unused.
        length: Number of the latest items of a history that are read.
        lora: The adapters. None: of rank 8, for queries and values.
        compute_dtype: Type in which the decoder's layers compute.
        remat: Compute activations again in the backward pass, instead of keeping them.

    Returns:
        The model.

    Raises:
        ValueError: the decoder has too few positions, there is not one text for each item, or adapters are not valid.

    Example:
        >>> sizes = DecoderSizes(10, 64, width=4, layers=1, heads=2, key_value_heads=1, head_width=2, hidden=8)
        >>> decoder = TextDecoder(sizes, init_decoder(Decoder(sizes), jax.random.key(0))["params"], start=1)
        >>> made = decoder_lora(9, decoder, np.zeros((9, 4), int), 5, LoraSettings(rank=2, pattern="q_proj"))
        >>> jax.tree.leaves(made.init(jax.random.key(0)))[1].shape
        (1, 2, 4)
    """
    check_prompt(decoder.sizes, num_items, pieces, length)
    adapters = lora or LoraSettings(8, pattern="q_proj|v_proj")
    made, init = make_adapted_decoder(decoder, adapters, compute_dtype, remat, length)
    return make_generative_model(made, init, {"base": decoder.params, "pieces": Table(np.asarray(pieces, np.int32))})


def code_decoder(
    num_items: int,
    codes: np.ndarray,
    length: int = 20,
    dim: int = 64,
    layers: int = 2,
    heads: int = 4,
    beam: int = 0,
) -> Model:
    """Scores items by the likelihood of their semantic codes after the codes of a history, as TIGER does (Rajput et al.
    2023, "Recommender systems with generative retrieval"). Clients train and send the whole decoder.

    Args:
        num_items: Number of items.
        codes: int [num_items, levels]: the codes of each item, different for different items, see `semantic_codes`.
        length: Number of the latest items of a history that are read.
        dim: Width of the decoder.
        layers: Number of its layers.
        heads: Heads of attention; they divide `dim`.
        beam: Prefixes that a beam search keeps at each level; items that it does not find come last. 0: no search.

    Returns:
        The model.

    Raises:
        ValueError: a size is not possible, or there are not codes for each item.

    Example:
        >>> made = code_decoder(6, np.array([[0, 0], [0, 1], [1, 0], [1, 1], [2, 0], [2, 1]]), length=5, dim=8)
        >>> made.frozen["text"]["pieces"].rows[3].tolist()  # the codes of each level have numbers of their own
        [1, 4]
    """
    check_code_decoder(dim, heads, beam)
    pieces, number = number_codes(codes)
    sizes = choose_decoder_sizes(number, pieces.shape[1] * (length + 1), dim, layers, heads)
    check_prompt(sizes, num_items, pieces, length)
    module = Decoder(sizes)
    made = GenerativeModel(module, lambda shared: {"params": shared["params"]}, number, length)
    text = {"pieces": Table(np.where(pieces == number, sizes.vocabulary, pieces))}
    return make_generative_model(made, lambda key: {"params": init_decoder(module, key)["params"]}, text, beam)


def check_code_decoder(dim: int, heads: int, beam: int) -> None:
    """Raises ValueError for sizes that are not possible."""
    check_positive("model.dim", dim)
    if beam < 0:
        raise ValueError(f"model.beam is {beam}: it must not be negative; 0 scores each item")
    if heads < 1 or dim % (2 * heads):
        raise ValueError(f"model.heads is {heads}: {dim} numbers must be that many heads of an even width")


def choose_decoder_sizes(codes: int, places: int, dim: int, layers: int, heads: int) -> DecoderSizes:
    """The sizes of a decoder of codes, with one more piece that begins a history. places: of a history and an item."""
    return DecoderSizes(codes + 1, 1 + places, dim, layers, heads, heads, dim // heads, 3 * dim, tied=True)


def number_codes(codes: np.ndarray) -> tuple[np.ndarray, int]:
    """(int32 [N, levels]: codes as pieces, with numbers of their own for each level; the number of pieces). A negative
    code means that there is none: its piece is the number of pieces."""
    counts = codes.max(0) + 1
    begin = np.concatenate([[0], np.cumsum(counts)])
    return np.where(codes < 0, begin[-1], codes + begin[:-1]).astype(np.int32), int(begin[-1])
